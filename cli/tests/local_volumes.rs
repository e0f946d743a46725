//! What `keelway volumes` says of volumes of each kind, beside a running driver and on what somebody has broken.
//!
//! `cargo build -p keelway-csi; cargo test -p keelway-cli --test local_volumes -- --ignored`, as root.

#[path = "../../csi/tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::process::Command;

use common::{BTRFS, Calls, DIRECTORY, Driver, MIB, RAW, block, bring, made, mount, take, take_away};
use keelway_csi::csi::{self, VolumeCapability};
use serde_json::Value;

fn keelway(driver: &Driver) -> (Value, Option<i32>) {
    let output = Command::new(env!("CARGO_BIN_EXE_keelway"))
        .args(["volumes", "--output", "json", "--csi-socket"])
        .arg(driver.socket())
        .arg("--state-dir")
        .arg(driver.path("state"))
        .arg("--pool-dir")
        .arg(driver.path("pool"))
        .arg("--kubelet-dir")
        .arg(driver.path("kubelet"))
        .output()
        .unwrap();
    let said = serde_json::from_slice(&output.stdout);
    (said.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr))), output.status.code())
}

/// A volume at a pod's path as the kubelet has it.
async fn brought(driver: &Driver, name: &str, mebibytes: i64, kind: VolumeCapability, class: &[(&str, &str)]) -> Calls {
    let target = match kind == block() {
        true => format!("plugins/kubernetes.io/csi/volumeDevices/publish/{name}/uid-{name}"),
        false => format!("pods/uid-{name}/volumes/kubernetes.io~csi/{name}/mount"),
    };
    let target = driver.kubelet(&target);
    std::fs::create_dir_all(Path::new(&target).parent().unwrap()).unwrap();
    let calls = Calls { target, ..made(driver, name, mebibytes * MIB, &kind, class).await };
    bring(driver, &calls).await;
    calls
}

#[tokio::test]
#[ignore = "needs root, loop devices, btrfs and keelway-csi"]
async fn volumes_of_each_kind_are_found_where_they_are() {
    let mut driver = Driver::on("btrfs", 1024).with(&["--backends=image,btrfs,directory"]).disks(2, 64);
    driver.start();
    let all = [
        brought(&driver, "image", 32, mount("ext4"), &[]).await,
        brought(&driver, "image-block", 16, block(), &[]).await,
        brought(&driver, "subvolume", 16, mount(""), BTRFS).await,
        brought(&driver, "directory", 16, mount(""), DIRECTORY).await,
        brought(&driver, "raw", 64, mount("ext4"), RAW).await,
        brought(&driver, "raw-block", 64, block(), RAW).await,
    ];
    let mut snapshots = Vec::new();
    for calls in [&all[0], &all[2]] {
        snapshots.push(take(&driver, &format!("of {}", calls.id), calls).await.snapshot_id);
    }
    let handle = format!("csi-{}", "0af9".repeat(16));
    let inline = csi::NodePublishVolumeRequest {
        volume_id: handle.clone(),
        target_path: driver.kubelet("pods/uid-inline/volumes/kubernetes.io~csi/scratch/mount"),
        volume_capability: Some(mount("")),
        volume_context: [("csi.storage.k8s.io/ephemeral", "true"), ("size", "32Mi")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        ..Default::default()
    };
    std::fs::create_dir_all(Path::new(&inline.target_path).parent().unwrap()).unwrap();
    driver.node().await.node_publish_volume(inline.clone()).await.unwrap();

    let (said, code) = keelway(&driver);
    assert_eq!((said["orphans"].as_array().unwrap().len(), code), (0, Some(0)), "{said:#}");
    let volumes = said["volumes"].as_array().unwrap();
    assert_eq!(volumes.len(), all.len() + 1);
    for calls in &all {
        let volume = volumes.iter().find(|volume| volume["id"] == calls.id.as_str()).unwrap();
        let name = volume["name"].as_str().unwrap();
        let mounts = volume["mounts"].as_array().unwrap();
        let of_pod = mounts.iter().find(|mount| mount["path"] == calls.target.as_str());
        assert!(of_pod.is_some_and(|mount| mount["pod"] == format!("uid-{name}")), "{name}: {mounts:?}");
        // Nothing is mounted where a block volume is staged.
        assert_eq!(mounts.len(), if calls.capability == block() { 1 } else { 2 }, "{name}: {mounts:?}");
        assert_eq!(volume["device"].is_null(), ["subvolume", "directory"].contains(&name), "{name}: {volume}");
    }
    let scratch = volumes.iter().find(|volume| volume["name"] == format!("inline {handle}")).unwrap();
    assert_eq!(scratch["mounts"][0]["pod"], "uid-inline", "{scratch}");

    // Without the driver it is seen, too; then somebody removes what he does not know.
    let unpublish = csi::NodeUnpublishVolumeRequest { volume_id: handle, target_path: inline.target_path };
    driver.node().await.node_unpublish_volume(unpublish).await.unwrap();
    for calls in &all {
        take_away(&driver, calls).await;
    }
    driver.kill();
    let (said, code) = keelway(&driver);
    assert!(said["driver"] == "none" && said["orphans"] == Value::Array(Vec::new()) && code == Some(0), "{said:#}");
    std::fs::remove_file(driver.path("pool").join(format!("{}.snap", snapshots[0]))).unwrap();
    std::fs::remove_file(driver.path("pool").join(format!("{}.img", all[1].id))).unwrap();
    std::fs::remove_file(driver.path("pool").join(format!("{}.dev", all[4].id))).unwrap();
    std::fs::remove_file(driver.by_id(1)).unwrap();
    std::fs::remove_file(driver.path("state/volumes").join(format!("{}.json", all[3].id))).unwrap();
    let (said, code) = keelway(&driver);
    let orphans: Vec<_> =
        said["orphans"].as_array().unwrap().iter().map(|it| format!("{}: {}", it["what"], it["why"])).collect();
    assert_eq!((orphans.len(), code), (5, Some(3)), "{orphans:#?}");
    for (what, why) in [
        (format!("snapshot {}", snapshots[0]), "its storage is gone"),
        (format!("volume {}", all[1].id), "its storage is not in the pool"),
        (format!("volume {}", all[4].id), "its claim on a device"),
        (format!("volume {}", all[5].id), "is not there"),
        (format!("{}.dir in the pool", all[3].id), "no record names it"),
    ] {
        assert!(
            orphans.iter().any(|orphan| orphan.contains(&what) && orphan.contains(why)),
            "{what}: {why}\n{orphans:#?}"
        );
    }
}
