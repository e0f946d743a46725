//! Volumes taken from where they are: also when their storage is damaged, when they were asked for twice, when they never got
//! to their pod.
//!
//! `cargo test -p keelway-csi --test teardown -- --ignored`, as root.

mod common;

use std::fs;

use common::{Calls, DIRECTORY, Driver, MIB, RAW, block, bring, create, delete, made, mount};
use keelway_csi::csi;
use tonic::Code;

/// Each call twice, the second of which finds nothing more to do.
async fn take_away_twice(driver: &Driver, calls: &Calls) {
    let mut node = driver.node().await;
    for _ in 0..2 {
        node.node_unpublish_volume(calls.unpublish()).await.unwrap();
    }
    for _ in 0..2 {
        node.node_unstage_volume(calls.unstage()).await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_damaged_volume_can_be_taken_down() {
    let mut driver = Driver::new();
    driver.start();
    for (n, kind) in [mount("ext4"), block()].into_iter().enumerate() {
        for how in ["removed", "replaced", "truncated"] {
            let calls = made(&driver, &format!("{how}-{n}"), 16 * MIB, &kind, &[]).await;
            bring(&driver, &calls).await;
            let image = driver.images().into_iter().find(|path| path.to_string_lossy().contains(&calls.id)).unwrap();
            let device = common::loop_of(&image).unwrap().path();
            match how {
                "removed" => fs::remove_file(&image).unwrap(),
                "truncated" => fs::File::options().write(true).open(&image).unwrap().set_len(8 << 20).unwrap(),
                _ => {
                    fs::write(driver.path("other"), "of somebody else").unwrap();
                    fs::rename(driver.path("other"), &image).unwrap();
                }
            }
            let refused = driver.node().await.node_stage_volume(calls.stage()).await.unwrap_err();
            assert_eq!(refused.code(), Code::DataLoss, "{how}: {refused}");
            take_away_twice(&driver, &calls).await;
            assert_eq!(driver.mounts(), Vec::<std::path::PathBuf>::new(), "{how}");
            let file = format!("/sys/block/{}/loop/backing_file", device.file_name().unwrap().to_str().unwrap());
            let file = fs::read_to_string(file).unwrap_or_default();
            assert!(!file.contains(&calls.id), "{how}: the device is left");
            // What there is instead is not ours to remove.
            if how == "replaced" {
                assert_eq!(
                    driver.controller().await.delete_volume(calls.delete()).await.unwrap_err().code(),
                    Code::DataLoss
                );
                fs::remove_file(&image).unwrap();
            }
            delete(&driver, &calls).await;
        }
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_directory_that_is_gone_can_be_taken_from_its_pod() {
    let mut driver = Driver::new().with(&["--backends=directory"]);
    driver.start();
    for how in ["removed", "replaced"] {
        let calls = made(&driver, how, 16 * MIB, &mount(""), DIRECTORY).await;
        bring(&driver, &calls).await;
        let directory = driver.path(&format!("pool/{}.dir", calls.id));
        fs::remove_dir(&directory).unwrap();
        if how == "replaced" {
            fs::create_dir(&directory).unwrap();
        }
        take_away_twice(&driver, &calls).await;
        assert_eq!(driver.mounts(), Vec::<std::path::PathBuf>::new(), "{how}");
        let _ = fs::remove_dir(&directory);
        delete(&driver, &calls).await;
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn two_staging_paths_do_not_lock_each_other() {
    let mut driver = Driver::new();
    driver.start();
    let calls = made(&driver, "first", 16 * MIB, &mount("ext4"), &[]).await;
    bring(&driver, &calls).await;
    let other = Calls { staging: driver.kubelet("staging/other"), ..calls.clone() };
    let mut node = driver.node().await;
    let refused = node.node_stage_volume(other.stage()).await.unwrap_err();
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("staging/first"), "{refused}");
    // It is not staged there, so there is nothing to be done.
    node.node_unstage_volume(other.unstage()).await.unwrap();
    assert_eq!(driver.mounts().len(), 2);
    assert_eq!(node.node_unstage_volume(calls.unstage()).await.unwrap_err().code(), Code::FailedPrecondition);
    take_away_twice(&driver, &calls).await;
    // Then it may be staged where it was not.
    node.node_stage_volume(other.stage()).await.unwrap();
    node.node_unstage_volume(other.unstage()).await.unwrap();
    delete(&driver, &calls).await;
    driver.assert_clean();
}

fn inline(driver: &Driver, target: &str, attributes: &[(&str, &str)]) -> csi::NodePublishVolumeRequest {
    let ours = [("csi.storage.k8s.io/ephemeral", "true"), ("size", "16Mi")];
    csi::NodePublishVolumeRequest {
        volume_id: format!("csi-{}", "0af9".repeat(16)),
        target_path: driver.kubelet(target),
        volume_capability: Some(mount("")),
        volume_context: ours.iter().chain(attributes).map(|(key, value)| ((*key).into(), (*value).into())).collect(),
        ..Default::default()
    }
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn an_inline_volume_that_never_got_to_its_pod_is_not_left() {
    let mut driver = Driver::new().disks(1, 64).with(&["--backends=raw,image,directory"]);
    driver.start();
    let mut node = driver.node().await;
    let refused = node.node_publish_volume(inline(&driver, "pods/none/volume", &[])).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
    driver.assert_clean();
    // A pod's author takes no whole disk, and nothing that he could grow beyond.
    for class in [RAW, DIRECTORY] {
        let refused = node.node_publish_volume(inline(&driver, "pods/inline", class)).await.unwrap_err();
        assert!(refused.code() == Code::InvalidArgument && refused.message().contains("inline"), "{refused}");
    }
    driver.assert_clean();
    // Nor does a claim's volume pass for a pod's.
    let name = format!("inline csi-{}", "0af9".repeat(16));
    let claim = create(&name, 16 * MIB, &mount(""), &[]);
    node.node_publish_volume(inline(&driver, "pods/inline", &[])).await.unwrap();
    let refused = driver.controller().await.create_volume(claim).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    let publish = inline(&driver, "pods/inline", &[]);
    let unpublish = csi::NodeUnpublishVolumeRequest { volume_id: publish.volume_id, target_path: publish.target_path };
    node.node_unpublish_volume(unpublish).await.unwrap();
    driver.assert_clean();
}
