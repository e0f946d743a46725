//! Volumes that are whole devices.
//!
//! `cargo test -p keelway-csi --test raw -- --ignored`, as root.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;

use common::{
    Calls, Driver, MIB, RAW, Still, available, block, bring, create, delete, end, made, mount, run, take_away, try_made,
};
use keelway_csi::csi;
use tonic::Code;

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_device_is_a_volume() {
    let mut driver = Driver::new().disks(1, 64).disks(1, 128);
    driver.start();
    for kind in [mount("ext4"), block()] {
        // The smallest that is large enough, and all of it.
        let request = create("pvc-1", 20 * MIB, &kind, RAW);
        let volume = driver.controller().await.create_volume(request).await.unwrap().into_inner().volume.unwrap();
        assert_eq!(volume.capacity_bytes, 64 * MIB);
        let calls = Calls::new(&driver, &volume.volume_id, kind.clone());
        bring(&driver, &calls).await;
        let path = if kind == block() { calls.target.clone() } else { format!("{}/data", calls.target) };
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&path).unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        driver.kill();
        driver.start();
        // In use it stays, also as a block device that nobody has open.
        let refused = driver.controller().await.delete_volume(calls.delete()).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        for _ in 0..2 {
            take_away(&driver, &calls).await;
            bring(&driver, &calls).await;
        }
        assert_eq!(fs::read(&path).unwrap()[..8192], [7; 8192]);
        end(&driver, &calls).await;
        // The next one to have it finds nothing of the last one's.
        let found = fs::read(driver.path("disk0")).unwrap();
        assert!(found.iter().all(|&byte| byte == 0), "data is left on the device");
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_may_hold_data_is_never_taken() {
    let mut driver = Driver::new().disks(3, 64);
    // One has a filesystem, one is mounted, and one is free.
    run("mkfs.ext4", &["-q", driver.disk(0)]);
    run("mkfs.ext4", &["-q", driver.disk(1)]);
    let mounted = driver.path("mounted");
    fs::create_dir(&mounted).unwrap();
    run("mount", &[driver.disk(1), mounted.to_str().unwrap()]);
    driver.start();
    assert_eq!(available(&driver, &[]).await, 64 * MIB);
    let calls = made(&driver, "pvc-1", 64 * MIB, &block(), RAW).await;
    let none = try_made(&driver, "pvc-2", 64 * MIB, &block(), RAW, None).await.unwrap_err();
    assert_eq!(none.code(), Code::ResourceExhausted);
    run("umount", &[mounted.to_str().unwrap()]);

    // A name that leads to another device than it did, as names do after a reboot, is noticed.
    fs::write(driver.path("disk0"), vec![0; 64 << 20]).unwrap();
    let point = |to: &str| {
        fs::remove_file(driver.by_id(2)).unwrap();
        std::os::unix::fs::symlink(to, driver.by_id(2)).unwrap();
    };
    point(driver.disk(0));
    let refused = driver.node().await.node_stage_volume(calls.stage()).await.unwrap_err();
    assert_eq!(refused.code(), Code::DataLoss, "{refused}");
    assert_eq!(driver.controller().await.delete_volume(calls.delete()).await.unwrap_err().code(), Code::DataLoss);
    point(driver.disk(2));
    delete(&driver, &calls).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_somebody_writes_to_a_claimed_disk_is_his() {
    let mut driver = Driver::new().disks(1, 64);
    driver.start();
    // By the start and by the end of it, where a RAID has what it is known by.
    for (at, kind) in [(0, mount("ext4")), ((64 << 20) - 4096, mount("ext4")), ((64 << 20) - 4096, block())] {
        let calls = made(&driver, "pvc-1", 16 * MIB, &kind, RAW).await;
        let disk = fs::File::options().write(true).open(driver.disk(0)).unwrap();
        disk.write_all_at(&[7; 4096], at).unwrap();
        disk.sync_all().unwrap();
        drop(disk);
        let refused = driver.node().await.node_stage_volume(calls.stage()).await.unwrap_err();
        assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("blank"), "{refused}");
        delete(&driver, &calls).await;
        let found = fs::read(driver.disk(0)).unwrap();
        assert!(found[at as usize..][..4096] == [7; 4096], "it was wiped");
        // Nor is it taken again.
        let none = try_made(&driver, "pvc-2", 16 * MIB, &kind, RAW, None).await.unwrap_err();
        assert_eq!(none.code(), Code::ResourceExhausted);
        fs::File::options().write(true).open(driver.disk(0)).unwrap().write_all_at(&[0; 4096], at).unwrap();
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root, loop devices and XFS"]
async fn a_disk_that_hangs_holds_up_nobody_else() {
    let mut driver = Driver::new().disks_below(1).disks(1, 64).disks(1, 128);
    driver.start();
    let kind = mount("ext4");
    let mut all = Vec::new();
    for (name, size) in [("hangs", 64), ("works", 128)] {
        let calls = made(&driver, name, size * MIB, &kind, RAW).await;
        bring(&driver, &calls).await;
        fs::write(format!("{}/data", calls.target), vec![7; 1 << 20]).unwrap();
        all.push(calls);
    }
    let (hangs, works) = (all[0].clone(), all[1].clone());
    let still = Still::hold(driver.path("below").to_str().unwrap());
    let mut node = driver.node().await;
    node.node_unpublish_volume(hangs.unpublish()).await.unwrap();
    let unstage = hangs.unstage();
    let waiting = tokio::spawn(async move { node.node_unstage_volume(unstage).await });
    let start = std::time::Instant::now();
    let mut node = driver.node().await;
    let mut unhealthy = Vec::new();
    while unhealthy.is_empty() {
        assert!(start.elapsed().as_secs() < 30 && !waiting.is_finished(), "it is never seen to hang");
        // All the while the other one is served.
        let one = std::time::Instant::now();
        take_away(&driver, &works).await;
        bring(&driver, &works).await;
        assert!(one.elapsed().as_secs() < 4, "held up for {:?}", one.elapsed());
        let again = node.node_unstage_volume(hangs.unstage()).await.unwrap_err();
        assert_eq!(again.code(), Code::Aborted);
        assert_eq!(driver.health(&works.id).await, []);
        unhealthy = driver.health(&hangs.id).await;
    }
    assert_eq!(unhealthy[0].0, csi::VolumeHealthErrorType::Inaccessible as i32, "{unhealthy:?}");
    drop(still);
    waiting.await.unwrap().unwrap();
    bring(&driver, &hangs).await;
    assert_eq!(fs::read(format!("{}/data", hangs.target)).unwrap(), vec![7; 1 << 20]);
    for calls in [&hangs, &works] {
        end(&driver, calls).await;
    }
    driver.assert_clean();
}
