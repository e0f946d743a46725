//! Mounts by file descriptor: made detached, checked, and only then moved to where they are to be seen.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::Dev;
use crate::error::{Context, Error, Result};
use crate::model::{FsType, MountOptions};

/// A mount that nobody sees yet; gone when dropped.
#[derive(Debug)]
pub struct Detached(OwnedFd);

/// Mounts the filesystem on a device, `nosuid,nodev` unless the options say otherwise.
///
/// # Errors
/// [`Error::Io`], with what the filesystem had to say.
pub fn filesystem(source: &Path, device: Dev, fs: FsType, options: &MountOptions, read_only: bool) -> Result<Detached> {
    let context = fsopen(fs.as_str(), FsOpenFlags::FSOPEN_CLOEXEC).context(|| format!("use {}", fs.as_str()))?;
    let told = |error: rustix::io::Errno| {
        let log = kernel_log(&context);
        Error::io(format!("mount {} as {}{log}", source.display(), fs.as_str()), error)
    };
    fsconfig_set_string(&context, "source", source).map_err(told)?;
    if read_only {
        fsconfig_set_flag(&context, "ro").map_err(told)?;
    }
    // A restored snapshot or a clone has the identity of what it was made from.
    if fs == FsType::Xfs {
        fsconfig_set_flag(&context, "nouuid").map_err(told)?;
    }
    for (name, value) in &options.filesystem {
        match value {
            Some(value) => fsconfig_set_string(&context, *name, value.as_str()).map_err(told)?,
            None => fsconfig_set_flag(&context, *name).map_err(told)?,
        }
    }
    fsconfig_create(&context).map_err(told)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(options, read_only)).map_err(told)?;
    // The path was only a name; what counts is that the device below is the one that we bound.
    // btrfs shows a number of its own, and is asked for the device instead: a clone has its origin's identity, and some
    // kernels would take the one for the other.
    if fs == FsType::Btrfs {
        let mount = Detached(mount);
        let found = super::btrfs::device(mount.root()?).context(|| "ask for the device of a btrfs")?;
        if found != source {
            let what = format!("the filesystem mounted from {}", source.display());
            let (expected, found) = (source.display().to_string(), found.display().to_string());
            return Err(Error::State { what, expected, found });
        }
        return Ok(mount);
    }
    let found = Dev::from_raw(rustix::fs::fstat(&mount).map_err(told)?.st_dev);
    if found != device {
        return Err(Error::State {
            what: format!("the filesystem mounted from {}", source.display()),
            expected: format!("device {device}"),
            found: format!("device {found}"),
        });
    }
    Ok(Detached(mount))
}

fn attributes(options: &MountOptions, read_only: bool) -> MountAttrFlags {
    let mut flags = MountAttrFlags::MOUNT_ATTR_NODEV;
    flags.set(MountAttrFlags::MOUNT_ATTR_NOSUID, !options.suid);
    flags.set(MountAttrFlags::MOUNT_ATTR_RDONLY, read_only);
    flags.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, options.noexec);
    flags.set(MountAttrFlags::MOUNT_ATTR_NODIRATIME, options.nodiratime);
    flags.set(MountAttrFlags::MOUNT_ATTR_NOATIME, options.noatime);
    flags.set(MountAttrFlags::MOUNT_ATTR_STRICTATIME, options.strictatime);
    flags
}

/// What the filesystem wrote about a failure, in front of which a colon is put.
fn kernel_log(context: &OwnedFd) -> String {
    let mut text = String::new();
    let mut buffer = [0; 512];
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        // Each message starts with its severity, as in "e ".
        let message = String::from_utf8_lossy(&buffer[..length]);
        text = format!("{text}: {}", message.trim().trim_start_matches(['e', 'w', 'i']).trim());
    }
    text
}

/// A second mount of what is mounted or stands at `source` (an `O_PATH` descriptor).
fn bind(source: impl AsFd, what: &Path) -> Result<Detached> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(source, "", flags).map(Detached).context(|| format!("clone the mount of {}", what.display()))
}

/// A mount of the node of a device, which has to have this number.
///
/// # Errors
/// [`Error::State`] when the node is another device's, else [`Error::Io`].
pub fn node(path: &Path, device: Dev) -> Result<Detached> {
    use rustix::fs::{Mode, OFlags};
    let what = || format!("open {}", path.display());
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = rustix::fs::open(path, flags, Mode::empty()).context(what)?;
    let found = Dev::from_raw(rustix::fs::fstat(&node).context(what)?.st_rdev);
    if found != device {
        let (expected, found) = (format!("device {device}"), format!("device {found}"));
        return Err(Error::State { what: path.display().to_string(), expected, found });
    }
    bind(&node, path)
}

/// A mount of its own of a directory, or of what is mounted there, with the options of a volume's as far as they are a
/// mount's. What the mount below refuses, as writes or programs, this one refuses as well.
///
/// # Errors
/// [`Error::Io`].
pub fn directory(source: impl AsFd, options: &MountOptions, read_only: bool, what: &Path) -> Result<Detached> {
    let Detached(mount) = bind(source, what)?;
    set(&mount, attributes(options, read_only).bits().into(), libc::MOUNT_ATTR__ATIME)
        .context(|| format!("set the options of a mount of {}", what.display()))?;
    Ok(Detached(mount))
}

fn set(mount: &OwnedFd, attr_set: u64, attr_clr: u64) -> std::io::Result<()> {
    let attr = libc::mount_attr { attr_set, attr_clr, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is an empty C string, `attr` and its size belong together, and both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

impl Detached {
    /// The directory at its root.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn root(&self) -> Result<std::fs::File> {
        use rustix::fs::{Mode, OFlags, openat};
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat(&self.0, ".", flags, Mode::empty()).context(|| "open the root of a new mount")?.into())
    }

    /// Makes the mount seen at `target` (an `O_PATH` descriptor).
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn attach(self, target: impl AsFd, what: &Path) -> Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.0, "", target, "", flags).context(|| format!("mount at {}", what.display()))
    }
}
