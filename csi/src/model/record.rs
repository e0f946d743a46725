//! What is known durably of a volume, and the only ways in which it may change.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Mutable, Nonce, Parameters, Shape, SnapshotId, VolumeId};

/// Version of the record's form. A newer one is refused, not guessed at; the first is read, and means the defaults.
const VERSION: u32 = 2;

/// A filesystem that this driver makes and mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsType {
    /// ext4, the default.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
}

impl FsType {
    /// The name that the kernel and StorageClasses use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

impl FromStr for FsType {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            "btrfs" => Ok(Self::Btrfs),
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
    /// A mounted filesystem of its own.
    Filesystem(FsType),
    /// A part of the host's filesystem: a directory or subvolume.
    Tree,
}

impl Content {
    /// The filesystem on the volume's own device.
    pub fn filesystem(self) -> Option<FsType> {
        match self {
            Self::Filesystem(fs) => Some(fs),
            Self::Raw | Self::Tree => None,
        }
    }

    /// Whether the volume can be used as a caller says.
    pub fn is(self, shape: Shape) -> bool {
        match (self, shape) {
            (Self::Raw, Shape::Block) | (Self::Filesystem(_) | Self::Tree, Shape::Mount(None)) => true,
            (Self::Filesystem(fs), Shape::Mount(Some(asked))) => fs == asked,
            (Self::Tree, Shape::Mount(Some(asked))) => asked == FsType::Btrfs,
            _ => false,
        }
    }

    /// The smallest size that can be served, in bytes: what the mkfs programs still accept, and can be filled.
    pub fn min_size(self) -> u64 {
        match self {
            Self::Raw | Self::Tree => 1 << 20,
            Self::Filesystem(FsType::Btrfs) => 128 << 20,
            Self::Filesystem(FsType::Ext4) => 16 << 20,
            Self::Filesystem(FsType::Xfs) => 300 << 20,
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("a block device"),
            Self::Filesystem(fs) => write!(f, "a filesystem of type {}", fs.as_str()),
            Self::Tree => f.write_str("a directory of the host's filesystem"),
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

/// What a volume was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A snapshot, restored.
    Snapshot(SnapshotId),
    /// A volume, cloned.
    Volume(VolumeId),
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
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// The size that it is being brought to, from before its storage grows until after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growing: Option<u64>,
    /// The size that its filesystem is known to fill; all of it when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filled: Option<u64>,
    /// What a VolumeAttributesClass said.
    #[serde(default)]
    pub mutable: Mutable,
    /// Made for one pod, inline: it goes when it is unpublished.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ephemeral: bool,
    /// The claim that it was made for, as `namespace/name`; for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
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
        Self {
            version: VERSION,
            seq,
            id,
            name,
            size,
            content,
            parameters,
            inode,
            nonce,
            // In a part of the host's filesystem there is none to be made.
            state: if content == Content::Tree { State::Formatted } else { State::Blank },
            source: None,
            growing: None,
            filled: None,
            mutable: Mutable::default(),
            ephemeral: false,
            claim: None,
        }
    }

    /// The record of a volume that was just made from another's content: with what that held, and as far as its
    /// filesystem reached.
    #[must_use]
    pub fn from_source(self, source: Source, formatted: bool, filled: u64) -> Self {
        let state = if formatted { State::Formatted } else { State::Blank };
        let filled = (formatted && filled < self.size).then_some(filled);
        Self { source: Some(source), state, filled, ..self }
    }

    /// The record to write before the storage is brought to another size.
    #[must_use]
    pub fn growing(&self, to: u64) -> Self {
        Self { growing: Some(to), ..self.clone() }
    }

    /// The record to write once the storage has the size. What is in it fills it as far as before.
    #[must_use]
    pub fn grown(&self, to: u64) -> Self {
        let behind = self.content.filesystem().is_some() && self.state == State::Formatted;
        let filled = behind.then(|| self.filled.unwrap_or(self.size)).filter(|&filled| filled < to);
        Self { size: to, growing: None, filled, ..self.clone() }
    }

    /// The record to write once the filesystem fills the device.
    #[must_use]
    pub fn filled(&self) -> Self {
        Self { filled: None, ..self.clone() }
    }

    /// Reads a record from its file's text.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        let record: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if !(1..=VERSION).contains(&record.version) {
            return Err(format!("record version {}, this build knows up to {VERSION}", record.version));
        }
        Ok(Self { version: VERSION, ..record })
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
    fn a_record_of_the_first_version_is_understood() {
        let first = r#"{"version":1,"seq":3,"id":"ID","name":"pvc-1","size":1073741824,"content":{"filesystem":"xfs"},
            "parameters":{"allocation":"full"},"inode":12,"nonce":"02020202020202020202020202020202","state":"blank"}"#;
        assert_eq!(Record::parse(&first.replace("ID", VolumeId::new([1; 16]).as_str())), Ok(record()));
    }

    #[test]
    fn a_filesystem_stays_behind_until_it_is_grown() {
        let grown = record().formatted().growing(2 << 30).grown(2 << 30);
        assert_eq!((grown.size, grown.growing, grown.filled), (2 << 30, None, Some(1 << 30)));
        assert_eq!(grown.grown(3 << 30).filled, Some(1 << 30));
        assert_eq!(grown.filled().filled, None);
        assert_eq!(record().grown(2 << 30).filled, None, "what is not yet formatted will fill it");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let text = serde_json::to_string(&record()).unwrap();
        assert!(Record::parse(&text.replace("\"version\":2", "\"version\":3")).unwrap_err().contains("version 3"));
        assert!(Record::parse(&text.replace("\"version\":2", "\"version\":0")).is_err());
        assert!(Record::parse(&text.replace("\"seq\"", "\"sec\"")).is_err());
        assert!(Record::parse(&text.replace("\"blank\"", "\"wiped\"")).is_err());
        assert!(Record::parse(&text[..text.len() / 2]).is_err());
        assert!(Record::parse("").is_err());
    }
}
