//! Runs a program in a node (its namespaces and its cgroup) or in a bare host (its network and its cgroup).
//!
//! It is a program of its own because entering a pid or mount namespace needs a process with one thread.
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;
use nix::sched::{CloneFlags, setns};

use crate::{cgroup, sh};

/// Where to run what.
#[derive(Args, Debug)]
pub struct Enter {
    /// The network namespace's file, for a host without other namespaces.
    #[arg(long)]
    pub net: Option<PathBuf>,
    /// The first process of a node, as this machine numbers it.
    #[arg(long)]
    pub pid1: Option<u32>,
    /// The cgroup to join.
    #[arg(long)]
    pub cgroup: String,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

/// Runs the program and returns its exit status, 128 + signal if one ended it.
pub fn enter(wanted: &Enter) -> Result<i32> {
    // The cgroup first: its files are out of sight from within the node.
    cgroup::join(&wanted.cgroup)?;
    let mut files = Vec::new();
    if let Some(path) = &wanted.net {
        files.push((path.clone(), CloneFlags::CLONE_NEWNET));
    }
    if let Some(pid) = wanted.pid1 {
        let kinds = [
            ("net", CloneFlags::CLONE_NEWNET),
            ("uts", CloneFlags::CLONE_NEWUTS),
            ("cgroup", CloneFlags::CLONE_NEWCGROUP),
            ("pid", CloneFlags::CLONE_NEWPID),
            ("mnt", CloneFlags::CLONE_NEWNS),
        ];
        files.extend(kinds.map(|(name, kind)| (PathBuf::from(format!("/proc/{pid}/ns/{name}")), kind)));
    }
    let open = |(path, kind): (PathBuf, _)| {
        let file = File::open(&path).with_context(|| format!("opening {}; has the node ended?", path.display()))?;
        Ok((path, kind, file))
    };
    // All are opened before the first is entered, since /proc is another one afterwards.
    for (path, kind, file) in files.into_iter().map(open).collect::<Result<Vec<_>>>()? {
        setns(file, kind).with_context(|| format!("entering {}", path.display()))?;
    }
    let (program, args) = wanted.command.split_first().context("no command")?;
    // The workspace's own programs can be called by name.
    let own =
        std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.display().to_string())).unwrap_or_default();
    let mut command = Command::new(program);
    let status = command
        .args(args)
        .env("PATH", format!("{}:{own}", sh::PATH))
        .status()
        .with_context(|| format!("starting {program}"))?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}
