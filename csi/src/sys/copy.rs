//! Files made from files: by sharing blocks where the filesystem can, else by copying, and what sharing may yet cost.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::model::Extent;

/// Bytes that are copied between two looks at whether to go on.
const CHUNK: usize = 8 << 20;
// linux/fs.h, linux/fiemap.h.
const FS_IOC_FIEMAP: u64 = 0xC020_660B;
const FIEMAP_EXTENT_LAST: u32 = 1;
const FIEMAP_EXTENT_SHARED: u32 = 0x2000;
const FIEMAP_EXTENT_UNWRITTEN: u32 = 0x800;
/// Extents asked for at a time.
const EXTENTS: usize = 512;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` with room for extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [RawExtent; EXTENTS],
}

mod raw {
    #![allow(missing_docs)]
    use super::*;
    nix::ioctl_readwrite_bad!(fiemap, FS_IOC_FIEMAP, Fiemap);
}

/// Makes `to` share all blocks of `from`. `false` where the filesystem cannot.
///
/// # Errors
/// The system's, but for those that say that it cannot.
pub fn share(from: &File, to: &File) -> io::Result<bool> {
    match ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL | Errno::NOSYS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Copies what is data in `from`, up to `length`; `to` is blank there. Asks `go_on` again and again.
///
/// # Errors
/// The system's, or what `go_on` says.
pub fn copy(from: &File, to: &File, length: u64, go_on: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
    let mut at = 0;
    while at < length {
        // A hole at the end has no data behind it.
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) if data < length => data,
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(data))?.min(length);
        let (mut read, mut written) = (data, data);
        while read < end {
            go_on()?;
            let want = usize::try_from(end - read).unwrap_or(CHUNK).min(CHUNK);
            match copy_file_range(from, Some(&mut read), to, Some(&mut written), want) {
                Ok(0) => return Err(io::Error::other(format!("the source ended at {read} of {end} bytes"))),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        at = end;
    }
    Ok(())
}

/// Bytes of a file that it shares with other files: what writing to them may yet cost.
///
/// # Errors
/// The system's.
pub fn shared_bytes(file: &File) -> io::Result<u64> {
    let mut shared = 0;
    walk(file, |extent| {
        if extent.flags & FIEMAP_EXTENT_SHARED != 0 {
            shared += extent.length;
        }
    })?;
    Ok(shared)
}

/// Where a file's data is, in order; what was allocated and never written is none.
///
/// # Errors
/// The system's.
pub fn extents(file: &File) -> io::Result<Vec<Extent>> {
    let mut all = Vec::new();
    walk(file, |extent| {
        if extent.flags & FIEMAP_EXTENT_UNWRITTEN == 0 {
            all.push(Extent { offset: extent.logical, length: extent.length, physical: extent.physical });
        }
    })?;
    Ok(all)
}

fn walk(file: &File, mut visit: impl FnMut(&RawExtent)) -> io::Result<()> {
    let blank = RawExtent { logical: 0, physical: 0, length: 0, reserved64: [0; 2], flags: 0, reserved: [0; 3] };
    let count = u32::try_from(EXTENTS).unwrap_or(u32::MAX);
    let mut map = Box::new(Fiemap {
        start: 0,
        length: u64::MAX,
        flags: 0,
        mapped: 0,
        count,
        reserved: 0,
        extents: [blank; EXTENTS],
    });
    loop {
        // SAFETY: `map` is the struct that this request reads and writes, with room for as many extents as it says.
        match unsafe { raw::fiemap(file.as_raw_fd(), &mut *map) } {
            Ok(_) => {}
            Err(nix::Error::EOPNOTSUPP | nix::Error::ENOTTY) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let found = &map.extents[..(map.mapped as usize).min(EXTENTS)];
        found.iter().for_each(&mut visit);
        match found.last() {
            Some(last) if last.flags & FIEMAP_EXTENT_LAST == 0 => map.start = last.logical + last.length,
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn structs_have_the_kernels_size() {
        assert_eq!((size_of::<RawExtent>(), std::mem::offset_of!(Fiemap, extents)), (56, 32));
    }

    #[test]
    fn data_is_copied_and_holes_stay() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        for file in [&from, &to] {
            file.set_len(64 << 20).unwrap();
        }
        for (at, byte) in [(0, 1u8), (20 << 20, 2), ((64 << 20) - 4096, 3)] {
            from.write_all_at(&[byte; 4096], at).unwrap();
        }
        copy(&from, &to, 64 << 20, &|| Ok(())).unwrap();
        for (at, byte) in [(0, 1u8), (4096, 0), (20 << 20, 2), ((64 << 20) - 4096, 3)] {
            let mut found = [9; 4096];
            to.read_exact_at(&mut found, at).unwrap();
            assert_eq!(found, [byte; 4096], "at {at}");
        }
        let blocks = std::os::unix::fs::MetadataExt::blocks(&to.metadata().unwrap());
        assert!(blocks * 512 < 1 << 20, "{blocks} blocks were written");
        assert_eq!(shared_bytes(&to).unwrap(), 0);
    }

    #[test]
    fn it_stops_when_told_to() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.write_all_at(&[1; 4096], 0).unwrap();
        assert!(copy(&from, &to, 4096, &|| Err(io::Error::other("enough"))).is_err());
    }
}
