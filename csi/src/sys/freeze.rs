//! Filesystems held still for a snapshot, and let go again whatever happens to the driver.
//!
//! The kernel keeps a filesystem frozen when the process that froze it is gone. So a helper, this same program, freezes
//! it, and lets it go when the driver says so, when the driver's end of their socket closes, or when it took too long.
//! Should both be killed at once, the intent in the journal makes the next start of the driver let it go.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};

/// What the program is told, as its only argument, to be the helper.
pub const HELPER: &str = "hold-still";
/// The longest that a filesystem is held still: its writers wait meanwhile.
pub const LONGEST: Duration = Duration::from_secs(20);

// linux/fs.h.
const FIFREEZE: u64 = 0xC004_5877;
const FITHAW: u64 = 0xC004_5878;

mod raw {
    #![allow(missing_docs)]
    use super::*;
    nix::ioctl_none_bad!(freeze, FIFREEZE);
    nix::ioctl_none_bad!(thaw, FITHAW);
}

/// A filesystem that is held still.
#[derive(Debug)]
pub struct Frozen {
    root: File,
    helper: Child,
    socket: UnixStream,
    since: Instant,
    /// Whether it may be us who hold it: not when the helper says that it does not.
    ours: bool,
}

impl Frozen {
    /// Writes everything of a filesystem to its device and holds it still. `root` is any directory of it.
    ///
    /// # Errors
    /// [`Error::Io`]: EBUSY when somebody else holds it still.
    pub fn new(root: File) -> Result<Self> {
        let what = || "hold a filesystem still";
        let (socket, theirs) = UnixStream::pair().context(what)?;
        let helper = Command::new("/proc/self/exe")
            .arg(HELPER)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(root.try_clone().context(what)?)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .context(what)?;
        let mut frozen = Self { root, helper, socket, since: Instant::now(), ours: true };
        frozen.socket.set_read_timeout(Some(LONGEST)).context(what)?;
        let mut answer = [0];
        // With a time limit on it a read is not taken up again by itself after a signal; `read_exact` does so.
        match frozen.socket.read_exact(&mut answer) {
            Ok(()) if answer == *b"F" => Ok(frozen),
            Ok(()) if answer == *b"B" => {
                frozen.ours = false;
                Err(Error::io("hold a filesystem still: somebody else does", rustix::io::Errno::BUSY))
            }
            Ok(_) => {
                frozen.ours = false;
                Err(Error::io("hold a filesystem still", std::io::Error::other("the helper could not")))
            }
            Err(error) => Err(Error::io("hold a filesystem still", error)),
        }
    }

    /// Whether there is time left.
    ///
    /// # Errors
    /// That there is none.
    pub fn go_on(&self) -> std::io::Result<()> {
        if self.since.elapsed() < LONGEST {
            return Ok(());
        }
        let text = format!("the filesystem may be held still for {} s only", LONGEST.as_secs());
        Err(std::io::Error::new(std::io::ErrorKind::TimedOut, text))
    }

    /// Lets the filesystem go.
    ///
    /// # Errors
    /// [`Error::Io`] when it was let go earlier than now: what was read meanwhile is of no one moment.
    pub fn thaw(mut self) -> Result<()> {
        let what = || "let a filesystem go";
        self.socket.write_all(b"T").context(what)?;
        let mut answer = [0];
        match self.socket.read_exact(&mut answer) {
            Ok(()) if answer == *b"T" => Ok(()),
            _ => Err(Error::io(what(), std::io::Error::other("it was not held still to the end"))),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Its end of the socket closes: if it has not yet let go, it does now. The helper is waited for, and where it
        // was killed we do it.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let _ = self.helper.wait();
        if self.ours {
            let _ = thaw(&self.root);
        }
    }
}

/// Lets a filesystem go. `false` when nobody held it still.
///
/// # Errors
/// The system's.
pub fn thaw(root: &File) -> std::io::Result<bool> {
    // SAFETY: takes no argument and writes no memory of ours.
    match unsafe { raw::thaw(root.as_raw_fd()) } {
        Ok(_) => Ok(true),
        Err(nix::Error::EINVAL | nix::Error::ENOTTY | nix::Error::EOPNOTSUPP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The helper: standard input is a directory of the filesystem, standard output the socket. Returns its exit code.
pub fn helper() -> i32 {
    // Both are opened by number, for they are no files that the standard library would buffer.
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    let (Ok(root), Ok(socket)) = (stdin.as_fd().try_clone_to_owned(), stdout.as_fd().try_clone_to_owned()) else {
        return 1;
    };
    let (root, mut socket) = (File::from(root), UnixStream::from(socket));
    // SAFETY: takes no argument and writes no memory of ours.
    let frozen = match unsafe { raw::freeze(root.as_raw_fd()) } {
        Ok(_) => true,
        Err(error) => {
            let _ = socket.write_all(if error == nix::Error::EBUSY { b"B" } else { b"E" });
            return 1;
        }
    };
    let mut told = [0];
    let asked = socket.write_all(b"F").is_ok()
        && socket.set_read_timeout(Some(LONGEST)).is_ok()
        && socket.read_exact(&mut told).is_ok();
    // Only when it was held still to this moment does the driver hear so.
    let thawed = frozen && thaw(&root).unwrap_or(false);
    if asked && thawed {
        let _ = socket.write_all(b"T");
    }
    i32::from(!thawed)
}
