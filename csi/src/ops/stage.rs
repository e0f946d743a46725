//! Bringing a volume to its staging path, and taking it from there.
//!
//! Staging comes in three steps, since only the middle one, mkfs, may take long and waits for a slot:
//! `stage` -> [`Staging::needs_format`] -> `format` -> `finish`.

use std::path::PathBuf;

use super::Volumes;
use super::publish::agree;
use crate::backend::Locked;
use crate::error::{Error, Result};
use crate::model::{Content, MountOptions, Record, State, Stop, Use};
use crate::request::{Stage, TargetPath, Unstage};
use crate::state::{Intent, Open};
use crate::sys::target::{Found, Target};
use crate::sys::{group, grow};

/// A staging under way: the image is locked and the intent written down.
pub struct Staging {
    request: Stage,
    record: Record,
    options: MountOptions,
    locked: Box<dyn Locked>,
    _intent: Open,
}

impl Staging {
    /// The volume.
    pub fn id(&self) -> &crate::model::VolumeId {
        &self.record.id
    }

    /// Whether there is no filesystem yet.
    pub fn needs_format(&self) -> bool {
        self.record.content.filesystem().is_some() && self.record.state() != State::Formatted
    }
}

impl Volumes {
    /// Begins to stage a volume. `None` when it is staged already.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::Invalid`] for a mount option, [`Error::State`] for another kind of volume and when
    /// something else is mounted at the path, [`Error::UsedOtherwise`], [`Error::InUse`] when it is staged elsewhere,
    /// [`Error::Busy`] while an earlier mkfs runs, [`Error::Damaged`], [`Error::Io`].
    pub fn stage(&self, request: Stage) -> Result<Option<Staging>> {
        let record = self.records.get(&request.id)?;
        request.usage.fits_node(record.content, &record.id)?;
        let options = request.usage.options(record.content)?;
        let asked = request.wanted(&options);
        let has = self.uses.at(&record.id, &asked.path).filter(|has| has.stop == Stop::Staged);
        let device = self.device(&record)?;
        if record.content == Content::Raw {
            if let (Some(has), Some(_), State::Formatted) = (&has, &device, record.state()) {
                return agree("staging_target_path", &asked, has).map(|()| None);
            }
        } else {
            let target = Target::require(&request.staging)?;
            match (target.look()?, &device) {
                (found @ Found::Mounted { .. }, Some(device)) if device.is(&found) => {
                    return agree("staging_target_path", &asked, has.as_ref().unwrap_or(&asked)).map(|()| None);
                }
                (found @ Found::Mounted { .. }, _) => return Err(target.unexpected("nothing mounted yet", &found)),
                (_, Some(device)) => {
                    // Either would be in the other's way when it is to be unstaged.
                    if let Some(other) = self.staged_elsewhere(device.as_ref(), &request.staging)? {
                        let by = format!("it is staged at {}", other.display());
                        return Err(Error::InUse { id: record.id, by });
                    }
                }
                _ => {}
            }
        }
        drop(device);
        let locked = self.backend_of(&record)?.lock(&record)?;
        let intent = Intent::Stage { id: request.id.clone(), path: request.staging.absolute() };
        let intent = self.journal.begin(intent)?;
        Ok(Some(Staging { request, record, options, locked, _intent: intent }))
    }

    /// Makes the filesystem. Only what our own record says was never handed out is ever formatted.
    ///
    /// # Errors
    /// [`Error::Mkfs`], [`Error::Io`].
    pub fn format(&self, mut staging: Staging) -> Result<Staging> {
        let (Some(_), Some(formatting)) = (staging.record.content.filesystem(), staging.record.formatting()) else {
            return Ok(staging);
        };
        let cut_short = staging.record.state() == State::Formatting;
        self.records.put(formatting.clone())?;
        if cut_short {
            staging.locked.wipe()?;
        }
        staging.locked.format()?;
        staging.record = formatting.formatted();
        self.records.put(staging.record.clone())?;
        Ok(staging)
    }

    /// Attaches and mounts.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::State`].
    pub fn finish(&self, staging: Staging) -> Result<()> {
        let (id, asked) = (staging.record.id.clone(), staging.request.wanted(&staging.options));
        let path = asked.path.clone();
        self.uses.put(&id, asked)?;
        let done = self.attach(staging);
        if done.is_err() {
            self.uses.remove(&id, &path);
        }
        done
    }

    fn attach(&self, mut staging: Staging) -> Result<()> {
        let read_only = staging.request.read_only;
        let formatted = staging.record.state() == State::Formatted;
        if !formatted && staging.record.content.filesystem().is_none() {
            // Whoever gets it may write to it: from here on it is not ours to format.
            staging.record = staging.record.formatted();
            self.records.put(staging.record.clone())?;
        } else if !formatted {
            let what = format!("the record of volume {}", staging.record.id);
            let found = format!("{:?}", staging.record.state());
            return Err(Error::State { what, expected: "Formatted before the first mount".into(), found });
        }
        if staging.record.content == Content::Raw {
            // One that is staged at another path, too, as for a second PersistentVolume of it, stays as it is.
            let elsewhere =
                self.uses.of(&staging.record.id).iter().any(|used| used.path != staging.request.staging.absolute());
            if elsewhere && self.device(&staging.record)?.is_some() {
                return Ok(());
            }
            return staging.locked.attach(read_only);
        }
        let target = Target::require(&staging.request.staging)?;
        target.create(true)?;
        if staging.record.filled.is_some()
            && let Some(fs) = staging.record.content.filesystem()
            && !grow::allowed(fs)
        {
            staging.locked.grow()?;
            staging.record = staging.record.filled();
            self.records.put(staging.record.clone())?;
        }
        let mount = staging.locked.mount(&staging.options, read_only)?;
        if !read_only {
            // Nobody sees it yet: whoever does finds it whole.
            let root = mount.root()?;
            if staging.record.filled.is_some() {
                self.fill(&staging.record, &root)?;
            }
            if let Some(gid) = staging.request.usage.group {
                group::give(&root, gid, &|| self.probes.goes_on(staging.record.id.as_str()))?;
            }
        }
        mount.attach(target.handle()?, target.path())
    }

    /// Takes a volume from its staging path.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`]; [`Error::InUse`] while it is published, or held open by anyone; [`Error::Io`].
    pub fn unstage(&self, request: &Unstage) -> Result<()> {
        let record = self.records.get(&request.id)?;
        let _intent =
            self.journal.begin(Intent::Unstage { id: request.id.clone(), path: request.staging.absolute() })?;
        self.take_down(&record, &request.staging)
    }

    pub(super) fn take_down(&self, record: &Record, staging: &TargetPath) -> Result<()> {
        let path = staging.absolute();
        let Some(device) = self.remains(record)? else {
            self.uses.forget(&record.id);
            return Ok(());
        };
        let target = Target::open(staging)?;
        let here = target.as_ref().map_or(Ok(false), |target| target.look().map(|found| device.is(&found)))?;
        if !here && record.content != Content::Raw && self.staged_elsewhere(device.as_ref(), staging)?.is_some() {
            self.uses.remove(&record.id, &path);
            return Ok(());
        }
        // A block volume may be staged at several paths: the kubelet makes one for each PersistentVolume of it.
        let uses = self.uses.of(&record.id);
        let elsewhere: Vec<_> = uses.iter().filter(|used| used.stop == Stop::Staged && used.path != path).collect();
        let others = self.targets(device.as_ref(), staging)?;
        let from_here = |target: &&PathBuf| {
            let from_elsewhere =
                |used: &Use| elsewhere.iter().any(|other| used.stop == Stop::Published(other.path.clone()));
            !uses.iter().any(|used| used.path == **target && from_elsewhere(used))
        };
        if let Some(target) = others.iter().find(from_here) {
            return Err(Error::InUse { id: record.id.clone(), by: format!("it is mounted at {}", target.display()) });
        }
        if let Some(target) = target {
            target.unmount(|found| device.is(found))?;
        }
        // It is held open by us until here.
        drop(device);
        if record.content != Content::Raw || elsewhere.is_empty() {
            self.backend_of(record)?.detach(record)?;
        }
        self.uses.remove(&record.id, &path);
        Ok(())
    }
}
