//! Findings as the interface words them.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use super::Shared;
use crate::csi::volume_health::VolumeHealthEntry;
use crate::csi::{StorageHealthErrorType, VolumeHealth, VolumeHealthErrorType};
use crate::model::{BackendKind, VolumeId};
use crate::ops::{Finding, Severity};

/// Volumes that are looked at at a time, of all that one call asks for.
const LOOKS: usize = 32;

impl Shared {
    /// A volume's health; one that does not answer in time has just that.
    pub(super) async fn health(&self, id: &VolumeId) -> Result<VolumeHealth, Status> {
        let asked = id.clone();
        let findings = match self.look(id.as_str(), move |volumes| volumes.health(&asked)).await {
            Err(status) if [Code::Unavailable, Code::Aborted].contains(&status.code()) => vec![silent(&status)],
            other => other?,
        };
        Ok(volume(id, findings))
    }

    /// The health of many volumes, in their order; one that went meanwhile is left out.
    pub(super) async fn health_of_all(&self, ids: Vec<VolumeId>) -> Result<Vec<VolumeHealth>, Status> {
        let (mut looks, slots) = (JoinSet::new(), Arc::new(Semaphore::new(LOOKS)));
        for (at, id) in ids.into_iter().enumerate() {
            let (shared, slots) = (self.clone(), slots.clone());
            looks.spawn(async move {
                let _slot = slots.acquire_owned().await;
                (at, shared.health(&id).await)
            });
        }
        let mut all = Vec::new();
        while let Some(done) = looks.join_next().await {
            match done {
                Ok((at, Ok(health))) => all.push((at, health)),
                Ok((_, Err(status))) if status.code() == Code::NotFound => {}
                Ok((_, Err(status))) => return Err(status),
                Err(error) => return Err(Status::internal(format!("look at a volume: {error}"))),
            }
        }
        all.sort_by_key(|&(at, _)| at);
        Ok(all.into_iter().map(|(_, health)| health).collect())
    }

    /// What is wrong with the storage below the volumes, of each backend by itself.
    pub(super) async fn storage_health(&self) -> Result<Vec<Finding>, Status> {
        let mut looks = JoinSet::new();
        for kind in self.volumes.kinds() {
            let shared = self.clone();
            looks.spawn(async move { shared.look(&storage_of(kind), move |it| Ok(it.storage_health(kind))).await });
        }
        let mut all = Vec::new();
        while let Some(done) = looks.join_next().await {
            match done {
                Ok(Ok(found)) => all.extend(found),
                Ok(Err(status)) => all.push(silent(&status)),
                Err(error) => return Err(Status::internal(format!("look at storage: {error}"))),
            }
        }
        all.sort_by(|one, other| one.message.cmp(&other.message));
        Ok(all)
    }
}

/// What is looked at when a backend's storage is.
pub(super) fn storage_of(kind: BackendKind) -> String {
    format!("storage of the {} backend", kind.as_str())
}

fn silent(status: &Status) -> Finding {
    Finding { severity: Severity::Inaccessible, reason: "NoAnswer", message: status.message().to_owned() }
}

/// A volume's findings.
fn volume(id: &VolumeId, findings: Vec<Finding>) -> VolumeHealth {
    let entry = |finding: Finding| VolumeHealthEntry {
        status: match finding.severity {
            Severity::Degraded => VolumeHealthErrorType::Degraded,
            Severity::Inaccessible => VolumeHealthErrorType::Inaccessible,
            Severity::DataLoss => VolumeHealthErrorType::DataLoss,
        } as i32,
        reason: finding.reason.into(),
        message: finding.message,
    };
    VolumeHealth { volume_id: id.to_string(), health_statuses: findings.into_iter().map(entry).collect() }
}

/// How bad a finding about the storage below all volumes is.
pub fn storage(severity: Severity) -> StorageHealthErrorType {
    match severity {
        Severity::Degraded => StorageHealthErrorType::StorageDegraded,
        Severity::Inaccessible | Severity::DataLoss => StorageHealthErrorType::StorageUnreachable,
    }
}
