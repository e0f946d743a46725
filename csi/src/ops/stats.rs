//! How full a volume is.

use super::Volumes;
use super::publish::is_of;
use crate::error::{Context, Error, Result};
use crate::model::Content;
use crate::request::Stats;
use crate::sys::target::Target;

/// How much of something there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// What can still be had by an ordinary user.
    pub available: u64,
    /// All.
    pub total: u64,
    /// What is taken.
    pub used: u64,
}

impl Volumes {
    /// Bytes, and inodes where there is a filesystem, of the volume that is mounted at the path.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::NotFound`] when it is not mounted there, [`Error::Io`].
    pub fn stats(&self, request: &Stats) -> Result<(Usage, Option<Usage>)> {
        let record = self.records.get(&request.id)?;
        let missing = || Error::NotFound { what: "the volume at", path: request.path.absolute() };
        let device = self.device(&record)?.ok_or_else(missing)?;
        let target = Target::open(&request.path)?.ok_or_else(missing)?;
        if !is_of(&target.look()?, device.as_ref()) {
            return Err(missing());
        }
        if record.content == Content::Raw {
            // How much of a block device is in use, only its user knows.
            return Ok((Usage { available: 0, total: record.size, used: 0 }, None));
        }
        let stat = rustix::fs::fstatvfs(target.handle()?).context(|| format!("statfs {}", target.path().display()))?;
        let bytes = |blocks: u64| blocks * stat.f_frsize;
        let used = stat.f_blocks.saturating_sub(stat.f_bfree);
        let size = Usage { available: bytes(stat.f_bavail), total: bytes(stat.f_blocks), used: bytes(used) };
        let taken = stat.f_files.saturating_sub(stat.f_ffree);
        Ok((size, Some(Usage { available: stat.f_favail, total: stat.f_files, used: taken })))
    }
}
