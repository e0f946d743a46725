//! Which mount shows the node's whole cgroup v2 hierarchy. Sockets are hooked there, and of a part only its own processes' are.
//!
//! The kernel writes a mount's root as seen from the reader's cgroup namespace (cgroup_namespaces(7)). In a container with a
//! namespace of its own, the container's mount has the root `/`, and the node's, mounted from the host, `/../../..`: the
//! higher, the better. In a container without one, the node's root is `/` and the container's own something below.

use std::collections::HashMap;
use std::path::PathBuf;

/// Why no mount can be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoMount {
    /// None shows a whole hierarchy.
    None,
    /// The one there is shows no more than this container.
    ContainerOnly,
}

/// A line of `/proc/self/mountinfo`: id, parent, major:minor, root, mount point, options, tags, `-`, type, ... (proc(5)).
struct Mount<'a> {
    id: &'a str,
    parent: &'a str,
    root: &'a str,
    point: &'a str,
    kind: &'a str,
}

impl<'a> Mount<'a> {
    fn read(line: &'a str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let (id, parent, _, root, point) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        Some(Self { id, parent, root, point, kind: file_system.split(' ').next()? })
    }

    /// By how many levels its root is above that of the reader's namespace; `None`: it is something below or beside it.
    fn levels_up(&self) -> Option<usize> {
        let mut parts = self.root.split('/').filter(|part| !part.is_empty());
        parts.try_fold(0, |up, part| (part == "..").then_some(up + 1))
    }

    fn covers(&self, other: &Self) -> bool {
        let rest = other.point.strip_prefix(self.point.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

/// The mount point to hook at. `cgroup` is the text of `/proc/self/cgroup`; `first_namespace` says whether the reader is
/// in the machine's first cgroup namespace.
///
/// # Errors
/// [`NoMount`].
pub fn hierarchy(mountinfo: &str, cgroup: &str, first_namespace: bool) -> Result<PathBuf, NoMount> {
    let mounts: Vec<Mount> = mountinfo.lines().filter_map(Mount::read).collect();
    let by_id: HashMap<&str, &Mount> = mounts.iter().map(|mount| (mount.id, mount)).collect();
    let mut best: Option<(usize, &Mount)> = None;
    for mount in mounts.iter().filter(|mount| mount.kind == "cgroup2") {
        if let Some(up) = mount.levels_up().filter(|_| is_visible(mount, &mounts, &by_id))
            && best.is_none_or(|(most, _)| up > most)
        {
            best = Some((up, mount));
        }
    }
    let (up, mount) = best.ok_or(NoMount::None)?;
    // A process at the root of a namespace of its own is a container's; a node that is a container has groups below.
    let is_container = !first_namespace && cgroup.lines().any(|line| line == "0::/");
    if up == 0 && is_container {
        return Err(NoMount::ContainerOnly);
    }
    Ok(unescape(mount.point).into())
}

/// Whether a path leads to it: nothing is mounted over its root, nor over where it and the mounts that it is below are
/// mounted.
fn is_visible(mount: &Mount, all: &[Mount], by_id: &HashMap<&str, &Mount>) -> bool {
    let over = |below: &str, point: &Mount| {
        all.iter()
            .any(|other| other.parent == below && other.id != point.id && other.id != below && other.covers(point))
    };
    if over(mount.id, mount) {
        return false;
    }
    let mut line = mount;
    // No line is longer than there are mounts.
    for _ in all {
        if over(line.parent, line) {
            return false;
        }
        let Some(parent) = by_id.get(line.parent) else { return true };
        line = parent;
    }
    true
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn found(mountinfo: &str, cgroup: &str, first: bool, expected: &str) {
        assert_eq!(hierarchy(mountinfo, cgroup, first), Ok(expected.into()));
    }

    const UNIFIED: &str = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const SERVICE: &str = "0::/system.slice/keelway-agent.service\n";

    #[test]
    fn on_a_host() {
        found(UNIFIED, SERVICE, true, "/sys/fs/cgroup");
        found(UNIFIED, "0::/\n", true, "/sys/fs/cgroup");
        let hybrid = "\
            30 25 0:26 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro\n\
            31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n\
            32 30 0:28 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,xattr,name=systemd\n";
        found(hybrid, SERVICE, true, "/sys/fs/cgroup/unified");
        assert_eq!(hierarchy("30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n", SERVICE, true), Err(NoMount::None));
        assert_eq!(hierarchy("", "", true), Err(NoMount::None));
    }

    /// The DaemonSet's container with a cgroup namespace of its own, as containerd makes it on cgroup v2.
    const CONTAINER: &str = "\
        913 912 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n\
        920 911 0:26 /../../../.. /host/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn in_the_daemonset() {
        found(CONTAINER, "0::/\n", false, "/host/cgroup");
        // Without such a namespace.
        let shared = "\
            913 912 0:26 /kubepods.slice/cri-1.scope /sys/fs/cgroup ro - cgroup2 cgroup rw\n\
            920 911 0:26 / /host/cgroup rw - cgroup2 cgroup2 rw\n";
        found(shared, "0::/kubepods.slice/cri-1.scope\n", true, "/host/cgroup");
        // Beside v1: the runtime mounts only that.
        let hybrid = "\
            913 912 0:40 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            914 913 0:28 /kubepods/1 /sys/fs/cgroup/systemd ro - cgroup cgroup rw,name=systemd\n\
            920 911 0:27 / /host/cgroup ro - tmpfs tmpfs ro\n\
            921 920 0:28 / /host/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
            922 920 0:29 / /host/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        found(hybrid, "1:name=systemd:/kubepods/1\n0::/\n", true, "/host/cgroup/unified");
        // On a node that is a container itself, the highest is the node's own.
        let nested = CONTAINER.replace("/../../../..", "/../..");
        found(&nested, "0::/\n", false, "/host/cgroup");
    }

    #[test]
    fn a_part_is_not_taken_for_the_whole() {
        let own = "913 912 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        assert_eq!(hierarchy(own, "0::/\n", false), Err(NoMount::ContainerOnly));
        // A node in a namespace, whose processes are in groups below its root.
        found(own, "0::/system\n", false, "/sys/fs/cgroup");
        let part = "913 912 0:26 /kubepods/1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        assert_eq!(hierarchy(part, "0::/kubepods/1\n", true), Err(NoMount::None));
        let beside = "913 912 0:26 /../other /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        assert_eq!(hierarchy(beside, "0::/x\n", false), Err(NoMount::None));
    }

    #[test]
    fn what_lies_under_another_mount_does_not_count() {
        // A machine's mounts, a fresh /sys over them, and the node's own.
        let node = "\
            40 1 8:1 / / rw - ext4 /dev/sda rw\n\
            45 40 0:20 / /sys rw - sysfs sysfs rw\n\
            50 45 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
            60 50 0:38 /../.. /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            70 45 0:50 / /sys rw - sysfs sysfs rw\n\
            71 70 0:51 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            72 71 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        found(node, "0::/system\n", false, "/sys/fs/cgroup/unified");
        let over = "30 25 0:26 /.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n31 30 0:26 / /sys/fs/cgroup rw - cgroup2 c rw\n\
                    32 25 0:26 /.. /sys/fs/cgroup-old rw - cgroup2 cgroup2 rw\n";
        found(over, "0::/system\n", false, "/sys/fs/cgroup-old");
        found("30 25 0:26 / /mnt/uni\\040fied rw - cgroup2 cgroup2 rw\n", SERVICE, true, "/mnt/uni fied");
    }
}
