use std::path::PathBuf;

/// Why the datapath could not be opened, switched or attached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent was built without the BPF toolchain.
    #[error("this build carries no BPF programs: run `hack/setup build` and build again")]
    NoObject,
    /// The kernel is older than what is supported.
    #[error("this kernel is Linux {found}, and {floor} or later is needed")]
    OldKernel {
        /// Its release.
        found: String,
        /// The oldest that is supported.
        floor: &'static str,
    },
    /// The kernel was built without something, or forbids it.
    #[error(
        "this kernel, Linux {release}, does not have {what}, which is needed (look for {option} in its configuration)"
    )]
    NoFeature {
        /// What is missing.
        what: &'static str,
        /// The option that brings it.
        option: &'static str,
        /// Its release.
        release: String,
    },
    /// This process lacks the right.
    #[error(
        "this process may not load BPF programs: it needs the capabilities CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN"
    )]
    NotPermitted,
    /// `--bpffs` is not a bpffs.
    #[error("--bpffs {path}: not a bpf file system (mount -t bpf bpf {path})")]
    NotBpffs {
        /// What was given.
        path: PathBuf,
    },
    /// A later build runs here.
    #[error("{path} was pinned by a newer build (layout version {found}, this build knows {ours}): leaving it running")]
    NewerLayout {
        /// The newer build's pins.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        ours: u32,
    },
    /// Something else is pinned under a name of ours.
    #[error("{path} is pinned, but is not our map: {what} is {found}, expected {expected}")]
    ForeignMap {
        /// The pin.
        path: PathBuf,
        /// The property that differs.
        what: &'static str,
        /// As found.
        found: String,
        /// As in the layout.
        expected: String,
    },
    /// The kernel refused a program or map.
    #[error("the kernel refused {what}: {reason}")]
    Refused {
        /// Which.
        what: String,
        /// Why, in the kernel's or verifier's words.
        reason: String,
    },
    /// A hook could not be attached.
    #[error("cannot attach {hook} to {to}: {reason}")]
    Attach {
        /// Which hook.
        hook: &'static str,
        /// Device or cgroup.
        to: String,
        /// Why.
        reason: String,
    },
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A table failed.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// Why a table refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// No room.
    #[error("{table} is full ({capacity} entries)")]
    Full {
        /// The map's name.
        table: &'static str,
        /// How many entries it holds.
        capacity: u32,
    },
    /// Try again.
    #[error("{table} is busy; try again")]
    Busy {
        /// The map's name.
        table: &'static str,
    },
    /// Anything else.
    #[error("{table}: {reason}")]
    Other {
        /// The map's name.
        table: &'static str,
        /// In the kernel's words.
        reason: String,
    },
}

impl TableError {
    /// Whether the same call may succeed later without anything being removed.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }

    pub(crate) fn from_io(table: &'static str, capacity: u32, error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => Self::Full { table, capacity },
            Some(libc::EBUSY | libc::EAGAIN) => Self::Busy { table },
            _ => Self::Other { table, reason: error.to_string() },
        }
    }
}
