//! From what a caller sent to typed requests. All validation is here; past this module a request is well-formed.
//!
//! Order in each: what is missing (INVALID_ARGUMENT), what is malformed (INVALID_ARGUMENT), then the volume id
//! (NOT_FOUND when it is none that this driver can have issued).

mod controller;
mod inline;
mod node;
mod path;
mod snapshot;

pub use controller::{Capacity, Create, Expand, List, Modify, Validate};
pub use inline::{Inline, inline_name};
pub use node::{NodeExpand, Publish, Stage, Stats, Unpublish, Unstage};
pub use path::TargetPath;
pub use snapshot::{ListSnapshots, Take, TakeGroup, group_of};

use crate::csi;
use crate::error::{Error, Result};
use crate::model::{Access, Content, FsType, MountOptions, Shape, SnapshotId, VolumeId};
use csi::volume_capability::AccessType;
use csi::volume_capability::access_mode::Mode;

/// The longest name that a caller may give, in bytes; CSI's limit for strings without another.
const MAX_STRING: usize = 128;

/// How a volume is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// As a block device or mounted.
    pub shape: Shape,
    /// Who may use it how.
    pub access: Access,
    /// Mount options as they came.
    flags: Vec<String>,
    /// The group that everything in the volume is to belong to.
    pub group: Option<u32>,
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
            Mode::SingleNodeWriter => Access::Writer,
            Mode::SingleNodeReaderOnly => Access::Reader,
            Mode::SingleNodeSingleWriter => Access::SingleWriter,
            Mode::SingleNodeMultiWriter => Access::MultiWriter,
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
        let AccessType::Mount(mount) = access_type else {
            return Ok(Self { shape: Shape::Block, access, flags: Vec::new(), group: None });
        };
        let fs = match mount.fs_type.as_str() {
            "" => None,
            name => Some(name.parse::<FsType>().map_err(|()| Error::Invalid {
                field: "volume_capability.mount.fs_type",
                value: string(name),
                expected: "ext4, xfs or btrfs".into(),
            })?),
        };
        let group = match mount.volume_mount_group.as_str() {
            "" => None,
            // The last number is what chown takes for "leave it".
            number => Some(number.parse().ok().filter(|&gid| gid != u32::MAX).ok_or_else(|| Error::Invalid {
                field: "volume_capability.mount.volume_mount_group",
                value: string(number),
                expected: "the number of a group".into(),
            })?),
        };
        Ok(Self { shape: Shape::Mount(fs), access, flags: mount.mount_flags.clone(), group })
    }

    /// Reads the volume capability with which an existing volume is brought to a node: one that is well-formed and that no
    /// volume of ours could ever have exceeds what the volume can be.
    ///
    /// # Errors
    /// As [`Usage::parse`], and [`Error::State`].
    pub fn parse_for_node(capability: Option<&csi::VolumeCapability>) -> Result<Self> {
        let named = capability.and_then(|it| it.access_mode.as_ref()).is_some_and(|it| it.mode() != Mode::Unknown);
        Self::parse(capability).map_err(|error| match error {
            Error::Invalid { field, .. } if field.ends_with("fs_type") || (field.ends_with("access_mode") && named) => {
                exceeds(error)
            }
            error => error,
        })
    }

    /// The mount options, for a volume that is this.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming the option.
    pub fn options(&self, content: Content) -> Result<MountOptions> {
        MountOptions::parse(&self.flags, content.filesystem())
    }

    /// Whether nothing may be written by way of it, as far as it says.
    pub fn read_only(&self) -> bool {
        let says_ro = |flag: &String| flag.split(',').any(|option| option.trim() == "ro");
        self.access == Access::Reader || self.flags.iter().any(says_ro)
    }

    /// Refuses to use a volume as what it is not.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn fits(&self, content: Content, id: &VolumeId) -> Result<()> {
        if content.is(self.shape) {
            return Ok(());
        }
        Err(Error::Invalid {
            field: "volume_capability",
            value: self.shape.to_string(),
            expected: format!("what volume {id} is: {content}"),
        })
    }

    /// As [`Usage::fits`], where a volume is brought to a node.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn fits_node(&self, content: Content, id: &VolumeId) -> Result<()> {
        self.fits(content, id).map_err(exceeds)
    }

    /// Reads the capabilities of a volume to be; all must agree on what the volume is.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Invalid`].
    pub fn parse_all(capabilities: &[csi::VolumeCapability]) -> Result<(Shape, Vec<Self>)> {
        let usages = capabilities.iter().map(|capability| Self::parse(Some(capability))).collect::<Result<Vec<_>>>()?;
        let mut shape = usages.first().ok_or(Error::Missing { field: "volume_capabilities" })?.shape;
        for usage in &usages {
            shape = match (shape, usage.shape) {
                (Shape::Mount(None), Shape::Mount(fs)) | (Shape::Mount(fs), Shape::Mount(None)) => Shape::Mount(fs),
                (one, other) if one == other => one,
                (_, other) => {
                    return Err(Error::Invalid {
                        field: "volume_capabilities",
                        value: other.to_string(),
                        expected: "the same kind of volume in each capability".into(),
                    });
                }
            };
        }
        Ok((shape, usages))
    }
}

/// The interface has a code of its own for what is right in itself, but more than the volume can be.
fn exceeds(error: Error) -> Error {
    match error {
        Error::Invalid { field, value, expected } => Error::State { what: field.into(), expected, found: value },
        error => error,
    }
}

fn required(field: &'static str, value: String) -> Result<String> {
    if value.is_empty() { Err(Error::Missing { field }) } else { Ok(value) }
}

/// An id that is not of our form names no volume.
pub(crate) fn known_id(id: &str) -> Result<VolumeId> {
    id.parse().map_err(|_| Error::NoSuchVolume { id: string(id) })
}

/// As [`known_id`], for snapshots.
pub(crate) fn known_snapshot(id: &str) -> Result<SnapshotId> {
    id.parse().map_err(|_| Error::NoSuchSnapshot { id: string(id) })
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
        let fs = |name| Usage::parse(Some(&capability(mount(name), Mode::SingleNodeWriter))).map(|usage| usage.shape);
        assert_eq!(fs("").unwrap(), Shape::Mount(None));
        assert_eq!(fs("xfs").unwrap(), Shape::Mount(Some(FsType::Xfs)));
        assert!(fs("ntfs").unwrap_err().to_string().contains("ntfs"));
    }

    #[test]
    fn capabilities_must_agree() {
        let w = Mode::SingleNodeWriter;
        let (shape, usages) = Usage::parse_all(&[capability(mount("xfs"), w), capability(mount(""), w)]).unwrap();
        assert_eq!((shape, usages.len()), (Shape::Mount(Some(FsType::Xfs)), 2));
        assert!(Usage::parse_all(&[capability(mount("ext4"), w), capability(mount("xfs"), w)]).is_err());
        assert!(Usage::parse_all(&[capability(mount("ext4"), w), capability(block(), w)]).is_err());
        assert!(matches!(Usage::parse_all(&[]), Err(Error::Missing { .. })));
    }

    #[test]
    fn a_group_is_a_number() {
        let group = |text: &str| {
            let mount = csi::volume_capability::MountVolume { volume_mount_group: text.into(), ..Default::default() };
            Usage::parse(Some(&capability(AccessType::Mount(mount), Mode::SingleNodeWriter))).map(|usage| usage.group)
        };
        assert_eq!(group("1000").unwrap(), Some(1000));
        assert_eq!(group("").unwrap(), None);
        for bad in ["-1", "root", "4294967295", "1000 "] {
            assert!(group(bad).is_err(), "{bad}");
        }
    }
}
