//! Volumes without a device: subvolumes and directories.
//!
//! `cargo test -p keelway-csi --test trees -- --ignored`, as root.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;

use common::{
    BTRFS, Calls, DIRECTORY, Driver, MIB, block, bring, create, delete, drop_snapshot, made, mount, snapshot, take,
    try_made, try_take, volume,
};
use keelway_csi::csi;
use tonic::Code;

/// In use it stays; then it ends.
async fn end(driver: &Driver, calls: &Calls) {
    let refused = driver.controller().await.delete_volume(calls.delete()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    common::end(driver, calls).await;
}

/// How many bytes can be written before the volume is full.
fn fill(directory: &str, most: usize) -> usize {
    let mut file = fs::File::create(format!("{directory}/filling")).unwrap();
    let chunk: Vec<u8> = (0..1 << 20).map(|n: u32| (n ^ n >> 8) as u8).collect();
    let mut written = 0;
    while written < most {
        if file.write_all(&chunk).and_then(|()| file.sync_data()).is_err() {
            return written;
        }
        written += chunk.len();
    }
    written
}

async fn used(driver: &Driver, calls: &Calls) -> csi::VolumeUsage {
    driver.node().await.node_get_volume_stats(calls.stats()).await.unwrap().into_inner().usage[0]
}

#[tokio::test]
#[ignore = "needs root and btrfs"]
async fn subvolumes_hold_their_data_and_their_limit() {
    let mut driver = Driver::on("btrfs", 2048).with(&["--backends=btrfs"]);
    driver.start();
    let first = made(&driver, "first", 64 * MIB, &mount(""), BTRFS).await;
    bring(&driver, &first).await;
    let options = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let line = options.lines().find(|line| line.contains(&first.target)).unwrap();
    assert!(line.contains("nosuid") && line.contains("nodev") && line.contains("btrfs"), "{line}");
    let data = format!("{}/data", first.target);
    fs::write(&data, "before").unwrap();
    let taken = take(&driver, "s", &first).await.snapshot_id;
    fs::write(&data, "after").unwrap();
    let clone = try_made(&driver, "clone", 64 * MIB, &mount(""), BTRFS, volume(&first.id)).await.unwrap();
    let restored = try_made(&driver, "restored", 0, &mount(""), BTRFS, snapshot(&taken)).await.unwrap();
    for (calls, want) in [(&clone, "after"), (&restored, "before")] {
        bring(&driver, calls).await;
        assert_eq!(fs::read_to_string(format!("{}/data", calls.target)).unwrap(), want);
        fs::write(format!("{}/data", calls.target), "changed").unwrap();
    }
    assert_eq!(fs::read_to_string(&data).unwrap(), "after");

    // A pod is held to its size, and a larger one is there at once.
    let written = fill(&first.target, 128 << 20);
    assert!((48 << 20..65 << 20).contains(&written), "{written} bytes fit into 64 MiB");
    let usage = used(&driver, &first).await;
    assert!(usage.total == 64 * MIB && usage.used > 48 * MIB && usage.used <= 64 * MIB, "{usage:?}");
    let grown = driver.controller().await.controller_expand_volume(first.expand(128 * MIB)).await;
    let answer = grown.unwrap().into_inner();
    assert!(answer.capacity_bytes == 128 * MIB && !answer.node_expansion_required);
    let written = fill(&first.target, 256 << 20);
    assert!((112 << 20..129 << 20).contains(&written), "{written} bytes fit into 128 MiB");

    driver.kill();
    driver.start();
    for calls in [&first, &clone, &restored] {
        bring(&driver, calls).await;
        end(&driver, calls).await;
    }
    drop_snapshot(&driver, &taken).await;
    let refused = driver.controller().await.create_volume(create("b", MIB, &block(), BTRFS)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root"]
async fn directories_are_had_by_who_asks_for_their_weakness() {
    let mut driver = Driver::new().with(&["--backends=directory,image"]);
    driver.start();
    let plain = create("a", 16 * MIB, &mount(""), &[("backend", "directory")]);
    let refused = driver.controller().await.create_volume(plain).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("unenforced"), "{refused}");
    let other = create("a", 16 * MIB, &mount(""), &[("backend", "btrfs")]);
    let refused = driver.controller().await.create_volume(other).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("image, directory"), "{refused}");

    let first = made(&driver, "first", 16 * MIB, &mount(""), DIRECTORY).await;
    bring(&driver, &first).await;
    fs::create_dir(format!("{}/deep", first.target)).unwrap();
    fs::write(format!("{}/deep/data", first.target), "kept").unwrap();
    driver.kill();
    driver.start();
    bring(&driver, &first).await;
    assert_eq!(fs::read_to_string(format!("{}/deep/data", first.target)).unwrap(), "kept");
    let refused = try_take(&driver, "s", &first).await.unwrap_err();
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("directory"), "{refused}");

    // What a pod leaves behind leads the removal nowhere else (csi-driver-nfs CVE-2026-3864, local-path CVE-2025-62878).
    let outside = driver.path("outside");
    fs::create_dir_all(outside.join("precious")).unwrap();
    symlink(&outside, format!("{}/link", first.target)).unwrap();
    symlink("../../../..", format!("{}/deep/up", first.target)).unwrap();
    end(&driver, &first).await;
    assert!(outside.join("precious").exists());
    driver.assert_clean();
}

/// How many MiB a process without privileges can write, of so many that it tries to.
fn written_by_a_pod(directory: &str, mebibytes: u64) -> u64 {
    use std::os::unix::process::CommandExt;
    // As fsGroup or an init container does it.
    std::os::unix::fs::chown(directory, Some(65534), Some(65534)).unwrap();
    let file = format!("{directory}/filling");
    let mut dd = std::process::Command::new("dd");
    dd.args(["if=/dev/zero", &format!("of={file}"), "bs=1048576", &format!("count={mebibytes}"), "conv=fsync"]);
    let output = dd.uid(65534).gid(65534).output().unwrap();
    let length = fs::metadata(&file).unwrap().len() >> 20;
    assert_eq!(output.status.success(), length == mebibytes, "{}", String::from_utf8_lossy(&output.stderr));
    length
}

/// A program as an ordinary user. Whether it succeeded.
fn as_a_pod(program: &str, args: &[&str]) -> bool {
    use std::os::unix::process::CommandExt;
    let output = std::process::Command::new(program).args(args).uid(65534).gid(65534).output().unwrap();
    output.status.success()
}

#[tokio::test]
#[ignore = "needs root and btrfs"]
async fn subvolumes_that_a_pod_makes_are_told_of_and_go_with_its_volume() {
    let mut driver = Driver::on("btrfs", 1024).with(&["--backends=btrfs"]);
    driver.start();
    // Since nothing holds them to a limit, a class that wants more than a quota is refused; one that says nothing gets that.
    let all = create("a", 16 * MIB, &mount(""), &[("backend", "btrfs"), ("capacity", "enforced")]);
    let refused = driver.controller().await.create_volume(all).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("quota"), "{refused}");
    let plain = made(&driver, "plain", 16 * MIB, &mount(""), &[("backend", "btrfs")]).await;
    delete(&driver, &plain).await;

    let first = made(&driver, "first", 16 * MIB, &mount(""), BTRFS).await;
    bring(&driver, &first).await;
    std::os::unix::fs::chown(&first.target, Some(65534), Some(65534)).unwrap();
    // In a directory whose path is longer than any name for it may be, and one in another that refuses writes.
    let deep = r#"for (1 .. 20) { mkdir "d" x 250; chdir "d" x 250 or die } exec qw(btrfs subvolume create far)"#;
    let script = format!(
        "cd {} && btrfs subvolume create outer && btrfs subvolume create outer/inner && echo x > outer/inner/data &&
         btrfs property set outer ro true && perl -e '{deep}'",
        first.target
    );
    assert!(as_a_pod("sh", &["-c", &script]));
    let refused = try_take(&driver, "s", &first).await.unwrap_err();
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("subvolumes"), "{refused}");
    let refused = try_made(&driver, "clone", 16 * MIB, &mount(""), BTRFS, volume(&first.id)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    end(&driver, &first).await;
    let left = common::run("btrfs", &["subvolume", "list", driver.path("pool").to_str().unwrap()]);
    assert_eq!(left, "", "subvolumes are left");
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and XFS"]
async fn no_tree_is_too_deep_to_be_removed() {
    let mut driver = Driver::on("xfs", 512).with(&["--backends=directory"]);
    driver.start();
    let first = made(&driver, "first", 16 * MIB, &mount(""), DIRECTORY).await;
    bring(&driver, &first).await;
    let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let mut at = rustix::fs::open(&first.target, flags, rustix::fs::Mode::empty()).unwrap();
    for _ in 0..60_000 {
        rustix::fs::mkdirat(&at, "d", rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
        at = rustix::fs::openat(&at, "d", flags, rustix::fs::Mode::empty()).unwrap();
    }
    rustix::fs::openat(&at, "file", rustix::fs::OFlags::CREATE | rustix::fs::OFlags::CLOEXEC, 0o600.into()).unwrap();
    drop(at);
    end(&driver, &first).await;
    driver.assert_clean();
}

async fn held_by_its_quota(mut driver: Driver) {
    const QUOTA: &[(&str, &str)] = &[("backend", "directory"), ("capacity", "quota")];
    driver = driver.with(&["--backends=directory"]);
    driver.start();
    let first = made(&driver, "first", 16 * MIB, &mount(""), QUOTA).await;
    let second = made(&driver, "second", 64 * MIB, &mount(""), QUOTA).await;
    for (calls, size) in [(&first, 16), (&second, 64)] {
        bring(&driver, calls).await;
        let stat = rustix::fs::statvfs(calls.target.as_str()).unwrap();
        assert_eq!(stat.f_blocks * stat.f_frsize, size << 20, "df shows the volume's size");
    }
    driver.kill();
    driver.start();
    // Neither past its own size, nor into the other's.
    let written = written_by_a_pod(&first.target, 32);
    assert!((14..=16).contains(&written), "{written} MiB of 16");
    assert_eq!(written_by_a_pod(&second.target, 32), 32);
    let usage = used(&driver, &first).await;
    assert!(usage.total == 16 * MIB && usage.used >= 14 * MIB, "{usage:?}");
    // Nor are all of the pool's files a pod's.
    fs::remove_file(format!("{}/filling", first.target)).unwrap();
    let script = format!("cd {} && for n in $(seq 2000); do : > $n || exit 1; done", first.target);
    assert!(!as_a_pod("sh", &["-c", &script]), "2000 files fit where 1024 are to be had");
    let files = fs::read_dir(&first.target).unwrap().count();
    assert!((1000..=1024).contains(&files), "{files} files of 1024");
    for entry in fs::read_dir(&first.target).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    driver.controller().await.controller_expand_volume(first.expand(32 * MIB)).await.unwrap();
    let written = written_by_a_pod(&first.target, 64);
    assert!((30..=32).contains(&written), "{written} MiB of 32");
    // What is made below the volume is in its project, and its limit goes with it.
    let root = fs::File::open(&first.target).unwrap();
    let project = keelway_csi::sys::quota::project(&root).unwrap();
    assert!(project > 0 && keelway_csi::sys::quota::usage(&root, project).unwrap().1 == 32 << 20);
    drop(root);
    end(&driver, &first).await;
    end(&driver, &second).await;
    let pool = fs::File::open(driver.path("pool")).unwrap();
    assert_eq!(keelway_csi::sys::quota::usage(&pool, project).unwrap(), (0, 0));
    drop(pool);
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and project quota"]
async fn quota_of_xfs_holds_a_directory() {
    match Driver::on_mounted("xfs", 512, &[], "loop,prjquota") {
        Some(driver) => held_by_its_quota(driver).await,
        None => eprintln!("skipped: this kernel has no quota on XFS; cargo xtask kernels runs it on one that has"),
    }
}

#[tokio::test]
#[ignore = "needs root and project quota"]
async fn quota_of_ext4_holds_a_directory() {
    let make = ["-O", "quota,project", "-E", "quotatype=prjquota"];
    match Driver::on_mounted("ext4", 512, &make, "loop,prjquota") {
        Some(driver) => held_by_its_quota(driver).await,
        None => eprintln!("skipped: this kernel has no quota on ext4; cargo xtask kernels runs it on one that has"),
    }
}

#[tokio::test]
#[ignore = "needs root and XFS"]
async fn a_quota_that_nobody_enforces_is_not_promised() {
    let mut driver = Driver::on("xfs", 512).with(&["--backends=directory"]);
    driver.start();
    let class = [("backend", "directory"), ("capacity", "quota")];
    let refused = driver.controller().await.create_volume(create("a", 16 * MIB, &mount(""), &class)).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("prjquota"), "{refused}");
    driver.assert_clean();
}
