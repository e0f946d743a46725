//! DELs that came while the agent was away: one file each, until the agent is back and has done them.
//!
//! The plugin writes with [`record`]; the agent reads with [`list`] and removes with [`remove`] what it has done, at its
//! start before it serves, and again once it serves (a DEL may just have missed it). The plugin clears an attachment's
//! own entry before it asks for an ADD of the same name, so that an old DEL never removes a new attachment.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::install::{sync_dir, write_atomically};
use crate::lease::LeaseKey;

/// Where they wait, below the agent's state directory.
pub const DIRECTORY: &str = "cni-del";
/// How many DELs wait at most; one more is told to try again later.
pub const CAPACITY: usize = 16_384;

/// A DEL that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PendingDel {
    /// The CNI network.
    pub network: String,
    /// Which attachment.
    pub key: LeaseKey,
    /// When the runtime asked, in seconds since 1970.
    pub asked: u64,
}

/// Why the queue could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PendingError {
    /// A system call failed.
    #[error("queue of DELs {path}: {doing}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// It holds as many as it may.
    #[error("queue of DELs {path}: full ({CAPACITY} entries): is the agent coming back?")]
    Full {
        /// The directory.
        path: PathBuf,
    },
    /// An entry is not what was written.
    #[error("queue of DELs: entry {path}: {reason}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Writes the entry into `directory`; it survives the loss of power from here on. Repeating it is fine.
///
/// # Errors
/// [`PendingError::Full`], [`PendingError::Io`].
pub fn record(directory: &Path, entry: &PendingDel) -> Result<(), PendingError> {
    std::fs::create_dir_all(directory).map_err(fail(directory, "create"))?;
    let path = path_of(directory, &entry.network, &entry.key);
    if !path.exists() && entries(directory)?.len() >= CAPACITY {
        return Err(PendingError::Full { path: directory.to_owned() });
    }
    let text = serde_json::to_string(entry).expect("an entry has string keys only");
    write_atomically(&path, text.as_bytes(), 0o600).map_err(fail(&path, "write"))
}

/// Whether a DEL of this attachment waits.
#[must_use]
pub fn waits(directory: &Path, network: &str, key: &LeaseKey) -> bool {
    path_of(directory, network, key).exists()
}

/// Everything that waits, the oldest first, and each entry that cannot be read by itself.
///
/// # Errors
/// [`PendingError::Io`] when the directory cannot be read; that it does not exist means that nothing waits.
pub fn list(directory: &Path) -> Result<(Vec<PendingDel>, Vec<PendingError>), PendingError> {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for path in entries(directory)? {
        match read(&path) {
            Ok(Some(entry)) => good.push(entry),
            Ok(None) => {}
            Err(e) => bad.push(e),
        }
    }
    good.sort_by(|a: &PendingDel, b| a.asked.cmp(&b.asked).then_with(|| a.key.cmp(&b.key)));
    Ok((good, bad))
}

/// Forgets the entry, because it is done; answers whether it was there.
///
/// # Errors
/// [`PendingError::Io`].
pub fn remove(directory: &Path, network: &str, key: &LeaseKey) -> Result<bool, PendingError> {
    let path = path_of(directory, network, key);
    match std::fs::remove_file(&path) {
        Ok(()) => sync_dir(&path).map(|()| true).map_err(fail(directory, "sync")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(fail(&path, "remove")(e)),
    }
}

fn read(path: &Path) -> Result<Option<PendingDel>, PendingError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        // Done by another between listing and reading.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(path, "read")(e)),
    };
    let corrupt = |reason: String| PendingError::Corrupt { path: path.to_owned(), reason };
    let entry: PendingDel = serde_json::from_str(&text).map_err(|e| corrupt(e.to_string()))?;
    if path.file_name() == path_of(Path::new(""), &entry.network, &entry.key).file_name() {
        Ok(Some(entry))
    } else {
        Err(corrupt(format!("its name is not that of {} in {}", entry.key, entry.network)))
    }
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, PendingError> {
    let found = match std::fs::read_dir(directory) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fail(directory, "read")(e)),
    };
    let paths = found.map(|entry| entry.map(|e| e.path())).collect::<io::Result<Vec<_>>>();
    let mut paths = paths.map_err(fail(directory, "read"))?;
    // Temporary files of writers that died end in .tmp.
    paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
    Ok(paths)
}

fn path_of(directory: &Path, network: &str, key: &LeaseKey) -> PathBuf {
    // None of the parts can hold a NUL, and a hash fits where a long container id would not.
    let hash = sha2::Sha256::digest(format!("{network}\0{}\0{}", key.container_id, key.ifname));
    let name: String = hash.iter().take(16).map(|b| format!("{b:02x}")).collect();
    directory.join(format!("{name}.json"))
}

fn fail(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> PendingError {
    let path = path.to_owned();
    move |source| PendingError::Io { path, doing, source }
}
