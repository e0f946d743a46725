//! The few things of bpf(2) that aya does not offer: what a link is attached to.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_DETACH: libc::c_long = 34;
const LINK_TYPE_CGROUP: u32 = 3;
const LINK_TYPE_XDP: u32 = 6;
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

#[repr(C)]
struct DetachAttr {
    link: u32,
}

/// `BPF_PROG_QUERY` of a cgroup: target, attach type, flags (in, out), ids' address, count (in: room, out: found), padding.
#[repr(C, align(8))]
struct QueryAttr {
    fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

/// Numbers of the programs attached to a cgroup itself (not to those above it), in the order in which they run.
pub fn cgroup_programs(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    // The kernel lets 64 be attached to one hook of a cgroup.
    let mut ids = [0_u32; 64];
    let mut attr = QueryAttr {
        fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        ids: (&raw mut ids).expose_provenance() as u64,
        count: ids.len() as u32,
        padding: 0,
    };
    // SAFETY: `attr` and the array that it names live through the call, and the array has the length given.
    let code = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut attr, size_of::<QueryAttr>()) };
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ids.into_iter().take(attr.count as usize).collect())
}

/// The link that is pinned at `path`.
pub fn pinned_link(path: &Path) -> io::Result<Link> {
    link_info(open_pin(path)?.as_fd())
}

/// Detaches the link that is pinned at `path`. Without its pin it would be by and by, once the kernel comes to that.
pub fn detach_pinned_link(path: &Path) -> io::Result<()> {
    let link = open_pin(path)?;
    let attr = DetachAttr { link: link.as_raw_fd().cast_unsigned() };
    // SAFETY: `attr` lives through the call, which only reads it.
    let code = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const attr, size_of::<DetachAttr>()) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = PathAttr { path: path.as_ptr().addr() as u64, fd: 0, flags: 0 };
    // SAFETY: `attr` and the path that it names live through the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attr, size_of::<PathAttr>()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
        LINK_TYPE_TCX | LINK_TYPE_XDP => LinkTarget::Device(info.union[0]),
        other => LinkTarget::Other(other),
    };
    Ok(Link { id: info.id, program_id: info.program_id, target })
}

const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;

#[repr(C)]
struct TestRunAttr {
    program: u32,
    verdict: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

#[repr(C)]
struct BatchAttr {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// What came of running a program on a packet.
pub struct TestRun {
    /// What it returned.
    pub verdict: u32,
    /// Bytes of the packet that it left.
    pub len: usize,
    /// Nanoseconds of each run.
    pub duration: u32,
}

/// Runs a tc or XDP program `repeat` times on the packet in `data`; `out` then holds what it made of it. With `from`, for XDP alone, as
/// if it came by that device.
pub fn test_run(
    program: BorrowedFd<'_>,
    data: &[u8],
    out: &mut [u8],
    repeat: u32,
    from: Option<u32>,
) -> io::Result<TestRun> {
    let size = u32::try_from(data.len()).map_err(io::Error::other)?;
    // `struct xdp_md`: begin and end of the packet, begin of its metadata, device, queue, device to send by.
    let context = [0, size, 0, from.unwrap_or(0), 0, 0];
    let mut attr = TestRunAttr {
        program: program.as_raw_fd().cast_unsigned(),
        verdict: 0,
        size_in: size,
        size_out: u32::try_from(out.len()).map_err(io::Error::other)?,
        data_in: data.as_ptr().addr() as u64,
        data_out: out.as_mut_ptr().addr() as u64,
        repeat,
        duration: 0,
        context_size_in: if from.is_some() { size_of_val(&context) as u32 } else { 0 },
        context_size_out: 0,
        context_in: if from.is_some() { context.as_ptr().addr() as u64 } else { 0 },
        context_out: 0,
        flags: 0,
        cpu: 0,
        batch_size: 0,
        padding: 0,
    };
    // SAFETY: the buffers live through the call and have the lengths given; the kernel writes to `out` and to `attr` alone.
    let code = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attr, size_of::<TestRunAttr>()) };
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(TestRun { verdict: attr.verdict, len: attr.size_out as usize, duration: attr.duration })
}

/// Copies entries of a hash map out, from where `cursor` says, which then says where to go on; nothing at the end. `keys` and
/// `values` have room for the same number; the number of those filled in.
pub fn lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Option<u32>,
    (keys, key_size): (&mut [u8], usize),
    (values, value_size): (&mut [u8], usize),
) -> io::Result<usize> {
    let room = (keys.len() / key_size).min(values.len() / value_size);
    let (from, mut next) = (cursor.unwrap_or(0), 0_u32);
    let mut attr = BatchAttr {
        from: if cursor.is_some() { (&raw const from).addr() as u64 } else { 0 },
        to: (&raw mut next).addr() as u64,
        keys: keys.as_mut_ptr().addr() as u64,
        values: values.as_mut_ptr().addr() as u64,
        count: u32::try_from(room).map_err(io::Error::other)?,
        map: map.as_raw_fd().cast_unsigned(),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: all that `attr` names lives through the call, and the buffers have room for `count` keys and values.
    let code = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut attr, size_of::<BatchAttr>()) };
    let error = io::Error::last_os_error();
    *cursor = match (code, error.raw_os_error()) {
        (0, _) => Some(next),
        (_, Some(libc::ENOENT)) => None,
        _ => return Err(error),
    };
    Ok(attr.count as usize)
}

/// Writes entries into a hash map, in their order and up to the first that fails: `keys` and `values` hold the same number of them.
pub fn update_batch(
    map: BorrowedFd<'_>,
    (keys, key_size): (&[u8], usize),
    (values, value_size): (&[u8], usize),
) -> io::Result<()> {
    let entries = (keys.len() / key_size).min(values.len() / value_size);
    let mut attr = BatchAttr {
        from: 0,
        to: 0,
        keys: keys.as_ptr().addr() as u64,
        values: values.as_ptr().addr() as u64,
        count: u32::try_from(entries).map_err(io::Error::other)?,
        map: map.as_raw_fd().cast_unsigned(),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: both buffers live through the call and hold `count` keys and values, which the kernel only reads; it writes `attr`.
    let code = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_UPDATE_BATCH, &raw mut attr, size_of::<BatchAttr>()) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
