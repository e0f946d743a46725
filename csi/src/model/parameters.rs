//! StorageClass parameters: few, typed, and nothing that is not known.

use std::collections::BTreeMap;

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

/// What a StorageClass may say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameters {
    /// `allocation`: `full` (the default) or `sparse`.
    pub allocation: Allocation,
    /// `bytesPerInode`: ext4 makes one inode for this many bytes, 1024 to 4194304.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_inode: Option<u32>,
}

/// Keys that a person writes. `backend` is there so that a class can be explicit; there is one backend so far.
const KEYS: [&str; 3] = ["allocation", "backend", "bytesPerInode"];

/// Keys that external-provisioner adds with `--extra-create-metadata`; they change nothing here.
const METADATA: [&str; 3] =
    ["csi.storage.k8s.io/pv/name", "csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace"];

impl Parameters {
    /// Reads a StorageClass's parameters for a volume with this content.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`] or [`Error::Invalid`], naming the key.
    pub fn parse<'a>(map: impl IntoIterator<Item = (&'a String, &'a String)>, content: Content) -> Result<Self> {
        // In order, so that of several mistakes the same one is told each time.
        let map: BTreeMap<_, _> = map.into_iter().collect();
        let mut parameters = Self::default();
        for (key, value) in map {
            match key.as_str() {
                "allocation" => {
                    parameters.allocation = match value.as_str() {
                        "full" => Allocation::Full,
                        "sparse" => Allocation::Sparse,
                        _ => return Err(invalid("parameters.allocation", value, "full or sparse")),
                    }
                }
                "backend" if value == "image" => {}
                "backend" => return Err(invalid("parameters.backend", value, "image")),
                "bytesPerInode" if content != Content::Filesystem(FsType::Ext4) => {
                    return Err(invalid("parameters.bytesPerInode", value, "for an ext4 volume; this one is not"));
                }
                "bytesPerInode" => match value.parse() {
                    Ok(bytes) if (1024..=4_194_304).contains(&bytes) => parameters.bytes_per_inode = Some(bytes),
                    _ => return Err(invalid("parameters.bytesPerInode", value, "a number from 1024 to 4194304")),
                },
                key if METADATA.contains(&key) => {}
                key => return Err(Error::UnknownParameter { key: printable(key), known: KEYS.join(", ") }),
            }
        }
        Ok(parameters)
    }
}

fn invalid(field: &'static str, value: &str, expected: &str) -> Error {
    Error::Invalid { field, value: printable(value), expected: expected.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)], content: Content) -> Result<Parameters> {
        let map: BTreeMap<String, String> = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        Parameters::parse(&map, content)
    }

    const EXT4: Content = Content::Filesystem(FsType::Ext4);

    #[test]
    fn defaults_and_every_key() {
        assert_eq!(parse(&[], EXT4).unwrap(), Parameters::default());
        let all = [("allocation", "sparse"), ("backend", "image"), ("bytesPerInode", "8192"), (METADATA[1], "data-0")];
        let want = Parameters { allocation: Allocation::Sparse, bytes_per_inode: Some(8192) };
        assert_eq!(parse(&all, EXT4).unwrap(), want);
    }

    #[test]
    fn an_unknown_key_is_named() {
        for key in ["Allocation", "fsType", "csi.storage.k8s.io/else", ""] {
            let error = parse(&[(key, "x")], EXT4).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            assert!(error.to_string().contains(&format!("{key:?}")), "{error}");
        }
    }

    #[test]
    fn a_bad_value_is_named_with_what_would_be_right() {
        for (key, value) in
            [("allocation", "thick"), ("backend", "lvm"), ("bytesPerInode", "1023"), ("bytesPerInode", "-1")]
        {
            let text = parse(&[(key, value)], EXT4).unwrap_err().to_string();
            assert!(text.contains(key) && text.contains(value), "{text}");
        }
        assert!(parse(&[("bytesPerInode", "8192")], Content::Raw).is_err());
        assert!(parse(&[("bytesPerInode", "8192")], Content::Filesystem(FsType::Xfs)).is_err());
    }
}
