//! Subvolumes and their limits, by btrfs's own requests.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};

use rustix::io::Errno;

// linux/btrfs.h.
const SUBVOL_CREATE: u64 = 0x5000_940E;
const SNAP_DESTROY: u64 = 0x5000_940F;
const SNAP_CREATE_V2: u64 = 0x5000_9417;
const SUBVOL_SETFLAGS: u64 = 0x4008_941A;
const TREE_SEARCH: u64 = 0xD000_9411;
const INO_LOOKUP: u64 = 0xD000_9412;
const QUOTA_CTL: u64 = 0xC010_9428;
const QGROUP_LIMIT: u64 = 0x8030_942B;
const FS_INFO: u64 = 0x8400_941F;
const DEV_INFO: u64 = 0xD000_941E;
const RDONLY: u64 = 2;
const QUOTA_ENABLE: u64 = 1;
const LIMIT_REFERENCED: u64 = 1;
/// The inode number of each subvolume's root.
pub(super) const ROOT_INODE: u64 = 256;
/// The tree of all subvolumes, and what in it says which one is in which, and where (linux/btrfs_tree.h).
const ROOT_TREE: u64 = 1;
const ROOT_REF: u32 = 156;
/// A file handle without its parent (fs/btrfs/export.h, linux/exportfs.h).
const FILE_ID: libc::c_int = 0x4D;

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

/// `struct btrfs_ioctl_search_args`.
#[repr(C)]
struct Search {
    tree: u64,
    objects: [u64; 2],
    offsets: [u64; 2],
    transactions: [u64; 2],
    kinds: [u32; 2],
    items: u32,
    unused: u32,
    rest: [u64; 4],
    found: [u8; 3992],
}

/// `struct file_handle` with the part of `struct btrfs_fid` that names no parent.
#[repr(C)]
struct Handle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    inode: u64,
    tree: u64,
    generation: u32,
}

mod raw {
    #![allow(missing_docs)]
    use super::*;
    nix::ioctl_write_ptr_bad!(create, SUBVOL_CREATE, Args);
    nix::ioctl_write_ptr_bad!(destroy, SNAP_DESTROY, Args);
    nix::ioctl_write_ptr_bad!(snapshot, SNAP_CREATE_V2, ArgsV2);
    nix::ioctl_write_ptr_bad!(set_flags, SUBVOL_SETFLAGS, u64);
    nix::ioctl_readwrite_bad!(search, TREE_SEARCH, Search);
    nix::ioctl_readwrite_bad!(lookup, INO_LOOKUP, Lookup);
    nix::ioctl_readwrite_bad!(quota, QUOTA_CTL, Quota);
    nix::ioctl_write_ptr_bad!(limit, QGROUP_LIMIT, Limit);
    nix::ioctl_read_bad!(fs_info, FS_INFO, FsInfo);
    nix::ioctl_readwrite_bad!(dev_info, DEV_INFO, DevInfo);
}

fn named<const N: usize>(name: impl AsRef<[u8]>) -> std::io::Result<[u8; N]> {
    let (mut buffer, name) = ([0; N], name.as_ref());
    // A NUL has to follow.
    if name.len() >= N || name.contains(&b'/') || name.contains(&0) {
        return Err(Errno::NAMETOOLONG.into());
    }
    buffer[..name.len()].copy_from_slice(name);
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
/// The system's; not empty when there are others in it.
pub fn destroy(parent: impl AsFd, name: impl AsRef<[u8]>) -> std::io::Result<()> {
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
    set_flags(subvolume, RDONLY)
}

/// Makes a subvolume accept writes again.
///
/// # Errors
/// The system's, also for what is no subvolume's root.
pub fn unseal(subvolume: impl AsFd) -> std::io::Result<()> {
    set_flags(subvolume, 0)
}

fn set_flags(subvolume: impl AsFd, flags: u64) -> std::io::Result<()> {
    // SAFETY: the request reads one u64, which outlives the call.
    unsafe { raw::set_flags(subvolume.as_fd().as_raw_fd(), &flags) }?;
    Ok(())
}

/// A subvolume in another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nested {
    /// Its number.
    pub number: u64,
    /// The number of the one that it is in.
    pub parent: u64,
    directory: u64,
    name: Vec<u8>,
}

/// The subvolumes right in another one, however deep in its directories. Whoever may write to a subvolume may make them.
///
/// # Errors
/// The system's.
pub fn nested(fs: impl AsFd, parent: u64) -> std::io::Result<Vec<Nested>> {
    let (mut all, mut from) = (Vec::new(), 0);
    loop {
        let mut search = Box::new(Search {
            tree: ROOT_TREE,
            objects: [parent; 2],
            offsets: [from, u64::MAX],
            transactions: [0, u64::MAX],
            kinds: [ROOT_REF; 2],
            items: u32::MAX,
            unused: 0,
            rest: [0; 4],
            found: [0; 3992],
        });
        // SAFETY: `search` is the struct that this request reads and writes.
        unsafe { raw::search(fs.as_fd().as_raw_fd(), &mut *search) }?;
        let page = items(&search.found, search.items, parent).ok_or(Errno::BADMSG)?;
        let Some(last) = page.last() else { return Ok(all) };
        from = last.number + 1;
        all.extend(page);
    }
}

/// Items as the kernel lays them out: a header of 32 bytes (transaction, object, offset, kind, length), and of each the
/// directory's number, a sequence number, the name's length and the name.
fn items(found: &[u8], count: u32, parent: u64) -> Option<Vec<Nested>> {
    let long = |bytes: &[u8]| Some(u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?));
    let mut rest = found;
    let mut all = Vec::new();
    for _ in 0..count {
        let (header, tail) = rest.split_at_checked(32)?;
        let length = u32::from_ne_bytes(header[28..].try_into().ok()?) as usize;
        let (item, tail) = tail.split_at_checked(length)?;
        let directory = u64::from_le(long(item)?);
        let name = item.get(18..18 + usize::from(u16::from_le_bytes(item.get(16..18)?.try_into().ok()?)))?.to_vec();
        all.push(Nested { number: long(&header[16..])?, parent, directory, name });
        rest = tail;
    }
    Some(all)
}

/// A directory of a subvolume, by its number: no path is too long for that.
fn directory(fs: impl AsFd, tree: u64, inode: u64) -> std::io::Result<File> {
    let mut handle = Handle { bytes: 20, kind: FILE_ID, inode, tree, generation: 0 };
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let at = std::ptr::from_mut(&mut handle);
    // SAFETY: `handle` is a file handle with as many bytes as it says, and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_by_handle_at, fs.as_fd().as_raw_fd(), at, flags) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the call has returned a descriptor that nobody else has.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

/// Removes all subvolumes that are in another one, the innermost first. Returns how many there were.
///
/// # Errors
/// The system's.
pub fn remove_nested(fs: impl AsFd, parent: u64) -> std::io::Result<usize> {
    let (mut left, mut removed) = (nested(&fs, parent)?, 0);
    while let Some(last) = left.last() {
        let within = nested(&fs, last.number)?;
        if !within.is_empty() {
            left.extend(within);
            continue;
        }
        let at = directory(&fs, last.parent, last.directory)?;
        let gone = match destroy(&at, &last.name) {
            // Its owner may have made the one that it is in refuse writes.
            Err(error) if error.raw_os_error() == Some(libc::EROFS) => {
                unseal(directory(&fs, last.parent, ROOT_INODE)?)?;
                destroy(&at, &last.name)
            }
            other => other,
        };
        gone?;
        left.pop();
        removed += 1;
    }
    Ok(removed)
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
        assert_eq!((size_of::<Search>(), std::mem::offset_of!(Search, found)), (4096, 104));
        assert_eq!((std::mem::offset_of!(Handle, inode), std::mem::offset_of!(Handle, generation)), (8, 24));
    }

    #[test]
    fn items_are_read_as_far_as_they_reach() {
        let mut found = [0; 64];
        found[16..24].copy_from_slice(&300_u64.to_ne_bytes());
        found[28..32].copy_from_slice(&21_u32.to_ne_bytes());
        found[32..40].copy_from_slice(&257_u64.to_le_bytes());
        found[48..50].copy_from_slice(&3_u16.to_le_bytes());
        found[50..53].copy_from_slice(b"sub");
        let want = Nested { number: 300, parent: 256, directory: 257, name: b"sub".to_vec() };
        assert_eq!(items(&found, 1, 256), Some(vec![want]));
        assert_eq!(items(&found, 0, 256), Some(Vec::new()));
        assert_eq!(items(&found[..40], 1, 256), None);
    }

    #[test]
    fn names_are_names() {
        assert!(named::<16>("kwl-1.sub").is_ok());
        assert!(named::<16>("a/b").is_err() && named::<4>("four").is_err());
    }
}
