//! What can go wrong, named by what was asked.

use std::path::PathBuf;

use nix::errno::Errno;

/// Result of every verb.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused the request.
    #[error("{what}: {errno}{}", .note.as_ref().map(|n| format!(" (kernel: {n})")).unwrap_or_default())]
    Kernel {
        /// The request in words, e.g. `create veth kw12ab`.
        what: String,
        /// Its answer.
        errno: Errno,
        /// The kernel's extended acknowledgement, when it gave one.
        note: Option<String>,
    },
    /// The process may not do this: CAP_NET_ADMIN (or CAP_SYS_ADMIN for another namespace) is missing.
    #[error(
        "{what}: not permitted: needs CAP_NET_ADMIN in the target's user namespace, and CAP_SYS_ADMIN to enter another network namespace"
    )]
    Privilege {
        /// The request in words.
        what: String,
    },
    /// The link does not exist.
    #[error("link {name:?} does not exist")]
    NoLink {
        /// Its name, or `#index`.
        name: String,
    },
    /// A link of that name exists with other attributes than asked.
    #[error("link {name:?} exists with {field} = {found}, wanted {wanted}")]
    LinkDiffers {
        /// The link.
        name: String,
        /// The attribute that differs.
        field: &'static str,
        /// What the kernel has.
        found: String,
        /// What was asked.
        wanted: String,
    },
    /// A name that the kernel would not take as an interface name.
    #[error("interface name {0:?}: expected 1 to 15 bytes without '/', ':' or white space, and not \".\" or \"..\"")]
    BadName(String),
    /// The path names no network namespace.
    #[error("network namespace {path}: {reason}")]
    Netns {
        /// As given.
        path: PathBuf,
        /// Why it is none.
        reason: String,
    },
    /// The path of the network namespace does not exist.
    #[error("network namespace {path} does not exist")]
    NetnsAbsent {
        /// As given.
        path: PathBuf,
    },
    /// A file below /proc/sys could not be read or written.
    #[error("sysctl {key}: {doing}: {source}")]
    Sysctl {
        /// Key with slashes, e.g. `net/ipv6/conf/eth0/accept_dad`.
        key: String,
        /// `read` or `write "1"`.
        doing: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A system call outside netlink failed.
    #[error("{what}: {source}")]
    Io {
        /// The call in words.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The netlink socket or the thread that served it is gone.
    #[error("{what}: {reason}")]
    Broken {
        /// The request in words.
        what: String,
        /// What is known.
        reason: String,
    },
}

impl Error {
    /// The kernel's errno, when it was the kernel that refused.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Kernel { errno, .. } => Some(*errno),
            Error::Privilege { .. } => Some(Errno::EPERM),
            Error::Sysctl { source, .. } | Error::Io { source, .. } => source.raw_os_error().map(Errno::from_raw),
            _ => None,
        }
    }

    /// Whether the thing asked about was not there.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Error::NoLink { .. } | Error::NetnsAbsent { .. })
            || matches!(self.errno(), Some(Errno::ENODEV | Errno::ENOENT | Errno::ESRCH | Errno::EADDRNOTAVAIL))
    }

    pub(crate) fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        let what = what.into();
        if source.raw_os_error() == Some(libc::EPERM) { Error::Privilege { what } } else { Error::Io { what, source } }
    }
}
