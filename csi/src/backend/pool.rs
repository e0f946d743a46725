//! The pool directory, and the proof that it is the one that the state belongs to.
//!
//! What is in it carries a nonce, by which it is known again.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};
use crate::model::Nonce;
use crate::state::write_durably;

/// The nonce on storage. `trusted.` attributes are for privileged processes only.
const XATTR: &str = "trusted.keelway.nonce";
/// Bytes of the pool that are never promised: directories and extents need some too.
pub const MARGIN: u64 = 64 << 20;
/// `statfs` type of btrfs.
const BTRFS: i64 = 0x9123_683E;

/// The mark's name in the pool, and its counterpart's in the state directory.
const MARK: &str = ".keelway-pool";
const STATE: &str = "pool";

/// A directory of images, held open: it stays this one, whatever is mounted over its path later.
#[derive(Debug)]
pub struct Pool {
    fd: OwnedFd,
    path: PathBuf,
    btrfs: bool,
}

/// The nonce that a file or directory carries.
pub fn nonce_of(file: impl AsFd, name: &str) -> Result<Option<Nonce>> {
    let mut buffer = [0; 64];
    match rustix::fs::fgetxattr(file, XATTR, &mut buffer) {
        Ok(length) => Ok(String::from_utf8_lossy(&buffer[..length]).into_owned().try_into().ok()),
        Err(Errno::NODATA | Errno::RANGE) => Ok(None),
        Err(error) => Err(Error::io(format!("read {XATTR} of {name}"), error)),
    }
}

/// Marks a file or directory.
pub fn set_nonce(file: impl AsFd, nonce: &Nonce, name: &str) -> Result<()> {
    rustix::fs::fsetxattr(file, XATTR, nonce.as_str().as_bytes(), XattrFlags::empty())
        .context(|| format!("set {XATTR} of {name}"))
}

impl Pool {
    /// Opens the pool and compares its mark with the one in the state directory. Both are made when neither is there.
    /// A disk that was not mounted, or a state that was lost, is noticed here, before anything is made or removed.
    ///
    /// # Errors
    /// [`Error::State`] when the marks differ or one is missing; [`Error::Io`].
    pub fn open(path: &Path, state_dir: &Path, fresh: &Nonce) -> Result<Self> {
        std::fs::create_dir_all(path).context(|| format!("create {}", path.display()))?;
        let (ours, theirs) = (state_dir.join(STATE), path.join(MARK));
        match (read(&ours)?, read(&theirs)?) {
            (Some(ours), Some(theirs)) if ours == theirs => {}
            (Some(ours), None) => {
                return Err(Error::State {
                    what: theirs.display().to_string(),
                    expected: format!("pool {ours}"),
                    found: "no mark of a pool; is its disk mounted?".into(),
                });
            }
            // The pool's mark is written first: alone and without images it is from a start that was cut short.
            (None, Some(mark)) if images(path)? == 0 => write_durably(state_dir, STATE, mark.as_bytes())?,
            (found, Some(theirs_mark)) => {
                return Err(Error::State {
                    what: theirs.display().to_string(),
                    expected: found.map_or("no images, since the state is new".into(), |mark| format!("pool {mark}")),
                    found: format!("pool {theirs_mark}, which belongs to another state directory"),
                });
            }
            (None, None) => {
                write_durably(path, MARK, fresh.as_str().as_bytes())?;
                write_durably(state_dir, STATE, fresh.as_str().as_bytes())?;
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).context(|| format!("open {}", path.display()))?;
        let stat = rustix::fs::fstatfs(&fd).context(|| format!("statfs {}", path.display()))?;
        Ok(Self { fd, path: path.to_owned(), btrfs: stat.f_type == BTRFS })
    }

    /// Whether its filesystem is a btrfs.
    pub fn is_btrfs(&self) -> bool {
        self.btrfs
    }

    /// The directory.
    pub fn directory(&self) -> &OwnedFd {
        &self.fd
    }

    /// Where it is, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a directory of the pool. `None` when there is none.
    pub fn open_directory(&self, name: &str) -> Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(fd.into())),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(Error::io(format!("open {}", self.path.join(name).display()), error)),
        }
    }

    /// Gives what is in the pool another name, durably. There must be none of that name.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        let what = || format!("rename {} to {to}", self.path.join(from).display());
        rustix::fs::renameat_with(&self.fd, from, &self.fd, to, rustix::fs::RenameFlags::NOREPLACE).context(what)?;
        self.sync()
    }

    /// Makes names that came or went durable.
    pub fn sync(&self) -> Result<()> {
        rustix::fs::fsync(&self.fd).context(|| format!("sync {}", self.path.display()))
    }

    /// Opens a file of the pool for reading and writing. `None` when there is none.
    pub fn open_file(&self, name: &str) -> Result<Option<File>> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(fd.into())),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(Error::io(format!("open {}", self.path.join(name).display()), error)),
        }
    }

    /// A new file that has no name yet.
    pub fn unnamed(&self) -> Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, ".", flags, Mode::RUSR | Mode::WUSR);
        Ok(fd.context(|| format!("create a file in {}", self.path.display()))?.into())
    }

    /// Gives a file its name, durably. There must be none of that name.
    pub fn link(&self, file: &File, name: &str) -> Result<()> {
        let what = || format!("link {}", self.path.join(name).display());
        let fd = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
        rustix::fs::linkat(rustix::fs::CWD, fd, &self.fd, name, AtFlags::SYMLINK_FOLLOW).context(what)?;
        rustix::fs::fsync(&self.fd).context(what)
    }

    /// Removes a name, durably.
    pub fn unlink(&self, name: &str) -> Result<()> {
        let what = || format!("remove {}", self.path.join(name).display());
        rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()).context(what)?;
        rustix::fs::fsync(&self.fd).context(what)
    }

    /// Bytes that the pool's filesystem has for us.
    pub fn free(&self) -> Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.fd).context(|| format!("statfs {}", self.path.display()))?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    /// All names but the mark's.
    pub fn names(&self) -> Result<Vec<String>> {
        let what = || format!("list {}", self.path.display());
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).context(what)? {
            let name = entry.context(what)?.file_name().to_string_lossy().into_owned();
            if ![".", "..", MARK, "lost+found"].contains(&name.as_str()) {
                names.push(name);
            }
        }
        Ok(names)
    }
}

/// How much there is that looks like a volume's or a snapshot's storage.
fn images(path: &Path) -> Result<usize> {
    let list = std::fs::read_dir(path).context(|| format!("list {}", path.display()))?;
    let ours = |extension: &OsStr| ["img", "snap", "sub", "dir", "dev"].iter().any(|ours| extension == *ours);
    Ok(list.flatten().filter(|entry| Path::new(&entry.file_name()).extension().is_some_and(ours)).count())
}

fn read(path: &Path) -> Result<Option<String>> {
    let mut text = String::new();
    match File::open(path).and_then(|file| file.take(4096).read_to_string(&mut text)) {
        Ok(_) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("read {}", path.display()), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (pool, state) = (dir.path().join("pool"), dir.path().join("state"));
        std::fs::create_dir(&state).unwrap();
        (dir, pool, state)
    }

    fn nonce(n: u8) -> Nonce {
        Nonce::new([n; 16])
    }

    #[test]
    fn a_pool_and_its_state_know_each_other() {
        let (_dir, pool, state) = dirs();
        Pool::open(&pool, &state, &nonce(1)).unwrap();
        Pool::open(&pool, &state, &nonce(2)).unwrap();
        // A start that was cut short between the two marks.
        std::fs::remove_file(state.join(STATE)).unwrap();
        Pool::open(&pool, &state, &nonce(3)).unwrap();
    }

    #[test]
    fn a_disk_that_is_not_mounted_is_noticed() {
        let (_dir, pool, state) = dirs();
        Pool::open(&pool, &state, &nonce(1)).unwrap();
        std::fs::rename(&pool, pool.with_extension("away")).unwrap();
        let error = Pool::open(&pool, &state, &nonce(2)).unwrap_err();
        assert!(error.to_string().contains("is its disk mounted?"), "{error}");
    }

    #[test]
    fn a_lost_state_does_not_take_over_a_pool_with_images() {
        let (_dir, pool, state) = dirs();
        Pool::open(&pool, &state, &nonce(1)).unwrap();
        std::fs::write(pool.join("a.img"), "").unwrap();
        std::fs::remove_file(state.join(STATE)).unwrap();
        let error = Pool::open(&pool, &state, &nonce(2)).unwrap_err();
        assert!(error.to_string().contains("another state directory"), "{error}");
    }
}
