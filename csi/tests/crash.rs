//! kill -9 at every system call by which the driver changes anything, then a new driver and the same calls again: the
//! data is there, nothing is left over. And kill -9 while mkfs runs, which outlives the driver.
//!
//! The driver is the ordinary program, under ptrace from outside: there is no hook in it.
//! `cargo test -p keelway-csi --test crash -- --ignored`, as root.
#![cfg(target_arch = "x86_64")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use common::{Calls, Driver, MIB, block, create, mount};
use keelway_csi::csi::VolumeCapability;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tonic::Code;

/// Whether a system call, at its entry, is about to change something that outlives the process.
fn changes(pid: Pid, regs: &libc::user_regs_struct) -> bool {
    const LOOP: [u64; 3] = [0x4C01, 0x4C0A, 0x125D];
    let number = regs.orig_rax as i64;
    match number {
        libc::SYS_openat => regs.rdx as i32 & (libc::O_CREAT | libc::O_TMPFILE & !libc::O_DIRECTORY) != 0,
        libc::SYS_ioctl => LOOP.contains(&regs.rsi),
        // Of the journal and of records; not of sockets and wake-ups.
        libc::SYS_write => std::fs::read_link(format!("/proc/{pid}/fd/{}", regs.rdi))
            .is_ok_and(|path| path.to_string_lossy().contains("/state/")),
        libc::SYS_ftruncate | libc::SYS_fallocate | libc::SYS_fsetxattr | libc::SYS_fsync | libc::SYS_fdatasync => true,
        libc::SYS_linkat | libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_rename | libc::SYS_mkdirat => true,
        libc::SYS_fsconfig | libc::SYS_fsmount | libc::SYS_open_tree | libc::SYS_move_mount | libc::SYS_umount2 => true,
        libc::SYS_mount_setattr | libc::SYS_flock | libc::SYS_vfork => true,
        // std starts programs by clone3 or clone with CLONE_VFORK; threads do not count.
        libc::SYS_clone => regs.rdi & libc::CLONE_VFORK as u64 != 0,
        _ => false,
    }
}

/// Lets the process run, and kills it when it enters the `at`-th change. Says when it watches; returns when it is gone.
fn trace(pid: u32, at: usize, seen: &AtomicUsize, watching: &Sender<()>) {
    let pid = Pid::from_raw(pid as i32);
    let mut seized = std::collections::BTreeSet::new();
    loop {
        let before = seized.len();
        for task in common::list(Path::new(&format!("/proc/{pid}/task"))) {
            let tid: i32 = task.file_name().unwrap().to_str().unwrap().parse().unwrap();
            // A thread made by a traced one is traced already.
            if seized.insert(tid)
                && ptrace::seize(Pid::from_raw(tid), Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACESYSGOOD)
                    .is_ok()
            {
                ptrace::interrupt(Pid::from_raw(tid)).unwrap();
            }
        }
        if seized.len() == before {
            break;
        }
    }
    watching.send(()).unwrap();
    // This thread's tracees only: other tests have children, too.
    let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    loop {
        let (tid, signal) = match waitpid(Pid::from_raw(-1), Some(flags)) {
            Ok(WaitStatus::PtraceSyscall(tid)) => {
                // ENOSYS in rax marks the entry.
                if let Ok(regs) = ptrace::getregs(tid)
                    && regs.rax as i64 == -i64::from(libc::ENOSYS)
                    && changes(pid, &regs)
                    && seen.fetch_add(1, Ordering::SeqCst) + 1 == at
                {
                    kill(pid, Signal::SIGKILL).unwrap();
                    continue;
                }
                (tid, None)
            }
            Ok(WaitStatus::PtraceEvent(tid, ..)) => (tid, None),
            Ok(WaitStatus::Stopped(tid, signal)) => (tid, Some(signal).filter(|&signal| signal != Signal::SIGTRAP)),
            Ok(_) => continue,
            Err(nix::Error::ECHILD) => return,
            Err(nix::Error::EINTR) => continue,
            Err(error) => panic!("waitpid: {error}"),
        };
        // It may have been killed meanwhile.
        let _ = ptrace::syscall(tid, signal);
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Create,
    Stage,
    Publish,
    Write,
    Check,
    Unpublish,
    Unstage,
    Delete,
}

const LIFE: [Step; 12] = {
    use Step::*;
    [Create, Stage, Publish, Write, Unpublish, Unstage, Stage, Publish, Check, Unpublish, Unstage, Delete]
};

const DATA: &[u8] = &[0x5a; 4096];

/// One try of one step. `Ok(false)` when the driver did not answer.
async fn attempt(driver: &Driver, step: Step, calls: &mut Calls) -> Result<bool, tonic::Status> {
    let Ok(channel) = driver.try_channel().await else { return Ok(false) };
    let (mut controller, mut node) = (
        keelway_csi::csi::controller_client::ControllerClient::new(channel.clone()),
        keelway_csi::csi::node_client::NodeClient::new(channel),
    );
    let outcome = match step {
        Step::Create => {
            let request = create("pvc-1", 16 * MIB, &calls.capability, &[]);
            controller.create_volume(request).await.map(|made| calls.id = made.into_inner().volume.unwrap().volume_id)
        }
        Step::Stage => node.node_stage_volume(calls.stage()).await.map(drop),
        Step::Publish => node.node_publish_volume(calls.publish()).await.map(drop),
        Step::Unpublish => node.node_unpublish_volume(calls.unpublish()).await.map(drop),
        Step::Unstage => node.node_unstage_volume(calls.unstage()).await.map(drop),
        Step::Delete => controller.delete_volume(calls.delete()).await.map(drop),
        Step::Write | Step::Check => Ok(()),
    };
    match outcome {
        Ok(()) => Ok(true),
        // A connection that broke; the driver itself never answers with these.
        Err(status) if [Code::Unavailable, Code::Unknown, Code::Cancelled].contains(&status.code()) => Ok(false),
        Err(status) => Err(status),
    }
}

fn data_path(calls: &Calls) -> String {
    if calls.capability == block() { calls.target.clone() } else { format!("{}/data", calls.target) }
}

/// Goes through a volume's life, with a kill at the `at`-th change. Returns how many changes there were in all.
async fn live_and_die(capability: VolumeCapability, at: usize) -> usize {
    let mut driver = Driver::new();
    let pid = driver.start();
    let seen = Arc::new(AtomicUsize::new(0));
    let (watching, watched) = channel();
    let tracer = {
        let seen = seen.clone();
        std::thread::spawn(move || trace(pid, at, &seen, &watching))
    };
    watched.recv().unwrap();
    let mut calls = Calls::new(&driver, "", capability);
    let mut killed = false;
    for step in LIFE {
        let start = Instant::now();
        loop {
            match attempt(&driver, step, &mut calls).await {
                Ok(true) => break,
                Ok(false) if !killed => {
                    killed = true;
                    while !tracer.is_finished() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    driver.lost();
                    driver.start();
                }
                // A mkfs of the driver that was killed still runs.
                Err(status) if status.code() == Code::Aborted => tokio::time::sleep(Duration::from_millis(5)).await,
                other => panic!("{step:?}, killed at change {at}: {other:?}"),
            }
            assert!(start.elapsed() < Duration::from_secs(20), "{step:?}, killed at change {at}: no end");
        }
        match step {
            Step::Create => assert_eq!(driver.images().len(), 1, "killed at change {at}"),
            Step::Write => {
                let file = std::fs::OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(data_path(&calls))
                    .unwrap();
                std::os::unix::fs::FileExt::write_all_at(&file, DATA, 0).unwrap();
                file.sync_all().unwrap();
            }
            Step::Check => {
                let found = std::fs::File::open(data_path(&calls)).and_then(|file| {
                    let mut found = vec![0; DATA.len()];
                    std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).map(|()| found)
                });
                assert!(found.is_ok_and(|found| found == DATA), "killed at change {at}: the data is lost");
            }
            _ => {}
        }
    }
    if !killed {
        driver.kill();
        tracer.join().unwrap();
    }
    driver.assert_clean();
    seen.load(Ordering::SeqCst)
}

async fn every_point(name: &str, capability: VolumeCapability) {
    common::need_root();
    let start = Instant::now();
    let mut at = 1;
    while live_and_die(capability.clone(), at).await >= at {
        at += 1;
    }
    eprintln!("{name}: killed at each of {} changes, nothing lost or left, in {:.1?}", at - 1, start.elapsed());
    // Fewer would mean that the tracer saw nothing.
    assert!(at > 60, "only {} changes were seen", at - 1);
}

#[tokio::test]
#[ignore = "needs root, loop devices and ptrace"]
async fn killed_at_every_change_of_a_filesystems_life() {
    every_point("ext4", mount("ext4")).await;
}

#[tokio::test]
#[ignore = "needs root, loop devices and ptrace"]
async fn killed_at_every_change_of_a_block_devices_life() {
    every_point("block", block()).await;
}

/// The pid of a mkfs that has the image as its standard input.
fn mkfs_on(image: &Path) -> Option<Pid> {
    let of = |process: &Path| std::fs::read_link(process.join("fd/0")).is_ok_and(|path| path == image);
    let is_mkfs =
        |process: &Path| std::fs::read_to_string(process.join("comm")).is_ok_and(|comm| comm.starts_with("mkfs"));
    let found = common::list(Path::new("/proc")).into_iter().find(|process| is_mkfs(process) && of(process))?;
    found.file_name()?.to_str()?.parse().ok().map(Pid::from_raw)
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_mkfs_that_outlives_its_driver_is_waited_for() {
    let mut driver = Driver::new();
    driver.start();
    // Many inodes, so that mkfs takes long enough to be stopped in the middle.
    let parameters = [("bytesPerInode", "1024"), ("allocation", "sparse")];
    let request = create("pvc-1", 8192 * MIB, &mount("ext4"), &parameters);
    let id = driver.controller().await.create_volume(request).await.unwrap().into_inner().volume.unwrap().volume_id;
    let calls = Calls::new(&driver, &id, mount("ext4"));
    let (mut node, stage) = (driver.node().await, calls.stage());
    let staging = tokio::spawn(async move { node.node_stage_volume(stage).await });
    let image = driver.images().remove(0).canonicalize().unwrap();
    let start = Instant::now();
    let mkfs = loop {
        if let Some(pid) = mkfs_on(&image) {
            break pid;
        }
        assert!(start.elapsed() < Duration::from_secs(10) && !staging.is_finished(), "no mkfs was seen");
        tokio::task::yield_now().await;
    };
    kill(mkfs, Signal::SIGSTOP).unwrap();
    driver.kill();
    assert!(staging.await.unwrap().is_err());

    // Another call of the same, and a delete, must keep away from the image while it is being written to.
    driver.start();
    assert!(driver.log().contains("its mkfs still runs"), "{}", driver.log());
    let refused = driver.node().await.node_stage_volume(calls.stage()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted, "{refused}");
    let refused = driver.controller().await.delete_volume(calls.delete()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted, "{refused}");

    // Half a filesystem is wiped, since nothing of it was ever handed out, and made anew.
    kill(mkfs, Signal::SIGKILL).unwrap();
    let start = Instant::now();
    while driver.node().await.node_stage_volume(calls.stage()).await.is_err() {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", driver.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut node = driver.node().await;
    node.node_publish_volume(calls.publish()).await.unwrap();
    std::fs::write(data_path(&calls), DATA).unwrap();
    node.node_unpublish_volume(calls.unpublish()).await.unwrap();
    node.node_unstage_volume(calls.unstage()).await.unwrap();
    let checked = std::process::Command::new("e2fsck").arg("-fn").arg(&image).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    driver.controller().await.delete_volume(calls.delete()).await.unwrap();
    driver.assert_clean();
}
