//! Block devices: what they are, and what can be asked of each.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::Dev;
use crate::error::{Context, Result};

// linux/fs.h.
const BLKROSET: u64 = 0x125D;
const BLKROGET: u64 = 0x125E;
const BLKRASET: u64 = 0x1262;
const BLKZEROOUT: u64 = 0x127F;
const BLKGETSIZE64: u64 = 0x8008_1272;

mod raw {
    #![allow(missing_docs)]
    use super::*;
    nix::ioctl_write_ptr_bad!(set_read_only, BLKROSET, libc::c_int);
    nix::ioctl_read_bad!(get_read_only, BLKROGET, libc::c_int);
    nix::ioctl_write_int_bad!(set_read_ahead, BLKRASET);
    nix::ioctl_write_ptr_bad!(zero, BLKZEROOUT, [u64; 2]);
    nix::ioctl_read_bad!(get_size, BLKGETSIZE64, u64);
}

/// Bytes that a device has.
///
/// # Errors
/// [`crate::error::Error::Io`].
pub fn size(device: &File) -> Result<u64> {
    let mut bytes = 0;
    // SAFETY: `bytes` is the u64 that this request writes.
    unsafe { raw::get_size(device.as_raw_fd(), &mut bytes) }.context(|| "ask a device for its size")?;
    Ok(bytes)
}

/// Whether a device refuses writes.
///
/// # Errors
/// [`crate::error::Error::Io`].
pub fn read_only(device: &File) -> Result<bool> {
    let mut value = 0;
    // SAFETY: `value` is the int that this request writes.
    unsafe { raw::get_read_only(device.as_raw_fd(), &mut value) }.context(|| "ask whether a device is read-only")?;
    Ok(value != 0)
}

/// Makes a device refuse writes, or accept them again.
///
/// # Errors
/// [`crate::error::Error::Io`].
pub fn set_read_only(device: &File, read_only: bool) -> Result<()> {
    // SAFETY: the request reads one int, which outlives the call.
    unsafe { raw::set_read_only(device.as_raw_fd(), &libc::c_int::from(read_only)) }
        .context(|| format!("set a device read-only: {read_only}"))?;
    Ok(())
}

/// Sets how much is read ahead.
///
/// # Errors
/// [`crate::error::Error::Io`].
pub fn set_read_ahead(device: &File, kib: u32) -> Result<()> {
    // In sectors of 512 bytes; `kib` is far below what an int holds.
    // SAFETY: the request takes a number and writes no memory of ours.
    unsafe { raw::set_read_ahead(device.as_raw_fd(), (kib * 2) as libc::c_int) }
        .context(|| "set a device's read-ahead")?;
    Ok(())
}

/// Makes a part of a device zeros.
///
/// # Errors
/// [`crate::error::Error::Io`].
pub fn zero(device: &File, at: u64, length: u64) -> Result<()> {
    // SAFETY: the request reads two u64, which outlive the call.
    unsafe { raw::zero(device.as_raw_fd(), &[at, length]) }
        .context(|| format!("zero {length} bytes of a device from {at}"))?;
    Ok(())
}

/// How many requests a device has completed: reads, writes, discards and flushes.
pub fn completed(dev: Dev) -> Option<u64> {
    requests(&std::fs::read_to_string(format!("/sys/dev/block/{dev}/stat")).ok()?)
}

/// Documentation/block/stat.rst: each kind's count is the first of its group of four; that of flushes is the 16th.
fn requests(stat: &str) -> Option<u64> {
    let fields: Vec<u64> = stat.split_whitespace().map(|field| field.parse().ok()).collect::<Option<_>>()?;
    let at = |n: usize| fields.get(n).copied().unwrap_or(0);
    (fields.len() >= 8).then(|| at(0) + at(4) + at(11) + at(15))
}

/// What a device is known by wherever it turns up next: its own identifier, or of a partition its disk's with the
/// partition's number. `None` for a device that has none.
pub fn identity(dev: Dev) -> Option<String> {
    let sysfs = PathBuf::from(format!("/sys/dev/block/{dev}")).canonicalize().ok()?;
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(path).ok()?.trim().to_owned();
        (!text.is_empty()).then_some(text)
    };
    let part = read(sysfs.join("partition"));
    let disk = if part.is_some() { sysfs.parent()?.to_owned() } else { sysfs };
    let own = ["wwid", "device/wwid", "serial", "device/serial", "dm/uuid", "loop/backing_file"]
        .iter()
        .find_map(|name| read(disk.join(name)).map(|text| format!("{name}={text}")))?;
    Some(match part {
        Some(number) => format!("{own} partition={number}"),
        None => own,
    })
}

/// A device's node, by the name that the kernel gave it.
pub fn node(dev: Dev) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/sys/dev/block/{dev}/uevent")).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(PathBuf::from("/dev").join(name))
}

/// How many errors the ext4 on a device has met; it keeps count over mounts. `root` is the node's name below /dev, with a
/// slash.
pub fn ext4_errors(root: &Path) -> u64 {
    let path = format!("/sys/fs/ext4{}/errors_count", root.display());
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_has_completed() {
        // Reads, writes, discards, flushes; their merges, sectors and times do not count, nor what is under way.
        let stat = "   11  2 3 4   20  6 7 8   99 10 11   300 13 14 15   4000 17\n";
        assert_eq!(requests(stat), Some(4331));
        assert_eq!(requests("1 0 0 0 2 0 0 0 0 0 0"), Some(3), "an older kernel's");
        assert_eq!(requests(""), None);
        assert_eq!(requests("1 0 x 0 2 0 0 0"), None);
    }
}
