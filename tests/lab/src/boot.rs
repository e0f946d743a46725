//! A node's birth: the two programs that run before anything else of it.
//!
//! [`init`] enters the node's network and cgroup, makes its other namespaces and starts [`pid1`] in them. `pid1` builds
//! the file systems that a booted machine has and then only reaps. Killing it ends the node whole, as a power cut does.
//! The node has a cgroup namespace: what it sees at `/sys/fs/cgroup` is its own subtree, as on a machine of its own.
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::wait::waitpid;
use serde::{Deserialize, Serialize};

use crate::cgroup::{self, Hierarchy};

/// What a node is made from; written by the lab, read by the node's first processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Host name.
    pub name: String,
    /// File of its network namespace.
    pub netns: PathBuf,
    /// Its cgroup, below each hierarchy's mount.
    pub cgroup: String,
    /// What survives a reboot.
    pub disk: PathBuf,
    /// Made when the node has booted.
    pub ready: PathBuf,
}

/// Directories that come from the node's disk as plain directories: an overlay serves neither containerd's own
/// overlays nor loop devices well.
const BOUND: [(&str, &str); 3] =
    [("kubelet", "/var/lib/kubelet"), ("containerd", "/var/lib/containerd"), ("keelway", "/var/lib/keelway")];

/// Directories of the machine that a node sees, with changes kept on its own disk.
const OVERLAID: [&str; 3] = ["etc", "opt", "var"];

/// The parent of a node's first process; returns when the node has ended.
pub fn init(spec_file: &Path) -> Result<i32> {
    let spec: NodeSpec = serde_json::from_slice(&fs::read(spec_file)?)?;
    cgroup::join(&spec.cgroup)?;
    let netns = File::open(&spec.netns).with_context(|| format!("opening {}", spec.netns.display()))?;
    setns(netns, CloneFlags::CLONE_NEWNET).context("entering the node's network")?;
    unshare(CloneFlags::CLONE_NEWCGROUP).context("making a cgroup namespace")?;
    // A v2 group with controllers for its children holds no processes of its own: out of it, then hand them on.
    let system = format!("{}/system", spec.cgroup);
    cgroup::make(&system)?;
    cgroup::join(&system)?;
    cgroup::make(&system)?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWPID)
        .context("making the node's namespaces")?;
    let status = Command::new(std::env::current_exe()?).arg("node-pid1").arg(spec_file).status()?;
    Ok(status.code().unwrap_or(128))
}

/// A node's first process; returns only on failure.
pub fn pid1(spec_file: &Path) -> Result<()> {
    let spec: NodeSpec = serde_json::from_slice(&fs::read(spec_file)?)?;
    nix::unistd::sethostname(&spec.name)?;
    build_filesystems(&spec)?;
    fs::write(&spec.ready, "")?;
    loop {
        match waitpid(None, None) {
            Err(Errno::ECHILD) => std::thread::sleep(Duration::from_millis(100)),
            Err(Errno::EINTR) | Ok(_) => {}
            Err(error) => return Err(error).context("reaping"),
        }
    }
}

fn build_filesystems(spec: &NodeSpec) -> Result<()> {
    let hierarchies = cgroup::hierarchies()?;
    change("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    fresh("proc", Path::new("/proc"), "")?;
    leave_others_disks(spec)?;
    // A fresh sysfs shows this network namespace's devices.
    fresh("sysfs", Path::new("/sys"), "")?;
    mount_cgroups(&hierarchies)?;
    fresh("bpf", Path::new("/sys/fs/bpf"), "")?;
    for name in OVERLAID {
        overlay(name, &spec.disk)?;
    }
    for (name, target) in BOUND {
        let source = spec.disk.join(name);
        fs::create_dir_all(&source)?;
        fs::create_dir_all(target)?;
        bind(&source, Path::new(target))?;
    }
    fresh("tmpfs", Path::new("/run"), "mode=755")?;
    let made = ["/run/netns", "/run/containerd", "/run/keelway", "/run/lock", "/etc/cni/net.d", "/opt/cni/bin"];
    for dir in made.iter().chain(&["/etc/keelway", "/var/lib/cni", "/var/log/pods"]) {
        fs::create_dir_all(dir)?;
    }
    // As systemd leaves a booted machine; what the kubelet mounts must reach containers.
    change("/", MsFlags::MS_REC | MsFlags::MS_SHARED)
}

/// Unmounts the loop devices that the machine has mounted, but for what the node's own disk is on: a node's copy of the mount would keep
/// them from being unmounted by whoever they are of.
fn leave_others_disks(spec: &NodeSpec) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (at, source) = (left.split(' ').nth(4), right.split(' ').nth(1));
        let (Some(at), Some(source)) = (at, source) else { continue };
        if source.starts_with("/dev/loop") && !spec.disk.starts_with(at) {
            // It may be gone with one that it was on.
            let _ = umount2(at, MntFlags::MNT_DETACH);
        }
    }
    Ok(())
}

/// Mounts the cgroup hierarchies at their usual places; in the node's cgroup namespace their root is the node's group.
fn mount_cgroups(hierarchies: &[Hierarchy]) -> Result<()> {
    let top = Path::new("/sys/fs/cgroup");
    if !hierarchies.iter().any(|hierarchy| hierarchy.mount == top) {
        fresh("tmpfs", top, "mode=755")?;
    }
    for hierarchy in hierarchies.iter().filter(|hierarchy| hierarchy.mount.starts_with(top)) {
        fs::create_dir_all(&hierarchy.mount)?;
        fresh(if hierarchy.v2 { "cgroup2" } else { "cgroup" }, &hierarchy.mount, &hierarchy.option)?;
    }
    Ok(())
}

fn overlay(name: &str, disk: &Path) -> Result<()> {
    let (upper, work) = (disk.join(name).join("upper"), disk.join(name).join("work"));
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let options = format!("lowerdir=/{name},upperdir={},workdir={}", upper.display(), work.display());
    fresh("overlay", &Path::new("/").join(name), &options)
}

fn fresh(kind: &str, target: &Path, options: &str) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("mounting {kind} ({options}) at {}", target.display()))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("binding {} to {}", source.display(), target.display()))
}

fn change(target: &str, flags: MsFlags) -> Result<()> {
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("changing the mounts below {target}"))
}
