//! Removing a lab: one function for every way in which it can end.
//!
//! Each lab has a guard, a process that holds the read end of a pipe whose write end only the lab's owner has. The pipe
//! closes when the owner drops the lab, panics, is interrupted or is killed; then the guard removes the lab.
use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::sh::run;
use crate::{cgroup, netns};

/// From a lab's first folder to its guard, at most.
const BIRTH: Duration = Duration::from_secs(10);

/// The folder of all labs.
pub fn base() -> PathBuf {
    std::env::var_os("KEELWAY_LAB_DIR").map_or_else(|| PathBuf::from("/tmp/keelway-lab"), PathBuf::from)
}

/// Waits for the owner's end and removes the lab, unless the owner has said that it is to stay.
pub fn guard(id: &str) -> Result<()> {
    let mut said = Vec::new();
    std::io::stdin().read_to_end(&mut said)?;
    if said.starts_with(b"keep") { Ok(()) } else { remove(id) }
}

/// Ends every process of a lab and removes everything that it made. Succeeds where there is nothing to do.
pub fn remove(id: &str) -> Result<()> {
    let (group, dir) = (format!("{}/{id}", cgroup::TOP), base().join(id));
    cgroup::kill(&group)?;
    detach_loops(&dir)?;
    for name in namespaces(&netns::prefix(id))? {
        run(&["ip", "netns", "del", &name])?;
    }
    cgroup::remove(&group)?;
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    // The tops go with the last lab; another lab's presence keeps them.
    let _ = fs::remove_dir(base());
    for hierarchy in cgroup::hierarchies()? {
        let _ = fs::remove_dir(hierarchy.mount.join(cgroup::TOP));
    }
    Ok(())
}

/// Labs whose guard is gone without having removed them; with `all`, every lab, running ones and kept ones too.
pub fn leftovers(all: bool) -> Result<Vec<String>> {
    let mut ids: HashSet<String> = HashSet::new();
    for entry in fs::read_dir(base()).into_iter().flatten().flatten() {
        ids.insert(entry.file_name().to_string_lossy().into_owned());
    }
    for entry in fs::read_dir(cgroup::v2_mount()?.join(cgroup::TOP)).into_iter().flatten().flatten() {
        if entry.file_type()?.is_dir() {
            ids.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    for name in namespaces("kw-")? {
        ids.extend(name.split('-').nth(1).map(str::to_owned));
    }
    Ok(ids.into_iter().filter(|id| all || !is_held(id)).collect())
}

/// Whether the lab's guard is alive, the lab was kept on purpose, or it is only just being made.
fn is_held(id: &str) -> bool {
    let dir = base().join(id);
    let Ok(pid) = fs::read_to_string(dir.join("guard")) else {
        let changed = fs::metadata(dir).and_then(|data| data.modified()).ok();
        return changed.and_then(|time| time.elapsed().ok()).is_some_and(|age| age < BIRTH);
    };
    let command = fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
    pid.trim() == "kept" || String::from_utf8_lossy(&command).contains("guard")
}

fn namespaces(prefix: &str) -> Result<Vec<String>> {
    let list = run(&["ip", "netns", "list"])?;
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    Ok(names.filter(|name| name.starts_with(prefix)).map(str::to_owned).collect())
}

/// Detaches the loop devices over files below `dir`. They are recognised by the file's device and inode: the path that
/// the kernel shows is the one inside a node.
pub fn detach_loops(dir: &Path) -> Result<()> {
    let list = run(&["losetup", "--list", "--noheadings", "--output", "NAME,BACK-MAJ:MIN,BACK-INO"])?;
    let loops: Vec<(&str, u64, u64)> = list.lines().filter_map(parse_loop).collect();
    if loops.is_empty() {
        return Ok(());
    }
    let files = files_below(dir, 8);
    for (name, ..) in loops.iter().filter(|(_, device, inode)| files.contains(&(*device, *inode))) {
        run(&["losetup", "-d", name])?;
    }
    Ok(())
}

/// One line of losetup: device, backing file's device number, inode.
fn parse_loop(line: &str) -> Option<(&str, u64, u64)> {
    let mut words = line.split_whitespace();
    let (name, device, inode) = (words.next()?, words.next()?, words.next()?);
    let (major, minor) = device.split_once(':')?;
    Some((name, nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?), inode.parse().ok()?))
}

/// Device and inode of each regular file; containerd's own tree, large and without volumes, is left out.
fn files_below(dir: &Path, depth: u32) -> HashSet<(u64, u64)> {
    let mut found = HashSet::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(data) = entry.metadata() else { continue };
        if data.is_file() {
            found.insert((data.dev(), data.ino()));
        } else if data.is_dir() && depth > 0 && entry.file_name() != "containerd" {
            found.extend(files_below(&entry.path(), depth - 1));
        }
    }
    found
}
