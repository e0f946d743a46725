//! Volumes as subvolumes of the pool's btrfs, each with a limit; snapshots are subvolumes that refuse writes.
//!
//! The limit is a subvolume's own. Whoever may write to one may make others in it, which the kernel holds to no limit, and
//! which no snapshot has; so no class can ask for more than `capacity: quota`, the default.
//!
//! One is made under a name of its own, marked, limited, and only then renamed and synced: a crash leaves nothing that
//! the intent does not name.

use std::fs::File;
use std::sync::Arc;

use super::pool::{MARGIN, Pool, nonce_of, set_nonce};
use super::tree::{Tree, lock, open_to_all, remains};
use super::{Attached, Backend, Features, GoOn, Locked, Made, New, Origin, Usage, damaged};
use crate::error::{Context, Error, Result};
use crate::model::{BackendKind, Nonce, Parameters, Record, Snapshot, SnapshotId, VolumeId};
use crate::state::Store;
use crate::sys::btrfs;

/// The btrfs backend.
#[derive(Clone, Debug)]
pub struct Subvolumes(Arc<Pool>);

impl Subvolumes {
    /// Subvolumes in this pool.
    ///
    /// # Errors
    /// [`Error::State`] when its filesystem is no btrfs, [`Error::Io`].
    pub fn new(pool: Arc<Pool>) -> Result<Self> {
        if !pool.is_btrfs() {
            let (what, found) = (pool.path().display().to_string(), "another filesystem".into());
            return Err(Error::State { what, expected: "a btrfs, for the btrfs backend".into(), found });
        }
        btrfs::count(pool.directory())
            .context(|| format!("count what subvolumes of {} take", pool.path().display()))?;
        Ok(Self(pool))
    }

    fn make(
        &self,
        name: &str,
        nonce: &Nonce,
        from: Option<&File>,
        finish: impl FnOnce(&File) -> Result<()>,
    ) -> Result<u64> {
        let (pool, new) = (&self.0, new_name(name));
        match from {
            Some(from) => btrfs::snapshot(pool.directory(), from, &new),
            None => btrfs::create(pool.directory(), &new),
        }
        .context(|| format!("make subvolume {name}"))?;
        let made =
            pool.open_directory(&new)?.ok_or_else(|| Error::io(format!("open {new}"), rustix::io::Errno::NOENT))?;
        set_nonce(&made, nonce, name)?;
        finish(&made)?;
        let number = btrfs::number(&made).context(|| format!("look at subvolume {name}"))?;
        pool.rename(&new, name)?;
        self.commit()?;
        Ok(number)
    }

    fn commit(&self) -> Result<()> {
        rustix::fs::syncfs(self.0.directory()).context(|| format!("sync {}", self.0.path().display()))
    }

    fn verified(&self, name: &str, id: &VolumeId, number: u64, nonce: &Nonce) -> Result<File> {
        let directory = self.0.open_directory(name)?;
        let directory = directory.ok_or_else(|| damaged(id, "subvolume", name, "no such directory in the pool"))?;
        let found = btrfs::number(&directory).context(|| format!("look at subvolume {name}"))?;
        if found != number {
            return Err(damaged(id, "subvolume", number, found));
        }
        if nonce_of(&directory, name)?.as_ref() != Some(nonce) {
            return Err(damaged(id, "nonce", "the record's", "another one, or none"));
        }
        Ok(directory)
    }

    fn volume(&self, record: &Record) -> Result<File> {
        self.verified(&name(&record.id), &record.id, record.inode, &record.nonce)
    }

    /// A volume of which a snapshot has everything.
    fn whole(&self, record: &Record) -> Result<File> {
        let directory = self.volume(record)?;
        let nested = btrfs::nested(&directory, record.inode);
        let nested = nested.context(|| format!("look for subvolumes in {}", record.id))?.len();
        if nested > 0 {
            let expected = "without subvolumes of its own, which a snapshot would lack".into();
            let found = format!("{nested} in it (btrfs subvolume list -o)");
            return Err(Error::State { what: format!("volume {}", record.id), expected, found });
        }
        Ok(directory)
    }

    fn picture(&self, snapshot: &Snapshot) -> Result<File> {
        self.verified(&snapshot_name(&snapshot.id), &snapshot.volume, snapshot.inode, &snapshot.nonce)
    }

    fn tree(&self, record: &Record) -> Result<Tree> {
        let (directory, name) = (self.volume(record)?, name(&record.id));
        Ok(Tree { directory, name, record: record.clone(), measure })
    }

    fn remove(&self, name: &str, nonce: &Nonce) -> Result<bool> {
        let new = new_name(name);
        // Only we make such a name, and only for this intent.
        let mut found = self.0.open_directory(&new)?.is_some();
        if found {
            btrfs::destroy(self.0.directory(), &new).context(|| format!("remove {new}"))?;
        }
        if let Some(directory) = self.0.open_directory(name)? {
            if nonce_of(&directory, name)?.as_ref() != Some(nonce) {
                let (expected, found) = ("the record's".to_owned(), "another one, or none".to_owned());
                return Err(Error::State { what: format!("the nonce of {name}"), expected, found });
            }
            let number = btrfs::number(&directory).context(|| format!("look at subvolume {name}"))?;
            drop(directory);
            btrfs::remove_nested(self.0.directory(), number).context(|| format!("remove what is nested in {name}"))?;
            btrfs::destroy(self.0.directory(), name).context(|| format!("remove {name}"))?;
            found = true;
        }
        if found {
            self.commit()?;
        }
        Ok(found)
    }
}

fn name(id: &VolumeId) -> String {
    format!("{id}.sub")
}

fn snapshot_name(id: &SnapshotId) -> String {
    format!("{id}.sub")
}

/// What something is called until it is whole.
fn new_name(name: &str) -> String {
    format!(".new-{name}")
}

fn measure(directory: &File, record: &Record) -> Option<Usage> {
    let (used, _) = btrfs::usage(directory)?;
    Some(Usage { total: record.size, used, available: record.size.saturating_sub(used) })
}

impl Backend for Subvolumes {
    fn kind(&self) -> BackendKind {
        BackendKind::Btrfs
    }

    fn store(&self) -> Store {
        Store::Pool
    }

    fn features(&self) -> Features {
        Features { snapshots: true, expand: true, modify: false, tracking: false }
    }

    fn free(&self) -> Result<u64> {
        Ok(self.0.free()?.saturating_sub(MARGIN))
    }

    fn admit(&self, parameters: &Parameters) -> Result<()> {
        if parameters.quota {
            return Ok(());
        }
        let expected = "quota, which holds who makes no subvolumes in his own: btrfs has nothing more";
        Err(Error::Invalid { field: "parameters.capacity", value: "enforced".into(), expected: expected.into() })
    }

    fn outstanding(&self, record: &Record) -> Result<u64> {
        // What it shares with a snapshot it may have to write anew.
        let own = self.0.open_directory(&name(&record.id))?.and_then(btrfs::usage).map_or(0, |(_, own)| own);
        Ok(record.growing.unwrap_or(record.size).saturating_sub(own))
    }

    fn create(&self, new: New<'_>, origin: Option<Origin<'_>>, _: GoOn<'_>) -> Result<Made> {
        let from = match origin {
            None => None,
            Some(Origin::Snapshot(snapshot)) => Some(self.picture(snapshot)?),
            Some(Origin::Volume(record)) => Some(self.whole(record)?),
        };
        let name = name(new.id);
        let inode = self.make(&name, new.nonce, from.as_ref(), |made| {
            if from.is_none() {
                open_to_all(made, &name)?;
            }
            btrfs::limit(made, new.size).context(|| format!("limit {name}"))
        })?;
        Ok(Made { inode, size: new.size })
    }

    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool> {
        self.remove(&name(id), nonce)
    }

    fn check(&self, record: &Record) -> Result<()> {
        self.volume(record).map(drop)
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

    fn remains(&self, record: &Record, _: Option<Error>) -> Result<Option<Box<dyn Attached>>> {
        remains(name(&record.id))
    }

    fn detach(&self, _: &Record) -> Result<()> {
        Ok(())
    }

    fn resize(&self, record: &Record, to: u64) -> Result<()> {
        btrfs::limit(self.volume(record)?, to).context(|| format!("limit volume {}", record.id))?;
        self.commit()
    }

    fn snapshots_at_once(&self) -> bool {
        true
    }

    fn snapshot(&self, record: &Record, id: &SnapshotId, nonce: &Nonce, _: GoOn<'_>) -> Result<u64> {
        let from = self.whole(record)?;
        let name = snapshot_name(id);
        self.make(&name, nonce, Some(&from), |made| btrfs::seal(made).context(|| format!("seal {name}")))
    }

    fn erase_snapshot(&self, id: &SnapshotId, nonce: &Nonce) -> Result<bool> {
        self.remove(&snapshot_name(id), nonce)
    }

    fn check_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        self.picture(snapshot).map(drop)
    }

    fn name(&self, id: &VolumeId) -> Option<String> {
        Some(name(id))
    }

    fn snapshot_name(&self, id: &SnapshotId) -> Option<String> {
        Some(snapshot_name(id))
    }
}
