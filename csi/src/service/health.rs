//! Findings as the interface words them.

use tonic::{Code, Status};

use super::Shared;
use crate::csi::volume_health::VolumeHealthEntry;
use crate::csi::{StorageHealthErrorType, VolumeHealth, VolumeHealthErrorType};
use crate::model::VolumeId;
use crate::ops::{Finding, Severity};

impl Shared {
    /// A volume's health; one that does not answer in time has just that.
    pub(super) async fn health(&self, id: &VolumeId) -> Result<VolumeHealth, Status> {
        let asked = id.clone();
        let findings = match self.probe(id, move |volumes| volumes.health(&asked)).await {
            Err(status) if status.code() == Code::Unavailable => {
                let message = status.message().to_owned();
                vec![Finding { severity: Severity::Inaccessible, reason: "NoAnswer", message }]
            }
            other => other?,
        };
        Ok(volume(id, findings))
    }
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
