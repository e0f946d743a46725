//! Mounted filesystems made as large as their device, by the filesystem's own request to the kernel.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::error::{Context, Result};
use crate::model::FsType;

// Of ext4/ext4.h, xfs/libxfs/xfs_fs.h and linux/btrfs.h.
const EXT4_IOC_RESIZE_FS: u64 = 0x4008_6610;
const XFS_IOC_FSGEOMETRY_V4: u64 = 0x8070_587C;
const XFS_IOC_FSGROWFSDATA: u64 = 0x4010_586E;
const BTRFS_IOC_RESIZE: u64 = 0x5000_9403;

/// `struct xfs_fsop_geom_v4`.
#[repr(C)]
#[derive(Default)]
struct Geometry {
    block_size: u32,
    others: [u32; 6],
    /// The most of the filesystem that inodes may take, in percent.
    inodes_percent: u32,
    data_blocks: u64,
    rest: [u64; 9],
}

/// `struct xfs_growfs_data`.
#[repr(C)]
struct Grow {
    blocks: u64,
    inodes_percent: u32,
    pad: u32,
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct Resize {
    fd: i64,
    name: [u8; 4088],
}

mod raw {
    #![allow(missing_docs)]
    use super::*;
    nix::ioctl_write_ptr_bad!(ext4_resize_fs, EXT4_IOC_RESIZE_FS, u64);
    nix::ioctl_read_bad!(xfs_geometry, XFS_IOC_FSGEOMETRY_V4, Geometry);
    nix::ioctl_write_ptr_bad!(xfs_grow, XFS_IOC_FSGROWFSDATA, Grow);
    nix::ioctl_write_ptr_bad!(btrfs_resize, BTRFS_IOC_RESIZE, Resize);
}

/// Whether this process may grow a mounted filesystem: ext4 wants CAP_SYS_RESOURCE, as a privileged container has it.
pub fn allowed(fs: FsType) -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    if fs != FsType::Ext4 {
        return true;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|set| set & 1 << CAP_SYS_RESOURCE != 0)
}

/// Grows the filesystem whose root is `root` to a device of `bytes`. To do so once more changes nothing.
///
/// # Errors
/// [`crate::error::Error::Io`].
pub fn filesystem(root: &File, fs: FsType, bytes: u64) -> Result<()> {
    let what = || format!("grow the filesystem of type {} to {bytes} bytes", fs.as_str());
    let fd = root.as_raw_fd();
    match fs {
        FsType::Ext4 => {
            let block = rustix::fs::fstatfs(root).context(what)?.f_bsize.unsigned_abs();
            // SAFETY: the request reads one u64, which outlives the call.
            unsafe { raw::ext4_resize_fs(fd, &(bytes / block)) }.context(what)?;
        }
        FsType::Xfs => {
            let mut geometry = Geometry::default();
            // SAFETY: `geometry` is the struct that this request writes.
            unsafe { raw::xfs_geometry(fd, &mut geometry) }.context(what)?;
            let blocks = bytes / u64::from(geometry.block_size.max(512));
            if blocks <= geometry.data_blocks {
                return Ok(());
            }
            let grow = Grow { blocks, inodes_percent: geometry.inodes_percent, pad: 0 };
            // SAFETY: `grow` is the struct that this request reads.
            unsafe { raw::xfs_grow(fd, &grow) }.context(what)?;
        }
        FsType::Btrfs => {
            let mut resize = Resize { fd: 0, name: [0; 4088] };
            resize.name[..3].copy_from_slice(b"max");
            // SAFETY: `resize` is the struct that this request reads, and its name ends with a NUL.
            unsafe { raw::btrfs_resize(fd, &resize) }.context(what)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_kernels_size() {
        assert_eq!((size_of::<Geometry>(), size_of::<Grow>(), size_of::<Resize>()), (112, 16, 4096));
        assert_eq!(std::mem::offset_of!(Geometry, inodes_percent), 28);
        assert_eq!(std::mem::offset_of!(Geometry, data_blocks), 32);
    }
}
