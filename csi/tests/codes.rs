//! What the driver answers where the specification names a code: each condition by the socket of a running driver.
//!
//! `cargo test -p keelway-csi --test codes -- --ignored`, as root.

mod common;

use std::path::Path;

use common::{
    Calls, DIRECTORY, Driver, MIB, RAW, as_mode, block, create, drop_group, drop_snapshot, end, filled, made, members,
    mount, snapshot, take, take_group, try_made, volume,
};
use keelway_csi::csi::snapshot_metadata_client::SnapshotMetadataClient;
use keelway_csi::csi::volume_capability::AccessType;
use keelway_csi::csi::volume_capability::access_mode::Mode;
use keelway_csi::csi::{self, VolumeCapability};
use tonic::{Code, Status};

fn code<T>(answer: Result<tonic::Response<T>, Status>) -> Code {
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

async fn stage(driver: &Driver, calls: &Calls) -> Code {
    code(driver.node().await.node_stage_volume(calls.stage()).await)
}

async fn publish(driver: &Driver, calls: &Calls) -> Code {
    code(driver.node().await.node_publish_volume(calls.publish()).await)
}

async fn unpublish(driver: &Driver, calls: &Calls) -> Code {
    code(driver.node().await.node_unpublish_volume(calls.unpublish()).await)
}

async fn unstage(driver: &Driver, calls: &Calls) -> Code {
    let code = code(driver.node().await.node_unstage_volume(calls.unstage()).await);
    let _ = std::fs::remove_dir(&calls.staging);
    code
}

async fn delete(driver: &Driver, calls: &Calls) -> Code {
    code(driver.controller().await.delete_volume(calls.delete()).await)
}

/// A mount with flags, and for a group.
fn with(flags: &[&str], group: &str, of: &VolumeCapability) -> VolumeCapability {
    let mut capability = of.clone();
    let Some(AccessType::Mount(mount)) = &mut capability.access_type else { unreachable!() };
    mount.mount_flags = flags.iter().map(|&flag| flag.to_owned()).collect();
    mount.volume_mount_group = group.to_owned();
    capability
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn another_call_for_the_same_path_is_refused() {
    let mut driver = Driver::new().with(&["--backends=image,directory"]);
    driver.start();
    for (name, class) in [("image", &[][..]), ("tree", DIRECTORY)] {
        let plain = as_mode(Mode::SingleNodeMultiWriter, &mount(""));
        let calls = made(&driver, name, 32 * MIB, &plain, class).await;
        let other = |capability: VolumeCapability| Calls { capability, ..calls.clone() };
        let noexec = with(&["noexec"], "", &plain);
        for exceeds in [block(), as_mode(Mode::MultiNodeMultiWriter, &plain), mount("xfs"), mount("ntfs")] {
            assert_eq!(stage(&driver, &other(exceeds.clone())).await, Code::FailedPrecondition, "{name} {exceeds:?}");
        }
        assert_eq!(stage(&driver, &other(as_mode(Mode::Unknown, &plain))).await, Code::InvalidArgument);
        assert_eq!(stage(&driver, &calls).await, Code::Ok);
        for round in 0..2 {
            // The second time of a driver that did not hear the first call.
            assert_eq!(stage(&driver, &calls).await, Code::Ok);
            assert_eq!(
                stage(&driver, &other(with(&["relatime,rw"], "", &plain))).await,
                Code::Ok,
                "the same in other words"
            );
            assert_eq!(stage(&driver, &other(noexec.clone())).await, Code::AlreadyExists);
            let reader = as_mode(Mode::SingleNodeReaderOnly, &plain);
            assert_eq!(stage(&driver, &other(reader)).await, Code::AlreadyExists);
            // The kubelet stages for one of several pods, each of which may have a group of its own.
            assert_eq!(stage(&driver, &other(with(&[], "4242", &plain))).await, Code::Ok);
            if round == 0 {
                driver.kill();
                driver.start();
            }
        }

        for exceeds in [block(), as_mode(Mode::MultiNodeReaderOnly, &plain), mount("xfs")] {
            assert_eq!(publish(&driver, &other(exceeds.clone())).await, Code::FailedPrecondition, "{exceeds:?}");
        }
        for flag in ["bind", "remount", "context=system_u:object_r:x", "nonsense"] {
            assert_eq!(publish(&driver, &other(with(&[flag], "", &plain))).await, Code::InvalidArgument, "{flag}");
        }
        let unstaged = csi::NodePublishVolumeRequest { staging_target_path: String::new(), ..calls.publish() };
        let answer = driver.node().await.node_publish_volume(unstaged).await.unwrap_err();
        assert!(
            answer.code() == Code::FailedPrecondition && answer.message().contains("staging_target_path"),
            "{answer}"
        );
        assert_eq!(publish(&driver, &calls).await, Code::Ok);
        for round in 0..2 {
            assert_eq!(publish(&driver, &calls).await, Code::Ok);
            for differs in [
                noexec.clone(),
                as_mode(Mode::SingleNodeSingleWriter, &plain),
                as_mode(Mode::SingleNodeReaderOnly, &plain),
                with(&[], "4242", &plain),
            ] {
                assert_eq!(publish(&driver, &other(differs.clone())).await, Code::AlreadyExists, "{differs:?}");
            }
            let readonly = csi::NodePublishVolumeRequest { readonly: true, ..calls.publish() };
            assert_eq!(code(driver.node().await.node_publish_volume(readonly).await), Code::AlreadyExists);
            if round == 0 {
                driver.kill();
                driver.start();
            }
        }
        // Another target may have other options and another group, and has them.
        let second = Calls { target: driver.kubelet("pods/second"), ..other(with(&["noexec"], "4242", &plain)) };
        assert_eq!(publish(&driver, &second).await, Code::Ok);
        let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let noexec = |target: &str| table.lines().any(|line| line.contains(target) && line.contains("noexec"));
        assert!(noexec(&second.target) && !noexec(&calls.target), "{table}");
        assert_eq!(unpublish(&driver, &second).await, Code::Ok);
        end(&driver, &calls).await;
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn several_targets_are_for_who_asks_for_them() {
    let mut driver = Driver::new();
    driver.start();
    let many = as_mode(Mode::SingleNodeMultiWriter, &mount("ext4"));
    let calls = made(&driver, "pvc-1", 32 * MIB, &many, &[]).await;
    assert_eq!(stage(&driver, &calls).await, Code::Ok);
    let modes =
        [Mode::SingleNodeMultiWriter, Mode::SingleNodeSingleWriter, Mode::SingleNodeWriter, Mode::SingleNodeReaderOnly];
    for first in modes {
        for second in modes {
            let one = Calls { capability: as_mode(first, &many), ..calls.clone() };
            let two =
                Calls { capability: as_mode(second, &many), target: driver.kubelet("pods/second"), ..calls.clone() };
            assert_eq!(publish(&driver, &one).await, Code::Ok);
            driver.kill();
            driver.start();
            // A kubelet's ReadWriteOnce is MULTI_WRITER: pods of one node share the volume. All else is for one.
            let both = first == Mode::SingleNodeMultiWriter && second == first;
            let want = if both { Code::Ok } else { Code::FailedPrecondition };
            assert_eq!(publish(&driver, &two).await, want, "{first:?}, then {second:?}");
            assert_eq!(publish(&driver, &one).await, Code::Ok, "{first:?}");
            for calls in [&one, &two] {
                assert_eq!(unpublish(&driver, calls).await, Code::Ok);
            }
        }
    }
    assert_eq!(unstage(&driver, &calls).await, Code::Ok);
    assert_eq!(delete(&driver, &calls).await, Code::Ok);
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_block_volume_is_published_from_where_it_is_staged() {
    let mut driver = Driver::new().with(&["--backends=image"]).disks(1, 64);
    driver.start();
    for (name, class) in [("image", &[][..]), ("raw", RAW)] {
        let kind = as_mode(Mode::SingleNodeMultiWriter, &block());
        let first = made(&driver, name, 16 * MIB, &kind, class).await;
        assert_eq!(publish(&driver, &first).await, Code::FailedPrecondition, "{name}: it was never staged");
        assert_eq!(stage(&driver, &first).await, Code::Ok);
        // A second PersistentVolume of it: the kubelet has another staging path for that.
        let second =
            Calls { staging: driver.kubelet("staging/two"), target: driver.kubelet("pods/two"), ..first.clone() };
        assert_eq!(publish(&driver, &second).await, Code::FailedPrecondition, "{name}: it is staged elsewhere");
        assert_eq!(unstage(&driver, &second).await, Code::Ok, "{name}: it is not staged there");
        assert_eq!(delete(&driver, &first).await, Code::FailedPrecondition, "{name}: it is staged");
        assert_eq!(stage(&driver, &second).await, Code::Ok);
        for calls in [&first, &second] {
            assert_eq!(publish(&driver, calls).await, Code::Ok, "{name}");
        }
        driver.kill();
        driver.start();
        assert_eq!(unstage(&driver, &first).await, Code::FailedPrecondition, "{name}: it is published from there");
        assert_eq!(unpublish(&driver, &first).await, Code::Ok);
        assert_eq!(unstage(&driver, &first).await, Code::Ok);
        std::fs::write(&second.target, "still there").unwrap();
        assert_eq!(publish(&driver, &first).await, Code::FailedPrecondition, "{name}: it is unstaged");
        assert_eq!(unpublish(&driver, &second).await, Code::Ok);
        assert_eq!(unstage(&driver, &second).await, Code::Ok);
        assert_eq!(publish(&driver, &second).await, Code::FailedPrecondition, "{name}: it is unstaged");
        assert_eq!(unpublish(&driver, &second).await, Code::Ok);
        assert_eq!(delete(&driver, &first).await, Code::Ok);
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_was_staged_read_only_is_well_and_stays_so() {
    let mut driver = Driver::new().with(&["--backends=image"]).disks(1, 64);
    driver.start();
    for (name, class) in [("image", &[][..]), ("raw", RAW)] {
        let kind = mount("ext4");
        let writer = made(&driver, name, 16 * MIB, &kind, class).await;
        let reader = Calls { capability: as_mode(Mode::SingleNodeReaderOnly, &kind), ..writer.clone() };
        assert_eq!(stage(&driver, &reader).await, Code::Ok);
        assert_eq!(driver.health(&writer.id).await, [], "{name}");
        assert_eq!(publish(&driver, &writer).await, Code::FailedPrecondition, "{name}: nothing can be written to it");
        assert_eq!(publish(&driver, &reader).await, Code::Ok);
        assert_eq!(driver.health(&writer.id).await, [], "{name}");
        assert_eq!(unpublish(&driver, &reader).await, Code::Ok);
        assert_eq!(unstage(&driver, &reader).await, Code::Ok);
        assert_eq!(stage(&driver, &writer).await, Code::Ok);
        assert_eq!(publish(&driver, &writer).await, Code::Ok);
        std::fs::write(Path::new(&writer.target).join("data"), "x").unwrap();
        end(&driver, &writer).await;
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_a_backend_cannot_is_a_wrong_argument() {
    let mut driver = Driver::new().with(&["--backends=image,directory"]).disks(1, 64);
    driver.start();
    let mut controller = driver.controller().await;
    // The only disk will be taken, but that is not what is wrong with a clone of it.
    let readahead = || [("readAheadKiB".to_owned(), "256".to_owned())].into();
    for (name, kind, class) in [("raw", block(), RAW), ("tree", mount(""), DIRECTORY)] {
        let calls = made(&driver, name, 16 * MIB, &kind, class).await;
        let refused = try_made(&driver, "clone", 16 * MIB, &kind, class, volume(&calls.id)).await.unwrap_err();
        assert!(refused.code() == Code::InvalidArgument && refused.message().contains("image, btrfs"), "{refused}");
        if name == "tree" {
            let modify = csi::ControllerModifyVolumeRequest {
                volume_id: calls.id.clone(),
                mutable_parameters: readahead(),
                ..Default::default()
            };
            assert_eq!(code(controller.controller_modify_volume(modify).await), Code::InvalidArgument);
            let create = csi::CreateVolumeRequest { mutable_parameters: readahead(), ..create("m", MIB, &kind, class) };
            assert_eq!(code(controller.create_volume(create).await), Code::InvalidArgument);
        }
        if name == "raw" {
            let grow = controller.controller_expand_volume(calls.expand(128 * MIB)).await;
            assert_eq!(code(grow), Code::OutOfRange, "in use or not");
        }
        let nothing = csi::ControllerModifyVolumeRequest { volume_id: calls.id.clone(), ..Default::default() };
        assert_eq!(code(controller.controller_modify_volume(nothing).await), Code::InvalidArgument);
        assert_eq!(delete(&driver, &calls).await, Code::Ok);
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn a_node_grows_what_is_there_and_no_further_than_it_may() {
    let mut driver = Driver::new();
    driver.start();
    for kind in [mount("xfs"), block()] {
        let size = if kind == block() { 16 } else { 300 };
        let calls = made(&driver, "pvc-1", size * MIB, &kind, &[]).await;
        assert_eq!(stage(&driver, &calls).await, Code::Ok);
        assert_eq!(publish(&driver, &calls).await, Code::Ok);
        let ask =
            |least: i64, most: i64, path: &str, capability: Option<&VolumeCapability>| csi::NodeExpandVolumeRequest {
                volume_id: calls.id.clone(),
                volume_path: path.into(),
                capacity_range: Some(csi::CapacityRange { required_bytes: least * MIB, limit_bytes: most * MIB }),
                volume_capability: capability.cloned(),
                ..Default::default()
            };
        let mut node = driver.node().await;
        let mut grow =
            async |request| node.node_expand_volume(request).await.map(|done| done.into_inner().capacity_bytes);
        let refused = |answer: Result<i64, Status>| answer.unwrap_err().code();
        let wrong = if kind == block() { mount("xfs") } else { block() };
        assert_eq!(refused(grow(ask(size, 0, &calls.target, Some(&wrong))).await), Code::InvalidArgument);
        let shared = as_mode(Mode::MultiNodeMultiWriter, &kind);
        assert_eq!(refused(grow(ask(size, 0, &calls.target, Some(&shared))).await), Code::InvalidArgument);
        assert_eq!(refused(grow(ask(size * 2, size, &calls.target, None)).await), Code::OutOfRange);
        assert_eq!(
            refused(grow(ask(1, size / 2, &calls.target, None)).await),
            Code::OutOfRange,
            "it is larger already"
        );
        assert_eq!(refused(grow(ask(size, -1, &calls.target, None)).await), Code::InvalidArgument);
        for nowhere in ["pods", "pods/other", "elsewhere/x"] {
            assert_eq!(refused(grow(ask(size, 0, &driver.kubelet(nowhere), None)).await), Code::NotFound, "{nowhere}");
        }
        // By its target or by where it is staged, as the kubelet has it.
        assert_eq!(grow(ask(size * 2, size * 2, &calls.target, Some(&kind))).await.unwrap(), size * 2 * MIB);
        assert_eq!(grow(ask(size * 3, size * 4, &calls.staging, Some(&kind))).await.unwrap(), size * 3 * MIB);
        assert_eq!(unpublish(&driver, &calls).await, Code::Ok);
        assert_eq!(unstage(&driver, &calls).await, Code::Ok);
        assert_eq!(refused(grow(ask(size, 0, &calls.staging, None)).await), Code::NotFound);
        assert_eq!(delete(&driver, &calls).await, Code::Ok);
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root, loop devices and XFS"]
async fn a_group_goes_as_a_whole_and_is_named_as_a_whole() {
    let mut driver = Driver::on("xfs", 1024);
    driver.start();
    let (mut controller, mut groups) = (driver.controller().await, driver.groups().await);
    let mut volumes = Vec::new();
    for name in ["one", "two"] {
        volumes.push(made(&driver, name, 16 * MIB, &block(), &[]).await);
    }
    let mut taken = Vec::new();
    for name in ["group", "other"] {
        taken.push(take_group(&driver, name, &volumes.iter().collect::<Vec<_>>()).await);
    }
    let ids = |n: usize| members(&taken[n]);
    let one = csi::DeleteSnapshotRequest { snapshot_id: ids(0)[0].clone(), ..Default::default() };
    assert_eq!(code(controller.delete_snapshot(one).await), Code::InvalidArgument);
    let never = keelway_csi::model::SnapshotId::new([9; 16]).to_string();
    let wrong = [
        vec![],
        vec![ids(0)[0].clone()],
        vec![ids(0)[0].clone(), "nonsense".into()],
        [ids(0), vec!["../../etc".into()]].concat(),
        [ids(0), vec![ids(1)[0].clone()]].concat(),
        ids(1),
    ];
    let group_snapshot_id = taken[0].group_snapshot_id.clone();
    let get = |snapshot_ids: Vec<String>| csi::GetVolumeGroupSnapshotRequest {
        group_snapshot_id: group_snapshot_id.clone(),
        snapshot_ids,
        ..Default::default()
    };
    let drop = |n: usize, snapshot_ids: Vec<String>| csi::DeleteVolumeGroupSnapshotRequest {
        group_snapshot_id: taken[n].group_snapshot_id.clone(),
        snapshot_ids,
        ..Default::default()
    };
    for list in wrong {
        assert_eq!(code(groups.get_volume_group_snapshot(get(list.clone())).await), Code::InvalidArgument, "{list:?}");
        let dropped = groups.delete_volume_group_snapshot(drop(0, list.clone())).await;
        assert_eq!(code(dropped), Code::InvalidArgument, "{list:?}");
    }
    let found = groups.get_volume_group_snapshot(get(ids(0))).await.unwrap().into_inner().group_snapshot.unwrap();
    assert_eq!(found, taken[0]);
    assert_eq!(
        code(groups.get_volume_group_snapshot(get([ids(0), vec![never]].concat())).await),
        Code::InvalidArgument
    );

    let base = ids(1)[0].clone();
    let mut metadata = SnapshotMetadataClient::new(driver.channel().await);
    for starting_offset in [-1, i64::MIN, 16 * MIB] {
        let request =
            csi::GetMetadataAllocatedRequest { snapshot_id: base.clone(), starting_offset, ..Default::default() };
        assert_eq!(code(metadata.get_metadata_allocated(request).await), Code::OutOfRange, "{starting_offset}");
        let (base_snapshot_id, target_snapshot_id) = (base.clone(), base.clone());
        let request = csi::GetMetadataDeltaRequest {
            base_snapshot_id,
            target_snapshot_id,
            starting_offset,
            ..Default::default()
        };
        assert_eq!(code(metadata.get_metadata_delta(request).await), Code::OutOfRange, "{starting_offset}");
    }
    let request = csi::GetMetadataAllocatedRequest { snapshot_id: base, max_results: -1, ..Default::default() };
    assert_eq!(code(metadata.get_metadata_allocated(request).await), Code::InvalidArgument);

    // One that fails halfway is carried on with by the same call.
    let last = taken[0].snapshots.iter().map(|it| driver.path("pool").join(format!("{}.snap", it.snapshot_id))).max();
    let last = last.unwrap().display().to_string();
    common::run("chattr", &["+i", &last]);
    assert_eq!(code(groups.delete_volume_group_snapshot(drop(0, ids(0))).await), Code::Internal);
    common::run("chattr", &["-i", &last]);
    for n in 0..2 {
        for _ in 0..2 {
            assert_eq!(code(groups.delete_volume_group_snapshot(drop(n, ids(n))).await), Code::Ok);
        }
    }
    for calls in &volumes {
        assert_eq!(delete(&driver, calls).await, Code::Ok);
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root, loop devices and XFS"]
async fn names_may_have_whitespace_and_no_other_control() {
    let mut driver = Driver::on("xfs", 1024);
    driver.start();
    let mut controller = driver.controller().await;
    for banned in ["\0", "\u{8}", "\u{b}", "\u{c}", "\u{e}", "\u{1f}", "\u{7f}", "\u{85}", "\u{9f}"] {
        let refused = controller.create_volume(create(&format!("a{banned}b"), MIB, &block(), &[])).await;
        assert_eq!(code(refused), Code::InvalidArgument, "{banned:?}");
    }
    let name = "a\tb\r\nc \u{fffd}";
    let made = controller.create_volume(create(name, MIB, &block(), &[])).await.unwrap().into_inner();
    let id = made.volume.unwrap().volume_id;
    let calls = Calls::new(&driver, &id, block());
    let taken = take(&driver, name, &calls).await;
    let of_group = take_group(&driver, name, &[&calls]).await;
    driver.kill();
    driver.start();
    let mut controller = driver.controller().await;
    let again = controller.create_volume(create(name, MIB, &block(), &[])).await.unwrap().into_inner();
    assert_eq!(again.volume.unwrap().volume_id, id);
    assert_eq!(take(&driver, name, &calls).await, taken);
    drop_group(&driver, &of_group).await;
    drop_snapshot(&driver, &taken.snapshot_id).await;
    assert_eq!(delete(&driver, &calls).await, Code::Ok);
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_is_not_served_is_said_as_such() {
    let mut driver = Driver::new();
    driver.set("--backends", "image,directory");
    driver.start();
    let calls = made(&driver, "pvc-1", 16 * MIB, &mount(""), DIRECTORY).await;
    driver.kill();
    driver.set("--backends", "image");
    driver.start();
    let mut controller = driver.controller().await;
    // What is there of a backend that is served no more waits for it; nobody passed anything wrong.
    assert_eq!(delete(&driver, &calls).await, Code::FailedPrecondition);
    assert_eq!(stage(&driver, &calls).await, Code::FailedPrecondition);
    assert_eq!(code(driver.node().await.node_get_volume_stats(calls.stats()).await), Code::FailedPrecondition);
    let again = controller.create_volume(create("pvc-1", 16 * MIB, &mount(""), DIRECTORY)).await;
    assert_eq!(code(again), Code::FailedPrecondition);
    let new = controller.create_volume(create("pvc-2", 16 * MIB, &mount(""), DIRECTORY)).await;
    assert_eq!(code(new), Code::InvalidArgument);
    // Of a class for other nodes there is no room here; and a filesystem has its least size on whatever device.
    for (backend, kind, least) in [
        ("image", mount("xfs"), 300 * MIB),
        ("raw", mount("ext4"), 16 * MIB),
        ("lvm", mount(""), 16 * MIB),
        ("lvm-thin", mount("btrfs"), 128 * MIB),
        ("lvm", block(), MIB),
        ("directory", mount(""), MIB),
    ] {
        let request = csi::GetCapacityRequest {
            volume_capabilities: vec![kind],
            parameters: [("backend".to_owned(), backend.to_owned())].into(),
            ..Default::default()
        };
        let answer = controller.get_capacity(request).await.unwrap().into_inner();
        assert_eq!(answer.minimum_volume_size, Some(least), "{backend}");
        assert_eq!(answer.available_capacity > 0, backend == "image", "{backend}: {answer:?}");
        assert_eq!(answer.maximum_volume_size.unwrap() > 0, backend == "image", "{backend}: {answer:?}");
    }
    driver.kill();
    driver.set("--backends", "directory");
    driver.start();
    let mut controller = driver.controller().await;
    let modify = csi::ControllerModifyVolumeRequest {
        volume_id: calls.id.clone(),
        mutable_parameters: [("readAheadKiB".to_owned(), "256".to_owned())].into(),
        ..Default::default()
    };
    assert_eq!(code(controller.controller_modify_volume(modify).await), Code::Unimplemented);
    assert_eq!(delete(&driver, &calls).await, Code::Ok);
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_is_not_advertised_is_not_implemented() {
    let mut driver = Driver::new().disks(1, 64);
    driver.start();
    let calls = made(&driver, "pvc-1", 16 * MIB, &block(), RAW).await;
    let (mut controller, mut node) = (driver.controller().await, driver.node().await);
    assert_eq!(code(controller.create_snapshot(calls.snapshot("s")).await), Code::Unimplemented);
    let snapshot_id = keelway_csi::model::SnapshotId::new([1; 16]).to_string();
    let request = csi::DeleteSnapshotRequest { snapshot_id: snapshot_id.clone(), ..Default::default() };
    assert_eq!(code(controller.delete_snapshot(request).await), Code::Unimplemented);
    let request = csi::GetSnapshotRequest { snapshot_id: snapshot_id.clone(), ..Default::default() };
    assert_eq!(code(controller.get_snapshot(request).await), Code::Unimplemented);
    assert_eq!(code(controller.list_snapshots(csi::ListSnapshotsRequest::default()).await), Code::Unimplemented);
    assert_eq!(code(controller.controller_expand_volume(calls.expand(128 * MIB)).await), Code::Unimplemented);
    assert_eq!(code(node.node_expand_volume(calls.node_expand(128 * MIB)).await), Code::Unimplemented);
    let restore = filled(snapshot(&snapshot_id), create("restored", 16 * MIB, &block(), RAW));
    assert_eq!(code(controller.create_volume(restore).await), Code::NotFound);
    assert_eq!(delete(&driver, &calls).await, Code::Ok);
    driver.assert_clean();
}
