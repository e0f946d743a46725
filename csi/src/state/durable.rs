//! Files that are there in full after a power cut, or not at all.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::error::{Context, Error, Result};

/// Writes a file whole: beside its name, synced, renamed, and the directory synced.
///
/// # Errors
/// [`Error::Io`]; the old content is there still.
pub fn write_durably(directory: &Path, name: &str, content: &[u8]) -> Result<()> {
    let beside = directory.join(format!("{name}.tmp"));
    let written = write(directory, name, &beside, content);
    if written.is_err() {
        // What there is of it takes room, of which there may be none.
        let _ = std::fs::remove_file(&beside);
    }
    written
}

fn write(directory: &Path, name: &str, beside: &Path, content: &[u8]) -> Result<()> {
    let path = directory.join(name);
    let what = || format!("write {}", path.display());
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(beside)
        .context(what)?;
    file.write_all(content).and_then(|()| file.sync_all()).context(what)?;
    std::fs::rename(beside, &path).context(what)?;
    sync_directory(directory)
}

/// Makes names that were made or removed in a directory durable.
///
/// # Errors
/// [`Error::Io`].
pub fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|directory| directory.sync_all()).context(|| format!("sync {}", directory.display()))
}

/// Takes the directory for this process alone, for as long as the returned file is open.
///
/// # Errors
/// [`Error::State`] when another process has it, else [`Error::Io`].
pub fn lock_directory(directory: &Path) -> Result<File> {
    let path = directory.join("lock");
    let what = || format!("lock {}", path.display());
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).context(what)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(Error::State {
            what: path.display().to_string(),
            expected: "free".into(),
            found: "held by another keelway-csi".into(),
        }),
        Err(error) => Err(Error::io(what(), error)),
    }
}
