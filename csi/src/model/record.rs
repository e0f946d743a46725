//! What is known durably of a volume, and the only ways in which it may change.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Nonce, Parameters, VolumeId};

/// Version of the record's form. A newer one is refused, not guessed at.
const VERSION: u32 = 1;

/// A filesystem that this driver makes and mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsType {
    /// ext4, the default.
    Ext4,
    /// XFS.
    Xfs,
}

impl FsType {
    /// The name that the kernel and StorageClasses use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

impl FromStr for FsType {
    type Err = ();
    /// The empty string stands for the default.
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "" | "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            _ => Err(()),
        }
    }
}

/// What a volume is handed out as; settled when it is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// A block device, never formatted by us.
    Raw,
    /// A mounted filesystem.
    Filesystem(FsType),
}

impl Content {
    /// The smallest size that can be served, in bytes: what the mkfs programs still accept.
    pub fn min_size(self) -> u64 {
        match self {
            Self::Raw => 1 << 20,
            Self::Filesystem(FsType::Ext4) => 16 << 20,
            Self::Filesystem(FsType::Xfs) => 300 << 20,
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("a block device"),
            Self::Filesystem(fs) => write!(f, "an {} filesystem", fs.as_str()),
        }
    }
}

/// Whether the volume may still be formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Made by us, full of zeros, never handed out.
    Blank,
    /// A mkfs was begun. Nothing was handed out, so it may be wiped and begun again, once no mkfs runs any more.
    Formatting,
    /// Handed out, or about to be: it holds data of others from here on. There is no way back.
    Formatted,
}

/// What is known durably of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// Grows with each volume; the order of lists.
    pub seq: u64,
    /// Our name of it.
    pub id: VolumeId,
    /// The caller's name of it.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// What it is handed out as.
    pub content: Content,
    /// What its StorageClass said.
    pub parameters: Parameters,
    /// Inode number of the image in the pool.
    pub inode: u64,
    /// Also on the image, as an extended attribute.
    pub nonce: Nonce,
    state: State,
}

impl Record {
    /// The record of an image that was just made, and is blank.
    #[allow(clippy::too_many_arguments)]
    pub fn blank(
        seq: u64,
        id: VolumeId,
        name: String,
        size: u64,
        content: Content,
        parameters: Parameters,
        inode: u64,
        nonce: Nonce,
    ) -> Self {
        Self { version: VERSION, seq, id, name, size, content, parameters, inode, nonce, state: State::Blank }
    }

    /// Reads a record from its file's text.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        let record: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if record.version != VERSION {
            return Err(format!("record version {}, this build knows {VERSION}", record.version));
        }
        Ok(record)
    }

    /// Whether the volume may still be formatted.
    pub fn state(&self) -> State {
        self.state
    }

    /// The record to write before a mkfs begins; `None` once the volume was handed out.
    #[must_use]
    pub fn formatting(&self) -> Option<Self> {
        (self.state != State::Formatted).then(|| Self { state: State::Formatting, ..self.clone() })
    }

    /// The record to write before the volume is handed out for the first time.
    #[must_use]
    pub fn formatted(&self) -> Self {
        Self { state: State::Formatted, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let id = VolumeId::new([1; 16]);
        let parameters = Parameters::default();
        Record::blank(
            3,
            id,
            "pvc-1".into(),
            1 << 30,
            Content::Filesystem(FsType::Xfs),
            parameters,
            12,
            Nonce::new([2; 16]),
        )
    }

    #[test]
    fn a_volume_that_was_handed_out_is_never_formatted_again() {
        let formatting = record().formatting().expect("a blank volume may be formatted");
        assert_eq!(formatting.state(), State::Formatting);
        assert!(formatting.formatting().is_some(), "a mkfs that was cut short may be begun again");
        assert_eq!(formatting.formatted().formatting(), None);
        assert_eq!(record().formatted().formatting(), None);
    }

    #[test]
    fn it_is_read_back_as_written() {
        let record = record().formatted();
        assert_eq!(Record::parse(&serde_json::to_string(&record).unwrap()), Ok(record));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let text = serde_json::to_string(&record()).unwrap();
        assert!(Record::parse(&text.replace("\"version\":1", "\"version\":2")).unwrap_err().contains("version 2"));
        assert!(Record::parse(&text.replace("\"seq\"", "\"sec\"")).is_err());
        assert!(Record::parse(&text.replace("\"blank\"", "\"wiped\"")).is_err());
        assert!(Record::parse(&text[..text.len() / 2]).is_err());
        assert!(Record::parse("").is_err());
    }
}
