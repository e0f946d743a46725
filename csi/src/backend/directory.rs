//! Volumes as directories of the pool. What keeps one from growing beyond its size is at most a project quota, and whoever
//! owns a file may take it out of its project, where he is not in a user namespace. So that is not pretended: a class has to
//! say that a quota is enough (`capacity: quota`), or that nothing is needed (`capacity: unenforced`).

use std::ffi::CString;
use std::fs::File;
use std::sync::Arc;

use rustix::fs::{Mode, mkdirat};
use sha2::{Digest, Sha256};

use super::pool::{MARGIN, Pool, nonce_of, set_nonce};
use super::tree::{Tree, lock, open_to_all, remains};
use super::{Attached, Backend, Features, GoOn, Locked, Made, New, Origin, damaged, inode_of};
use crate::error::{Context, Error, Result};
use crate::model::{BackendKind, Nonce, Parameters, Record, VolumeId};
use crate::state::Store;
use crate::sys::{quota, remove};

/// The directory backend.
#[derive(Clone, Debug)]
pub struct Directories {
    pool: Arc<Pool>,
    /// Whether the pool's filesystem holds projects to their limits.
    quota: bool,
}

impl Directories {
    /// Directories in this pool.
    pub fn new(pool: Arc<Pool>) -> Self {
        let quota = quota::enforced(pool.directory());
        Self { pool, quota }
    }

    fn tree(&self, record: &Record) -> Result<Tree> {
        let (id, name) = (&record.id, name(&record.id));
        let directory = self.pool.open_directory(&name)?;
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

    /// The project of a volume's directory, when it has to have one.
    fn project(&self, record: &Record, directory: &File) -> Result<Option<u32>> {
        if !record.parameters.quota {
            return Ok(None);
        }
        match quota::project(directory).context(|| format!("ask for the project of {}", record.id))? {
            0 => Err(damaged(&record.id, "project", "one", "none")),
            _ if !self.quota => Err(Error::State {
                what: format!("the pool of volume {}", record.id),
                expected: "mounted with prjquota, which its class counts on".into(),
                found: "without".into(),
            }),
            project => Ok(Some(project)),
        }
    }

    /// A number that no project has.
    fn new_project(&self, id: &VolumeId) -> Result<u32> {
        let digest = Sha256::digest(id.as_str());
        let first = u32::from_be_bytes(digest[..4].try_into().expect("a digest has 32 bytes"));
        // 0 is everybody's, and the last is none.
        for project in (0..64).map(|n| first.wrapping_add(n) & 0x7FFF_FFFF).filter(|&project| project != 0) {
            if self.used(project)? == (0, 0) {
                return Ok(project);
            }
        }
        Err(Error::io("find a free project number", std::io::Error::other("64 in a row are taken")))
    }

    fn used(&self, project: u32) -> Result<(u64, u64)> {
        quota::usage(self.pool.directory(), project).context(|| format!("ask what project {project} takes"))
    }

    fn limit(&self, project: u32, bytes: u64) -> Result<()> {
        quota::limit(self.pool.directory(), project, bytes).context(|| format!("limit project {project}"))
    }

    /// Removes a directory with all that is in it, itself last.
    fn remove(&self, name: &str) -> Result<()> {
        if let Some(directory) = self.pool.open_directory(name)?
            && self.quota
            && let project @ 1.. = quota::project(&directory).context(|| format!("ask for the project of {name}"))?
        {
            self.limit(project, 0)?;
        }
        let path = CString::new(name).context(|| format!("remove {name}"))?;
        remove::tree(self.pool.directory(), &path).context(|| format!("remove {name}"))?;
        self.pool.sync()
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
        Ok(self.pool.free()?.saturating_sub(MARGIN))
    }

    fn outstanding(&self, record: &Record) -> Result<u64> {
        let size = record.growing.unwrap_or(record.size);
        if record.parameters.quota
            && let Some(directory) = self.pool.open_directory(&name(&record.id))?
            && let Some(project) = self.project(record, &directory)?
        {
            return Ok(size.saturating_sub(self.used(project)?.0));
        }
        // How much it holds, only a walk through it would tell: counted in full, beside what it has taken.
        Ok(size)
    }

    fn admit(&self, parameters: &Parameters) -> Result<()> {
        let refused = |value: &str, expected: &str| {
            Err(Error::Invalid { field: "parameters.capacity", value: value.into(), expected: expected.into() })
        };
        match (parameters.unenforced, parameters.quota) {
            (true, _) => Ok(()),
            (_, true) if self.quota => Ok(()),
            (_, true) => {
                refused("quota", "to be had here: the pool's filesystem is not one of XFS or ext4 with prjquota")
            }
            _ => refused(
                "enforced",
                "quota, which holds who does not evade it, or unenforced: a class of directories has to say that it knows",
            ),
        }
    }

    fn create(&self, new: New<'_>, _: Option<Origin<'_>>, _: GoOn<'_>) -> Result<Made> {
        let (name, beside) = (name(new.id), new_name(new.id));
        mkdirat(self.pool.directory(), &beside, Mode::from_raw_mode(0o755)).context(|| format!("create {name}"))?;
        let made: File = self
            .pool
            .open_directory(&beside)?
            .ok_or_else(|| Error::io(format!("open {beside}"), rustix::io::Errno::NOENT))?;
        open_to_all(&made, &name)?;
        if new.parameters.quota {
            let project = self.new_project(new.id)?;
            quota::assign(&made, project).context(|| format!("make {name} a project"))?;
            self.limit(project, new.size)?;
        }
        set_nonce(&made, new.nonce, &name)?;
        made.sync_all().context(|| format!("sync {name}"))?;
        let inode = inode_of(&made, &name)?;
        self.pool.rename(&beside, &name)?;
        Ok(Made { inode, size: new.size })
    }

    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool> {
        let (name, beside) = (name(id), new_name(id));
        // Only we make such a name, and only for this intent.
        if self.pool.open_directory(&beside)?.is_some() {
            self.remove(&beside)?;
            return Ok(true);
        }
        let Some(directory) = self.pool.open_directory(&name)? else { return Ok(false) };
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
        if let Some(project) = self.project(record, &tree.directory)? {
            // Said again before anybody can write: it may not have been on the disk when the power went.
            self.limit(project, record.growing.unwrap_or(record.size))?;
        }
        Ok(Box::new(tree))
    }

    fn attached(&self, record: &Record) -> Result<Option<Box<dyn Attached>>> {
        if self.pool.open_directory(&name(&record.id))?.is_none() {
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
        let tree = self.tree(record)?;
        // Without a project its size is a number that nothing holds it to.
        self.project(record, &tree.directory)?.map_or(Ok(()), |project| self.limit(project, to))
    }

    fn name(&self, id: &VolumeId) -> Option<String> {
        Some(name(id))
    }
}
