//! Volumes from their making to their removal, by the socket of a running driver: what holds data, what is refused.
//!
//! `cargo test -p keelway-csi --test volumes -- --ignored`, as root.

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, Instant};

use common::{
    Calls, Driver, MIB, as_mode, available, block, bring, create, delete, drop_snapshot, end, made, mount, run, take,
    take_away,
};
use keelway_csi::csi::volume_capability::AccessType;
use keelway_csi::csi::volume_capability::access_mode::Mode;
use keelway_csi::csi::{self, VolumeCapability};
use tonic::Code;

/// Makes it, stages it and publishes it.
async fn brought(driver: &Driver, name: &str, size: i64, kind: &VolumeCapability) -> Calls {
    let calls = made(driver, name, size, kind, &[]).await;
    bring(driver, &calls).await;
    calls
}

fn code<T: std::fmt::Debug>(result: Result<T, tonic::Status>) -> (Code, String) {
    let status = result.expect_err("this must be refused");
    (status.code(), status.message().to_owned())
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn data_outlives_pods_and_drivers() {
    for fs in ["ext4", "xfs"] {
        let mut driver = Driver::new();
        driver.start();
        let calls = brought(&driver, "pvc-1", 300 * MIB, &mount(fs)).await;
        let file = std::path::Path::new(&calls.target).join("data");
        fs::write(&file, "precious").unwrap();
        assert_eq!(fs::metadata(&calls.target).unwrap().permissions().mode() & 0o777, 0o755);
        let options = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let line = options.lines().find(|line| line.contains(&calls.target)).unwrap();
        assert!(line.contains("nosuid") && line.contains("nodev") && line.contains(fs), "{line}");
        let dio = driver.loops()[0].path().file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(fs::read_to_string(format!("/sys/block/{dio}/loop/dio")).unwrap().trim(), "1");

        // A new driver finds everything as it was: each call again changes nothing.
        driver.kill();
        driver.start();
        let mut node = driver.node().await;
        node.node_stage_volume(calls.stage()).await.unwrap();
        node.node_publish_volume(calls.publish()).await.unwrap();
        assert_eq!(driver.mounts().len(), 2);
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");

        take_away(&driver, &calls).await;
        assert!(driver.loops().is_empty() && !std::path::Path::new(&calls.target).exists());
        node.node_stage_volume(calls.stage()).await.unwrap();
        node.node_publish_volume(csi::NodePublishVolumeRequest { readonly: true, ..calls.publish() }).await.unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        assert_eq!(fs::write(&file, "x").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        let again = node.node_publish_volume(calls.publish()).await;
        assert_eq!(code(again).0, Code::AlreadyExists);

        // In use it is not removed; free it is.
        let removed = driver.controller().await.delete_volume(calls.delete()).await;
        assert_eq!(code(removed).0, Code::FailedPrecondition);
        assert_eq!(code(node.node_unstage_volume(calls.unstage()).await).0, Code::FailedPrecondition);
        take_away(&driver, &calls).await;
        delete(&driver, &calls).await;
        delete(&driver, &calls).await;
        assert_eq!(driver.stop_with_connections().await, Some(0));
        assert!(!driver.socket().exists());
        driver.assert_clean();
    }
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_block_device_holds_its_data() {
    let mut driver = Driver::new();
    driver.start();
    let calls = brought(&driver, "pvc-1", 16 * MIB, &block()).await;
    assert!(fs::metadata(&calls.target).unwrap().file_type().is_block_device());
    fs::write(&calls.target, vec![7; 4096]).unwrap();
    let device = fs::OpenOptions::new().write(true).open(&calls.target).unwrap();
    device.sync_all().unwrap();
    drop(device);
    take_away(&driver, &calls).await;
    assert!(driver.loops().is_empty());
    let image = &driver.images()[0];
    assert_eq!(fs::read(image).unwrap()[..4096], [7; 4096]);

    // Read-only is the device's, so all who have it must agree.
    let mut node = driver.node().await;
    node.node_stage_volume(calls.stage()).await.unwrap();
    node.node_publish_volume(csi::NodePublishVolumeRequest { readonly: true, ..calls.publish() }).await.unwrap();
    let second = csi::NodePublishVolumeRequest { target_path: driver.kubelet("pods/second"), ..calls.publish() };
    assert_eq!(code(node.node_publish_volume(second).await).0, Code::FailedPrecondition);
    assert!(fs::write(&calls.target, "x").is_err());
    // A filesystem was never asked for, and none is made.
    let as_mount = Calls { capability: mount(""), ..calls.clone() };
    assert_eq!(code(node.node_stage_volume(as_mount.stage()).await).0, Code::FailedPrecondition);
    let device = driver.loops().remove(0).path();
    take_away(&driver, &calls).await;
    let read_only = std::process::Command::new("blockdev").arg("--getro").arg(device).output().unwrap().stdout;
    assert_eq!(read_only, b"0\n", "the next file bound to this device would be read-only");
    // The refused one left its target behind, as the kubelet expects to clean it up.
    let second = csi::NodeUnpublishVolumeRequest { target_path: driver.kubelet("pods/second"), ..calls.unpublish() };
    node.node_unpublish_volume(second).await.unwrap();
    delete(&driver, &calls).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn bad_input_is_named_and_changes_nothing() {
    let mut driver = Driver::new();
    driver.start();
    let (mut controller, mut node) = (driver.controller().await, driver.node().await);

    let (status, text) = code(controller.create_volume(create("a", MIB, &mount(""), &[("replicas", "3")])).await);
    assert_eq!(status, Code::InvalidArgument);
    assert!(text.contains("\"replicas\"") && text.contains("allocation"), "{text}");
    let (status, text) = code(controller.create_volume(create("a", MIB, &mount("ntfs"), &[])).await);
    assert!(status == Code::InvalidArgument && text.contains("ntfs"), "{text}");
    let huge = code(controller.create_volume(create("a", 1 << 50, &mount(""), &[("allocation", "sparse")])).await);
    assert_eq!(huge.0, Code::ResourceExhausted);
    let mut flags = mount("ext4");
    let Some(AccessType::Mount(options)) = &mut flags.access_type else { unreachable!() };
    options.mount_flags = vec!["errors=panic".into()];
    assert_eq!(code(controller.create_volume(create("a", MIB, &flags, &[])).await).0, Code::InvalidArgument);

    let never_issued = keelway_csi::model::VolumeId::new([9; 16]).to_string();
    for id in ["../../../etc/passwd", "..", "fake-vol-id", never_issued.as_str()] {
        let calls = Calls::new(&driver, id, mount(""));
        assert_eq!(code(node.node_stage_volume(calls.stage()).await).0, Code::NotFound, "{id}");
        assert_eq!(code(node.node_unstage_volume(calls.unstage()).await).0, Code::NotFound, "{id}");
        assert_eq!(code(node.node_publish_volume(calls.publish()).await).0, Code::NotFound, "{id}");
        assert_eq!(code(node.node_unpublish_volume(calls.unpublish()).await).0, Code::NotFound, "{id}");
        controller.delete_volume(calls.delete()).await.unwrap();
    }

    // Targets: outside the kubelet's directory, by dots, or by a link that somebody planted.
    let outside = driver.path("outside");
    fs::create_dir_all(outside.join("target")).unwrap();
    symlink(&outside, driver.kubelet("pods/link")).unwrap();
    let good = made(&driver, "b", 16 * MIB, &mount(""), &[]).await;
    node.node_stage_volume(good.stage()).await.unwrap();
    let at = |target: String| Calls { target, ..good.clone() };
    let dots = at(driver.kubelet("pods/../../outside/target"));
    assert_eq!(code(node.node_publish_volume(dots.publish()).await).0, Code::InvalidArgument);
    let elsewhere = at(outside.join("target").to_str().unwrap().into());
    assert_eq!(code(node.node_publish_volume(elsewhere.publish()).await).0, Code::InvalidArgument);
    for target in ["pods/link", "pods/link/target"] {
        let linked = at(driver.kubelet(target));
        let (status, text) = code(node.node_publish_volume(linked.publish()).await);
        assert!(status == Code::FailedPrecondition && text.contains("symbolic"), "{text}");
        let (status, _) = code(node.node_unpublish_volume(linked.unpublish()).await);
        assert_eq!(status, Code::FailedPrecondition);
    }
    let linked = Calls { staging: driver.kubelet("pods/link/target"), ..good.clone() };
    assert_eq!(code(node.node_stage_volume(linked.stage()).await).0, Code::FailedPrecondition);
    assert!(outside.join("target").exists() && driver.mounts().len() == 1);

    // What is mounted at a target is only taken off when it is this volume's.
    let other = made(&driver, "c", 16 * MIB, &mount(""), &[]).await.id;
    node.node_publish_volume(good.publish()).await.unwrap();
    let wrong = Calls { id: other, ..good.clone() };
    assert_eq!(code(node.node_unpublish_volume(wrong.unpublish()).await).0, Code::FailedPrecondition);
    assert_eq!(code(node.node_publish_volume(wrong.publish()).await).0, Code::FailedPrecondition);
    assert_eq!(driver.mounts().len(), 2);

    take_away(&driver, &good).await;
    fs::remove_file(driver.kubelet("pods/link")).unwrap();
    delete(&driver, &good).await;
    delete(&driver, &wrong).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn another_file_under_the_images_name_is_never_touched() {
    let mut driver = Driver::new();
    driver.start();
    let calls = made(&driver, "a", 16 * MIB, &mount(""), &[]).await;
    let image = driver.images().remove(0);
    let inode = fs::metadata(&image).unwrap().ino();
    let away = driver.path("away");
    fs::rename(&image, &away).unwrap();
    fs::write(&image, vec![1; 16 << 20]).unwrap();
    let (status, text) = code(driver.node().await.node_stage_volume(calls.stage()).await);
    assert_eq!(status, Code::DataLoss, "{text}");
    assert_eq!(code(driver.controller().await.delete_volume(calls.delete()).await).0, Code::DataLoss);
    assert_eq!(fs::read(&image).unwrap(), vec![1; 16 << 20]);
    // The start says so, too, and goes on.
    driver.kill();
    driver.start();
    assert!(driver.log().contains("is damaged: inode"), "{}", driver.log());
    fs::rename(&away, &image).unwrap();
    assert_eq!(fs::metadata(&image).unwrap().ino(), inode);
    driver.node().await.node_stage_volume(calls.stage()).await.unwrap();
    driver.node().await.node_unstage_volume(calls.unstage()).await.unwrap();
    delete(&driver, &calls).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn one_operation_a_volume_and_no_byte_promised_twice() {
    // A pool that nobody else fills and empties meanwhile: its room is counted below.
    let mut driver = Driver::on("ext4", 1024);
    driver.start();
    // Many at once of one name make one volume; those that meet another under way are told to come again.
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let mut controller = driver.controller().await;
        tasks.spawn(async move { controller.create_volume(create("same", 16 * MIB, &mount(""), &[])).await });
    }
    let mut ids = std::collections::BTreeSet::new();
    while let Some(answer) = tasks.join_next().await {
        match answer.unwrap() {
            Ok(made) => drop(ids.insert(made.into_inner().volume.unwrap().volume_id)),
            Err(status) => assert_eq!(status.code(), Code::Aborted),
        }
    }
    assert_eq!((ids.len(), driver.images().len(), driver.records().len()), (1, 1, 1));
    let calls = Calls::new(&driver, ids.first().unwrap(), mount(""));
    for _ in 0..16 {
        let (mut node, request) = (driver.node().await, calls.stage());
        tasks.spawn(async move {
            let staged = node.node_stage_volume(request).await.map(|_| ());
            staged.map(|()| tonic::Response::new(csi::CreateVolumeResponse::default()))
        });
    }
    let mut staged = 0;
    while let Some(answer) = tasks.join_next().await {
        match answer.unwrap() {
            Ok(_) => staged += 1,
            Err(status) => assert_eq!(status.code(), Code::Aborted),
        }
    }
    assert!(staged >= 1);
    assert_eq!((driver.mounts().len(), driver.loops().len()), (1, 1));
    driver.node().await.node_unstage_volume(calls.unstage()).await.unwrap();
    delete(&driver, &calls).await;

    // Volumes that together are larger than the pool: sparse, so that only our own books can tell.
    let size = available(&driver, &[]).await / 4;
    for number in 0..8 {
        let mut controller = driver.controller().await;
        let request = create(&format!("big-{number}"), size, &block(), &[("allocation", "sparse")]);
        tasks.spawn(async move { controller.create_volume(request).await });
    }
    let mut made = Vec::new();
    while let Some(answer) = tasks.join_next().await {
        match answer.unwrap() {
            Ok(answer) => made.push(answer.into_inner().volume.unwrap().volume_id),
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
        }
    }
    assert!((3..=4).contains(&made.len()), "{} volumes of a quarter each", made.len());
    assert!(available(&driver, &[]).await < 2 * size);
    for id in made {
        delete(&driver, &Calls::new(&driver, &id, block())).await;
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_single_writer_is_alone_and_a_reader_reads() {
    let mut driver = Driver::new();
    driver.start();
    let with = |mode: Mode| as_mode(mode, &mount("xfs"));
    let single = brought(&driver, "a", 300 * MIB, &with(Mode::SingleNodeSingleWriter)).await;
    let second = Calls { target: driver.kubelet("pods/second"), ..single.clone() };
    let mut node = driver.node().await;
    assert_eq!(code(node.node_publish_volume(second.publish()).await).0, Code::FailedPrecondition);
    take_away(&driver, &single).await;

    let reader = Calls { capability: with(Mode::SingleNodeReaderOnly), ..single.clone() };
    node.node_stage_volume(reader.stage()).await.unwrap();
    node.node_publish_volume(reader.publish()).await.unwrap();
    let refused = fs::write(format!("{}/x", reader.target), "x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    end(&driver, &reader).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_second_driver_keeps_its_hands_off() {
    let mut driver = Driver::new();
    driver.start();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_keelway-csi"))
        .arg(format!("--endpoint=unix://{}/other.sock", driver.dir.path().display()))
        .arg(format!("--state-dir={}", driver.path("state").display()))
        .arg(format!("--pool-dir={}", driver.path("pool").display()))
        .arg(format!("--kubelet-dir={}", driver.path("kubelet").display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("held by another keelway-csi"), "{said}");
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn who_may_run_out_of_room_is_told() {
    let mut driver = Driver::on("xfs", 1024);
    driver.start();
    let mut all = Vec::new();
    for (name, allocation) in [("full", "full"), ("shared", "full"), ("sparse", "sparse")] {
        all.push(made(&driver, name, 128 * MIB, &mount("ext4"), &[("allocation", allocation)]).await);
    }
    let [full, shared, sparse] = [&all[0].id, &all[1].id, &all[2].id];
    let calls = &all[1];
    bring(&driver, calls).await;
    fs::write(format!("{}/data", calls.target), vec![7; 32 << 20]).unwrap();
    let taken = take(&driver, "s", calls).await;
    for calls in &all {
        assert_eq!(driver.health(&calls.id).await, [], "{}", calls.id);
    }
    // Somebody else takes nearly all of the room that there is. The driver leaves 64 MiB alone.
    let others = driver.path("pool/others");
    let free = rustix::fs::statvfs(driver.path("pool")).map(|stat| stat.f_bavail * stat.f_frsize).unwrap();
    run("fallocate", &["-l", &(free - (70 << 20)).to_string(), others.to_str().unwrap()]);
    let wanted = [(csi::VolumeHealthErrorType::Degraded as i32, "StorageFull".to_owned())];
    assert_eq!(driver.health(sparse).await, wanted);
    assert_eq!(driver.health(shared).await, wanted, "what its snapshot shares it may write anew");
    assert_eq!(driver.health(full).await, [], "all its blocks are its own");
    fs::remove_file(&others).unwrap();
    // XFS gives back what a file had a little later.
    let end = Instant::now() + Duration::from_secs(60);
    while !driver.health(sparse).await.is_empty() && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(driver.health(sparse).await, []);
    drop_snapshot(&driver, &taken.snapshot_id).await;
    take_away(&driver, calls).await;
    for calls in &all {
        delete(&driver, calls).await;
    }
    driver.assert_clean();
}
