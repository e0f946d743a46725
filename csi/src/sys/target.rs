//! Staging and target paths, opened so that no symbolic link below the kubelet's directory is ever followed.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::Dev;
use crate::error::{Context, Error, Result};
use crate::request::TargetPath;

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
/// A target belongs to the kubelet; pods reach it through their own mounts.
const DIRECTORY: Mode = Mode::from_raw_mode(0o750);
const FILE: Mode = Mode::from_raw_mode(0o660);
/// How long a mount may be busy before it counts as in use. Who only looks needs less than that, but on a machine that is busy
/// itself may not get to go on for a while.
const LOOKERS: Duration = Duration::from_secs(2);
/// The most mounts taken from one target. One is what there should be; older drivers stacked them.
const MAX_STACK: usize = 64;

/// A target: its parent, held open, and its name therein.
#[derive(Debug)]
pub struct Target {
    parent: OwnedFd,
    name: OsString,
    path: PathBuf,
}

/// What is at a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// A directory or file where nothing is mounted.
    Plain(FileType),
    /// The root of a mount.
    Mounted {
        /// The device of the filesystem that is mounted.
        fs: Dev,
        /// The mount's number.
        id: u64,
        /// The number of what is mounted of it.
        inode: u64,
        /// The device whose node is mounted; 0:0 for what is no device.
        node: Dev,
        /// Whether the mount refuses writes.
        read_only: bool,
    },
}

impl Target {
    /// Opens the parent of a path. `None` when it does not exist.
    ///
    /// # Errors
    /// [`Error::State`] for a symbolic link on the way, else [`Error::Io`].
    pub fn open(path: &TargetPath) -> Result<Option<Self>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path.root(), flags, Mode::empty());
        let root = root.context(|| format!("open {}", path.root().display()))?;
        let (name, parent) = match (path.relative().file_name(), path.relative().parent()) {
            (Some(name), Some(parent)) => (name.to_owned(), parent),
            _ => unreachable!("a TargetPath has at least one component"),
        };
        let parent = if parent.as_os_str().is_empty() {
            root
        } else {
            match rustix::fs::openat2(&root, parent, flags, Mode::empty(), RESOLVE) {
                Ok(parent) => parent,
                Err(Errno::NOENT) => return Ok(None),
                Err(error) => return Err(refused(path.absolute(), error)),
            }
        };
        Ok(Some(Self { parent, name, path: path.absolute() }))
    }

    /// Like [`Target::open`], for a path whose parent has to exist.
    ///
    /// # Errors
    /// [`Error::NotFound`], and as [`Target::open`].
    pub fn require(path: &TargetPath) -> Result<Self> {
        Self::open(path)?.ok_or_else(|| Error::NotFound { what: "the parent of", path: path.absolute() })
    }

    /// Looks at what is there, without following a link.
    ///
    /// # Errors
    /// [`Error::State`] for a symbolic link, else [`Error::Io`].
    pub fn look(&self) -> Result<Found> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat =
            match rustix::fs::statx(&self.parent, &self.name, flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => return Ok(Found::Nothing),
                Err(error) => return Err(self.io("look at", error)),
            };
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            let fs = Dev { major: stat.stx_dev_major, minor: stat.stx_dev_minor };
            let node = Dev { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor };
            let vfs = rustix::fs::fstatvfs(self.handle()?).map_err(|error| self.io("look at", error))?;
            let read_only = vfs.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY);
            return Ok(Found::Mounted { fs, id: stat.stx_mnt_id, inode: stat.stx_ino, node, read_only });
        }
        match kind {
            FileType::Symlink => Err(refused(self.path.clone(), Errno::LOOP)),
            kind => Ok(Found::Plain(kind)),
        }
    }

    /// A handle of what is there (`O_PATH`).
    ///
    /// # Errors
    /// As [`Target::look`].
    pub fn handle(&self) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat2(&self.parent, &self.name, flags, Mode::empty(), RESOLVE)
            .map_err(|error| refused(self.path.clone(), error))
    }

    /// The directory that is there, opened. `None` for what is none.
    ///
    /// # Errors
    /// As [`Target::look`].
    pub fn directory(&self) -> Result<Option<std::fs::File>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat2(&self.parent, &self.name, flags, Mode::empty(), RESOLVE) {
            Ok(directory) => Ok(Some(directory.into())),
            Err(Errno::NOTDIR) => Ok(None),
            Err(error) => Err(refused(self.path.clone(), error)),
        }
    }

    /// Makes an empty directory or file to mount on, where there is none yet.
    ///
    /// # Errors
    /// [`Error::State`] when something else is there, else [`Error::Io`].
    pub fn create(&self, directory: bool) -> Result<()> {
        let made = if directory {
            rustix::fs::mkdirat(&self.parent, &self.name, DIRECTORY)
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&self.parent, &self.name, flags, FILE).map(drop)
        };
        match made {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                let want = if directory { FileType::Directory } else { FileType::RegularFile };
                match self.look()? {
                    Found::Plain(kind) if kind == want => Ok(()),
                    found => Err(self.unexpected(&format!("a {want:?} to mount on"), &found)),
                }
            }
            Err(error) => Err(self.io("create", error)),
        }
    }

    /// Removes the empty directory or file that was mounted on.
    ///
    /// # Errors
    /// [`Error::Io`], also for a directory that is not empty.
    pub fn remove(&self) -> Result<()> {
        let flags = match self.look()? {
            Found::Nothing => return Ok(()),
            Found::Plain(FileType::Directory) => AtFlags::REMOVEDIR,
            Found::Plain(FileType::RegularFile) => AtFlags::empty(),
            found => return Err(self.unexpected("an empty directory or file", &found)),
        };
        rustix::fs::unlinkat(&self.parent, &self.name, flags).map_err(|error| self.io("remove", error))
    }

    /// Takes off the mounts for which `ours` says yes, from the top one down, and says what is there then.
    ///
    /// # Errors
    /// [`Error::Io`]: EBUSY while something still uses the mount.
    pub fn unmount(&self, ours: impl Fn(&Found) -> bool) -> Result<Found> {
        for _ in 0..MAX_STACK {
            let found = self.look()?;
            if !matches!(found, Found::Mounted { .. }) || !ours(&found) {
                return Ok(found);
            }
            // By way of the parent: a descriptor of the mount itself would keep it busy.
            let fd = self.parent.as_raw_fd();
            let path = PathBuf::from(format!("/proc/self/fd/{fd}")).join(&self.name);
            let start = Instant::now();
            while let Err(error) = rustix::mount::unmount(&path, UnmountFlags::NOFOLLOW) {
                // Who only looks, as a monitor does, or forks, is through in a moment.
                if error != Errno::BUSY || start.elapsed() > LOOKERS {
                    return Err(self.io("unmount", error));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Err(self.io("unmount", Errno::BUSY))
    }

    /// The whole path, for messages and mount tables.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// An error that says what was found instead of what was wanted.
    pub fn unexpected(&self, expected: &str, found: &Found) -> Error {
        Error::State {
            what: self.path.display().to_string(),
            expected: expected.into(),
            found: match found {
                Found::Nothing => "nothing".into(),
                Found::Plain(kind) => format!("a {kind:?}"),
                Found::Mounted { fs, node: Dev { major: 0, .. }, .. } => format!("a mount of device {fs}"),
                Found::Mounted { node, .. } => format!("a mount of the node of device {node}"),
            },
        }
    }

    fn io(&self, verb: &str, error: Errno) -> Error {
        Error::io(format!("{verb} {}", self.path.display()), error)
    }
}

fn refused(path: PathBuf, error: Errno) -> Error {
    match error {
        Errno::LOOP | Errno::XDEV | Errno::NOTDIR => Error::State {
            what: path.display().to_string(),
            expected: "a path without symbolic links".into(),
            found: error.to_string(),
        },
        error => Error::io(format!("open {}", path.display()), error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn target(root: &std::path::Path, name: &str) -> TargetPath {
        TargetPath::parse("target_path", root.join(name).to_str().unwrap(), root).unwrap()
    }

    #[test]
    fn a_link_on_the_way_or_at_the_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("kubelet"), dir.path().join("outside"));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir_all(outside.join("pod")).unwrap();
        symlink(&outside, root.join("link")).unwrap();
        for (path, opens) in [("link/pod/target", false), ("link/target", false), ("link", true)] {
            match Target::open(&target(&root, path)) {
                Err(error) => assert!(!opens && error.to_string().contains("symbolic"), "{error}"),
                Ok(opened) => {
                    let error = opened.unwrap().create(true).unwrap_err();
                    assert!(opens && error.to_string().contains("symbolic"), "{error}");
                }
            }
        }
        assert_eq!(std::fs::read_dir(outside.join("pod")).unwrap().count(), 0);
    }

    #[test]
    fn made_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = target(dir.path(), "a");
        let target = Target::require(&path).unwrap();
        assert_eq!(target.look().unwrap(), Found::Nothing);
        target.create(true).unwrap();
        target.create(true).unwrap();
        assert!(target.create(false).is_err());
        assert_eq!(target.look().unwrap(), Found::Plain(FileType::Directory));
        target.remove().unwrap();
        target.remove().unwrap();
        assert!(!path.absolute().exists());
    }

    #[test]
    fn what_holds_files_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::fs::write(dir.path().join("a/data"), "x").unwrap();
        assert!(Target::require(&target(dir.path(), "a")).unwrap().remove().is_err());
        assert!(dir.path().join("a/data").exists());
    }
}
