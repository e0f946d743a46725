//! After a crash: what was begun is undone or carried on with, and what is odd is reported and left alone.

use super::Volumes;
use crate::error::{Context, Error, Result};
use crate::model::{Record, Snapshot, State, VolumeId};
use crate::request::TargetPath;
use crate::state::Intent;
use crate::sys::freeze;

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
        // First what others may be waiting for: writers of a filesystem that is still held still.
        for intent in &open {
            if let Intent::Snapshot { volume, .. } | Intent::Create { from: Some(volume), .. } = intent
                && let Err(error) = self.let_go(volume, &mut report)
            {
                report.left.push(format!("volume {volume}: {error}"));
            }
        }
        for intent in open {
            let settled = match self.resolve(&intent) {
                Ok(done) => {
                    report.healed.push(format!("{intent:?}: {done}"));
                    true
                }
                Err(error) => {
                    report.left.push(format!("{intent:?}: {error}"));
                    // Only of what nobody knows nobody would ask for again.
                    use Intent::{Create, Expand, Group, Snapshot};
                    !matches!(intent, Create { .. } | Snapshot { .. } | Expand { .. } | Group { .. })
                }
            };
            if settled {
                self.journal.settle(&intent);
            }
        }
        let records = self.records.all();
        for record in &records {
            let backend = match self.backend_of(record) {
                Ok(backend) => backend,
                Err(error) => {
                    report.left.push(format!("volume {}: {error}", record.id));
                    continue;
                }
            };
            if let Err(error) = backend.check(record) {
                report.left.push(error.to_string());
            } else if record.state() == State::Formatting {
                match backend.lock(record) {
                    Ok(_) => {
                        report.healed.push(format!("volume {}: its mkfs was cut short; it begins anew", record.id))
                    }
                    Err(Error::Busy { .. }) => report.left.push(format!("volume {}: its mkfs still runs", record.id)),
                    Err(error) => report.left.push(error.to_string()),
                }
            }
        }
        let snapshots = self.snapshots.all();
        for snapshot in &snapshots {
            let checked = self.backend(snapshot.parameters.backend).and_then(|it| it.check_snapshot(snapshot));
            if let Err(error) = checked {
                report.left.push(format!("snapshot {}: {error}", snapshot.id));
            }
        }
        let strays = self.strays(&records, &snapshots)?;
        report.left.extend(strays.into_iter().map(|name| format!("{name} belongs to no volume")));
        Ok(report)
    }

    /// Names in the pool that belong to nothing known: reported, never touched.
    fn strays(&self, records: &[Record], snapshots: &[Snapshot]) -> Result<Vec<String>> {
        let mut known = std::collections::HashSet::new();
        // Also of a backend that is not served now: its volumes are no strays.
        for record in records {
            let backend = self.backends.get(&record.parameters.backend);
            known.insert(backend.map_or_else(|| Some(record.id.to_string()), |backend| backend.name(&record.id)));
        }
        for snapshot in snapshots {
            let backend = self.backends.get(&snapshot.parameters.backend);
            let name = backend.map(|backend| backend.snapshot_name(&snapshot.id));
            known.insert(name.unwrap_or_else(|| Some(snapshot.id.to_string())));
        }
        let stem = |name: &str| name.split_once('.').map_or(name, |(stem, _)| stem).to_owned();
        let mut names = self.pool.names()?;
        for backend in self.backends.values() {
            names.extend(backend.names()?);
        }
        names.retain(|name| !known.contains(&Some(name.clone())) && !known.contains(&Some(stem(name))));
        Ok(names)
    }

    /// Lets a filesystem go that an earlier run held still.
    fn let_go(&self, id: &VolumeId, report: &mut Report) -> Result<()> {
        let Some(record) = self.records.find(id) else { return Ok(()) };
        let Some(device) = self.device(&record)? else { return Ok(()) };
        if record.content.filesystem().is_none() {
            return Ok(());
        }
        if let Some(root) = self.open_root(device.as_ref())?
            && freeze::thaw(&root).context(|| "let a filesystem go")?
        {
            report.healed.push(format!("volume {id}: its filesystem was still held still"));
        }
        Ok(())
    }

    fn resolve(&self, intent: &Intent) -> Result<&'static str> {
        match intent {
            Intent::Create { id, .. } if self.records.find(id).is_some() => Ok("the volume is complete"),
            Intent::Create { id, nonce, backend, .. } => match self.backend(*backend)?.erase(id, nonce)? {
                true => Ok("removed what was made of it"),
                false => Ok("nothing was made of it"),
            },
            Intent::Delete { id } => self.known(id, || self.delete(id), "removed"),
            Intent::Expand { id } => self.known(id, || self.resume_growth(id), "grown"),
            Intent::Group { id, members } if self.count(id) == *members => Ok("the group is complete"),
            Intent::Group { id, .. } | Intent::DeleteGroup { id } => {
                self.drop_members(id).map(|()| "its snapshots are removed")
            }
            Intent::Snapshot { id, .. } if self.snapshots.find(id).is_some() => Ok("the snapshot is complete"),
            Intent::Snapshot { id, nonce, backend, .. } => match self.backend(*backend)?.erase_snapshot(id, nonce)? {
                true => Ok("removed what was made of it"),
                false => Ok("nothing was made of it"),
            },
            Intent::DeleteSnapshot { id } => match self.snapshots.find(id) {
                Some(snapshot) => self.remove_snapshot(&snapshot).map(|()| "removed"),
                None => Ok("the snapshot is gone"),
            },
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
