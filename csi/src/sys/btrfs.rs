//! Subvolumes and their limits, by btrfs's own requests.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

// linux/btrfs.h.
const SUBVOL_CREATE: u64 = 0x5000_940E;
const SNAP_DESTROY: u64 = 0x5000_940F;
const SNAP_CREATE_V2: u64 = 0x5000_9417;
const SUBVOL_SETFLAGS: u64 = 0x4008_941A;
const INO_LOOKUP: u64 = 0xD000_9412;
const QUOTA_CTL: u64 = 0xC010_9428;
const QGROUP_LIMIT: u64 = 0x8030_942B;
const FS_INFO: u64 = 0x8400_941F;
const DEV_INFO: u64 = 0xD000_941E;
const RDONLY: u64 = 2;
const QUOTA_ENABLE: u64 = 1;
const LIMIT_REFERENCED: u64 = 1;
/// The inode number of each subvolume's root.
const ROOT_INODE: u64 = 256;

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct Args {
    fd: i64,
    name: [u8; 4088],
}

/// `struct btrfs_ioctl_vol_args_v2`.
#[repr(C)]
struct ArgsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

/// `struct btrfs_ioctl_ino_lookup_args`.
#[repr(C)]
struct Lookup {
    tree: u64,
    object: u64,
    name: [u8; 4080],
}

/// `struct btrfs_ioctl_quota_ctl_args`.
#[repr(C)]
struct Quota {
    command: u64,
    status: u64,
}

/// `struct btrfs_ioctl_qgroup_limit_args`.
#[repr(C)]
struct Limit {
    group: u64,
    flags: u64,
    most_referenced: u64,
    most_exclusive: u64,
    reserved_referenced: u64,
    reserved_exclusive: u64,
}

/// `struct btrfs_ioctl_fs_info_args`.
#[repr(C)]
struct FsInfo {
    max_id: u64,
    devices: u64,
    uuid: [u8; 16],
    rest: [u8; 992],
}

/// `struct btrfs_ioctl_dev_info_args`.
#[repr(C)]
struct DevInfo {
    id: u64,
    uuid: [u8; 16],
    bytes: [u64; 2],
    rest: [u8; 3032],
    path: [u8; 1024],
}

mod raw {
    #![allow(missing_docs)]
    use super::*;
    nix::ioctl_write_ptr_bad!(create, SUBVOL_CREATE, Args);
    nix::ioctl_write_ptr_bad!(destroy, SNAP_DESTROY, Args);
    nix::ioctl_write_ptr_bad!(snapshot, SNAP_CREATE_V2, ArgsV2);
    nix::ioctl_write_ptr_bad!(set_flags, SUBVOL_SETFLAGS, u64);
    nix::ioctl_readwrite_bad!(lookup, INO_LOOKUP, Lookup);
    nix::ioctl_readwrite_bad!(quota, QUOTA_CTL, Quota);
    nix::ioctl_write_ptr_bad!(limit, QGROUP_LIMIT, Limit);
    nix::ioctl_read_bad!(fs_info, FS_INFO, FsInfo);
    nix::ioctl_readwrite_bad!(dev_info, DEV_INFO, DevInfo);
}

fn named<const N: usize>(name: &str) -> std::io::Result<[u8; N]> {
    let mut buffer = [0; N];
    // A NUL has to follow.
    if name.len() >= N || name.contains(['/', '\0']) {
        return Err(Errno::NAMETOOLONG.into());
    }
    buffer[..name.len()].copy_from_slice(name.as_bytes());
    Ok(buffer)
}

/// Makes an empty subvolume in a directory.
///
/// # Errors
/// The system's.
pub fn create(parent: impl AsFd, name: &str) -> std::io::Result<()> {
    let args = Args { fd: 0, name: named(name)? };
    // SAFETY: `args` is the struct that this request reads, and its name ends with a NUL.
    unsafe { raw::create(parent.as_fd().as_raw_fd(), &args) }?;
    Ok(())
}

/// Makes a writable snapshot of a subvolume in a directory.
///
/// # Errors
/// The system's.
pub fn snapshot(parent: impl AsFd, of: impl AsFd, name: &str) -> std::io::Result<()> {
    let fd = of.as_fd().as_raw_fd().into();
    let args = ArgsV2 { fd, transid: 0, flags: 0, unused: [0; 4], name: named(name)? };
    // SAFETY: `args` is the struct that this request reads, and its name ends with a NUL.
    unsafe { raw::snapshot(parent.as_fd().as_raw_fd(), &args) }?;
    Ok(())
}

/// Removes a subvolume of a directory with all that is in it.
///
/// # Errors
/// The system's.
pub fn destroy(parent: impl AsFd, name: &str) -> std::io::Result<()> {
    let args = Args { fd: 0, name: named(name)? };
    // SAFETY: `args` is the struct that this request reads, and its name ends with a NUL.
    unsafe { raw::destroy(parent.as_fd().as_raw_fd(), &args) }?;
    Ok(())
}

/// Makes a subvolume refuse writes for good.
///
/// # Errors
/// The system's.
pub fn seal(subvolume: impl AsFd) -> std::io::Result<()> {
    // SAFETY: the request reads one u64, which outlives the call.
    unsafe { raw::set_flags(subvolume.as_fd().as_raw_fd(), &RDONLY) }?;
    Ok(())
}

/// The number of the subvolume that a directory is in; it is never used again.
///
/// # Errors
/// The system's.
pub fn number(subvolume: impl AsFd) -> std::io::Result<u64> {
    let mut lookup = Box::new(Lookup { tree: 0, object: ROOT_INODE, name: [0; 4080] });
    // SAFETY: `lookup` is the struct that this request reads and writes.
    unsafe { raw::lookup(subvolume.as_fd().as_raw_fd(), &mut *lookup) }?;
    Ok(lookup.tree)
}

/// Has the filesystem keep count of what each subvolume takes.
///
/// # Errors
/// The system's.
pub fn count(filesystem: impl AsFd) -> std::io::Result<()> {
    let mut quota = Quota { command: QUOTA_ENABLE, status: 0 };
    // SAFETY: `quota` is the struct that this request reads and writes.
    match unsafe { raw::quota(filesystem.as_fd().as_raw_fd(), &mut quota) } {
        Ok(_) | Err(nix::Error::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Limits what a subvolume may hold, in bytes.
///
/// # Errors
/// The system's.
pub fn limit(subvolume: impl AsFd, bytes: u64) -> std::io::Result<()> {
    let limit = Limit {
        // The subvolume's own.
        group: 0,
        flags: LIMIT_REFERENCED,
        most_referenced: bytes,
        most_exclusive: 0,
        reserved_referenced: 0,
        reserved_exclusive: 0,
    };
    // SAFETY: `limit` is the struct that this request reads.
    unsafe { raw::limit(subvolume.as_fd().as_raw_fd(), &limit) }?;
    Ok(())
}

/// What a subvolume refers to, and what of it is its own alone, in bytes. `None` where the kernel does not say.
pub fn usage(subvolume: impl AsFd) -> Option<(u64, u64)> {
    let mut info = Box::new(FsInfo { max_id: 0, devices: 0, uuid: [0; 16], rest: [0; 992] });
    // SAFETY: `info` is the struct that this request writes.
    unsafe { raw::fs_info(subvolume.as_fd().as_raw_fd(), &mut *info) }.ok()?;
    let hex = crate::model::hex(&info.uuid);
    let uuid = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    let group = format!("/sys/fs/btrfs/{uuid}/qgroups/0_{}", number(subvolume).ok()?);
    let read = |name: &str| std::fs::read_to_string(format!("{group}/{name}")).ok()?.trim().parse().ok();
    Some((read("referenced")?, read("exclusive")?))
}

/// The node of the only device of a mounted filesystem, as the kernel names it.
///
/// # Errors
/// The system's; also when there is another number of devices.
pub fn device(root: impl AsFd) -> std::io::Result<std::path::PathBuf> {
    let fd = root.as_fd().as_raw_fd();
    let mut info = Box::new(DevInfo { id: 1, uuid: [0; 16], bytes: [0; 2], rest: [0; 3032], path: [0; 1024] });
    // SAFETY: `info` is the struct that this request reads and writes.
    unsafe { raw::dev_info(fd, &mut *info) }?;
    let end = info.path.iter().position(|&byte| byte == 0).unwrap_or(info.path.len());
    Ok(std::ffi::OsString::from(String::from_utf8_lossy(&info.path[..end]).into_owned()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_kernels_size() {
        assert_eq!((size_of::<Args>(), size_of::<ArgsV2>(), size_of::<Lookup>()), (4096, 4096, 4096));
        assert_eq!((size_of::<Quota>(), size_of::<Limit>(), size_of::<FsInfo>()), (16, 48, 1024));
        assert_eq!((size_of::<DevInfo>(), std::mem::offset_of!(DevInfo, path)), (4096, 3072));
    }

    #[test]
    fn names_are_names() {
        assert!(named::<16>("kwl-1.sub").is_ok());
        assert!(named::<16>("a/b").is_err() && named::<4>("four").is_err());
    }
}
