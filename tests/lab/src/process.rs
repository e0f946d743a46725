//! A program left running in the lab.
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::sh::{SOON, wait_for};

/// A running program, which `keelway-lab enter` started and waits for. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    wrapper: Child,
    pid: Pid,
    log: PathBuf,
    keep: bool,
}

impl Process {
    /// Starts `command` (from [`crate::Host::command`]) and waits until the program within has a process.
    pub(crate) fn start(name: &str, mut command: Command, log: PathBuf) -> Result<Self> {
        let mut wrapper = command.spawn().with_context(|| format!("starting {name}"))?;
        let pid = wait_for(name, SOON, || match child_of(wrapper.id()) {
            Some(pid) => Ok(Some(pid)),
            None if wrapper.try_wait()?.is_some() => Ok(None),
            None => bail!("it has not started"),
        })?;
        let Some(pid) = pid else { bail!("{name} ended at once; its log {}:\n{}", log.display(), tail(&log)) };
        Ok(Self { name: name.to_owned(), wrapper, pid: Pid::from_raw(pid), log, keep: false })
    }

    /// The program's process id on this machine.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Everything it has written so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its exit status if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.wrapper.try_wait()?)
    }

    /// An error with the end of its log if it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.ended()? {
            Some(status) => {
                bail!("{} ended ({status}); its log {}:\n{}", self.name, self.log.display(), tail(&self.log))
            }
            None => Ok(()),
        }
    }

    /// Sends it a signal and waits until it has ended.
    pub fn stop(&mut self, signal: Signal) -> Result<ExitStatus> {
        if self.ended()?.is_none() {
            match kill(self.pid, signal) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => return Err(error).with_context(|| format!("sending {signal} to {}", self.name)),
            }
        }
        wait_for(&format!("{} to end", self.name), SOON, || self.wrapper.try_wait()?.context("it is still running"))
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        wait_for(&format!("{} to end", self.name), limit, || self.wrapper.try_wait()?.context("it is still running"))
    }

    /// Lets it run on after this value is gone; it ends with its lab.
    pub fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.keep && !matches!(self.wrapper.try_wait(), Ok(Some(_))) {
            let _ = self.stop(Signal::SIGKILL);
        }
    }
}

/// The only child of a process, from the kernel's list.
pub(crate) fn child_of(pid: u32) -> Option<i32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?.split_whitespace().next()?.parse().ok()
}

fn tail(log: &PathBuf) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
