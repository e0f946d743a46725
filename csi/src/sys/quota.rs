//! Project quotas: what belongs to a project is what was made below a directory of it, and together takes no more than the
//! project's limit. XFS and ext4 have them, when they are mounted with `prjquota`.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

// linux/fs.h, linux/quota.h, linux/dqblk_xfs.h.
const FS_IOC_FSGETXATTR: u64 = 0x801C_581F;
const FS_IOC_FSSETXATTR: u64 = 0x401C_5820;
const PROJINHERIT: u32 = 0x200;
const PRJQUOTA: u32 = 2;
const Q_GETQUOTA: u32 = 0x80_0007;
const Q_SETQUOTA: u32 = 0x80_0008;
const Q_XGETQSTAT: u32 = 0x5805;
const QIF_BLIMITS: u32 = 1;
const QIF_ILIMITS: u32 = 4;
/// Bytes of a limit for each file that may be had with it, as mkfs.ext4 reckons.
const PER_FILE: u64 = 16 << 10;
/// So many files even in the smallest.
const LEAST_FILES: u64 = 1024;
const ENFORCED: u16 = 1 << 5;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

/// `struct if_dqblk`.
#[repr(C)]
#[derive(Default)]
struct Limits {
    /// In KiB.
    hard: u64,
    soft: u64,
    /// In bytes.
    used: u64,
    most_files: u64,
    files: [u64; 2],
    times: [u64; 2],
    valid: u32,
}

/// `struct fs_quota_stat`, as far as it is looked at.
#[repr(C)]
#[derive(Default)]
struct Status {
    version: i8,
    flags: u16,
    rest: [u64; 9],
}

mod raw {
    #![allow(missing_docs)]
    use super::*;
    nix::ioctl_read_bad!(get_attributes, FS_IOC_FSGETXATTR, Attributes);
    nix::ioctl_write_ptr_bad!(set_attributes, FS_IOC_FSSETXATTR, Attributes);
}

fn quotactl<T>(fs: impl AsFd, command: u32, project: u32, argument: &mut T) -> std::io::Result<()> {
    let (fd, command) = (fs.as_fd().as_raw_fd(), command << 8 | PRJQUOTA);
    // SAFETY: each caller hands over the struct that its command reads or writes, or a longer one; it outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_quotactl_fd, fd, command, project, std::ptr::from_mut(argument)) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Whether the filesystem holds projects to their limits.
pub fn enforced(fs: impl AsFd) -> bool {
    let mut status = Status::default();
    quotactl(fs, Q_XGETQSTAT, 0, &mut status).is_ok() && status.flags & ENFORCED != 0
}

/// The project that what is made in a directory will belong to; 0 when it is none.
///
/// # Errors
/// The system's answer.
pub fn project(directory: impl AsFd) -> std::io::Result<u32> {
    let attributes = attributes(directory)?;
    Ok(if attributes.flags & PROJINHERIT != 0 { attributes.project } else { 0 })
}

fn attributes(directory: impl AsFd) -> std::io::Result<Attributes> {
    let mut attributes = Attributes::default();
    // SAFETY: `attributes` is the struct that this request writes.
    unsafe { raw::get_attributes(directory.as_fd().as_raw_fd(), &mut attributes) }?;
    Ok(attributes)
}

/// Makes a directory, and all that is made in it from now on, belong to a project.
///
/// # Errors
/// The system's answer.
pub fn assign(directory: impl AsFd, project: u32) -> std::io::Result<()> {
    let mut attributes = attributes(&directory)?;
    attributes.flags |= PROJINHERIT;
    attributes.project = project;
    // SAFETY: `attributes` is the struct that this request reads.
    unsafe { raw::set_attributes(directory.as_fd().as_raw_fd(), &attributes) }?;
    Ok(())
}

/// Holds a project to this many bytes, and to as many files as their part of the disk is worth; 0 for no limit.
///
/// # Errors
/// The system's answer.
pub fn limit(fs: impl AsFd, project: u32, bytes: u64) -> std::io::Result<()> {
    let most_files = if bytes == 0 { 0 } else { (bytes / PER_FILE).max(LEAST_FILES) };
    let valid = QIF_BLIMITS | QIF_ILIMITS;
    let mut limits = Limits { hard: bytes / 1024, soft: 0, most_files, valid, ..Limits::default() };
    quotactl(fs, Q_SETQUOTA, project, &mut limits)
}

/// Bytes that a project has taken, and its limit.
///
/// # Errors
/// The system's answer.
pub fn usage(fs: impl AsFd, project: u32) -> std::io::Result<(u64, u64)> {
    let mut limits = Limits::default();
    match quotactl(fs, Q_GETQUOTA, project, &mut limits) {
        // Nothing was ever known of it.
        Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok((0, 0)),
        other => other.map(|()| (limits.used, limits.hard * 1024)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_kernels_size() {
        assert_eq!((size_of::<Attributes>(), size_of::<Limits>(), size_of::<Status>()), (28, 72, 80));
        assert_eq!((std::mem::offset_of!(Limits, valid), std::mem::offset_of!(Status, flags)), (64, 2));
    }
}
