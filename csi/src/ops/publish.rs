//! Bringing a staged volume to a pod, and taking it from there.

use std::path::PathBuf;

use super::Volumes;
use crate::backend::Attached;
use crate::error::{Error, Result};
use crate::model::{Access, Content, MountOptions, Record, State, Stop, Use};
use crate::request::{Publish, TargetPath, Unpublish};
use crate::state::Intent;
use crate::sys::target::{Found, Target};
use crate::sys::{group, mount};

impl Volumes {
    /// Mounts a staged volume, or its device's node, at a pod's target.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::Invalid`] for a mount option; [`Error::State`] for another kind of volume, when it
    /// is not staged there or something else is at the target; [`Error::UsedOtherwise`]; [`Error::InUse`] for a second
    /// target where not all have the mode for several; [`Error::Io`].
    pub fn publish(&self, request: &Publish) -> Result<()> {
        let record = self.records.get(&request.id)?;
        request.usage.fits_node(record.content, &record.id)?;
        let options = request.usage.options(record.content)?;
        let asked = request.wanted(&options);
        let device = self.staged(&record, request)?;
        let target = Target::require(&request.target)?;
        match target.look()? {
            found @ Found::Mounted { read_only, .. } if device.is(&found) => {
                let read_only = if request.block() { device.read_only()? } else { read_only };
                // One that an older driver published: of it only this can be seen.
                let seen = Use { read_only, ..asked.clone() };
                let has = self.uses.at(&record.id, &asked.path).filter(|has| has.stop != Stop::Staged);
                return agree("target_path", &asked, &has.unwrap_or(seen));
            }
            found @ Found::Mounted { .. } => return Err(target.unexpected("nothing mounted yet", &found)),
            _ => {}
        }
        let others = self.targets(device.as_ref(), &request.staging)?;
        self.admit(&record, request, &others)?;
        let _intent =
            self.journal.begin(Intent::Publish { id: request.id.clone(), path: request.target.absolute() })?;
        self.uses.put(&record.id, asked.clone())?;
        let done = self.bring(&record, request, device.as_ref(), &target, &options, &others);
        if done.is_err() {
            self.uses.remove(&record.id, &asked.path);
        }
        done
    }

    fn bring(
        &self,
        record: &Record,
        request: &Publish,
        device: &dyn Attached,
        target: &Target,
        options: &MountOptions,
        others: &[PathBuf],
    ) -> Result<()> {
        target.create(!request.block())?;
        let mount = if request.block() {
            self.protect(record, device, request.read_only, others)?;
            device.node()?
        } else {
            let staging = Target::require(&request.staging)?;
            if let (Some(gid), Some(root)) = (request.usage.group.filter(|_| !request.read_only), staging.directory()?)
            {
                group::give(&root, gid, &|| self.probes.goes_on(record.id.as_str()))?;
            }
            mount::directory(staging.handle()?, options, request.read_only, staging.path())?
        };
        mount.attach(target.handle()?, target.path())
    }

    /// Whether the volume may have one more target. Several are for those only who all say so, by SINGLE_NODE_MULTI_WRITER:
    /// that is how a kubelet that was told of this mode asks for ReadWriteOnce. ReadWriteOncePod is SINGLE_NODE_SINGLE_WRITER,
    /// also when another PersistentVolume of the same volume has the other mode.
    fn admit(&self, record: &Record, request: &Publish, others: &[PathBuf]) -> Result<()> {
        let staging = request.staging.absolute();
        let staged = self.uses.of(&record.id).into_iter().find(|used| used.is_staged(&staging));
        if !request.read_only && !request.block() && staged.is_some_and(|used| used.read_only) {
            let (what, found) = (format!("volume {}", record.id), "read-only".to_owned());
            return Err(Error::State { what, expected: "staged so that it can be written to".into(), found });
        }
        let alone = |path: &PathBuf| {
            let has = self.uses.at(&record.id, path).map(|used| used.access);
            let both = [Some(request.usage.access), has];
            both.into_iter().flatten().any(|access| access != Access::MultiWriter)
        };
        match others.iter().find(|path| alone(path)) {
            None => Ok(()),
            Some(other) => {
                let by = format!("it is at {}; only SINGLE_NODE_MULTI_WRITER is for several targets", other.display());
                Err(Error::InUse { id: record.id.clone(), by })
            }
        }
    }

    /// Whether a path is where a block volume is staged: nothing is to be seen there.
    pub(super) fn is_staged_block(&self, record: &Record, path: &TargetPath) -> bool {
        let path = path.absolute();
        record.content == Content::Raw && self.uses.of(&record.id).iter().any(|used| used.is_staged(&path))
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
        if request.block() {
            if !self.is_staged_block(record, &request.staging) {
                return Err(not_staged("a block volume that is not".into()));
            }
        } else {
            let staging = Target::open(&request.staging)?.ok_or_else(|| not_staged("no such path".into()))?;
            match staging.look()? {
                found if device.is(&found) => {}
                found => return Err(staging.unexpected("the volume staged there", &found)),
            }
        }
        Ok(device)
    }

    /// A node has no read-only mounts: all who have the device must agree.
    fn protect(&self, record: &Record, device: &dyn Attached, read_only: bool, others: &[PathBuf]) -> Result<()> {
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
        let path = target.absolute();
        let Some(target) = Target::open(target)? else {
            self.uses.remove(&record.id, &path);
            return Ok(());
        };
        let device = self.remains(record)?;
        let ours = |found: &Found| device.as_deref().is_some_and(|device| device.is(found));
        if let found @ Found::Mounted { .. } = target.unmount(ours)? {
            return Err(target.unexpected("a mount of this volume, or none", &found));
        }
        self.uses.remove(&record.id, &path);
        target.remove()
    }
}

/// The same call once more changes nothing; another one for the same path is refused.
pub(super) fn agree(field: &'static str, asked: &Use, has: &Use) -> Result<()> {
    if asked.agrees(has) {
        return Ok(());
    }
    let (path, has, asked) = (asked.path.clone(), has.describe(), asked.describe());
    Err(Error::UsedOtherwise { field, path, has, asked })
}
