//! Files that are there in full after a power cut, or not at all.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::error::{Context, Error, Result};

/// Writes a file whole, and for good: beside its name, synced, renamed, and the directory synced.
///
/// # Errors
/// [`Error::Io`]; the old content is there still.
pub fn write_durably(directory: &Path, name: &str, content: &[u8]) -> Result<()> {
    write(directory, name, content, true)
}

/// Writes a file whole for as long as this boot lasts: beside its name and renamed, and never synced.
///
/// # Errors
/// [`Error::Io`]; the old content is there still.
pub fn write_for_this_boot(directory: &Path, name: &str, content: &[u8]) -> Result<()> {
    write(directory, name, content, false)
}

fn write(directory: &Path, name: &str, content: &[u8], durably: bool) -> Result<()> {
    let (path, beside) = (directory.join(name), directory.join(format!("{name}.tmp")));
    let written = write_beside(&beside, content, durably).and_then(|()| std::fs::rename(&beside, &path));
    if written.is_err() {
        // What there is of it takes room, of which there may be none.
        let _ = std::fs::remove_file(&beside);
    }
    written.context(|| format!("write {}", path.display()))?;
    if durably { sync_directory(directory) } else { Ok(()) }
}

fn write_beside(beside: &Path, content: &[u8], durably: bool) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(beside)?;
    file.write_all(content)?;
    if durably { file.sync_all() } else { Ok(()) }
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
