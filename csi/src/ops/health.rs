//! What is wrong with a volume, as far as it can be seen without changing anything.

use std::time::Duration;

use super::Volumes;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::{BackendKind, Content, Record, Stop, VolumeId};
use crate::sys::block;

/// How long a device is watched for a request that it completes.
const MOMENT: Duration = Duration::from_millis(500);

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It works, but something is wrong.
    Degraded,
    /// It cannot be used now.
    Inaccessible,
    /// Data is gone.
    DataLoss,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// For machines, CamelCase.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Volumes {
    /// Looks at a volume. Nothing found means that nothing is known to be wrong.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`]. What cannot be looked at is a finding.
    pub fn health(&self, id: &VolumeId) -> Result<Vec<Finding>> {
        let record = self.get(id)?;
        // This look is one of those under way; only an earlier one can have hung.
        let waits = || self.probes.waits(id.as_str()).filter(|_| !self.is_moving(&record));
        if let Some(since) = self.probes.hung(id.as_str()).or_else(waits) {
            let message = super::probes::hung(&format!("volume {id}"), since).to_string();
            return Ok(vec![Finding { severity: Severity::Inaccessible, reason: "NoAnswer", message }]);
        }
        Ok(match self.look(&record) {
            Ok(findings) => findings,
            Err(error) => vec![finding(&error)],
        })
    }

    /// Whether the volume's device completes requests: a call that waits for it has much to do, as a large cache to write back or a
    /// long log to replay.
    fn is_moving(&self, record: &Record) -> bool {
        let Ok(Some(attached)) = self.device(record) else { return false };
        let Some(before) = attached.dev().and_then(block::completed) else { return false };
        std::thread::sleep(MOMENT);
        attached.dev().and_then(block::completed).is_some_and(|now| now != before)
    }

    fn look(&self, record: &Record) -> Result<Vec<Finding>> {
        let backend = self.backend_of(record)?;
        backend.check(record)?;
        let mut findings = Vec::from_iter(self.starving(record)?);
        let Some(device) = backend.attached(record)? else { return Ok(findings) };
        let errors = device.errors();
        if errors > 0 {
            let message = format!("its filesystem has met {errors} errors");
            findings.push(Finding { severity: Severity::Degraded, reason: "FilesystemErrors", message });
        }
        if let Content::Filesystem(_) = record.content {
            let stopped = self.mounts(device.as_ref())?.iter().any(|mount| mount.read_only);
            let asked = || self.uses.of(&record.id).iter().any(|used| used.stop == Stop::Staged && used.read_only);
            if stopped && !device.read_only()? && !asked() {
                let message = "its filesystem refuses writes, which nobody asked for".into();
                findings.push(Finding { severity: Severity::Degraded, reason: "FilesystemReadOnly", message });
            }
            if let Some(root) = self.open_root(device.as_ref())?
                && let Err(error) = root.metadata()
            {
                let message = format!("its filesystem answers: {error}");
                findings.push(Finding { severity: Severity::Inaccessible, reason: "FilesystemShutDown", message });
            }
        }
        Ok(findings)
    }

    /// That the store below has less left than what the volume was promised of it: somebody else filled it. What has all its
    /// blocks for itself does not mind.
    fn starving(&self, record: &Record) -> Result<Option<Finding>> {
        let backend = self.backend_of(record)?;
        if record.parameters.unenforced {
            // Nobody knows how much of its size such a directory has taken.
            return Ok(None);
        }
        let mut needed = backend.outstanding(record)?;
        for snapshot in self.snapshots.all().iter().filter(|snapshot| snapshot.volume == record.id) {
            needed += backend.outstanding_of(snapshot)?;
        }
        if needed == 0 {
            return Ok(None);
        }
        let free = backend.free()?;
        let message = format!("it may still write {needed} bytes anew, and the storage below has {free}");
        Ok((needed > free).then_some(Finding { severity: Severity::Degraded, reason: "StorageFull", message }))
    }

    /// What is wrong with the storage below the volumes of a backend.
    pub fn storage_health(&self, kind: BackendKind) -> Option<Finding> {
        let name = kind.as_str();
        match self.available(Some(kind)) {
            Err(error) => Some(Finding {
                severity: Severity::Inaccessible,
                reason: "StorageUnreachable",
                message: format!("{name}: {error}"),
            }),
            Ok((0, _)) if self.backend(kind).and_then(Backend::free).is_ok_and(|free| free == 0) => Some(Finding {
                severity: Severity::Degraded,
                reason: "StorageFull",
                message: format!("{name}: nothing is free, and volumes may still need what they were promised"),
            }),
            Ok(_) => None,
        }
    }
}

fn finding(error: &Error) -> Finding {
    let (severity, reason) = match error {
        Error::Damaged { .. } => (Severity::DataLoss, "StorageMismatch"),
        _ => (Severity::Inaccessible, "StorageUnreachable"),
    };
    Finding { severity, reason, message: error.to_string() }
}
