//! Groups of snapshots: of one moment or none, all of them or none, under names that nobody else has.
//!
//! `cargo test -p keelway-csi --test groups -- --ignored`, as root.

mod common;
#[path = "common/journal.rs"]
mod journal;

use std::fs;
use std::path::Path;

use common::{
    BTRFS, Driver, MIB, block, bring, delete, drop_group, drop_snapshot, end, made, mount, run, take, take_group,
    try_take, try_take_group,
};
use tonic::Code;

#[tokio::test]
#[ignore = "needs root, loop devices, XFS and btrfs"]
async fn what_cannot_be_of_one_moment_is_refused() {
    for (pool, kind, class) in [("xfs", block(), &[][..]), ("btrfs", mount(""), BTRFS)] {
        let mut driver =
            Driver::on(pool, 1024).with(&[if pool == "xfs" { "--backends=image" } else { "--backends=btrfs" }]);
        driver.start();
        let (first, second) = (
            made(&driver, "first", 16 * MIB, &kind, class).await,
            made(&driver, "second", 16 * MIB, &kind, class).await,
        );
        // At rest, of which any moment is the same one.
        let group = take_group(&driver, "rest", &[&first, &second]).await;
        drop_group(&driver, &group).await;
        bring(&driver, &first).await;
        bring(&driver, &second).await;
        let refused = try_take_group(&driver, "use", &[&first, &second]).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{pool}: {refused}");
        // One alone is.
        let group = take_group(&driver, "alone", &[&first]).await;
        drop_group(&driver, &group).await;
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
    let calls = made(&driver, "first", 16 * MIB, &mount("ext4"), &[]).await;
    let names = [format!("g/{}", calls.id), format!("h/{}", calls.id)];
    let before = take(&driver, &names[0], &calls).await;
    let groups = [take_group(&driver, "g", &[&calls]).await, take_group(&driver, "h", &[&calls]).await];
    let after = take(&driver, &names[1], &calls).await;
    assert!(after.group_snapshot_id.is_empty() && after.snapshot_id != groups[1].snapshots[0].snapshot_id);
    driver.kill();
    driver.start();
    let again = take_group(&driver, "g", &[&calls]).await;
    assert_eq!(again.group_snapshot_id, groups[0].group_snapshot_id);
    for group in &groups {
        drop_group(&driver, group).await;
    }
    for (name, snapshot) in names.iter().zip([before, after]) {
        let same = take(&driver, name, &calls).await;
        assert_eq!(same.snapshot_id, snapshot.snapshot_id);
        drop_snapshot(&driver, &snapshot.snapshot_id).await;
    }
    delete(&driver, &calls).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_group_that_could_not_be_undone_is_not_forgotten() {
    let mut driver = Driver::on("ext4", 512);
    driver.start();
    let (first, second) = (
        made(&driver, "first", 16 * MIB, &mount("ext4"), &[]).await,
        made(&driver, "second", 16 * MIB, &mount("ext4"), &[]).await,
    );
    let group = take_group(&driver, "g", &[&first, &second]).await;
    driver.kill();
    // As if there were to have been three: a driver that was killed on the way.
    let id = &group.group_snapshot_id;
    let json = format!(r#"{{"begin":{{"seq":900,"intent":{{"op":"group","id":"{id}","members":3}}}}}}"#);
    fs::write(driver.path("state/journal"), journal::line(&json)).unwrap();
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
    let other = take_group(&driver, "g", &[&first, &second]).await;
    assert_ne!(&other.group_snapshot_id, id, "what is left of a group was taken for all of it");
    drop_group(&driver, &other).await;
    for calls in [first, second] {
        delete(&driver, &calls).await;
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_somebody_else_holds_still_stays_so() {
    let mut driver = Driver::new();
    driver.start();
    let calls = made(&driver, "first", 16 * MIB, &mount("ext4"), &[]).await;
    bring(&driver, &calls).await;
    run("fsfreeze", &["--freeze", &calls.target]);
    let refused = try_take(&driver, "s", &calls).await;
    let still = !std::process::Command::new("fsfreeze").args(["--freeze", &calls.target]).status().unwrap().success();
    run("fsfreeze", &["--unfreeze", &calls.target]);
    assert!(refused.is_err() && still, "somebody else's hold is gone: {refused:?}");
    let taken = take(&driver, "s", &calls).await;
    fs::write(Path::new(&calls.target).join("data"), "not held any more").unwrap();
    drop_snapshot(&driver, &taken.snapshot_id).await;
    end(&driver, &calls).await;
    driver.assert_clean();
}
