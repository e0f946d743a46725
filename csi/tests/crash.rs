//! kill -9 at the entry and at the exit of every system call by which the driver changes anything, then a new driver and
//! the same calls again: the data is there, nothing is left over. And kill -9 while mkfs runs, which outlives the driver.
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

use common::{
    BTRFS, Calls, DIRECTORY, Driver, MIB, Still, block, bring, create, delete, delete_group, end, filled, group, made,
    mount, snapshot, take_away, volume,
};
use keelway_csi::csi::volume_content_source::Type;
use keelway_csi::csi::{self, VolumeCapability};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tonic::Code;

/// Whether a system call is about to change something that outlives the process.
fn changes(pid: Pid, regs: &libc::user_regs_struct) -> bool {
    // Of loop devices, of blocks that are shared, of filesystems that grow, of subvolumes.
    const CHANGING: [u64; 14] = [
        0x4C01,
        0x4C0A,
        0x4C07,
        0x125D,
        0x1262,
        0x4004_9409,
        0x4008_6602,
        0x4010_586E,
        0x5000_9403,
        0x5000_940E,
        0x5000_940F,
        0x5000_9417,
        0x4008_941A,
        0x8030_942B,
    ];
    let number = regs.orig_rax as i64;
    match number {
        libc::SYS_openat => regs.rdx as i32 & (libc::O_CREAT | libc::O_TMPFILE & !libc::O_DIRECTORY) != 0,
        libc::SYS_ioctl => CHANGING.contains(&regs.rsi),
        // Of the journal and of records; not of sockets and wake-ups.
        libc::SYS_write | libc::SYS_pwrite64 => std::fs::read_link(format!("/proc/{pid}/fd/{}", regs.rdi))
            .is_ok_and(|path| path.to_string_lossy().contains("/state/")),
        libc::SYS_ftruncate | libc::SYS_fallocate | libc::SYS_fsetxattr | libc::SYS_fsync | libc::SYS_fdatasync => true,
        libc::SYS_copy_file_range | libc::SYS_syncfs | libc::SYS_renameat2 | libc::SYS_rmdir => true,
        libc::SYS_fchmod | libc::SYS_fchown | libc::SYS_fchownat | libc::SYS_fchmodat => true,
        libc::SYS_linkat | libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_rename | libc::SYS_mkdirat => true,
        libc::SYS_fsconfig | libc::SYS_fsmount | libc::SYS_open_tree | libc::SYS_move_mount | libc::SYS_umount2 => true,
        libc::SYS_mount_setattr | libc::SYS_flock | libc::SYS_vfork => true,
        // std starts programs by clone3 or clone with CLONE_VFORK; threads do not count.
        libc::SYS_clone => regs.rdi & libc::CLONE_VFORK as u64 != 0,
        _ => false,
    }
}

/// Lets the process run, and kills it at the `at`-th change; each is one when it is entered and one when it is left. Says when it watches; returns when it is gone.
fn trace(pid: u32, at: usize, seen: &AtomicUsize, watching: &Sender<()>) {
    let pid = Pid::from_raw(pid as i32);
    let mut seized = std::collections::BTreeSet::new();
    loop {
        let before = seized.len();
        for task in common::list(Path::new(&format!("/proc/{pid}/task"))) {
            let tid: i32 = task.file_name().unwrap().to_str().unwrap().parse().unwrap();
            // A thread made by a traced one is traced already.
            let options = Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACESYSGOOD;
            if seized.insert(tid) && ptrace::seize(Pid::from_raw(tid), options).is_ok() {
                // One that was idle for long may have ended by itself.
                let stopped = ptrace::interrupt(Pid::from_raw(tid));
                assert!(matches!(stopped, Ok(()) | Err(nix::Error::ESRCH)), "interrupt {tid}: {stopped:?}");
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
                // The arguments are in their registers at the exit, too.
                if let Ok(regs) = ptrace::getregs(tid)
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
    Snapshot,
    Restore,
    Clone,
    DropSnapshot,
    Group,
    DropGroup,
    Expand,
    NodeExpand,
    Modify,
}
use Step::*;

const LIFE: [Step; 12] =
    [Create, Stage, Publish, Write, Unpublish, Unstage, Stage, Publish, Check, Unpublish, Unstage, Delete];

const DATA: &[u8] = &[0x5a; 4096];

/// How long something may take that must happen: far longer than it does on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is lived through: steps before the tracer watches, and those that it watches.
#[derive(Clone)]
struct Scenario {
    name: &'static str,
    /// The pool's filesystem, when it is not the host's.
    pool: Option<&'static str>,
    class: &'static [(&'static str, &'static str)],
    flags: &'static [&'static str],
    capability: VolumeCapability,
    mebibytes: i64,
    before: &'static [Step],
    watched: &'static [Step],
    /// Whether it has a volume group.
    group: bool,
    /// Fewer changes would mean that the tracer saw nothing.
    least: usize,
}

/// The requests, and what came of them.
struct World {
    calls: Calls,
    class: &'static [(&'static str, &'static str)],
    size: i64,
    snapshot: String,
    group: csi::VolumeGroupSnapshot,
    restored: String,
    clone: String,
}

impl World {
    fn made(&self, name: &str, from: Option<Type>) -> csi::CreateVolumeRequest {
        filled(from, create(name, self.size, &self.calls.capability, self.class))
    }
}

/// One try of one step. `Ok(false)` when the driver did not answer.
async fn attempt(driver: &Driver, step: Step, world: &mut World) -> Result<bool, tonic::Status> {
    let Ok(channel) = driver.try_channel().await else { return Ok(false) };
    let mut controller = keelway_csi::csi::controller_client::ControllerClient::new(channel.clone());
    let mut groups = keelway_csi::csi::group_controller_client::GroupControllerClient::new(channel.clone());
    let mut node = keelway_csi::csi::node_client::NodeClient::new(channel);
    let id = |made: tonic::Response<csi::CreateVolumeResponse>| made.into_inner().volume.unwrap().volume_id;
    let outcome = match step {
        Create => controller.create_volume(world.made("pvc-1", None)).await.map(|made| world.calls.id = id(made)),
        Stage => node.node_stage_volume(world.calls.stage()).await.map(drop),
        Publish => node.node_publish_volume(world.calls.publish()).await.map(drop),
        Unpublish => node.node_unpublish_volume(world.calls.unpublish()).await.map(drop),
        Unstage => node.node_unstage_volume(world.calls.unstage()).await.map(drop),
        Delete => controller.delete_volume(world.calls.delete()).await.map(drop),
        Write | Check => Ok(()),
        Snapshot => {
            let taken = controller.create_snapshot(world.calls.snapshot("s")).await;
            taken.map(|taken| world.snapshot = taken.into_inner().snapshot.unwrap().snapshot_id)
        }
        Restore => {
            let from = snapshot(&world.snapshot);
            controller.create_volume(world.made("restored", from)).await.map(|made| world.restored = id(made))
        }
        Clone => {
            let from = volume(&world.calls.id);
            controller.create_volume(world.made("clone", from)).await.map(|made| world.clone = id(made))
        }
        DropSnapshot => {
            let request = csi::DeleteSnapshotRequest { snapshot_id: world.snapshot.clone(), ..Default::default() };
            controller.delete_snapshot(request).await.map(drop)
        }
        Group => {
            let clone = Calls { id: world.clone.clone(), ..world.calls.clone() };
            let taken = groups.create_volume_group_snapshot(group("g", &[&world.calls, &clone])).await;
            taken.map(|taken| world.group = taken.into_inner().group_snapshot.unwrap())
        }
        DropGroup => groups.delete_volume_group_snapshot(delete_group(&world.group)).await.map(drop),
        Expand => controller.controller_expand_volume(world.calls.expand(world.size * 2)).await.map(drop),
        NodeExpand => node.node_expand_volume(world.calls.node_expand(world.size * 2)).await.map(drop),
        Modify => {
            let volume_id = world.calls.id.clone();
            let mutable_parameters = [("readAheadKiB".to_owned(), "512".to_owned())].into();
            let request = csi::ControllerModifyVolumeRequest { volume_id, mutable_parameters, ..Default::default() };
            controller.controller_modify_volume(request).await.map(drop)
        }
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

fn check(calls: &Calls, when: &str) {
    let found = std::fs::File::open(data_path(calls)).and_then(|file| {
        let mut found = vec![0; DATA.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).map(|()| found)
    });
    assert!(found.is_ok_and(|found| found == DATA), "{when}: the data is lost");
}

/// Goes through the steps, with a kill at the `at`-th change. Returns how many changes there were in all.
async fn live_and_die(scenario: &Scenario, at: usize) -> usize {
    let mut driver = match scenario.pool {
        Some(fs) => Driver::on(fs, 3072),
        None if scenario.group => Driver::new().lvm(4096, "lvm-thin"),
        None => Driver::new(),
    }
    .with(scenario.flags);
    let pid = driver.start();
    let mut world = World {
        calls: Calls::new(&driver, "", scenario.capability.clone()),
        class: scenario.class,
        size: scenario.mebibytes * MIB,
        snapshot: String::new(),
        group: Default::default(),
        restored: String::new(),
        clone: String::new(),
    };
    let when = format!("{}, killed at change {at}", scenario.name);
    for &step in scenario.before {
        assert!(attempt(&driver, step, &mut world).await.unwrap(), "{when}: {step:?}");
        after(step, &driver, &world, &when);
    }
    let seen = Arc::new(AtomicUsize::new(0));
    let (watching, watched) = channel();
    let tracer = {
        let seen = seen.clone();
        std::thread::spawn(move || trace(pid, at, &seen, &watching))
    };
    watched.recv().unwrap();
    let mut killed = false;
    for &step in scenario.watched {
        let start = Instant::now();
        loop {
            match attempt(&driver, step, &mut world).await {
                Ok(true) => break,
                Ok(false) if !killed => {
                    killed = true;
                    while !tracer.is_finished() {
                        assert!(start.elapsed() < PATIENCE, "{when}: {step:?}: not answered, though not killed");
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    driver.lost();
                    driver.start();
                }
                // A mkfs of the driver that was killed still runs.
                Err(status) if status.code() == Code::Aborted => tokio::time::sleep(Duration::from_millis(5)).await,
                other => panic!("{when}: {step:?}: {other:?}\n{}", driver.log()),
            }
            assert!(start.elapsed() < PATIENCE, "{when}: {step:?}: no end");
        }
        after(step, &driver, &world, &when);
    }
    if !killed {
        driver.kill();
        tracer.join().unwrap();
        driver.start();
    }
    // What was made of it holds the data, too.
    if scenario.watched.last() != Some(&Delete) {
        if scenario.before.contains(&Publish) || scenario.watched.contains(&Publish) {
            check(&world.calls, &when);
            take_away(&driver, &world.calls).await;
        }
        for id in [&world.restored, &world.clone].into_iter().filter(|id| !id.is_empty()) {
            let calls = Calls { id: id.clone(), ..world.calls.clone() };
            bring(&driver, &calls).await;
            check(&calls, &when);
            end(&driver, &calls).await;
        }
        delete(&driver, &world.calls).await;
    }
    driver.assert_clean();
    assert!(driver.stop_with_connections().await == Some(0), "{when}");
    let journal = std::fs::read_to_string(driver.path("state/journal")).unwrap();
    let begun = journal.matches("\"begin\"").count();
    assert_eq!(begun, journal.matches("\"end\"").count(), "{when}: an intent is left open\n{journal}");
    seen.load(Ordering::SeqCst)
}

/// What a step means outside of the driver.
fn after(step: Step, driver: &Driver, world: &World, when: &str) {
    match step {
        Create if world.class.is_empty() => assert_eq!(driver.images().len(), 1, "{when}"),
        Write => {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(data_path(&world.calls))
                .unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, DATA, 0).unwrap();
            file.sync_all().unwrap();
        }
        Check => check(&world.calls, when),
        _ => {}
    }
}

async fn every_point(scenario: Scenario) {
    common::need_root();
    let start = Instant::now();
    // On an emulated CPU not at each of them.
    let step = std::env::var("KEELWAY_CRASH_STEP").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let (mut at, mut tries) = (1, 0);
    let changes = loop {
        let seen = live_and_die(&scenario, at).await;
        if seen < at {
            break seen;
        }
        (at, tries) = (at + step, tries + 1);
    };
    let (name, took) = (scenario.name, start.elapsed());
    eprintln!("{name}: killed at {tries} of {changes} changes, nothing lost or left, in {took:.1?}");
    assert!(changes >= scenario.least, "only {changes} changes were seen");
}

const PLAIN: Scenario = Scenario {
    name: "",
    pool: None,
    class: &[],
    flags: &[],
    capability: VolumeCapability { access_mode: None, access_type: None },
    mebibytes: 16,
    before: &[],
    watched: &LIFE,
    group: false,
    least: 120,
};

const IN_USE: &[Step] = &[Create, Stage, Publish, Write];

#[tokio::test]
#[ignore = "needs root, loop devices and ptrace"]
async fn killed_at_every_change_of_a_filesystems_life() {
    every_point(Scenario { name: "ext4", capability: mount("ext4"), ..PLAIN }).await;
}

#[tokio::test]
#[ignore = "needs root, loop devices and ptrace"]
async fn killed_at_every_change_of_a_block_devices_life() {
    every_point(Scenario { name: "block", capability: block(), ..PLAIN }).await;
}

#[tokio::test]
#[ignore = "needs root, loop devices and ptrace"]
async fn killed_at_every_change_of_copies() {
    every_point(Scenario {
        name: "snapshot, restore, clone, group by copy",
        capability: mount("ext4"),
        before: IN_USE,
        watched: &[Snapshot, Restore, Clone, DropSnapshot, Group, DropGroup],
        least: 100,
        ..PLAIN
    })
    .await;
}

#[tokio::test]
#[ignore = "needs root, loop devices, ptrace and XFS"]
async fn killed_at_every_change_of_shared_blocks() {
    every_point(Scenario {
        name: "snapshot, restore, clone by shared blocks on XFS",
        pool: Some("xfs"),
        capability: mount("ext4"),
        before: IN_USE,
        watched: &[Snapshot, Restore, Clone, DropSnapshot],
        least: 60,
        ..PLAIN
    })
    .await;
}

#[tokio::test]
#[ignore = "needs root, loop devices, ptrace and XFS"]
async fn killed_at_every_change_of_growth() {
    every_point(Scenario {
        name: "growth of XFS in use, and new parameters",
        capability: mount("xfs"),
        mebibytes: 300,
        before: IN_USE,
        watched: &[Expand, NodeExpand, Modify],
        least: 30,
        ..PLAIN
    })
    .await;
}

#[tokio::test]
#[ignore = "needs root, loop devices, ptrace and btrfs"]
async fn killed_at_every_change_of_a_subvolumes_life() {
    every_point(Scenario {
        name: "subvolumes",
        pool: Some("btrfs"),
        class: BTRFS,
        flags: &["--backends=btrfs"],
        capability: mount(""),
        watched: &[
            Create,
            Stage,
            Publish,
            Write,
            Snapshot,
            Restore,
            Clone,
            DropSnapshot,
            Expand,
            Unpublish,
            Unstage,
            Stage,
            Publish,
            Check,
        ],
        least: 100,
        ..PLAIN
    })
    .await;
}

#[tokio::test]
#[ignore = "needs root and ptrace"]
async fn killed_at_every_change_of_a_directorys_life() {
    every_point(Scenario {
        name: "directories",
        class: DIRECTORY,
        flags: &["--backends=directory"],
        capability: mount(""),
        least: 60,
        ..PLAIN
    })
    .await;
}

const LOGICAL: Scenario = Scenario {
    name: "thin volumes",
    class: &[("backend", "lvm-thin")],
    watched: &[Create, Stage, Publish, Write, Snapshot, Restore, DropSnapshot, Expand, NodeExpand, Check],
    group: true,
    least: 60,
    ..PLAIN
};

#[tokio::test]
#[ignore = "needs root, device-mapper and ptrace"]
async fn killed_at_every_change_of_a_thin_volumes_life() {
    if common::no_device_mapper() {
        return;
    }
    every_point(Scenario { capability: mount("xfs"), mebibytes: 300, ..LOGICAL }).await;
}

/// The pid of a mkfs that has the image as its standard input.
fn mkfs_on(image: &Path) -> Option<Pid> {
    let of = |process: &Path| std::fs::read_link(process.join("fd/0")).is_ok_and(|path| path == image);
    let is_mkfs =
        |process: &Path| std::fs::read_to_string(process.join("comm")).is_ok_and(|comm| comm.starts_with("mkfs"));
    let found = common::list(Path::new("/proc")).into_iter().find(|process| is_mkfs(process) && of(process))?;
    found.file_name()?.to_str()?.parse().ok().map(Pid::from_raw)
}

/// What a process does: `T` when it is stopped, `D` while it waits for a disk.
fn state_of(pid: Pid) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // PID (NAME) STATE PARENT ...
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or(' ')
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_mkfs_that_outlives_its_driver_is_waited_for() {
    let mut driver = Driver::on("ext4", 512);
    driver.start();
    let calls = made(&driver, "pvc-1", 128 * MIB, &mount("ext4"), &[("bytesPerInode", "1024")]).await;
    // Its pool is held still, so that mkfs comes no further than to its first write before it is stopped.
    let still = Still::hold(driver.path("pool").to_str().unwrap());
    let (mut node, stage) = (driver.node().await, calls.stage());
    let staging = tokio::spawn(async move { node.node_stage_volume(stage).await });
    let image = driver.images().remove(0).canonicalize().unwrap();
    let start = Instant::now();
    let mkfs = loop {
        if let Some(pid) = mkfs_on(&image).filter(|&pid| state_of(pid) == 'D') {
            break pid;
        }
        assert!(start.elapsed() < PATIENCE && !staging.is_finished(), "no mkfs was seen");
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    kill(mkfs, Signal::SIGSTOP).unwrap();
    drop(still);
    while state_of(mkfs) != 'T' {
        assert!(start.elapsed() < PATIENCE, "mkfs does not stop");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
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
        assert!(start.elapsed() < PATIENCE, "{}", driver.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    driver.node().await.node_publish_volume(calls.publish()).await.unwrap();
    std::fs::write(data_path(&calls), DATA).unwrap();
    take_away(&driver, &calls).await;
    let checked = std::process::Command::new("e2fsck").arg("-fn").arg(&image).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    delete(&driver, &calls).await;
    driver.assert_clean();
}
