//! Bringing a staged volume to a pod, and taking it from there.

use super::Volumes;
use crate::backend::Attached;
use crate::error::{Error, Result};
use crate::model::{Record, State};
use crate::request::{Access, Publish, TargetPath, Unpublish};
use crate::state::Intent;
use crate::sys::target::{Found, Target};
use crate::sys::{group, mount};

impl Volumes {
    /// Mounts a staged volume, or its device's node, at a pod's target.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::Invalid`]; [`Error::State`] when it is not staged there or something else is at
    /// the target; [`Error::PublishedOtherwise`]; [`Error::InUse`] for a second target of a single writer; [`Error::Io`].
    pub fn publish(&self, request: &Publish) -> Result<()> {
        let record = self.records.get(&request.id)?;
        request.usage.fits(record.content, &record.id)?;
        let device = self.staged(&record, request)?;
        let target = Target::require(&request.target)?;
        match target.look()? {
            found @ Found::Mounted { read_only, .. } if device.is(&found) => {
                let read_only = if request.block() { device.read_only()? } else { read_only };
                return already(request, read_only);
            }
            found @ Found::Mounted { .. } => return Err(target.unexpected("nothing mounted yet", &found)),
            _ => {}
        }
        let others = self.targets(device.as_ref(), &request.staging)?;
        if let (Access::SingleWriter, Some(other)) = (request.usage.access, others.first()) {
            let by = format!("a single writer has it at {}", other.display());
            return Err(Error::InUse { id: record.id, by });
        }
        let _intent =
            self.journal.begin(Intent::Publish { id: request.id.clone(), path: request.target.absolute() })?;
        target.create(!request.block())?;
        let mount = if request.block() {
            self.protect(&record, device.as_ref(), request.read_only, &others)?;
            device.node()?
        } else {
            let staging = Target::require(&request.staging)?;
            if let (Some(gid), Some(root)) = (request.usage.group.filter(|_| !request.read_only), staging.directory()?)
            {
                group::give(&root, gid)?;
            }
            mount::bind(staging.handle()?, request.read_only, staging.path())?
        };
        mount.attach(target.handle()?, target.path())
    }

    /// The volume's device, when it is staged at the path of the request and was prepared to be handed out.
    fn staged(&self, record: &Record, request: &Publish) -> Result<Box<dyn Attached>> {
        let not_staged = |found: String| Error::State {
            what: format!("volume {}", record.id),
            expected: format!("staged at {}", request.staging.absolute().display()),
            found,
        };
        if record.state() != State::Formatted {
            return Err(not_staged(format!("a volume that is {:?}", record.state())));
        }
        let device = self.device(record)?.ok_or_else(|| not_staged("no device attached".into()))?;
        if !request.block() {
            let staging = Target::open(&request.staging)?.ok_or_else(|| not_staged("no such path".into()))?;
            match staging.look()? {
                found if device.is(&found) => {}
                found => return Err(staging.unexpected("the volume staged there", &found)),
            }
        }
        Ok(device)
    }

    /// A node has no read-only mounts: all who have the device must agree.
    fn protect(
        &self,
        record: &Record,
        device: &dyn Attached,
        read_only: bool,
        others: &[std::path::PathBuf],
    ) -> Result<()> {
        match others.first() {
            _ if device.read_only()? == read_only => Ok(()),
            None => device.set_read_only(read_only),
            Some(other) => Err(Error::InUse {
                id: record.id.clone(),
                by: format!("{} has its device with read-only = {}", other.display(), !read_only),
            }),
        }
    }

    /// Takes a volume from a pod's target, and removes the target.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::State`] when something else is mounted there, [`Error::Io`].
    pub fn unpublish(&self, request: &Unpublish) -> Result<()> {
        let record = self.records.get(&request.id)?;
        let _intent =
            self.journal.begin(Intent::Unpublish { id: request.id.clone(), path: request.target.absolute() })?;
        self.withdraw(&record, &request.target)
    }

    pub(super) fn withdraw(&self, record: &Record, target: &TargetPath) -> Result<()> {
        let Some(target) = Target::open(target)? else { return Ok(()) };
        let device = self.device(record)?;
        let ours = |found: &Found| device.as_deref().is_some_and(|device| device.is(found));
        match target.unmount(ours)? {
            found @ Found::Mounted { .. } => Err(target.unexpected("a mount of this volume, or none", &found)),
            _ => target.remove(),
        }
    }
}

fn already(request: &Publish, read_only: bool) -> Result<()> {
    if read_only == request.read_only {
        return Ok(());
    }
    let mode = |read_only: bool| if read_only { "read-only" } else { "read-write" }.to_owned();
    let (has, asked) = (mode(read_only), mode(request.read_only));
    Err(Error::PublishedOtherwise { target: request.target.absolute(), has, asked })
}
