//! Volumes that are whole devices.
//!
//! `cargo test -p keelway-csi --test raw -- --ignored`, as root.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;

use common::{Calls, Driver, MIB, block, create, mount, run};
use keelway_csi::csi::{self, VolumeCapability};
use tonic::Code;

const CLASS: &[(&str, &str)] = &[("backend", "raw")];

async fn made(driver: &Driver, name: &str, size: i64, kind: &VolumeCapability) -> Result<csi::Volume, tonic::Status> {
    let request = create(name, size, kind, CLASS);
    driver.controller().await.create_volume(request).await.map(|made| made.into_inner().volume.unwrap())
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_device_is_a_volume() {
    let mut driver = Driver::new().disks(1, 64).disks(1, 128);
    driver.start();
    for kind in [mount("ext4"), block()] {
        // The smallest that is large enough, and all of it.
        let volume = made(&driver, "pvc-1", 20 * MIB, &kind).await.unwrap();
        assert_eq!(volume.capacity_bytes, 64 * MIB);
        let calls = Calls::new(&driver, &volume.volume_id, kind.clone());
        let mut node = driver.node().await;
        node.node_stage_volume(calls.stage()).await.unwrap();
        node.node_publish_volume(calls.publish()).await.unwrap();
        let path = if kind == block() { calls.target.clone() } else { format!("{}/data", calls.target) };
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&path).unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        driver.kill();
        driver.start();
        let mut node = driver.node().await;
        // In use it stays, also as a block device that nobody has open.
        let refused = driver.controller().await.delete_volume(calls.delete()).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        for _ in 0..2 {
            node.node_unpublish_volume(calls.unpublish()).await.unwrap();
            node.node_unstage_volume(calls.unstage()).await.unwrap();
            node.node_stage_volume(calls.stage()).await.unwrap();
            node.node_publish_volume(calls.publish()).await.unwrap();
        }
        assert_eq!(fs::read(&path).unwrap()[..8192], [7; 8192]);
        node.node_unpublish_volume(calls.unpublish()).await.unwrap();
        node.node_unstage_volume(calls.unstage()).await.unwrap();
        driver.controller().await.delete_volume(calls.delete()).await.unwrap();
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
    let capacity = driver.controller().await.get_capacity(csi::GetCapacityRequest::default()).await.unwrap();
    assert_eq!(capacity.into_inner().available_capacity, 64 * MIB);
    let volume = made(&driver, "pvc-1", 64 * MIB, &block()).await.unwrap();
    let none = made(&driver, "pvc-2", 64 * MIB, &block()).await.unwrap_err();
    assert_eq!(none.code(), Code::ResourceExhausted);
    run("umount", &[mounted.to_str().unwrap()]);

    // Another device where the claimed one was is not it.
    let calls = Calls::new(&driver, &volume.volume_id, block());
    run("losetup", &["--detach", driver.disk(2)]);
    let other = driver.path("other");
    fs::File::create(&other).unwrap().set_len(64 << 20).unwrap();
    run("losetup", &[driver.disk(2), other.to_str().unwrap()]);
    let refused = driver.node().await.node_stage_volume(calls.stage()).await.unwrap_err();
    assert_eq!(refused.code(), Code::DataLoss, "{refused}");
    assert_eq!(driver.controller().await.delete_volume(calls.delete()).await.unwrap_err().code(), Code::DataLoss);
    run("losetup", &["--detach", driver.disk(2)]);
    run("losetup", &[driver.disk(2), driver.path("disk2").to_str().unwrap()]);
    driver.controller().await.delete_volume(calls.delete()).await.unwrap();
    driver.assert_clean();
}
