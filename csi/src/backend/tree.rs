//! What volumes have in common that are directories of the pool's filesystem, and have no device.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Attached, Locked, Usage};
use crate::error::{Context, Error, Result};
use crate::model::{MountOptions, Record, VolumeId};
use crate::sys::mount::{self, Detached};
use crate::sys::mountinfo::{self, Mount};
use crate::sys::target::Found;

/// A new volume's root is as mkfs makes it.
pub fn open_to_all(directory: &File, name: &str) -> Result<()> {
    directory.set_permissions(PermissionsExt::from_mode(0o755)).context(|| format!("set the mode of {name}"))
}

/// How much of a directory is taken.
pub type Measure = fn(&File, &Record) -> Option<Usage>;

/// A directory, held open.
pub struct Tree {
    /// The directory.
    pub directory: File,
    /// Its name in the pool.
    pub name: String,
    /// Its volume.
    pub record: Record,
    /// How much of it is taken.
    pub measure: Measure,
}

/// Locks a directory: a second stage, or a delete, has to wait.
pub fn lock(directory: &File, id: &VolumeId) -> Result<()> {
    match flock(directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(Error::Busy { what: format!("the directory of volume {id}") }),
        Err(error) => Err(Error::io(format!("lock the directory of {id}"), error)),
    }
}

/// What is left of a directory's volume when the directory is gone, or is another: its mounts.
struct Remains {
    name: String,
}

impl Remains {
    fn is_root(&self, root: &std::path::Path) -> bool {
        let root = root.to_string_lossy();
        // As the kernel shows what was removed.
        let root = root.strip_suffix("//deleted").unwrap_or(&root);
        root.rsplit('/').next() == Some(&self.name)
    }
}

/// The mounts of a volume whose directory of this name is gone, or is another. `None` when there are none.
pub fn remains(name: String) -> Result<Option<Box<dyn Attached>>> {
    let remains = Remains { name };
    let mounted = mountinfo::read()?.iter().any(|mount| remains.shows(mount));
    Ok(mounted.then(|| Box::new(remains) as Box<dyn Attached>))
}

impl Attached for Remains {
    fn is(&self, found: &Found) -> bool {
        let Found::Mounted { id, .. } = found else { return false };
        mountinfo::read().is_ok_and(|all| all.iter().any(|mount| mount.id == *id && self.shows(mount)))
    }

    fn shows(&self, mount: &Mount) -> bool {
        self.is_root(&mount.root)
    }

    fn node(&self) -> Result<Detached> {
        Err(gone(&self.name))
    }

    fn set_read_only(&self, _: bool) -> Result<()> {
        Err(gone(&self.name))
    }

    fn read_only(&self) -> Result<bool> {
        Err(gone(&self.name))
    }
}

fn gone(name: &str) -> Error {
    Error::io(format!("use {name}"), Errno::NODEV)
}

impl Tree {
    fn no_device<T>(&self) -> Result<T> {
        let what = format!("volume {}", self.record.id);
        Err(Error::State { what, expected: "a block device".into(), found: self.record.content.to_string() })
    }
}

impl Locked for Tree {
    fn wipe(&mut self) -> Result<()> {
        Ok(())
    }

    fn format(&mut self) -> Result<()> {
        Ok(())
    }

    fn mount(&mut self, options: &MountOptions, read_only: bool) -> Result<Detached> {
        mount::directory(&self.directory, options, read_only, self.name.as_ref())
    }

    fn attach(&mut self, _: bool) -> Result<()> {
        self.no_device()
    }
}

impl Attached for Tree {
    fn is(&self, found: &Found) -> bool {
        let Found::Mounted { fs, inode, .. } = found else { return false };
        let ours = self.directory.metadata();
        ours.is_ok_and(|ours| crate::sys::Dev::from_raw(ours.dev()) == *fs && ours.ino() == *inode)
    }

    fn shows(&self, mount: &Mount) -> bool {
        // The name is an id of ours, which nothing else on this machine has.
        mount.root.file_name().is_some_and(|name| *name == *self.name)
    }

    fn usage(&self) -> Result<Option<Usage>> {
        Ok((self.measure)(&self.directory, &self.record))
    }

    fn node(&self) -> Result<Detached> {
        self.no_device()
    }

    fn set_read_only(&self, _: bool) -> Result<()> {
        self.no_device()
    }

    fn read_only(&self) -> Result<bool> {
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_directory_is_known_by_its_mounts() {
        let remains = Remains { name: "kwl-1.dir".into() };
        for (root, ours) in [
            ("/pool/kwl-1.dir", true),
            ("/pool/kwl-1.dir//deleted", true),
            ("/kwl-1.dir", true),
            ("/pool/kwl-1.dir/deep", false),
            ("/pool/kwl-11.dir//deleted", false),
        ] {
            assert_eq!(remains.is_root(root.as_ref()), ours, "{root}");
        }
    }
}
