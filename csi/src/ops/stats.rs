//! How full a volume is.

use super::Volumes;
use crate::backend::Usage;
use crate::error::{Context, Error, Result};
use crate::model::{Content, VolumeId};
use crate::request::{Stats, inline_name};
use crate::sys::target::Target;

impl Volumes {
    /// The volume that a caller names by our id, or by the kubelet's handle of an inline one.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`].
    pub fn by_handle(&self, handle: &str) -> Result<VolumeId> {
        let missing = || Error::NoSuchVolume { id: crate::model::printable(handle) };
        match inline_name(handle) {
            Some(name) => self.named(&name).map(|record| record.id).ok_or_else(missing),
            None => self.get(&handle.parse().map_err(|_| missing())?).map(|record| record.id),
        }
    }

    /// Bytes, and inodes where there is a filesystem, of the volume that is mounted at the path.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::NotFound`] when it is not mounted there, [`Error::Io`].
    pub fn stats(&self, request: &Stats) -> Result<(Usage, Option<Usage>)> {
        let record = self.get(&self.by_handle(&request.id)?)?;
        let missing = || Error::NotFound { what: "the volume at", path: request.path.absolute() };
        let device = self.device(&record)?.ok_or_else(missing)?;
        // How much of a block device is in use, only its user knows.
        let of_block = (Usage { available: 0, total: record.size, used: 0 }, None);
        if self.is_staged_block(&record, &request.path) {
            return Ok(of_block);
        }
        let target = Target::open(&request.path)?.ok_or_else(missing)?;
        if !device.is(&target.look()?) {
            return Err(missing());
        }
        if record.content == Content::Raw {
            return Ok(of_block);
        }
        let stat = rustix::fs::fstatvfs(target.handle()?).context(|| format!("statfs {}", target.path().display()))?;
        let bytes = |blocks: u64| blocks * stat.f_frsize;
        let used = stat.f_blocks.saturating_sub(stat.f_bfree);
        let size = Usage { available: bytes(stat.f_bavail), total: bytes(stat.f_blocks), used: bytes(used) };
        let size = device.usage()?.unwrap_or(size);
        let taken = stat.f_files.saturating_sub(stat.f_ffree);
        Ok((size, Some(Usage { available: stat.f_favail, total: stat.f_files, used: taken })))
    }
}
