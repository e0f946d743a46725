//! Requests about snapshots and groups of them.

use super::controller::name;
use super::{List, known_id, required, string};
use crate::csi;
use crate::error::{Error, Result};
use crate::model::{GroupId, SnapshotId, VolumeId, printable};

/// The most volumes that are held still at once for one group.
const MAX_GROUP: usize = 32;

/// A snapshot to take, or to find again.
#[derive(Clone, Debug)]
pub struct Take {
    /// The caller's name of it.
    pub name: String,
    /// The volume that it is of.
    pub volume: VolumeId,
}

impl Take {
    /// Validates a request.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: csi::CreateSnapshotRequest) -> Result<Self> {
        let name = name(request.name)?;
        let volume = required("source_volume_id", request.source_volume_id)?;
        no_parameters(&request.parameters)?;
        Ok(Self { name, volume: known_id(&volume)? })
    }
}

/// external-snapshotter adds names with `--extra-create-metadata`; they change nothing here.
fn no_parameters(parameters: &std::collections::HashMap<String, String>) -> Result<()> {
    match parameters.keys().filter(|key| !key.starts_with("csi.storage.k8s.io/")).min() {
        Some(key) => Err(Error::UnknownParameter { key: printable(key), known: "none".into() }),
        None => Ok(()),
    }
}

/// Which snapshots to list.
#[derive(Clone, Debug)]
pub struct ListSnapshots {
    /// Which page.
    pub page: List,
    /// Of this volume only. `Err` for an id that names none.
    pub volume: Option<std::result::Result<VolumeId, ()>>,
    /// This one only. `Err` for an id that names none.
    pub id: Option<std::result::Result<SnapshotId, ()>>,
}

impl ListSnapshots {
    /// Validates a request.
    ///
    /// # Errors
    /// As [`List::parse`].
    pub fn parse(request: &csi::ListSnapshotsRequest) -> Result<Self> {
        let page = List::parse(request.max_entries, &request.starting_token)?;
        let given = |text: &'_ String| Some(text.clone()).filter(|text| !text.is_empty());
        let volume = given(&request.source_volume_id).map(|id| id.parse().map_err(drop));
        let id = given(&request.snapshot_id).map(|id| id.parse().map_err(drop));
        Ok(Self { page, volume, id })
    }
}

/// Snapshots to take at one moment, or to find again.
#[derive(Clone, Debug)]
pub struct TakeGroup {
    /// The caller's name of the group.
    pub name: String,
    /// The volumes, in the order of their ids, each once.
    pub volumes: Vec<VolumeId>,
}

impl TakeGroup {
    /// Validates a request.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: csi::CreateVolumeGroupSnapshotRequest) -> Result<Self> {
        let name = name(request.name)?;
        no_parameters(&request.parameters)?;
        if request.source_volume_ids.is_empty() {
            return Err(Error::Missing { field: "source_volume_ids" });
        }
        let mut volumes = request.source_volume_ids.iter().map(|id| known_id(id)).collect::<Result<Vec<_>>>()?;
        volumes.sort();
        volumes.dedup();
        if volumes.len() > MAX_GROUP {
            let (value, expected) = (volumes.len().to_string(), format!("at most {MAX_GROUP} volumes"));
            return Err(Error::Invalid { field: "source_volume_ids", value, expected });
        }
        Ok(Self { name, volumes })
    }
}

/// A group and the snapshots that the caller takes for its members.
///
/// # Errors
/// As the module says.
pub fn group_of(id: &str, snapshots: &[String]) -> Result<(GroupId, Vec<SnapshotId>)> {
    let id = required("group_snapshot_id", id.to_owned())?;
    let group = id.parse().map_err(|_| Error::NoSuchGroup { id: string(&id) })?;
    if snapshots.is_empty() {
        return Err(Error::Missing { field: "snapshot_ids" });
    }
    let member = |id: &String| {
        let expected = || "an id of a snapshot".into();
        id.parse().map_err(|_| Error::Invalid { field: "snapshot_ids", value: string(id), expected: expected() })
    };
    Ok((group, snapshots.iter().map(member).collect::<Result<Vec<_>>>()?))
}
