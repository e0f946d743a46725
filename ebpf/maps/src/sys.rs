//! The few things of bpf(2) that aya does not offer: what a link is attached to.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const LINK_TYPE_CGROUP: u32 = 3;
const LINK_TYPE_TCX: u32 = 11;

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkTarget {
    /// A cgroup by its id; 0 once the cgroup is gone.
    Cgroup(u64),
    /// A device by its index; 0 once the device is gone.
    Device(u32),
    /// Something that is not ours.
    Other(u32),
}

/// A link as the kernel describes it.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Kernel-wide number of the link.
    pub id: u32,
    /// Kernel-wide number of its program.
    pub program_id: u32,
    /// Where.
    pub target: LinkTarget,
}

/// `struct bpf_link_info` as far as it is read here (include/uapi/linux/bpf.h): type, id, prog_id, padding, then a union.
#[repr(C, align(8))]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program_id: u32,
    padding: u32,
    union: [u32; 12],
}

#[repr(C, align(8))]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C, align(8))]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The link that is pinned at `path`.
pub fn pinned_link(path: &Path) -> io::Result<Link> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = PathAttr { path: path.as_ptr().addr() as u64, fd: 0, flags: 0 };
    // SAFETY: `attr` and the path that it names live through the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attr, size_of::<PathAttr>()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel just gave us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    link_info(fd.as_fd())
}

/// Asks the kernel about a link.
fn link_info(fd: BorrowedFd<'_>) -> io::Result<Link> {
    let mut info = LinkInfo::default();
    let attr = InfoAttr {
        fd: fd.as_raw_fd().cast_unsigned(),
        len: size_of::<LinkInfo>() as u32,
        info: (&raw mut info).addr() as u64,
    };
    // SAFETY: `attr` and the buffer that it names live through the call, and the buffer has the length given.
    let code = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw const attr, size_of::<InfoAttr>()) };
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    let target = match info.kind {
        LINK_TYPE_CGROUP => LinkTarget::Cgroup(u64::from(info.union[0]) | u64::from(info.union[1]) << 32),
        LINK_TYPE_TCX => LinkTarget::Device(info.union[0]),
        other => LinkTarget::Other(other),
    };
    Ok(Link { id: info.id, program_id: info.program_id, target })
}
