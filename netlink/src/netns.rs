//! Network namespaces: opening one by path, telling two apart, being in one for the length of a closure.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::{Error, Result};

/// Identity of a network namespace on this machine: two handles are of one namespace exactly when these are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    /// Device of the nsfs instance.
    pub dev: u64,
    /// Inode, as in `net:[4026531840]`.
    pub ino: u64,
}

/// An open network namespace; it lives at least as long as this handle. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<OwnedFd>,
    path: PathBuf,
}

impl Netns {
    /// Opens the namespace at `path` (a bind mount such as `/run/netns/x`, or `/proc/<pid>/ns/net`).
    ///
    /// # Errors
    /// [`Error::NetnsAbsent`] when nothing is there, [`Error::Netns`] when it is no namespace.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let file = File::open(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::NetnsAbsent { path: path.clone() },
            _ => Error::Netns { path: path.clone(), reason: e.to_string() },
        })?;
        Self::from_fd(file.into(), path)
    }

    /// Takes an open file descriptor; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Netns`] when it is no namespace.
    pub fn from_fd(fd: OwnedFd, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        match fstatfs(&fd) {
            Ok(fs) if fs.filesystem_type() == NSFS_MAGIC => Ok(Self { file: Arc::new(fd), path }),
            Ok(_) => Err(Error::Netns { path, reason: "not a namespace (a plain file)".into() }),
            Err(e) => Err(Error::Netns { path, reason: e.to_string() }),
        }
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// As [`Netns::open`], when /proc is not mounted.
    pub fn current() -> Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// As it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode.
    ///
    /// # Errors
    /// [`Error::Io`] from fstat.
    pub fn id(&self) -> Result<NetnsId> {
        let stat = nix::sys::stat::fstat(&self.file)
            .map_err(|e| Error::io(format!("stat network namespace {}", self.path.display()), e.into()))?;
        Ok(NetnsId { dev: stat.st_dev, ino: stat.st_ino })
    }

    /// The kernel's cookie of this namespace, as BPF programs see it (`bpf_get_netns_cookie`). Never reused.
    ///
    /// # Errors
    /// [`Error::Privilege`] without CAP_SYS_ADMIN, [`Error::Io`] on kernels before 5.14.
    pub async fn cookie(&self) -> Result<u64> {
        self.run(own_cookie).await
    }

    /// Runs `work` inside the namespace, on a thread of its own, and waits for it without blocking the runtime.
    ///
    /// # Errors
    /// [`Error::Privilege`] when the namespace may not be entered, and those of `work`.
    pub async fn run<T, F>(&self, work: F) -> Result<T>
    where
        F: FnOnce() -> Result<T> + Send + 'static,
        T: Send + 'static,
    {
        let (send, receive) = tokio::sync::oneshot::channel();
        let netns = self.clone();
        std::thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                let what = || format!("enter network namespace {}", netns.path.display());
                let result = setns(&netns.file, CloneFlags::CLONE_NEWNET)
                    .map_err(|e| Error::io(what(), e.into()))
                    .and_then(|()| work());
                // The caller gave up: there is nobody to tell.
                let _ = send.send(result);
            })
            .map_err(|e| Error::io("start a thread for another network namespace", e))?;
        receive.await.unwrap_or_else(|_| {
            Err(Error::Broken {
                what: format!("work in {}", self.path.display()),
                reason: "its thread panicked".into(),
            })
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The cookie of the calling thread's network namespace (`SO_NETNS_COOKIE`).
///
/// # Errors
/// [`Error::Io`] on kernels before 5.14.
pub fn own_cookie() -> Result<u64> {
    let io = |e: nix::Error| Error::io("read SO_NETNS_COOKIE", e.into());
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).map_err(io)?;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the socket is open, and the kernel writes at most `len` bytes into `cookie`, which is that long.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast::<libc::c_void>(),
            &raw mut len,
        )
    };
    nix::errno::Errno::result(answer).map_err(io)?;
    Ok(cookie)
}
