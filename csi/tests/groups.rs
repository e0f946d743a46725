//! Groups of snapshots: of one moment or none, all of them or none, under names that nobody else has.
//!
//! `cargo test -p keelway-csi --test groups -- --ignored`, as root.

mod common;

use std::fs;
use std::path::Path;

use common::{Calls, Driver, MIB, block, create, mount, run};
use keelway_csi::csi::{self, VolumeCapability};
use sha2::{Digest, Sha256};
use tonic::{Code, Status};

async fn made(driver: &Driver, name: &str, kind: &VolumeCapability, class: &[(&str, &str)]) -> Calls {
    let request = create(name, 16 * MIB, kind, class);
    let id = driver.controller().await.create_volume(request).await.unwrap().into_inner().volume.unwrap().volume_id;
    let (staging, target) = (driver.kubelet(&format!("staging/{name}")), driver.kubelet(&format!("pods/{name}")));
    Calls { staging, target, ..Calls::new(driver, &id, kind.clone()) }
}

async fn bring(driver: &Driver, calls: &Calls) {
    let mut node = driver.node().await;
    node.node_stage_volume(calls.stage()).await.unwrap();
    node.node_publish_volume(calls.publish()).await.unwrap();
}

async fn end(driver: &Driver, calls: &Calls) {
    let mut node = driver.node().await;
    node.node_unpublish_volume(calls.unpublish()).await.unwrap();
    node.node_unstage_volume(calls.unstage()).await.unwrap();
    driver.controller().await.delete_volume(calls.delete()).await.unwrap();
}

async fn take(driver: &Driver, name: &str, of: &[&Calls]) -> Result<csi::VolumeGroupSnapshot, Status> {
    let source_volume_ids = of.iter().map(|calls| calls.id.clone()).collect();
    let request = csi::CreateVolumeGroupSnapshotRequest { name: name.into(), source_volume_ids, ..Default::default() };
    let taken = driver.groups().await.create_volume_group_snapshot(request).await;
    taken.map(|taken| taken.into_inner().group_snapshot.unwrap())
}

async fn drop_group(driver: &Driver, group: csi::VolumeGroupSnapshot) {
    let delete = csi::DeleteVolumeGroupSnapshotRequest {
        group_snapshot_id: group.group_snapshot_id,
        snapshot_ids: group.snapshots.into_iter().map(|snapshot| snapshot.snapshot_id).collect(),
        ..Default::default()
    };
    driver.groups().await.delete_volume_group_snapshot(delete).await.unwrap();
}

#[tokio::test]
#[ignore = "needs root, loop devices, XFS and btrfs"]
async fn what_cannot_be_of_one_moment_is_refused() {
    for (pool, kind, class) in
        [("xfs", block(), &[][..]), ("btrfs", mount(""), &[("backend", "btrfs"), ("capacity", "quota")][..])]
    {
        let mut driver =
            Driver::on(pool, 1024).with(&[if pool == "xfs" { "--backends=image" } else { "--backends=btrfs" }]);
        driver.start();
        let (first, second) = (made(&driver, "first", &kind, class).await, made(&driver, "second", &kind, class).await);
        // At rest, of which any moment is the same one.
        let group = take(&driver, "rest", &[&first, &second]).await.unwrap();
        drop_group(&driver, group).await;
        bring(&driver, &first).await;
        bring(&driver, &second).await;
        let refused = take(&driver, "use", &[&first, &second]).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{pool}: {refused}");
        // One alone is.
        let group = take(&driver, "alone", &[&first]).await.unwrap();
        drop_group(&driver, group).await;
        end(&driver, &first).await;
        end(&driver, &second).await;
        driver.assert_clean();
    }
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_callers_name_is_no_groups() {
    let mut driver = Driver::new();
    driver.start();
    let calls = made(&driver, "first", &mount("ext4"), &[]).await;
    let request = |name: &str| csi::CreateSnapshotRequest {
        name: name.into(),
        source_volume_id: calls.id.clone(),
        ..Default::default()
    };
    let names = [format!("g/{}", calls.id), format!("h/{}", calls.id)];
    let mut controller = driver.controller().await;
    let before = controller.create_snapshot(request(&names[0])).await.unwrap().into_inner().snapshot.unwrap();
    let groups = [take(&driver, "g", &[&calls]).await.unwrap(), take(&driver, "h", &[&calls]).await.unwrap()];
    let after = controller.create_snapshot(request(&names[1])).await.unwrap().into_inner().snapshot.unwrap();
    assert!(after.group_snapshot_id.is_empty() && after.snapshot_id != groups[1].snapshots[0].snapshot_id);
    driver.kill();
    driver.start();
    let again = take(&driver, "g", &[&calls]).await.unwrap();
    assert_eq!(again.group_snapshot_id, groups[0].group_snapshot_id);
    for group in groups {
        drop_group(&driver, group).await;
    }
    let mut controller = driver.controller().await;
    for (name, snapshot) in names.iter().zip([before, after]) {
        let same = controller.create_snapshot(request(name)).await.unwrap().into_inner().snapshot.unwrap();
        assert_eq!(same.snapshot_id, snapshot.snapshot_id);
        let snapshot_id = snapshot.snapshot_id;
        controller.delete_snapshot(csi::DeleteSnapshotRequest { snapshot_id, ..Default::default() }).await.unwrap();
    }
    controller.delete_volume(calls.delete()).await.unwrap();
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_group_that_could_not_be_undone_is_not_forgotten() {
    let mut driver = Driver::on("ext4", 512);
    driver.start();
    let (first, second) =
        (made(&driver, "first", &mount("ext4"), &[]).await, made(&driver, "second", &mount("ext4"), &[]).await);
    let group = take(&driver, "g", &[&first, &second]).await.unwrap();
    driver.kill();
    // As if there were to have been three: a driver that was killed on the way.
    let id = &group.group_snapshot_id;
    let json = format!(r#"{{"begin":{{"seq":900,"intent":{{"op":"group","id":"{id}","members":3}}}}}}"#);
    let digest: String = Sha256::digest(&json)[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(driver.path("state/journal"), format!("{digest} {json}\n")).unwrap();
    let last = group.snapshots.iter().map(|snapshot| driver.path(&format!("pool/{}.snap", snapshot.snapshot_id)));
    let last = last.max().unwrap();
    for snapshot in &group.snapshots {
        let path = driver.path(&format!("pool/{}.snap", snapshot.snapshot_id));
        run("chattr", &[if path == last { "+i" } else { "-i" }, path.to_str().unwrap()]);
    }
    for _ in 0..2 {
        driver.start();
        driver.kill();
    }
    run("chattr", &["-i", last.to_str().unwrap()]);
    driver.start();
    let other = take(&driver, "g", &[&first, &second]).await.unwrap();
    assert_ne!(&other.group_snapshot_id, id, "what is left of a group was taken for all of it");
    drop_group(&driver, other).await;
    for calls in [first, second] {
        driver.controller().await.delete_volume(calls.delete()).await.unwrap();
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_somebody_else_holds_still_stays_so() {
    let mut driver = Driver::new();
    driver.start();
    let calls = made(&driver, "first", &mount("ext4"), &[]).await;
    bring(&driver, &calls).await;
    run("fsfreeze", &["--freeze", &calls.target]);
    let request =
        csi::CreateSnapshotRequest { name: "s".into(), source_volume_id: calls.id.clone(), ..Default::default() };
    let refused = driver.controller().await.create_snapshot(request.clone()).await;
    let still = !std::process::Command::new("fsfreeze").args(["--freeze", &calls.target]).status().unwrap().success();
    run("fsfreeze", &["--unfreeze", &calls.target]);
    assert!(refused.is_err() && still, "somebody else's hold is gone: {refused:?}");
    let taken = driver.controller().await.create_snapshot(request).await.unwrap().into_inner().snapshot.unwrap();
    fs::write(Path::new(&calls.target).join("data"), "not held any more").unwrap();
    let delete = csi::DeleteSnapshotRequest { snapshot_id: taken.snapshot_id, ..Default::default() };
    driver.controller().await.delete_snapshot(delete).await.unwrap();
    end(&driver, &calls).await;
    driver.assert_clean();
}
