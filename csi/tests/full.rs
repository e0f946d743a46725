//! Disks without a free byte under the driver's state, and journals as power cuts and older builds leave them.
//!
//! `cargo test -p keelway-csi --test full -- --ignored`, as root.

mod common;
#[path = "common/journal.rs"]
mod journal;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use common::{
    Calls, Driver, MIB, as_mode, bring, create, delete, drop_group, end, made, mount, take_group, try_take_group,
};
use keelway_csi::csi;
use keelway_csi::csi::volume_capability::access_mode::Mode;
use tonic::Code;

/// Takes all that there is of a filesystem, down to the last byte.
fn fill(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("filling");
    let mut file = File::create(&path).unwrap();
    for size in [1 << 20, 64 << 10, 4096, 512, 1] {
        while file.write_all(&vec![7; size]).and_then(|()| file.sync_all()).is_ok() {}
    }
    path
}

/// A volume that several pods may have.
async fn shared(driver: &Driver, name: &str) -> Calls {
    made(driver, name, 16 * MIB, &as_mode(Mode::SingleNodeMultiWriter, &mount("ext4")), &[]).await
}

fn mounted(driver: &Driver, target: &str) -> bool {
    driver.mounts().contains(&Path::new(target).canonicalize().unwrap_or_default())
}

#[tokio::test]
#[ignore = "needs root, loop devices, XFS and btrfs"]
async fn what_gives_room_is_never_refused_for_want_of_it() {
    for (fs, mebibytes) in [("ext4", 16), ("xfs", 300), ("btrfs", 128)] {
        eprintln!("{fs}");
        gives_room(Driver::new().state_on(fs, mebibytes)).await;
    }
}

async fn gives_room(mut driver: Driver) {
    driver.start();
    let (first, second) = (shared(&driver, "first").await, shared(&driver, "second").await);
    bring(&driver, &first).await;
    bring(&driver, &second).await;
    let filling = fill(&driver.path("state"));
    let mut node = driver.node().await;
    // More than the journal has room for, so that it is written anew.
    for n in 0..1400 {
        if n == 700 {
            driver.kill();
            driver.start();
            node = driver.node().await;
        }
        node.node_unpublish_volume(first.unpublish()).await.unwrap_or_else(|error| panic!("{n}: {error}"));
    }
    let refused = driver.controller().await.create_volume(create("third", 16 * MIB, &mount("ext4"), &[])).await;
    assert_eq!(refused.unwrap_err().code(), Code::ResourceExhausted);
    end(&driver, &first).await;
    driver.kill();
    driver.start();
    end(&driver, &second).await;
    fs::remove_file(filling).unwrap();
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_was_answered_outlives_a_full_disk_and_a_kill() {
    let mut driver = Driver::new().state_on("ext4", 16);
    driver.start();
    let calls = shared(&driver, "first").await;
    bring(&driver, &calls).await;
    let mut node = driver.node().await;
    let mut published = Vec::new();
    for round in 0..6 {
        let filling = fill(&driver.path("state"));
        // Intents of all lengths, so that one fits and its end does not, where there is an end to the room.
        let mut length = 160;
        for n in 0..30 {
            let target_path = driver.kubelet(&format!("pods/{round}-{n}-{}", "x".repeat(length)));
            let publish = csi::NodePublishVolumeRequest { target_path, ..calls.publish() };
            match node.node_publish_volume(publish.clone()).await {
                Ok(_) => published.push(publish.target_path),
                Err(error) => {
                    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
                    length = length.saturating_sub(8);
                }
            }
        }
        fs::remove_file(filling).unwrap();
        let target_path = driver.kubelet(&format!("pods/{round}"));
        let publish = csi::NodePublishVolumeRequest { target_path, ..calls.publish() };
        node.node_publish_volume(publish.clone()).await.unwrap();
        published.push(publish.target_path);
    }
    driver.kill();
    driver.start();
    let mut node = driver.node().await;
    for target in &published {
        assert!(mounted(&driver, target), "{target}: taken from a pod that has it\n{}", driver.log());
    }
    for target in published {
        let unpublish = csi::NodeUnpublishVolumeRequest { target_path: target, ..calls.unpublish() };
        node.node_unpublish_volume(unpublish).await.unwrap();
    }
    end(&driver, &calls).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_group_that_fails_halfway_leaves_nothing() {
    let mut driver = Driver::new().state_on("ext4", 16);
    driver.start();
    let (first, second) = (shared(&driver, "first").await, shared(&driver, "second").await);
    let filling = fill(&driver.path("state"));
    // The snapshots can be taken, but not written down.
    let refused = try_take_group(&driver, "g", &[&first, &second]).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    let left = |driver: &Driver| {
        common::list(&driver.path("pool")).into_iter().filter(|it| it.extension().is_some_and(|e| e == "snap")).count()
    };
    assert_eq!(left(&driver), 0, "a snapshot is left");
    fs::remove_file(filling).unwrap();
    let group = take_group(&driver, "g", &[&first, &second]).await;
    assert_eq!(left(&driver), 2);
    drop_group(&driver, &group).await;
    for calls in [first, second] {
        delete(&driver, &calls).await;
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_journal_of_an_older_build_or_of_a_power_cut_is_carried_on_with() {
    let mut driver = Driver::new().state_on("ext4", 16);
    driver.start();
    let calls = shared(&driver, "first").await;
    bring(&driver, &calls).await;
    let second = driver.kubelet("pods/second");
    driver
        .node()
        .await
        .node_publish_volume(csi::NodePublishVolumeRequest { target_path: second.clone(), ..calls.publish() })
        .await
        .unwrap();
    let id = &calls.id;
    let begin = |seq: u64, path: &str| {
        journal::line(&format!(
            r#"{{"begin":{{"seq":{seq},"intent":{{"op":"publish","id":"{id}","path":"{path}"}}}}}}"#
        ))
    };
    let ended = journal::line(r#"{"end":{"seq":5}}"#);
    let (first_line, open) = (begin(5, &calls.target), begin(6, &second));
    let torn = [&first_line.as_bytes()[..40], &[0; 512], b"tail of a line\n"].concat();
    let journal =
        [first_line.as_bytes(), ended.as_bytes(), &torn, open.as_bytes(), &first_line.as_bytes()[..30]].concat();
    driver.kill();
    fs::write(driver.path("state/journal"), journal).unwrap();
    let _ = fs::remove_file(driver.path("state/journal.spare"));
    let filling = fill(&driver.path("state"));
    // Though there is no room, and lines that were never synced are damaged, with others behind them.
    driver.start();
    assert!(mounted(&driver, &calls.target), "{}", driver.log());
    assert!(!Path::new(&second).exists(), "what was open is undone\n{}", driver.log());
    fs::remove_file(filling).unwrap();
    driver.kill();
    driver.start();
    end(&driver, &calls).await;
    driver.assert_clean();
}
