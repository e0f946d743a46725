//! Which files of a directory count, and which of them changed since the last look.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::parse::{self, MAX_FILE_BYTES};
use crate::source::{Object, ObjectRef};

/// What tells one content of a file from another without reading it: device, inode, size, and the two times that a write
/// or a rename changes, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Signature {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl Signature {
    /// When the file was last written to, renamed or linked: (seconds, nanoseconds).
    pub fn changed(&self) -> (i64, i64) {
        self.changed
    }

    /// Time since then; without end for times to come.
    pub fn since_change(&self) -> Duration {
        since(self.changed)
    }

    /// Time since the file was last written to; without end for times to come.
    pub fn age(&self) -> Duration {
        since(self.modified)
    }
}

fn since((seconds, nanoseconds): (i64, i64)) -> Duration {
    let seconds = Duration::from_secs(seconds.max(0).unsigned_abs());
    let time = UNIX_EPOCH + seconds + Duration::from_nanos(nanoseconds.unsigned_abs());
    SystemTime::now().duration_since(time).unwrap_or(Duration::MAX)
}

/// Whether a file of this name is read: YAML and JSON, but neither hidden files nor editors' copies.
pub fn counts(name: &str) -> bool {
    let hidden = name.starts_with('.') || name.starts_with('#');
    !hidden && [".yaml", ".yml", ".json"].iter().any(|ending| name.len() > ending.len() && name.ends_with(ending))
}

/// The files of `dir` that count. Symbolic links are followed, as in a mounted ConfigMap; directories are not.
///
/// # Errors
/// What the system said of the directory.
pub fn list(dir: &Path) -> std::io::Result<BTreeMap<String, Signature>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !counts(&name) {
            continue;
        }
        // A file that vanishes between the two calls is gone.
        if let Ok(metadata) = std::fs::metadata(entry.path())
            && metadata.is_file()
        {
            files.insert(name, Signature::of(&metadata));
        }
    }
    Ok(files)
}

/// Device and inode of the directory: another one under the same path needs another watch.
pub fn identity(dir: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(dir).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The objects of one file.
///
/// # Errors
/// What is wrong with it, in words.
pub fn read(path: &PathBuf) -> Result<BTreeMap<ObjectRef, Object>, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("is larger than {} MiB: split it", MAX_FILE_BYTES >> 20));
    }
    let text = String::from_utf8(bytes).map_err(|_| "is not UTF-8 text".to_owned())?;
    parse::parse(&text).map_err(|error| error.to_string())
}
