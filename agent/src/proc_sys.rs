//! `/proc/sys` in a container: runtimes mount it read-only for all but privileged ones, and the agent, which shares the
//! node's network namespace, has settings of it to write.

use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::{FsFlags, statvfs};

/// Makes this container's `/proc/sys` writable; needs CAP_SYS_ADMIN. Does nothing where it is writable, and nothing outside
/// of a container, where the mount would be everybody's: only as the first process of a pid namespace.
pub fn make_writable() {
    let path = "/proc/sys";
    let is_read_only = statvfs(path).is_ok_and(|found| found.flags().contains(FsFlags::ST_RDONLY));
    if std::process::id() != 1 || !is_read_only {
        return;
    }
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    match mount(None::<&str>, path, None::<&str>, flags, None::<&str>) {
        Ok(()) => tracing::info!("made the container's /proc/sys writable"),
        // What cannot be written later is named then.
        Err(error) => tracing::warn!(%error, "/proc/sys is read-only here and cannot be made writable"),
    }
}
