//! Giving a volume to a group (VOLUME_MOUNT_GROUP).
//!
//! The root is marked last: while it belongs to the group and hands it on, everything below was given before, and new
//! files get the group from their directory. So a volume that is brought to the same group again costs one look.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, StatxFlags, chmodat, chownat, fchmod, fchown, fstat, openat, statat,
    statx,
};
use rustix::io::Errno;

use crate::error::{Context, Result};

/// Directories hand on their group; the group may do what the owner may.
const DIRECTORY: Mode = Mode::from_raw_mode(0o2770);
const FILE: Mode = Mode::from_raw_mode(0o660);

/// A directory on the way to where the walk is.
struct Level {
    /// What it is known by when the walk comes back.
    known: (u64, u64),
    mode: Mode,
    /// Its directories that are still to be walked.
    below: Vec<CString>,
}

/// Gives everything below `root` to a group that may read and write it; `goes_on` is called again and again meanwhile. However
/// deep a tree is, few descriptors are open.
///
/// # Errors
/// [`crate::error::Error::Io`]; then the next call begins anew.
pub fn give(root: &File, gid: u32, goes_on: &dyn Fn()) -> Result<()> {
    let what = || format!("give a volume to group {gid}");
    let stat = fstat(root).context(what)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    if stat.st_gid == gid && mode.contains(DIRECTORY) {
        return Ok(());
    }
    below(root, Gid::from_raw(gid), goes_on).context(what)?;
    fchown(root, None, Some(Gid::from_raw(gid))).context(what)?;
    fchmod(root, bits(&stat) | DIRECTORY).context(what)
}

fn bits(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn below(root: &File, group: Gid, goes_on: &dyn Fn()) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mount = mount_of(root)?;
    let mut at: OwnedFd = openat(root, ".", flags, Mode::empty())?;
    let mut way = vec![enter(&at, group, goes_on)?];
    while let Some(level) = way.last_mut() {
        if let Some(name) = level.below.pop() {
            let child = openat(&at, &name, flags, Mode::empty())?;
            // The volume's own files only, not what somebody mounted there.
            if mount_of(&child)? == mount {
                way.push(enter(&child, group, goes_on)?);
                at = child;
            }
            continue;
        }
        let mode = level.mode;
        way.pop();
        let Some(parent) = way.last() else { break };
        fchown(&at, None, Some(group))?;
        fchmod(&at, mode | DIRECTORY)?;
        let up = openat(&at, "..", flags, Mode::empty())?;
        let stat = fstat(&up)?;
        // Somebody moved it meanwhile.
        if (stat.st_dev, stat.st_ino) != parent.known {
            return Err(Errno::AGAIN);
        }
        at = up;
    }
    Ok(())
}

/// The mount that something is in.
fn mount_of(fd: impl AsFd) -> rustix::io::Result<u64> {
    Ok(statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// Gives all that is in a directory, but for directories.
fn enter(directory: &OwnedFd, gid: Gid, goes_on: &dyn Fn()) -> rustix::io::Result<Level> {
    let (stat, group) = (fstat(directory)?, Some(gid));
    let mut level = Level { known: (stat.st_dev, stat.st_ino), mode: bits(&stat), below: Vec::new() };
    for entry in rustix::fs::Dir::read_from(directory)? {
        goes_on();
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => level.below.push(name.to_owned()),
            FileType::RegularFile => {
                // A change of owner takes set-uid and set-gid away. Links are never followed.
                chownat(directory, name, None, group, AtFlags::SYMLINK_NOFOLLOW)?;
                let path: OwnedFd =
                    openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
                if FileType::from_raw_mode(fstat(&path)?.st_mode) == FileType::RegularFile {
                    let by_fd = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&path));
                    let keep = Mode::from_raw_mode(stat.st_mode & 0o1777);
                    chmodat(rustix::fs::CWD, by_fd, keep | FILE, AtFlags::empty())?;
                }
            }
            _ => chownat(directory, name, None, group, AtFlags::SYMLINK_NOFOLLOW)?,
        }
    }
    Ok(level)
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
        give(&File::open(&root).unwrap(), 4242, &|| {}).unwrap();
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
        give(&File::open(&root).unwrap(), 4242, &|| {}).unwrap();
        assert_eq!(std::fs::metadata(root.join("a/b/file")).unwrap().gid(), 1);
    }
    #[test]
    fn deeper_than_there_are_descriptors() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: only root can give files away");
        }
        let dir = tempfile::tempdir().unwrap();
        // Longer than a path can be; so each is made from the one before.
        let (mut at, depth) = (File::open(dir.path()).unwrap(), 3000);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let step = |at: &File| -> File {
            rustix::fs::mkdirat(at, "d", Mode::from_raw_mode(0o700)).unwrap();
            openat(at, "d", flags, Mode::empty()).unwrap().into()
        };
        for _ in 0..depth {
            at = step(&at);
        }
        let seen = std::cell::Cell::new(0);
        give(&File::open(dir.path()).unwrap(), 4242, &|| seen.set(seen.get() + 1)).unwrap();
        assert_eq!(at.metadata().unwrap().gid(), 4242);
        assert!(seen.get() > depth, "{}", seen.get());
        std::process::Command::new("rm").arg("-rf").arg(dir.path()).status().unwrap();
    }
}
