//! Directories removed with all that is in them, however deep: by three descriptors, and not by the stack.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2, unlinkat};
use rustix::io::Errno;

use super::btrfs;

/// A directory on the way to the one that is being emptied.
struct Level {
    name: CString,
    inode: u64,
    /// Directories in it that are still to be removed.
    left: Vec<CString>,
}

/// Removes a directory of `parent`. No link is followed, and no mount entered.
///
/// # Errors
/// The system's; then a part of it is left.
pub fn tree(parent: impl AsFd, name: &CStr) -> io::Result<()> {
    let (mut here, top) = enter(&parent, name.to_owned())?;
    let mut levels = vec![top];
    while let Some(level) = levels.last_mut() {
        if let Some(next) = level.left.pop() {
            let (below, level) = enter(&here, next)?;
            here = below;
            levels.push(level);
            continue;
        }
        let (Some(done), above) = (levels.pop(), levels.last()) else { break };
        let Some(above) = above else { break };
        // Its parent, by which it is not held open meanwhile.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        here = openat(&here, c"..", flags, Mode::empty())?;
        if fstat(&here)?.st_ino != above.inode {
            return Err(io::Error::other("a directory was moved while it was being removed"));
        }
        unlinkat(&here, &done.name, AtFlags::REMOVEDIR)?;
    }
    Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

/// Opens a directory and removes what is no directory in it.
fn enter(parent: impl AsFd, name: CString) -> io::Result<(OwnedFd, Level)> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    let here = openat2(parent, &name, flags, Mode::empty(), resolve)?;
    let inode = fstat(&here)?.st_ino;
    if inode == btrfs::ROOT_INODE {
        // A subvolume, perhaps, which its owner made refuse writes.
        let _ = btrfs::unseal(&here);
    }
    let mut left = Vec::new();
    // A list may leave out names while others are being removed: until there are none.
    while clear(&here, &mut left)? > 0 {}
    Ok((here, Level { name, inode, left }))
}

/// Removes what is no directory, and says how much that was; `left` is then which directories there are.
fn clear(here: &OwnedFd, left: &mut Vec<CString>) -> io::Result<usize> {
    left.clear();
    let mut removed = 0;
    for entry in Dir::read_from(here)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let gone = match entry.file_type() {
            FileType::Directory => Err(Errno::ISDIR),
            _ => unlinkat(here, name, AtFlags::empty()),
        };
        match gone {
            Ok(()) => removed += 1,
            Err(Errno::ISDIR) => left.push(name.to_owned()),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn all_of_it_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let tree_at = dir.path().join("tree");
        for n in 0..300 {
            let path = tree_at.join(format!("a{}/b{}/c", n % 7, n % 50));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join(format!("file{n}")), "x").unwrap();
        }
        fs::create_dir(dir.path().join("other")).unwrap();
        fs::write(dir.path().join("other/kept"), "x").unwrap();
        std::os::unix::fs::symlink("../../other", tree_at.join("a1/link")).unwrap();
        tree(fs::File::open(dir.path()).unwrap(), c"tree").unwrap();
        assert!(!tree_at.exists() && dir.path().join("other/kept").exists());
        assert!(tree(fs::File::open(dir.path()).unwrap(), c"../other").is_err());
    }
}
