//! What the journal has of an operation: enough to carry on with it, or to undo it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::{BackendKind, GroupId, Nonce, SnapshotId, VolumeId};

/// What is about to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "op", deny_unknown_fields)]
pub enum Intent {
    /// Make a volume's storage and record. Undone when there is no record.
    Create {
        /// The volume to be.
        id: VolumeId,
        /// What is on its storage.
        nonce: Nonce,
        /// Where that is.
        #[serde(default)]
        backend: BackendKind,
        /// A volume that is held still meanwhile.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<VolumeId>,
    },
    /// Remove storage and record. Carried on with.
    Delete {
        /// The volume.
        id: VolumeId,
    },
    /// Bring a volume's storage to the size that its record names. Carried on with.
    Expand {
        /// The volume.
        id: VolumeId,
    },
    /// Take a snapshot. Undone when there is no record of it; the volume's filesystem is thawed in any case.
    Snapshot {
        /// The snapshot to be.
        id: SnapshotId,
        /// What is on its storage.
        nonce: Nonce,
        /// Where that is.
        backend: BackendKind,
        /// The volume that it is of.
        volume: VolumeId,
    },
    /// Take snapshots of several volumes. All are undone unless all are there.
    Group {
        /// The group to be.
        id: GroupId,
        /// How many there will be.
        members: usize,
    },
    /// Remove a group's snapshots. Carried on with.
    DeleteGroup {
        /// The group.
        id: GroupId,
    },
    /// Remove a snapshot's storage and record. Carried on with.
    DeleteSnapshot {
        /// The snapshot.
        id: SnapshotId,
    },
    /// Format where needed, attach, mount. Undone.
    Stage {
        /// The volume.
        id: VolumeId,
        /// The path to mount at.
        path: PathBuf,
    },
    /// Unmount, detach. Carried on with.
    Unstage {
        /// The volume.
        id: VolumeId,
        /// The path it is mounted at.
        path: PathBuf,
    },
    /// Mount at a pod's target. Undone.
    Publish {
        /// The volume.
        id: VolumeId,
        /// The target.
        path: PathBuf,
    },
    /// Unmount from a pod's target. Carried on with.
    Unpublish {
        /// The volume.
        id: VolumeId,
        /// The target.
        path: PathBuf,
    },
}
