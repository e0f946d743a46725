//! Bringing a volume to its staging path, and taking it from there.
//!
//! Staging comes in three steps, since only the middle one, mkfs, may take long and waits for a slot:
//! `stage` -> [`Staging::needs_format`] -> `format` -> `finish`.

use super::Volumes;
use crate::backend::Locked;
use crate::error::{Error, Result};
use crate::model::{Content, FsType, Record, State};
use crate::request::{Stage, TargetPath, Unstage};
use crate::state::{Intent, Open};
use crate::sys::target::{Found, Target};

/// A staging under way: the image is locked and the intent written down.
pub struct Staging {
    request: Stage,
    record: Record,
    locked: Box<dyn Locked>,
    _intent: Open,
}

impl Staging {
    /// Whether there is no filesystem yet.
    pub fn needs_format(&self) -> bool {
        self.filesystem().is_some() && self.record.state() != State::Formatted
    }

    fn filesystem(&self) -> Option<FsType> {
        match self.record.content {
            Content::Raw => None,
            Content::Filesystem(fs) => Some(fs),
        }
    }
}

impl Volumes {
    /// Begins to stage a volume. `None` when it is staged already.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::Invalid`] for another kind of volume, [`Error::State`] when something else is
    /// mounted at the path, [`Error::Busy`] while an earlier mkfs runs, [`Error::Damaged`], [`Error::Io`].
    pub fn stage(&self, request: Stage) -> Result<Option<Staging>> {
        let record = self.records.get(&request.id)?;
        if record.content != request.usage.content {
            return Err(Error::Invalid {
                field: "volume_capability",
                value: request.usage.content.to_string(),
                expected: format!("what volume {} is: {}", record.id, record.content),
            });
        }
        let device = self.device(&record)?;
        if record.content == Content::Raw {
            if device.is_some() && record.state() == State::Formatted {
                return Ok(None);
            }
        } else {
            let target = Target::require(&request.staging)?;
            match (target.look()?, &device) {
                (Found::Mounted { fs, .. }, Some(device)) if fs == device.dev() => return Ok(None),
                (found @ Found::Mounted { .. }, _) => return Err(target.unexpected("nothing mounted yet", &found)),
                _ => {}
            }
        }
        drop(device);
        let locked = self.backend.lock(&record)?;
        let intent = Intent::Stage { id: request.id.clone(), path: request.staging.absolute() };
        let intent = self.journal.begin(intent)?;
        Ok(Some(Staging { request, record, locked, _intent: intent }))
    }

    /// Makes the filesystem. Only what our own record says was never handed out is ever formatted.
    ///
    /// # Errors
    /// [`Error::Mkfs`], [`Error::Io`].
    pub fn format(&self, mut staging: Staging) -> Result<Staging> {
        let (Some(fs), Some(formatting)) = (staging.filesystem(), staging.record.formatting()) else {
            return Ok(staging);
        };
        let cut_short = staging.record.state() == State::Formatting;
        self.records.put(formatting.clone())?;
        if cut_short {
            staging.locked.wipe()?;
        }
        staging.locked.format(fs)?;
        staging.record = formatting.formatted();
        self.records.put(staging.record.clone())?;
        Ok(staging)
    }

    /// Attaches and mounts.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::State`].
    pub fn finish(&self, mut staging: Staging) -> Result<()> {
        let read_only = staging.request.read_only();
        let Some(fs) = staging.filesystem() else {
            if staging.record.state() != State::Formatted {
                // Whoever gets the device may write to it: from here on it is not ours to format.
                self.records.put(staging.record.formatted())?;
            }
            return staging.locked.attach(read_only);
        };
        if staging.record.state() != State::Formatted {
            let what = format!("the record of volume {}", staging.record.id);
            let found = format!("{:?}", staging.record.state());
            return Err(Error::State { what, expected: "Formatted before the first mount".into(), found });
        }
        let target = Target::require(&staging.request.staging)?;
        target.create(true)?;
        let mount = staging.locked.mount(fs, &staging.request.usage.options, read_only)?;
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
        let Some(device) = self.device(record)? else { return Ok(()) };
        if let Some(target) = self.targets(device.as_ref(), staging)?.first() {
            return Err(Error::InUse { id: record.id.clone(), by: format!("it is mounted at {}", target.display()) });
        }
        if let Some(target) = Target::open(staging)? {
            target.unmount(|found| matches!(found, Found::Mounted { fs, .. } if *fs == device.dev()))?;
        }
        // It is held open by us until here.
        drop(device);
        self.backend.detach(record)
    }
}
