//! The first process of a pod.
use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

/// Sleeps until SIGINT or SIGTERM, collecting every child that has ended.
pub(super) fn pause() -> Result<()> {
    let wanted: SigSet = [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    wanted.thread_block()?;
    while wanted.wait()? == Signal::SIGCHLD {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
    }
    Ok(())
}
