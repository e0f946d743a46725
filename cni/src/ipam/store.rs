//! What a store of leases has to do, and one that only remembers.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::lease::{Lease, LeaseKey};

/// One line of history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub enum Record {
    /// The lease was made or changed.
    Put {
        /// As it is now.
        lease: Lease,
    },
    /// The lease was given up.
    Del {
        /// Whose it was; empty in a snapshot.
        key: LeaseKey,
        /// What it held.
        addresses: Vec<IpAddr>,
    },
    /// Where the search for free addresses stands.
    Cursor {
        /// The last one handed out of each CIDR.
        addresses: Vec<IpAddr>,
    },
}

/// Why leases could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("lease journal {path}: {doing}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A line is not what was written: nothing is guessed, a person decides.
    #[error("lease journal {path} line {line}: {reason}; restore the file, or move it away to start without leases")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process has the journal open.
    #[error("lease journal {path}: another process holds it")]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// An earlier write failed half-way and could not be taken back: nothing more is written until the next start.
    #[error("lease journal {path}: an earlier write failed and could not be undone")]
    Broken {
        /// The file.
        path: PathBuf,
    },
}

/// Keeps leases over restarts. After a method returns `Ok`, its effect survives the loss of power.
pub trait LeaseStore {
    /// The whole history, oldest first. Called once.
    ///
    /// # Errors
    /// [`StoreError`]; a damaged history is never shortened silently.
    fn load(&mut self) -> Result<Vec<Record>, StoreError>;
    /// Adds to the history.
    ///
    /// # Errors
    /// [`StoreError`]; then the history is as before.
    fn append(&mut self, record: &Record) -> Result<(), StoreError>;
    /// Replaces the history by a shorter one that says the same.
    ///
    /// # Errors
    /// [`StoreError`]; then the history is as before.
    fn rewrite(&mut self, records: &[Record]) -> Result<(), StoreError>;
    /// Records in the history.
    fn len(&self) -> usize;
    /// Whether there is no history.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A store for tests: remembers nothing over restarts, and fails when told to.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    /// The history.
    pub records: Vec<Record>,
    /// Makes every write fail.
    pub fail: bool,
}

impl MemoryStore {
    fn check(&self) -> Result<(), StoreError> {
        if self.fail {
            let source = std::io::ErrorKind::StorageFull.into();
            return Err(StoreError::Io { path: PathBuf::from("(memory)"), doing: "append", source });
        }
        Ok(())
    }
}

impl LeaseStore for MemoryStore {
    fn load(&mut self) -> Result<Vec<Record>, StoreError> {
        Ok(self.records.clone())
    }

    fn append(&mut self, record: &Record) -> Result<(), StoreError> {
        self.check()?;
        self.records.push(record.clone());
        Ok(())
    }

    fn rewrite(&mut self, records: &[Record]) -> Result<(), StoreError> {
        self.check()?;
        self.records = records.to_vec();
        Ok(())
    }

    fn len(&self) -> usize {
        self.records.len()
    }
}
