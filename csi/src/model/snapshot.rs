//! What is known durably of a snapshot. It never changes.

use serde::{Deserialize, Serialize};

use super::{Content, GroupId, Nonce, Parameters, Record, SnapshotId, State, VolumeId};

/// Version of the record's form.
const VERSION: u32 = 1;

/// The group that a snapshot was taken in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Our name of it.
    pub id: GroupId,
    /// The caller's name of it.
    pub name: String,
}

/// A snapshot: a volume's content at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    version: u32,
    /// Grows with each snapshot; the order of lists.
    pub seq: u64,
    /// Our name of it.
    pub id: SnapshotId,
    /// The caller's name of it; of one that was taken in a group, the group's with the volume's id.
    pub name: String,
    /// The volume that it is of, which may be gone.
    pub volume: VolumeId,
    /// Bytes, as the volume had.
    pub size: u64,
    /// What the volume is.
    pub content: Content,
    /// What the volume's class said.
    pub parameters: Parameters,
    /// Inode number of its storage in the pool.
    pub inode: u64,
    /// Also on its storage, as an extended attribute.
    pub nonce: Nonce,
    /// Whether there is data in it: else the volume had never been handed out.
    pub formatted: bool,
    /// How far the filesystem reached.
    pub filled: u64,
    /// When, in nanoseconds since 1970.
    pub created_ns: u64,
    /// The group that it was taken in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Group>,
}

/// What is new in a snapshot, beside what its volume had.
#[derive(Clone, Debug)]
pub struct Taken {
    /// The order of lists.
    pub seq: u64,
    /// Our name of it.
    pub id: SnapshotId,
    /// The caller's name of it.
    pub name: String,
    /// Of its storage.
    pub inode: u64,
    /// Of its storage.
    pub nonce: Nonce,
    /// When, in nanoseconds since 1970.
    pub created_ns: u64,
    /// The group that it was taken in.
    pub group: Option<Group>,
}

impl Snapshot {
    /// A snapshot that was just taken of a volume.
    pub fn of(volume: &Record, taken: Taken) -> Self {
        let Taken { seq, id, name, inode, nonce, created_ns, group } = taken;
        Self {
            version: VERSION,
            seq,
            id,
            name,
            volume: volume.id.clone(),
            size: volume.size,
            content: volume.content,
            parameters: volume.parameters.clone(),
            inode,
            nonce,
            formatted: volume.state() == State::Formatted,
            filled: volume.filled.unwrap_or(volume.size),
            created_ns,
            group,
        }
    }

    /// Reads a snapshot from its file's text.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        let snapshot: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if snapshot.version != VERSION {
            return Err(format!("record version {}, this build knows {VERSION}", snapshot.version));
        }
        Ok(snapshot)
    }
}
