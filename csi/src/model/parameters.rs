//! StorageClass parameters: few, typed, and nothing that is not known.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::id::printable;
use super::{Content, FsType};
use crate::error::{Error, Result};

/// How an image takes its space from the pool. Capacity is counted in full either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Allocation {
    /// All blocks when the volume is made: a write never fails for want of space.
    #[default]
    Full,
    /// Blocks as they are written.
    Sparse,
}

/// Where a volume's bytes live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// A file in the pool directory, attached as a loop device.
    #[default]
    Image,
    /// A subvolume of the pool's btrfs.
    Btrfs,
    /// A directory of the pool.
    Directory,
    /// A whole device that the driver was given.
    Raw,
    /// A logical volume, which has all of its room.
    Lvm,
    /// A logical volume of a thin pool.
    LvmThin,
}

impl BackendKind {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Image, Self::Btrfs, Self::Directory, Self::Raw, Self::Lvm, Self::LvmThin];

    /// Whether a volume is a block device of its own.
    pub fn has_device(self) -> bool {
        matches!(self, Self::Image | Self::Raw | Self::Lvm | Self::LvmThin)
    }

    /// The name in a StorageClass.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Btrfs => "btrfs",
            Self::Directory => "directory",
            Self::Raw => "raw",
            Self::Lvm => "lvm",
            Self::LvmThin => "lvm-thin",
        }
    }
}

impl FromStr for BackendKind {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let names = Self::ALL.map(Self::as_str).join(", ");
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| format!("{:?} is none of {names}", printable(text)))
    }
}

/// What a caller says that a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A block device.
    Block,
    /// A mount; with this filesystem, when one is named.
    Mount(Option<FsType>),
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block => f.write_str("a block device"),
            Self::Mount(None) => f.write_str("a mount"),
            Self::Mount(Some(fs)) => write!(f, "a mount of {}", fs.as_str()),
        }
    }
}

/// What a StorageClass may say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameters {
    /// `backend`: the name of a [`BackendKind`]; `image` is the default.
    #[serde(default)]
    pub backend: BackendKind,
    /// `allocation`: `full` (the default) or `sparse`; of images.
    pub allocation: Allocation,
    /// `bytesPerInode`: ext4 makes one inode for this many bytes, 1024 to 4194304.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_inode: Option<u32>,
    /// `capacity: unenforced`: a directory may grow beyond its size.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unenforced: bool,
    /// `capacity: quota`, the default of subvolumes: a directory or subvolume is held to its size by a quota, which holds who does not
    /// evade it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub quota: bool,
}

/// Keys that a person writes.
const KEYS: [&str; 4] = ["allocation", "backend", "bytesPerInode", "capacity"];

/// Keys that external-provisioner adds with `--extra-create-metadata`; they change nothing here.
const METADATA: [&str; 3] = ["csi.storage.k8s.io/pv/name", CLAIM, CLAIM_NAMESPACE];
const CLAIM: &str = "csi.storage.k8s.io/pvc/name";
const CLAIM_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";

/// The claim that a volume is for, as `namespace/name`, where external-provisioner says so.
pub fn claim(map: &std::collections::HashMap<String, String>) -> Option<String> {
    Some(format!("{}/{}", printable(map.get(CLAIM_NAMESPACE)?), printable(map.get(CLAIM)?)))
}

impl Parameters {
    /// Reads a StorageClass's parameters for a volume of this shape, and says what it will be.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`] or [`Error::Invalid`], naming the key.
    pub fn parse<'a>(map: impl IntoIterator<Item = (&'a String, &'a String)>, shape: Shape) -> Result<(Self, Content)> {
        // In order, so that of several mistakes the same one is told each time.
        let map: BTreeMap<_, _> = map.into_iter().collect();
        let mut parameters = Self::default();
        for (key, value) in &map {
            match key.as_str() {
                "allocation" => {
                    parameters.allocation = match value.as_str() {
                        "full" => Allocation::Full,
                        "sparse" => Allocation::Sparse,
                        _ => return Err(invalid("parameters.allocation", value, "full or sparse")),
                    }
                }
                "backend" => {
                    let names = || BackendKind::ALL.map(BackendKind::as_str).join(", ");
                    let unknown = |_| invalid("parameters.backend", value, &format!("one of {}", names()));
                    parameters.backend = value.parse().map_err(unknown)?;
                }
                "bytesPerInode" => match value.parse() {
                    Ok(bytes) if (1024..=4_194_304).contains(&bytes) => parameters.bytes_per_inode = Some(bytes),
                    _ => return Err(invalid("parameters.bytesPerInode", value, "a number from 1024 to 4194304")),
                },
                "capacity" => match value.as_str() {
                    "enforced" => {}
                    "quota" => parameters.quota = true,
                    "unenforced" => parameters.unenforced = true,
                    _ => return Err(invalid("parameters.capacity", value, "enforced, quota or unenforced")),
                },
                key if METADATA.contains(&key) => {}
                key => return Err(Error::UnknownParameter { key: printable(key), known: KEYS.join(", ") }),
            }
        }
        let content = parameters.content(shape)?;
        let given = |key: &str| map.iter().find(|(name, _)| name.as_str() == key).map(|(_, value)| value.as_str());
        // All that there is for a subvolume.
        parameters.quota |= parameters.backend == BackendKind::Btrfs && given("capacity").is_none();
        if let Some(value) = given("allocation").filter(|_| parameters.backend != BackendKind::Image) {
            return Err(invalid("parameters.allocation", value, "for the image backend; this class has another"));
        }
        if let Some(value) = given("bytesPerInode").filter(|_| content != Content::Filesystem(FsType::Ext4)) {
            return Err(invalid("parameters.bytesPerInode", value, "for an ext4 volume; this one is not"));
        }
        let allowed = match parameters.backend {
            BackendKind::Directory => true,
            BackendKind::Btrfs => !parameters.unenforced,
            _ => !parameters.unenforced && !parameters.quota,
        };
        if let Some(value) = given("capacity").filter(|_| !allowed) {
            let expected = "enforced; only a directory's can be otherwise, and a subvolume's quota";
            return Err(invalid("parameters.capacity", value, expected));
        }
        Ok((parameters, content))
    }

    fn content(&self, shape: Shape) -> Result<Content> {
        match (self.backend, shape) {
            (kind, Shape::Block) if kind.has_device() => Ok(Content::Raw),
            (kind, Shape::Mount(fs)) if kind.has_device() => Ok(Content::Filesystem(fs.unwrap_or(FsType::Ext4))),
            (BackendKind::Btrfs, Shape::Mount(None | Some(FsType::Btrfs)))
            | (BackendKind::Directory, Shape::Mount(None)) => Ok(Content::Tree),
            (backend, shape) => Err(Error::Invalid {
                field: "volume_capabilities",
                value: shape.to_string(),
                expected: format!("what the {} backend can be", backend.as_str()),
            }),
        }
    }
}

/// What may change in a volume's life, by a VolumeAttributesClass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutable {
    /// `readAheadKiB`: how much the device reads ahead, 0 to 65536; the kernel's choice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_ahead_kib: Option<u32>,
}

impl Mutable {
    /// Reads mutable parameters. What is not named stays as it is in `self`.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`] or [`Error::Invalid`], naming the key.
    pub fn with<'a>(mut self, map: impl IntoIterator<Item = (&'a String, &'a String)>) -> Result<Self> {
        for (key, value) in map.into_iter().collect::<BTreeMap<_, _>>() {
            match (key.as_str(), value.parse()) {
                ("readAheadKiB", Ok(kib @ 0..=65536)) => self.read_ahead_kib = Some(kib),
                ("readAheadKiB", _) => {
                    return Err(invalid("mutable_parameters.readAheadKiB", value, "a number from 0 to 65536"));
                }
                (key, _) => return Err(Error::UnknownParameter { key: printable(key), known: "readAheadKiB".into() }),
            }
        }
        Ok(self)
    }
}

fn invalid(field: &'static str, value: &str, expected: &str) -> Error {
    Error::Invalid { field, value: printable(value), expected: expected.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)], shape: Shape) -> Result<(Parameters, Content)> {
        let map: BTreeMap<String, String> = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        Parameters::parse(&map, shape)
    }

    const ANY: Shape = Shape::Mount(None);
    const EXT4: Content = Content::Filesystem(FsType::Ext4);

    #[test]
    fn defaults_and_every_key() {
        assert_eq!(parse(&[], ANY).unwrap(), (Parameters::default(), EXT4));
        let all = [
            ("allocation", "sparse"),
            ("backend", "image"),
            ("bytesPerInode", "8192"),
            ("capacity", "enforced"),
            (METADATA[1], "data-0"),
        ];
        let want = Parameters { allocation: Allocation::Sparse, bytes_per_inode: Some(8192), ..Parameters::default() };
        assert_eq!(parse(&all, ANY).unwrap(), (want, EXT4));
        assert_eq!(parse(&[("backend", "btrfs")], ANY).unwrap().1, Content::Tree);
        assert!(parse(&[("backend", "btrfs")], ANY).unwrap().0.quota, "all that it has");
        assert!(!parse(&[("backend", "btrfs"), ("capacity", "enforced")], ANY).unwrap().0.quota);
        assert_eq!(parse(&[("backend", "lvm")], ANY).unwrap().1, EXT4);
        assert_eq!(parse(&[("backend", "lvm-thin")], Shape::Block).unwrap().1, Content::Raw);
        assert!(parse(&[("backend", "directory"), ("capacity", "unenforced")], ANY).unwrap().0.unenforced);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (pairs, word) in [
            (&[("replicas", "3")][..], "\"replicas\""),
            (&[("allocation", "thin")], "parameters.allocation"),
            (&[("backend", "zfs")], "image, btrfs, directory, raw, lvm, lvm-thin"),
            (&[("bytesPerInode", "1023")], "1024"),
            (&[("bytesPerInode", "-1")], "1024"),
            (&[("backend", "directory"), ("bytesPerInode", "8192")], "ext4"),
            (&[("backend", "btrfs"), ("allocation", "sparse")], "image backend"),
            (&[("capacity", "unenforced")], "only a directory"),
            (&[("capacity", "quota"), ("backend", "lvm")], "only a directory"),
            (&[("capacity", "unenforced"), ("backend", "btrfs")], "a subvolume's quota"),
            (&[("capacity", "some")], "enforced, quota or unenforced"),
            (&[("Allocation", "full")], "\"Allocation\""),
        ] {
            let error = parse(pairs, ANY).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn a_backend_is_only_what_it_can_be() {
        for (backend, shape) in [
            ("btrfs", Shape::Block),
            ("btrfs", Shape::Mount(Some(FsType::Ext4))),
            ("directory", Shape::Block),
            ("directory", Shape::Mount(Some(FsType::Xfs))),
        ] {
            assert!(parse(&[("backend", backend)], shape).is_err(), "{backend} {shape}");
        }
        assert!(parse(&[("bytesPerInode", "8192")], Shape::Block).is_err());
    }

    #[test]
    fn mutable_parameters() {
        let with = |key: &str, value: &str| Mutable::default().with(&BTreeMap::from([(key.into(), value.into())]));
        assert_eq!(with("readAheadKiB", "256").unwrap().read_ahead_kib, Some(256));
        assert!(with("readAheadKiB", "65537").is_err() && with("iops", "3").is_err());
    }
}
