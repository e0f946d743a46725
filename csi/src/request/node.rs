//! Requests of the node service.

use std::path::Path;

use super::controller::range;
use super::{TargetPath, Usage, known_id, required};
use crate::csi;
use crate::error::{Error, Result};
use crate::model::{MountOptions, Shape, Stop, Use, VolumeId};

/// A volume to bring to this node's staging path.
#[derive(Clone, Debug)]
pub struct Stage {
    /// The volume.
    pub id: VolumeId,
    /// Where to mount it; nothing is mounted there for a block volume.
    pub staging: TargetPath,
    /// How.
    pub usage: Usage,
    /// Whether nothing may be written by way of it.
    pub read_only: bool,
}

impl Stage {
    /// Validates a request; targets must lie below `kubelet_dir`.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: csi::NodeStageVolumeRequest, kubelet_dir: &Path) -> Result<Self> {
        let id = required("volume_id", request.volume_id)?;
        let staging = TargetPath::parse("staging_target_path", &request.staging_target_path, kubelet_dir)?;
        let usage = Usage::parse_for_node(request.volume_capability.as_ref())?;
        Ok(Self { id: known_id(&id)?, staging, read_only: usage.read_only(), usage })
    }

    /// What the volume will be used as.
    pub fn wanted(&self, options: &MountOptions) -> Use {
        used(&self.staging, Stop::Staged, &self.usage, options, self.read_only)
    }
}

/// A volume to take from its staging path.
#[derive(Clone, Debug)]
pub struct Unstage {
    /// The volume.
    pub id: VolumeId,
    /// Where it was staged.
    pub staging: TargetPath,
}

impl Unstage {
    /// Validates a request; targets must lie below `kubelet_dir`.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: csi::NodeUnstageVolumeRequest, kubelet_dir: &Path) -> Result<Self> {
        let id = required("volume_id", request.volume_id)?;
        let staging = TargetPath::parse("staging_target_path", &request.staging_target_path, kubelet_dir)?;
        Ok(Self { id: known_id(&id)?, staging })
    }
}

/// A staged volume to bring to a pod.
#[derive(Clone, Debug)]
pub struct Publish {
    /// The volume.
    pub id: VolumeId,
    /// Where it is staged.
    pub staging: TargetPath,
    /// Where the pod wants it.
    pub target: TargetPath,
    /// How.
    pub usage: Usage,
    /// Whether this target may not be written through.
    pub read_only: bool,
}

impl Publish {
    /// Validates a request; targets must lie below `kubelet_dir`.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: csi::NodePublishVolumeRequest, kubelet_dir: &Path) -> Result<Self> {
        let id = required("volume_id", request.volume_id)?;
        let target = TargetPath::parse("target_path", &request.target_path, kubelet_dir)?;
        let usage = Usage::parse_for_node(request.volume_capability.as_ref())?;
        if request.staging_target_path.is_empty() {
            let (expected, found) = ("where the volume is staged".into(), "no path".into());
            return Err(Error::State { what: "staging_target_path".into(), expected, found });
        }
        let staging = TargetPath::parse("staging_target_path", &request.staging_target_path, kubelet_dir)?;
        if staging == target {
            return Err(Error::Invalid {
                field: "target_path",
                value: request.target_path,
                expected: "another path than staging_target_path".into(),
            });
        }
        let read_only = request.readonly || usage.read_only();
        Ok(Self { id: known_id(&id)?, staging, target, usage, read_only })
    }

    /// What the volume will be used as.
    pub fn wanted(&self, options: &MountOptions) -> Use {
        used(&self.target, Stop::Published(self.staging.absolute()), &self.usage, options, self.read_only)
    }

    /// Whether a block device is wanted.
    pub fn block(&self) -> bool {
        self.usage.shape == Shape::Block
    }
}

/// A volume to take from a pod.
#[derive(Clone, Debug)]
pub struct Unpublish {
    /// The volume.
    pub id: VolumeId,
    /// Where the pod had it.
    pub target: TargetPath,
}

impl Unpublish {
    /// Validates a request; targets must lie below `kubelet_dir`.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: csi::NodeUnpublishVolumeRequest, kubelet_dir: &Path) -> Result<Self> {
        let id = required("volume_id", request.volume_id)?;
        let target = TargetPath::parse("target_path", &request.target_path, kubelet_dir)?;
        Ok(Self { id: known_id(&id)?, target })
    }
}

/// A volume whose filesystem is to fill its device.
#[derive(Clone, Debug)]
pub struct NodeExpand {
    /// The volume.
    pub id: VolumeId,
    /// Where it is staged or published.
    pub path: TargetPath,
    /// Where it is staged, when the caller says so.
    pub staging: Option<TargetPath>,
    /// The least that it is to have, in bytes.
    pub least: u64,
    /// The most, where there is a limit.
    pub most: Option<u64>,
    /// What the caller takes it for, when it says so.
    pub usage: Option<Usage>,
}

impl NodeExpand {
    /// Validates a request; targets must lie below `kubelet_dir`.
    ///
    /// # Errors
    /// As the module says; a path that cannot be a target of ours is [`Error::NotFound`].
    pub fn parse(request: csi::NodeExpandVolumeRequest, kubelet_dir: &Path) -> Result<Self> {
        let id = required("volume_id", request.volume_id)?;
        let path = required("volume_path", request.volume_path)?;
        let (least, most) = range(request.capacity_range)?;
        let usage = request.volume_capability.as_ref().map(|capability| Usage::parse(Some(capability))).transpose()?;
        let staging = TargetPath::parse("staging_target_path", &request.staging_target_path, kubelet_dir).ok();
        let (id, path) = (known_id(&id)?, found_path(&path, kubelet_dir)?);
        Ok(Self { id, path, staging, least, most, usage })
    }
}

/// A question about a volume, as it is on this node.
#[derive(Clone, Debug)]
pub struct Stats {
    /// The volume, as the caller names it: an inline one has a handle of the kubelet's.
    pub id: String,
    /// Where it is staged or published.
    pub path: TargetPath,
}

impl Stats {
    /// Validates a request; targets must lie below `kubelet_dir`.
    ///
    /// # Errors
    /// As the module says; a path that cannot be a target of ours is [`Error::NotFound`].
    pub fn parse(id: String, path: String, kubelet_dir: &Path) -> Result<Self> {
        let id = required("volume_id", id)?;
        let path = required("volume_path", path)?;
        if super::inline_name(&id).is_none() {
            known_id(&id)?;
        }
        Ok(Self { id, path: found_path(&path, kubelet_dir)? })
    }
}

fn used(path: &TargetPath, stop: Stop, usage: &Usage, options: &MountOptions, read_only: bool) -> Use {
    let (path, options) = (path.absolute(), options.canonical());
    Use { path, stop, access: usage.access, options, group: usage.group, read_only }
}

fn found_path(path: &str, kubelet_dir: &Path) -> Result<TargetPath> {
    TargetPath::parse("volume_path", path, kubelet_dir)
        .map_err(|_| Error::NotFound { what: "volume_path", path: super::string(path).into() })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{capability, mount};
    use super::*;
    use csi::volume_capability::access_mode::Mode;
    use tonic::Code;

    const ROOT: &str = "/var/lib/kubelet";

    fn publish() -> csi::NodePublishVolumeRequest {
        csi::NodePublishVolumeRequest {
            volume_id: VolumeId::new([1; 16]).to_string(),
            staging_target_path: format!("{ROOT}/stage"),
            target_path: format!("{ROOT}/target"),
            volume_capability: Some(capability(mount("xfs"), Mode::SingleNodeReaderOnly)),
            ..Default::default()
        }
    }

    fn code(request: csi::NodePublishVolumeRequest) -> Code {
        Publish::parse(request, Path::new(ROOT)).map_or_else(|error| error.code(), |_| Code::Ok)
    }

    #[test]
    fn a_reader_only_volume_is_published_read_only() {
        assert!(Publish::parse(publish(), Path::new(ROOT)).unwrap().read_only);
    }

    #[test]
    fn what_is_missing_comes_before_what_is_unknown() {
        let unknown = |request| csi::NodePublishVolumeRequest { volume_id: "fake-vol-id".into(), ..request };
        assert_eq!(code(unknown(publish())), Code::NotFound);
        assert_eq!(
            code(unknown(csi::NodePublishVolumeRequest { target_path: String::new(), ..publish() })),
            Code::InvalidArgument
        );
        assert_eq!(
            code(unknown(csi::NodePublishVolumeRequest { volume_capability: None, ..publish() })),
            Code::InvalidArgument
        );
        assert_eq!(
            code(csi::NodePublishVolumeRequest { volume_id: String::new(), ..publish() }),
            Code::InvalidArgument
        );
        let same = csi::NodePublishVolumeRequest { target_path: format!("{ROOT}//stage"), ..publish() };
        assert_eq!(code(same), Code::InvalidArgument);
    }

    #[test]
    fn ids_that_try_to_be_paths_are_not_found() {
        for id in ["../../etc/passwd", "..", "/", "kwl-../../../../../../../../../../../../-00000000"] {
            assert_eq!(
                code(csi::NodePublishVolumeRequest { volume_id: id.into(), ..publish() }),
                Code::NotFound,
                "{id}"
            );
        }
    }

    #[test]
    fn stats_of_an_odd_path_are_not_found() {
        let id = VolumeId::new([1; 16]).to_string();
        assert_eq!(Stats::parse(id, "some/path".into(), Path::new(ROOT)).unwrap_err().code(), Code::NotFound);
    }
}
