//! Desired state from a directory of YAML files.
//!
//! At the start every file must be good: [`Manifests::open`] names those that are not. While it runs, a file that breaks is
//! named in the status and what it said last stays in force; a file that goes takes its objects with it. When the
//! directory itself cannot be read, everything stays. An object that several files hold is taken from the first by name.
//!
//! Changes are taken in the order in which they were made, and of those that are seen together Pods come last: a policy that
//! was written before a Pod is never delivered after it, so that the Pod does not start without it.
//!
//! Files should be replaced by renaming. One that is written in place is read when its writer closes it.

mod merge;
mod parse;
mod scan;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::mpsc;

use super::{Event, Kind, Object, Source, Status};
use merge::Merged;
pub use parse::{ParseError, parse};
use scan::Signature;
use watch::Watch;

/// How long after the last look the directory is looked at again, in case no event told of a change.
const RESCAN: Duration = Duration::from_secs(10);

/// How long a change waits for an older one whose file is still being written.
const HELD: Duration = Duration::from_secs(2);
/// How often the directory is listed until nothing changes between two listings.
const LISTINGS: usize = 8;

/// The directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestsError {
    /// It cannot be read.
    #[error("manifests: {dir}: {reason}")]
    Unreadable {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// Some files are broken.
    #[error("manifests: {}", .0.join("\nmanifests: "))]
    Broken(Vec<String>),
}

/// A directory of YAML files, read once and then watched.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    known: BTreeMap<String, Signature>,
    broken: BTreeMap<String, String>,
    merged: Merged,
}

impl Manifests {
    /// Reads the directory.
    ///
    /// # Errors
    /// That it cannot be read, or every file that is broken, with the document and the field.
    pub fn open(dir: &Path) -> Result<Self, ManifestsError> {
        let mut this =
            Self { dir: dir.to_owned(), known: BTreeMap::new(), broken: BTreeMap::new(), merged: Merged::default() };
        this.rescan(|_, _| true)
            .map_err(|error| ManifestsError::Unreadable { dir: dir.to_owned(), reason: error.to_string() })?;
        if this.broken.is_empty() {
            return Ok(this);
        }
        let broken = this.broken.iter().map(|(file, reason)| format!("{}: {reason}", dir.join(file).display()));
        Err(ManifestsError::Broken(broken.collect()))
    }

    /// Reads what changed and `settled` says is not being written now; the events are what that changes.
    fn rescan(&mut self, settled: impl Fn(&str, Duration) -> bool) -> std::io::Result<Vec<Event>> {
        let found = self.list()?;
        let mut events = Vec::new();
        let gone: Vec<String> = self.known.keys().filter(|file| !found.contains_key(*file)).cloned().collect();
        for file in gone {
            self.known.remove(&file);
            self.broken.remove(&file);
            events.extend(self.merged.replace(&file, BTreeMap::new()));
        }
        let changed = found.into_iter().filter(|(file, signature)| self.known.get(file) != Some(signature));
        let (changed, unsettled): (Vec<_>, Vec<_>) =
            changed.partition(|(file, signature)| settled(file, signature.age()));
        let first_unsettled = unsettled.iter().map(|(_, signature)| signature.changed()).min();
        for (file, signature) in changed {
            // Not older than one that cannot be read yet; both may be of the same tick of the clock.
            let is_late = first_unsettled.is_some_and(|first| signature.changed() >= first);
            if is_late && signature.since_change() < HELD {
                continue;
            }
            self.known.insert(file.clone(), signature);
            match scan::read(&self.dir.join(&file)) {
                Ok(objects) => {
                    self.broken.remove(&file);
                    events.extend(self.merged.replace(&file, objects));
                }
                Err(reason) => {
                    self.broken.insert(file, reason);
                }
            }
        }
        events.sort_by_key(|event| matches!(event, Event::Upsert(Object::Pod(_))));
        Ok(events)
    }

    /// The files, as they were at one moment: what is in a listing may be newer than what the listing missed, and then the
    /// next one differs.
    fn list(&self) -> std::io::Result<BTreeMap<String, Signature>> {
        let mut found = scan::list(&self.dir)?;
        if found == self.known {
            return Ok(found);
        }
        for _ in 1..LISTINGS {
            let before = std::mem::replace(&mut found, scan::list(&self.dir)?);
            if found == before {
                break;
            }
        }
        Ok(found)
    }

    /// Brings the status up to date: counts, broken files, objects that several files hold.
    fn report(&self, status: &Status, reported: &mut BTreeMap<String, String>) {
        let mut problems = BTreeMap::new();
        for (file, reason) in &self.broken {
            let text = format!("{reason}; what it said before stays in force");
            problems.insert(self.dir.join(file).display().to_string(), text);
        }
        for (reference, files) in self.merged.contested() {
            problems.insert(reference.to_string(), format!("is in {}; the first is in force", files.join(" and ")));
        }
        for about in reported.keys().filter(|about| !problems.contains_key(*about)) {
            tracing::info!(%about, "is well again");
            status.clear(about);
        }
        for (about, problem) in &problems {
            if reported.get(about) != Some(problem) {
                tracing::warn!(%about, "{problem}");
                status.problem(about, problem.clone());
            }
        }
        *reported = problems;
        for kind in Kind::ALL {
            status.set_objects(kind, self.merged.count(kind));
        }
    }
}

impl Source for Manifests {
    fn describe(&self) -> String {
        format!("manifests {}", self.dir.display())
    }

    async fn run(mut self, events: mpsc::Sender<Event>, status: Status) {
        status.describe(self.describe());
        let mut reported = BTreeMap::new();
        // Watched from before the first delivery, so that no change falls between.
        let mut watch = Watch::start(&self.dir);
        self.report(&status, &mut reported);
        for object in self.merged.objects() {
            if events.send(Event::Upsert(object.clone())).await.is_err() {
                return;
            }
        }
        for kind in Kind::ALL {
            if events.send(Event::Synced(kind)).await.is_err() {
                return;
            }
            status.set_synced(kind);
        }
        loop {
            tokio::select! {
                () = watch.changed(RESCAN) => {}
                () = events.closed() => return,
            }
            watch.renew(&self.dir);
            let about = self.dir.display().to_string();
            let changes = match self.rescan(|file, age| watch.is_settled(file, age)) {
                Ok(changes) => {
                    status.clear(&about);
                    changes
                }
                Err(error) => {
                    if status.problem(&about, format!("{error}; what it held before stays in force")) {
                        tracing::warn!(dir = %about, %error, "cannot read the directory of manifests");
                    }
                    continue;
                }
            };
            self.report(&status, &mut reported);
            for change in changes {
                if events.send(change).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
