//! What can go wrong, and the one place that turns it into a gRPC status.

use std::path::PathBuf;

use tonic::{Code, Status};

use crate::model::VolumeId;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a request was not carried out. [`Error::code`] says what the caller is told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A required field of a request is empty.
    #[error("{field} is required")]
    Missing {
        /// The field's name in the interface definition.
        field: &'static str,
    },
    /// A field holds what it must not.
    #[error("{field}: {value:?} is not {expected}")]
    Invalid {
        /// The field's name in the interface definition.
        field: &'static str,
        /// What came.
        value: String,
        /// What would have been right.
        expected: String,
    },
    /// A StorageClass parameter that this driver does not know.
    #[error("parameters: unknown key {key:?}; known keys are {known}")]
    UnknownParameter {
        /// The key as it came.
        key: String,
        /// The keys that there are.
        known: String,
    },
    /// A size that cannot be served.
    #[error("capacity_range: {wanted} bytes cannot be served: {why}")]
    OutOfRange {
        /// Bytes asked for.
        wanted: u64,
        /// Which bound it misses.
        why: String,
    },
    /// No volume has this id; also the answer to an id that this driver cannot have issued.
    #[error("volume_id: no volume {id:?} here")]
    NoSuchVolume {
        /// The id as it came, cut to a printable length.
        id: String,
    },
    /// No snapshot has this id; also the answer to an id that this driver cannot have issued.
    #[error("snapshot_id: no snapshot {id:?} here")]
    NoSuchSnapshot {
        /// The id as it came, cut to a printable length.
        id: String,
    },
    /// What a volume is to be made from is not on this node, and may be on another.
    #[error("volume_content_source: no {what} {id} on this node; what is made from it has to be on the same node")]
    SourceElsewhere {
        /// Volume or snapshot.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// No group of snapshots has this id.
    #[error("group_snapshot_id: no group {id:?} here")]
    NoSuchGroup {
        /// The id as it came, cut to a printable length.
        id: String,
    },
    /// The volume's backend cannot do what is asked for.
    #[error("{what}: the {backend} backend cannot; {why}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// The backend.
        backend: &'static str,
        /// Why, or what can.
        why: String,
    },
    /// A call that is not offered, since no backend that is served could carry it out.
    #[error("{call} is not offered: {why}")]
    NotOffered {
        /// The call.
        call: &'static str,
        /// What would offer it.
        why: &'static str,
    },
    /// A volume or snapshot of this name exists and differs from what is asked for.
    #[error("name: {name:?} exists with {has}, asked for was {asked}")]
    Exists {
        /// The volume's name.
        name: String,
        /// What it has.
        has: String,
        /// What was asked for.
        asked: String,
    },
    /// Another operation on the volume is under way.
    #[error("an operation on {what} is under way; try again")]
    Busy {
        /// The volume's id or name.
        what: String,
    },
    /// A volume is mounted or attached where it must not be.
    #[error("volume {id} is in use: {by}")]
    InUse {
        /// The volume.
        id: VolumeId,
        /// By what.
        by: String,
    },
    /// The request fits the interface, but not the state that the volume or the target is in.
    #[error("{what}: expected {expected}, found {found}")]
    State {
        /// What was looked at.
        what: String,
        /// What it had to be.
        expected: String,
        /// What it was.
        found: String,
    },
    /// A volume is already staged or published at the path, with other properties.
    #[error("{field}: {path} has the volume with {has}, asked for was {asked}")]
    UsedOtherwise {
        /// The path's name in the interface definition.
        field: &'static str,
        /// The path.
        path: PathBuf,
        /// How it is used there.
        has: String,
        /// What was asked for.
        asked: String,
    },
    /// The pool cannot hold the volume.
    #[error("the pool has {available} bytes available, asked for were {wanted}")]
    NoSpace {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes that are neither used nor promised.
        available: u64,
    },
    /// The volume is asked for elsewhere than on this node.
    #[error("accessibility_requirements: no requisite topology is {key}={node}")]
    WrongTopology {
        /// The topology key of this driver.
        key: String,
        /// This node.
        node: String,
    },
    /// A list token that this driver did not issue.
    #[error("starting_token: {token:?} was not issued by this driver")]
    BadToken {
        /// The token.
        token: String,
    },
    /// What is on disk is not what the volume's record says; nothing was touched.
    #[error("volume {id} is damaged: {what}: expected {expected}, found {found}")]
    Damaged {
        /// The volume.
        id: VolumeId,
        /// What was compared.
        what: &'static str,
        /// What the record says.
        expected: String,
        /// What there is.
        found: String,
    },
    /// Something a path needs is not there.
    #[error("{what} {path}: not found")]
    NotFound {
        /// What was looked for.
        what: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// The storage does not answer; only its own callers wait for it.
    #[error("{what} does not answer: a call has waited for it for {seconds} s now")]
    Hung {
        /// The volume, or what volumes are stored in.
        what: String,
        /// For how long.
        seconds: u64,
    },
    /// mkfs, or another program of a filesystem, did not succeed.
    #[error("{program} failed on volume {id}: {output}")]
    Mkfs {
        /// The program.
        program: &'static str,
        /// The volume.
        id: VolumeId,
        /// Its exit code, when it ended by itself.
        code: Option<i32>,
        /// The end of what it said.
        output: String,
    },
    /// A command of LVM did not succeed.
    #[error("{command} failed: {output}")]
    Lvm {
        /// The command.
        command: &'static str,
        /// How it ended, and the end of what it said.
        output: String,
    },
    /// A file of ours, or what a program reports, cannot be understood.
    #[error("{path}: {why}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the path or device.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl Error {
    /// An error of the system, with what was tried.
    pub fn io(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }

    /// The code that the interface asks for.
    pub fn code(&self) -> Code {
        match self {
            Self::Missing { .. } | Self::Invalid { .. } | Self::UnknownParameter { .. } => Code::InvalidArgument,
            Self::OutOfRange { .. } => Code::OutOfRange,
            Self::NoSuchVolume { .. }
            | Self::NoSuchSnapshot { .. }
            | Self::NoSuchGroup { .. }
            | Self::NotFound { .. } => Code::NotFound,
            Self::Exists { .. } | Self::UsedOtherwise { .. } => Code::AlreadyExists,
            Self::NotOffered { .. } => Code::Unimplemented,
            Self::Busy { .. } | Self::BadToken { .. } => Code::Aborted,
            Self::InUse { .. } | Self::State { .. } | Self::Unsupported { .. } => Code::FailedPrecondition,
            Self::Hung { .. } => Code::Unavailable,
            // The provisioner then gives the claim back to the scheduler.
            Self::NoSpace { .. } | Self::WrongTopology { .. } | Self::SourceElsewhere { .. } => Code::ResourceExhausted,
            Self::Damaged { .. } => Code::DataLoss,
            Self::Io { source, .. } if is_full(source.kind()) => Code::ResourceExhausted,
            Self::Lvm { output, .. } if lvm_is_full(output) => Code::ResourceExhausted,
            Self::Mkfs { .. } | Self::Lvm { .. } | Self::Corrupt { .. } | Self::Io { .. } => Code::Internal,
        }
    }
}

fn is_full(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(kind, StorageFull | QuotaExceeded)
}

/// Whether LVM says that a group or a thin pool has no room for what was asked of it: somebody else took it meanwhile. It
/// has no exit code for that; its messages are in C's locale.
fn lvm_is_full(output: &str) -> bool {
    let output = output.to_lowercase();
    ["insufficient free space", "insufficient suitable", "free space in thin pool", "free space in pool"]
        .iter()
        .any(|said| output.contains(said))
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// Adds to a system error what was tried.
pub(crate) trait Context<T> {
    /// `what` is only made when there is an error.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| Error::io(what(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_room_is_said_as_such() {
        let lvm = |output: &str| Error::Lvm { command: "lvcreate", output: output.into() }.code();
        for full in [
            "exit status: 5: Volume group \"data\" has insufficient free space (0 extents): 4 required.",
            "exit status: 5: Insufficient free space: 25 extents needed, but only 3 available",
            "exit status: 5: Insufficient suitable allocatable extents for logical volume kwl-1: 4 more required",
            "exit status: 5: Cannot create new thin volume, free space in thin pool data/pool reached threshold.",
        ] {
            assert_eq!(lvm(full), Code::ResourceExhausted, "{full}");
        }
        assert_eq!(lvm("exit status: 5: Volume group \"data\" not found"), Code::Internal);
        for (errno, code) in [
            (libc::ENOSPC, Code::ResourceExhausted),
            (libc::EDQUOT, Code::ResourceExhausted),
            (libc::EIO, Code::Internal),
        ] {
            assert_eq!(Error::io("write", std::io::Error::from_raw_os_error(errno)).code(), code, "{errno}");
        }
    }
}
