//! Control groups in whatever layout the machine has: pure v2, hybrid (v1 controllers with a v2 tree beside them).
//!
//! A lab owns `keelway-lab/<id>` in every hierarchy, a node `keelway-lab/<id>/<node>`. Every process of a lab is in the
//! lab's v2 group, which is how all of them are found again, whoever started them.
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::sh::{SOON, wait_for};

/// The top group of all labs.
pub const TOP: &str = "keelway-lab";

/// One mounted hierarchy.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    /// Where it is mounted, e.g. `/sys/fs/cgroup/cpu`.
    pub mount: PathBuf,
    /// The option that names it when mounted again (`cpu,cpuacct`, `none,name=systemd`); empty for v2.
    pub option: String,
    /// Whether it is the v2 tree.
    pub v2: bool,
}

/// Every hierarchy that is mounted here, as the running process sees it.
pub fn hierarchies() -> Result<Vec<Hierarchy>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let mut found: Vec<Hierarchy> = text.lines().filter_map(parse).collect();
    found.dedup_by(|a, b| a.mount == b.mount);
    if !found.iter().any(|hierarchy| hierarchy.v2) {
        bail!("no cgroup v2 tree is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified");
    }
    Ok(found)
}

/// One line of mountinfo; `None` for what is no cgroup mount.
fn parse(line: &str) -> Option<Hierarchy> {
    let (left, right) = line.split_once(" - ")?;
    let mount = PathBuf::from(left.split(' ').nth(4)?);
    let mut right = right.split(' ');
    let (kind, options) = (right.next()?, right.nth(1)?);
    let skip = ["rw", "ro", "xattr", "clone_children"];
    let named: Vec<&str> =
        options.split(',').filter(|option| !skip.contains(option) && !option.starts_with("release_agent")).collect();
    let option = named.join(",");
    match kind {
        "cgroup2" => Some(Hierarchy { mount, option: String::new(), v2: true }),
        "cgroup" if option.starts_with("name=") => {
            Some(Hierarchy { mount, option: format!("none,{option}"), v2: false })
        }
        "cgroup" => Some(Hierarchy { mount, option, v2: false }),
        _ => None,
    }
}

/// The mount of the v2 tree.
pub fn v2_mount() -> Result<PathBuf> {
    hierarchies()?
        .into_iter()
        .find(|hierarchy| hierarchy.v2)
        .map(|hierarchy| hierarchy.mount)
        .context("no cgroup v2 tree")
}

/// Makes `group` (a path without leading slash) in every hierarchy, ready to take processes.
pub fn make(group: &str) -> Result<()> {
    // Another lab's end may remove the top group just before something is made in it.
    wait_for("a cgroup to be made", SOON, || try_make(group))
}

fn try_make(group: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let mut parent = hierarchy.mount.clone();
        for part in Path::new(group).components() {
            if hierarchy.v2 {
                enable_controllers(&parent);
            }
            let child = parent.join(part);
            match fs::create_dir(&child) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| format!("making the cgroup {}", child.display()));
                }
                _ => inherit_cpuset(&parent, &child)?,
            }
            parent = child;
        }
    }
    Ok(())
}

/// Hands a v2 group's controllers to its children; where that is refused the children live without.
fn enable_controllers(group: &Path) {
    let controllers = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// A v1 cpuset takes no process before its CPUs and memory nodes are set.
fn inherit_cpuset(parent: &Path, child: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (from, to) = (parent.join(file), child.join(file));
        if to.exists() && !child.join("cgroup.controllers").exists() && fs::read_to_string(&to)?.trim().is_empty() {
            fs::write(&to, fs::read_to_string(&from)?).with_context(|| format!("filling {}", to.display()))?;
        }
    }
    Ok(())
}

/// Moves the calling process into `group`, in every hierarchy.
pub fn join(group: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let file = hierarchy.mount.join(group).join("cgroup.procs");
        fs::write(&file, "0").with_context(|| format!("joining {}", file.display()))?;
    }
    Ok(())
}

/// The processes in a group of the v2 tree and below it, by their numbers on this machine.
pub fn processes(dir: &Path) -> Vec<u32> {
    let own = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<u32> = own.lines().filter_map(|line| line.parse().ok()).collect();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(processes(&entry.path()));
        }
    }
    found
}

/// Ends every process in `group` and below with SIGKILL and waits until none is left.
pub fn kill(group: &str) -> Result<()> {
    let dir = v2_mount()?.join(group);
    if !dir.exists() {
        return Ok(());
    }
    fs::write(dir.join("cgroup.kill"), "1").with_context(|| format!("killing the processes of {}", dir.display()))?;
    wait_for("the lab's processes to end", SOON, || {
        let events = fs::read_to_string(dir.join("cgroup.events"))?;
        if events.contains("populated 1") { bail!("some are still there") } else { Ok(()) }
    })
}

/// Removes `group` and everything below it from every hierarchy. Its processes must have ended.
pub fn remove(group: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let dir = hierarchy.mount.join(group);
        // A v1 group whose last process has just ended answers EBUSY for a moment.
        wait_for("a cgroup to empty", SOON, || remove_tree(&dir))?;
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_tree(&entry.path())?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn reads_each_kind_of_mount() {
        let v1 = parse("30 25 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct").unwrap();
        assert_eq!((v1.option.as_str(), v1.v2), ("cpu,cpuacct", false));
        let named = parse("31 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup systemd rw,xattr,name=systemd").unwrap();
        assert_eq!(named.option, "none,name=systemd");
        let v2 =
            parse("32 25 0:28 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate").unwrap();
        assert!(v2.v2 && v2.mount.ends_with("unified"));
        assert!(parse("25 1 0:5 / /proc rw - proc proc rw").is_none());
    }
}
