//! Giving a volume to a group (VOLUME_MOUNT_GROUP).
//!
//! The root is marked last: while it belongs to the group and hands it on, everything below was given before, and new
//! files get the group from their directory. So a volume that is brought to the same group again costs one look.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, chmodat, chownat, fchmod, fchown, fstat, openat, statat};

use crate::error::{Context, Result};

/// Directories hand on their group; the group may do what the owner may.
const DIRECTORY: Mode = Mode::from_raw_mode(0o2770);
const FILE: Mode = Mode::from_raw_mode(0o660);
/// The deepest tree that is walked. Each level holds a descriptor.
const DEPTH: usize = 256;

/// Gives everything below `root` to a group that may read and write it.
///
/// # Errors
/// [`crate::error::Error::Io`]; then the next call begins anew.
pub fn give(root: &File, gid: u32) -> Result<()> {
    let what = || format!("give a volume to group {gid}");
    let stat = fstat(root).context(what)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    if stat.st_gid == gid && mode.contains(DIRECTORY) {
        return Ok(());
    }
    below(root.as_fd(), gid, DEPTH).context(what)?;
    fchown(root, None, Some(Gid::from_raw(gid))).context(what)?;
    fchmod(root, bits(&stat) | DIRECTORY).context(what)
}

fn bits(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn below(directory: impl AsFd, gid: u32, depth: usize) -> rustix::io::Result<()> {
    let Some(depth) = depth.checked_sub(1) else { return Err(rustix::io::Errno::NAMETOOLONG) };
    let group = Some(Gid::from_raw(gid));
    for entry in rustix::fs::Dir::read_from(&directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let child: OwnedFd = openat(&directory, name, flags, Mode::empty())?;
                // The volume's own files only, not what somebody mounted there.
                if fstat(&child)?.st_dev != stat.st_dev {
                    continue;
                }
                below(&child, gid, depth)?;
                fchown(&child, None, group)?;
                fchmod(&child, bits(&stat) | DIRECTORY)?;
            }
            FileType::RegularFile => {
                // A change of owner takes set-uid and set-gid away. Links are never followed.
                chownat(&directory, name, None, group, AtFlags::SYMLINK_NOFOLLOW)?;
                let path: OwnedFd =
                    openat(&directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
                if FileType::from_raw_mode(fstat(&path)?.st_mode) == FileType::RegularFile {
                    let by_fd = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&path));
                    let keep = Mode::from_raw_mode(stat.st_mode & 0o1777);
                    chmodat(rustix::fs::CWD, by_fd, keep | FILE, AtFlags::empty())?;
                }
            }
            _ => chownat(&directory, name, None, group, AtFlags::SYMLINK_NOFOLLOW)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn everything_below_and_nothing_beside() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: only root can give files away");
        }
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("volume"), dir.path().join("outside"));
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        for path in [root.join("a/b/file"), outside.clone()] {
            std::fs::write(&path, "x").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        symlink(&outside, root.join("link")).unwrap();
        give(&File::open(&root).unwrap(), 4242).unwrap();
        for (path, mode) in [("", 0o2775), ("a", 0o2775), ("a/b", 0o2775), ("a/b/file", 0o660)] {
            let meta = std::fs::symlink_metadata(root.join(path)).unwrap();
            assert_eq!((meta.gid(), meta.mode() & 0o7777 & mode), (4242, mode & meta.mode()), "{path}");
            assert_eq!(meta.mode() & 0o060, 0o060, "{path}");
        }
        assert_eq!(std::fs::symlink_metadata(root.join("link")).unwrap().gid(), 4242);
        let meta = std::fs::metadata(&outside).unwrap();
        assert_eq!((meta.gid() == 4242, meta.mode() & 0o777), (false, 0o600));
        // The mark on the root says that nothing is left to do.
        std::os::unix::fs::chown(root.join("a/b/file"), None, Some(1)).unwrap();
        give(&File::open(&root).unwrap(), 4242).unwrap();
        assert_eq!(std::fs::metadata(root.join("a/b/file")).unwrap().gid(), 1);
    }
}
