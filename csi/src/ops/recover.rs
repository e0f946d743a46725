//! After a crash: what was begun is undone or carried on with, and what is odd is reported and left alone.

use super::Volumes;
use crate::error::{Error, Result};
use crate::model::{State, VolumeId};
use crate::request::TargetPath;
use crate::state::Intent;

/// What recovery found. Each entry is a sentence for the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What was put right.
    pub healed: Vec<String>,
    /// What needs a person to look at it, or another call of the same kind.
    pub left: Vec<String>,
}

impl Volumes {
    /// Deals with the intents that an earlier run left open, then compares records and pool. Runs before any request.
    ///
    /// # Errors
    /// [`Error::Io`] when the journal or the pool cannot be used at all.
    pub fn recover(&self, open: Vec<Intent>) -> Result<Report> {
        let mut report = Report::default();
        for intent in open {
            let settled = match self.resolve(&intent) {
                Ok(done) => {
                    report.healed.push(format!("{intent:?}: {done}"));
                    true
                }
                Err(error) => {
                    report.left.push(format!("{intent:?}: {error}"));
                    // Only a volume that nobody knows of has nobody who would call again.
                    !matches!(intent, Intent::Create { .. })
                }
            };
            if settled {
                self.journal.settle(&intent)?;
            }
        }
        let records = self.records.all();
        for record in &records {
            if let Err(error) = self.backend.check(record) {
                report.left.push(error.to_string());
            } else if record.state() == State::Formatting {
                match self.backend.lock(record) {
                    Ok(_) => {
                        report.healed.push(format!("volume {}: its mkfs was cut short; it begins anew", record.id))
                    }
                    Err(Error::Busy { .. }) => report.left.push(format!("volume {}: its mkfs still runs", record.id)),
                    Err(error) => report.left.push(error.to_string()),
                }
            }
        }
        let strays = self.backend.strays(&records)?;
        report.left.extend(strays.into_iter().map(|name| format!("{name} in the pool belongs to no volume")));
        Ok(report)
    }

    fn resolve(&self, intent: &Intent) -> Result<&'static str> {
        match intent {
            Intent::Create { id, .. } if self.records.find(id).is_some() => Ok("the volume is complete"),
            Intent::Create { id, nonce } => match self.backend.erase(id, nonce)? {
                true => Ok("removed what was made of it"),
                false => Ok("nothing was made of it"),
            },
            Intent::Delete { id } => self.known(id, || self.delete(id), "removed"),
            Intent::Stage { id, path } => self.known(id, || self.undo_stage(id, path), "taken down"),
            Intent::Unstage { id, path } => self.known(id, || self.undo_stage(id, path), "taken down"),
            Intent::Publish { id, path } | Intent::Unpublish { id, path } => {
                let undo = || self.withdraw(&self.records.get(id)?, &self.target(path)?);
                self.known(id, undo, "withdrawn")
            }
        }
    }

    fn known(&self, id: &VolumeId, act: impl FnOnce() -> Result<()>, done: &'static str) -> Result<&'static str> {
        if self.records.find(id).is_none() {
            return Ok("the volume is gone");
        }
        act().map(|()| done)
    }

    fn undo_stage(&self, id: &VolumeId, path: &std::path::Path) -> Result<()> {
        self.take_down(&self.records.get(id)?, &self.target(path)?)
    }

    fn target(&self, path: &std::path::Path) -> Result<TargetPath> {
        TargetPath::parse("path in the journal", &path.to_string_lossy(), &self.kubelet_dir)
    }
}
