//! From what a caller sent to typed requests. All validation is here; past this module a request is well-formed.
//!
//! Order in each: what is missing (INVALID_ARGUMENT), what is malformed (INVALID_ARGUMENT), then the volume id
//! (NOT_FOUND when it is none that this driver can have issued).

mod controller;
mod node;
mod path;

pub use controller::{Capacity, Create, List, Validate};
pub use node::{Publish, Stage, Stats, Unpublish, Unstage};
pub use path::TargetPath;

use crate::csi;
use crate::error::{Error, Result};
use crate::model::{Content, FsType, MountOptions, VolumeId};
use csi::volume_capability::AccessType;
use csi::volume_capability::access_mode::Mode;

/// The longest name that a caller may give, in bytes; CSI's limit for strings without another.
const MAX_STRING: usize = 128;

/// How a volume is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// As a block device or mounted.
    pub content: Content,
    /// Who may use it how.
    pub access: Access,
    /// Mount options; the defaults for a block device.
    pub options: MountOptions,
}

/// The access modes that a volume of one node can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading and writing, at one or several targets.
    Writer,
    /// Reading only.
    Reader,
    /// Reading and writing, at exactly one target.
    SingleWriter,
}

impl Usage {
    /// Reads one volume capability.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Invalid`].
    pub fn parse(capability: Option<&csi::VolumeCapability>) -> Result<Self> {
        let capability = capability.ok_or(Error::Missing { field: "volume_capability" })?;
        let mode = capability.access_mode.as_ref().ok_or(Error::Missing { field: "volume_capability.access_mode" })?;
        let access = match mode.mode() {
            Mode::SingleNodeWriter | Mode::SingleNodeMultiWriter => Access::Writer,
            Mode::SingleNodeReaderOnly => Access::Reader,
            Mode::SingleNodeSingleWriter => Access::SingleWriter,
            Mode::Unknown | Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => {
                return Err(Error::Invalid {
                    field: "volume_capability.access_mode",
                    value: mode.mode().as_str_name().to_owned(),
                    expected: "a SINGLE_NODE mode; a local volume is reached from one node".into(),
                });
            }
        };
        let access_type =
            capability.access_type.as_ref().ok_or(Error::Missing { field: "volume_capability.access_type" })?;
        let (content, options) = match access_type {
            AccessType::Block(_) => (Content::Raw, MountOptions::default()),
            AccessType::Mount(mount) => {
                if !mount.volume_mount_group.is_empty() {
                    return Err(Error::Invalid {
                        field: "volume_capability.mount.volume_mount_group",
                        value: string(&mount.volume_mount_group),
                        expected: "empty; VOLUME_MOUNT_GROUP is not advertised".into(),
                    });
                }
                let fs: FsType = mount.fs_type.parse().map_err(|()| Error::Invalid {
                    field: "volume_capability.mount.fs_type",
                    value: string(&mount.fs_type),
                    expected: "ext4 or xfs".into(),
                })?;
                (Content::Filesystem(fs), MountOptions::parse(&mount.mount_flags, fs)?)
            }
        };
        Ok(Self { content, access, options })
    }

    /// Reads the capabilities of a volume to be; all must agree on what the volume is.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Invalid`].
    pub fn parse_all(capabilities: &[csi::VolumeCapability]) -> Result<Content> {
        let mut content = None;
        for capability in capabilities {
            let usage = Self::parse(Some(capability))?;
            if content.is_some_and(|content| content != usage.content) {
                return Err(Error::Invalid {
                    field: "volume_capabilities",
                    value: usage.content.to_string(),
                    expected: "the same kind of volume in each capability".into(),
                });
            }
            content = Some(usage.content);
        }
        content.ok_or(Error::Missing { field: "volume_capabilities" })
    }
}

fn required(field: &'static str, value: String) -> Result<String> {
    if value.is_empty() { Err(Error::Missing { field }) } else { Ok(value) }
}

/// An id that is not of our form names no volume.
pub(crate) fn known_id(id: &str) -> Result<VolumeId> {
    id.parse().map_err(|_| Error::NoSuchVolume { id: string(id) })
}

fn string(text: &str) -> String {
    crate::model::printable(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn capability(access_type: AccessType, mode: Mode) -> csi::VolumeCapability {
        csi::VolumeCapability {
            access_mode: Some(csi::volume_capability::AccessMode { mode: mode as i32 }),
            access_type: Some(access_type),
        }
    }

    pub(super) fn mount(fs_type: &str) -> AccessType {
        AccessType::Mount(csi::volume_capability::MountVolume { fs_type: fs_type.into(), ..Default::default() })
    }

    fn block() -> AccessType {
        AccessType::Block(csi::volume_capability::BlockVolume {})
    }

    #[test]
    fn modes_of_one_node_are_served_and_no_others() {
        for number in 0..=7 {
            let mode = Mode::try_from(number).unwrap();
            let served = mode.as_str_name().starts_with("SINGLE_NODE");
            assert_eq!(Usage::parse(Some(&capability(block(), mode))).is_ok(), served, "{mode:?}");
        }
    }

    #[test]
    fn the_filesystem_is_one_of_ours() {
        let fs = |name| Usage::parse(Some(&capability(mount(name), Mode::SingleNodeWriter))).map(|usage| usage.content);
        assert_eq!(fs("").unwrap(), Content::Filesystem(FsType::Ext4));
        assert_eq!(fs("xfs").unwrap(), Content::Filesystem(FsType::Xfs));
        assert!(fs("btrfs").unwrap_err().to_string().contains("btrfs"));
    }

    #[test]
    fn capabilities_must_agree() {
        let w = Mode::SingleNodeWriter;
        assert!(Usage::parse_all(&[capability(mount("ext4"), w), capability(mount(""), w)]).is_ok());
        assert!(Usage::parse_all(&[capability(mount("ext4"), w), capability(block(), w)]).is_err());
        assert!(matches!(Usage::parse_all(&[]), Err(Error::Missing { .. })));
    }
}
