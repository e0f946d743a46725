//! Volumes as directories of the pool. Nothing keeps one from growing beyond its size, so that a class has to say that it
//! knows. (A project quota would, but whoever owns a file may take it out of its project; so it is not pretended.)

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{Mode, mkdirat};

use super::pool::{MARGIN, Pool, nonce_of, set_nonce};
use super::tree::{Tree, lock, open_to_all};
use super::{Attached, Backend, Features, GoOn, Locked, Made, New, Origin, damaged, inode_of};
use crate::error::{Context, Error, Result};
use crate::model::{BackendKind, Nonce, Parameters, Record, VolumeId};
use crate::state::Store;

/// The directory backend.
#[derive(Clone, Debug)]
pub struct Directories(Arc<Pool>);

impl Directories {
    /// Directories in this pool.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self(pool)
    }

    fn tree(&self, record: &Record) -> Result<Tree> {
        let (id, name) = (&record.id, name(&record.id));
        let directory = self.0.open_directory(&name)?;
        let directory = directory.ok_or_else(|| damaged(id, "directory", &name, "no such directory in the pool"))?;
        let inode = inode_of(&directory, &name)?;
        if inode != record.inode {
            return Err(damaged(id, "inode", record.inode, inode));
        }
        if nonce_of(&directory, &name)?.as_ref() != Some(&record.nonce) {
            return Err(damaged(id, "nonce", "the record's", "another one, or none"));
        }
        // What there is of the pool is what it can have.
        Ok(Tree { directory, name, record: record.clone(), measure: |_, _| None })
    }

    /// Removes a directory with all that is in it, itself last.
    fn remove(&self, name: &str) -> Result<()> {
        let path = format!("/proc/self/fd/{}/{name}", self.0.directory().as_raw_fd());
        // Works by descriptors, so that no link that a pod made leads it elsewhere.
        std::fs::remove_dir_all(path).context(|| format!("remove {name}"))?;
        self.0.sync()
    }
}

fn name(id: &VolumeId) -> String {
    format!("{id}.dir")
}

/// What one is called until it is whole.
fn new_name(id: &VolumeId) -> String {
    format!(".new-{id}.dir")
}

impl Backend for Directories {
    fn kind(&self) -> BackendKind {
        BackendKind::Directory
    }

    fn store(&self) -> Store {
        Store::Pool
    }

    fn features(&self) -> Features {
        Features { snapshots: false, expand: true, modify: false, tracking: false }
    }

    fn free(&self) -> Result<u64> {
        Ok(self.0.free()?.saturating_sub(MARGIN))
    }

    fn outstanding(&self, record: &Record) -> Result<u64> {
        // How much it holds, only a walk through it would tell: counted in full, beside what it has taken.
        Ok(record.growing.unwrap_or(record.size))
    }

    fn admit(&self, parameters: &Parameters) -> Result<()> {
        if parameters.unenforced {
            return Ok(());
        }
        Err(Error::Invalid {
            field: "parameters.capacity",
            value: "enforced".into(),
            expected: "unenforced: nothing keeps a directory from growing beyond its size, and its class has to say that it knows".into(),
        })
    }

    fn create(&self, new: New<'_>, _: Option<Origin<'_>>, _: GoOn<'_>) -> Result<Made> {
        let (name, beside) = (name(new.id), new_name(new.id));
        mkdirat(self.0.directory(), &beside, Mode::from_raw_mode(0o755)).context(|| format!("create {name}"))?;
        let made: File = self
            .0
            .open_directory(&beside)?
            .ok_or_else(|| Error::io(format!("open {beside}"), rustix::io::Errno::NOENT))?;
        open_to_all(&made, &name)?;
        set_nonce(&made, new.nonce, &name)?;
        made.sync_all().context(|| format!("sync {name}"))?;
        let inode = inode_of(&made, &name)?;
        self.0.rename(&beside, &name)?;
        Ok(Made { inode, size: new.size })
    }

    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool> {
        let (name, beside) = (name(id), new_name(id));
        // Only we make such a name, and only for this intent.
        if self.0.open_directory(&beside)?.is_some() {
            self.remove(&beside)?;
            return Ok(true);
        }
        let Some(directory) = self.0.open_directory(&name)? else { return Ok(false) };
        if nonce_of(&directory, &name)?.as_ref() != Some(nonce) {
            return Err(damaged(id, "nonce", "the record's", "another one, or none"));
        }
        self.remove(&name)?;
        Ok(true)
    }

    fn check(&self, record: &Record) -> Result<()> {
        self.tree(record).map(drop)
    }

    fn lock(&self, record: &Record) -> Result<Box<dyn Locked>> {
        let tree = self.tree(record)?;
        lock(&tree.directory, &record.id)?;
        Ok(Box::new(tree))
    }

    fn attached(&self, record: &Record) -> Result<Option<Box<dyn Attached>>> {
        if self.0.open_directory(&name(&record.id))?.is_none() {
            return Ok(None);
        }
        Ok(Some(Box::new(self.tree(record)?)))
    }

    fn detach(&self, _: &Record) -> Result<()> {
        Ok(())
    }

    fn resize(&self, record: &Record, _: u64) -> Result<()> {
        // Its size is a number that nothing holds it to.
        self.check(record)
    }

    fn name(&self, id: &VolumeId) -> Option<String> {
        Some(name(id))
    }
}
