//! Disks and paths that do not answer: whoever has nothing to do with them is answered, and nothing piles up.
//!
//! `cargo test -p keelway-csi --test hangs -- --ignored`, as root.

mod common;

use std::fs;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::{
    Calls, DIRECTORY, Driver, MIB, RAW, Still, as_mode, available, bring, create, delete, end, made, mount, run,
};
use keelway_csi::csi;
use keelway_csi::csi::volume_capability::AccessType;
use keelway_csi::csi::volume_capability::access_mode::Mode;

/// What is wrong with each volume that something is wrong with.
async fn unhealthy(driver: &Driver) -> Vec<(String, i32)> {
    let request = csi::ControllerListVolumeHealthRequest::default();
    let answer = driver.controller().await.controller_list_volume_health(request).await.unwrap().into_inner();
    let found = answer.entries.into_iter().filter(|volume| !volume.health_statuses.is_empty());
    found.map(|volume| (volume.volume_id, volume.health_statuses[0].status)).collect()
}

/// Waits until nothing is wrong with any volume: a look that hung may come back a moment after what it waited for.
async fn well_again(driver: &Driver) {
    let start = Instant::now();
    loop {
        let found = unhealthy(driver).await;
        if found.is_empty() {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "{found:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn threads(driver: &Driver) -> usize {
    common::list(format!("/proc/{}/task", driver.pid().unwrap()).as_ref()).len()
}

#[tokio::test]
#[ignore = "needs root, loop devices and FUSE"]
async fn a_device_that_cannot_even_be_opened_is_not_free() {
    let mut driver = Driver::new().disks(1, 64);
    // A FUSE that nobody serves: who goes there does not come back.
    let nowhere = driver.path("nowhere");
    fs::create_dir(&nowhere).unwrap();
    let fuse = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
    nix::mount::mount(Some("nobody"), &nowhere, Some("fuse"), nix::mount::MsFlags::empty(), Some(options.as_str()))
        .unwrap();
    let disk = driver.by_id(0).display().to_string();
    driver.set("--raw-devices", &format!("{}/disk,{disk}", nowhere.display()));
    driver.start();
    let start = Instant::now();
    assert_eq!(available(&driver, &[]).await, 64 * MIB);
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    // Only the first one waited.
    let (start, before) = (Instant::now(), threads(&driver));
    let mut many = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let mut controller = driver.controller().await;
        many.spawn(async move { controller.get_capacity(csi::GetCapacityRequest::default()).await.map(drop) });
    }
    assert!(many.join_all().await.into_iter().all(|answer| answer.is_ok()));
    for _ in 0..50 {
        assert_eq!(available(&driver, &[]).await, 64 * MIB);
        let request = csi::NodeGetStorageHealthRequest::default();
        driver.node().await.node_get_storage_health(request).await.unwrap();
    }
    // Each that waited as the first one did would have taken four seconds.
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    // Those that are idle end by themselves after a while; one that waits there does not.
    while threads(&driver) > before + 4 {
        assert!(start.elapsed() < Duration::from_secs(60), "{} threads after {before}", threads(&driver));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let calls = made(&driver, "pvc-1", 64 * MIB, &mount("ext4"), RAW).await;
    driver.node().await.node_stage_volume(calls.stage()).await.unwrap();
    driver.node().await.node_unstage_volume(calls.unstage()).await.unwrap();
    delete(&driver, &calls).await;
    // Whoever waited there is let go with its other end.
    drop(fuse);
    driver.kill();
    run("umount", &["--lazy", nowhere.to_str().unwrap()]);
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root, loop devices and XFS"]
async fn disks_that_hang_in_mkfs_keep_nobody_elses_slot() {
    let driver = Driver::new().with(&["--format-slots=2", "--backends=image"]).disks_below(2);
    let mut driver = driver.disks(2, 64).disks(1, 128);
    driver.start();
    let mut all = Vec::new();
    for (name, size) in [("one", 64), ("two", 64), ("works", 128)] {
        all.push(made(&driver, name, size * MIB, &mount("ext4"), RAW).await);
    }
    let image = made(&driver, "image", 32 * MIB, &mount("ext4"), &[]).await;
    let still = Still::hold(driver.path("below").to_str().unwrap());
    let mut hanging = Vec::new();
    for calls in &all[..2] {
        let (mut node, request) = (driver.node().await, calls.stage());
        hanging.push(tokio::spawn(async move { node.node_stage_volume(request).await }));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Another store has slots of its own.
    let start = Instant::now();
    driver.node().await.node_stage_volume(image.stage()).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    let start = Instant::now();
    let stage = tokio::time::timeout(Duration::from_secs(60), async {
        driver.node().await.node_stage_volume(all[2].stage()).await.unwrap();
    });
    stage.await.expect("all slots are taken by disks that hang");
    assert!(hanging.iter().all(|stage| !stage.is_finished()), "they do not hang at all");
    eprintln!("a slot was free after {:?}", start.elapsed());
    // All volumes are looked at side by side, and those two are seen to hang.
    let start = Instant::now();
    let mut found = unhealthy(&driver).await;
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    found.sort();
    let inaccessible = csi::VolumeHealthErrorType::Inaccessible as i32;
    let mut want: Vec<_> = all[..2].iter().map(|calls| (calls.id.clone(), inaccessible)).collect();
    want.sort();
    assert_eq!(found, want);
    drop(still);
    for stage in hanging {
        stage.await.unwrap().unwrap();
    }
    well_again(&driver).await;
    all.push(image);
    for calls in &all {
        driver.node().await.node_unstage_volume(calls.unstage()).await.unwrap();
        delete(&driver, calls).await;
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn what_takes_long_at_one_target_holds_up_no_other() {
    let mut driver = Driver::new();
    driver.start();
    let kind = as_mode(Mode::SingleNodeMultiWriter, &mount("ext4"));
    let calls = made(&driver, "pvc-1", 64 * MIB, &kind, &[]).await;
    bring(&driver, &calls).await;
    // What its device completes is seen: a call that waits long meanwhile does not wait for a disk that hangs.
    let completed = || keelway_csi::sys::block::completed(driver.loops()[0].dev()).unwrap();
    let before = completed();
    let file = fs::File::create(format!("{}/data", calls.target)).unwrap();
    file.set_len(4096).and_then(|()| file.sync_all()).unwrap();
    assert!(completed() > before, "{before}");
    drop(file);
    // A second pod, to whose group all is given first; meanwhile the filesystem is held still, so that nothing goes on.
    let mut capability = kind.clone();
    let Some(AccessType::Mount(options)) = &mut capability.access_type else { unreachable!() };
    options.volume_mount_group = "4242".into();
    let second = Calls { capability, target: driver.kubelet("pods/second"), ..calls.clone() };
    let still = Still::hold(&calls.target);
    let (mut node, request) = (driver.node().await, second.publish());
    let waiting = tokio::spawn(async move { node.node_publish_volume(request).await });
    let start = Instant::now();
    let mut said = Vec::new();
    while said.is_empty() && start.elapsed() < Duration::from_secs(60) {
        tokio::time::sleep(Duration::from_millis(500)).await;
        said = unhealthy(&driver).await;
    }
    assert!(
        !waiting.is_finished() && start.elapsed() >= Duration::from_secs(7),
        "{said:?} after {:?}",
        start.elapsed()
    );
    assert_eq!(said, [(calls.id.clone(), csi::VolumeHealthErrorType::Inaccessible as i32)]);
    let answer = driver.node().await.node_get_volume_stats(calls.stats()).await.unwrap().into_inner();
    assert_eq!(answer.usage.len(), 2);
    drop(still);
    waiting.await.unwrap().unwrap();
    well_again(&driver).await;
    driver.node().await.node_unpublish_volume(second.unpublish()).await.unwrap();
    end(&driver, &calls).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root"]
async fn volumes_that_come_and_go_do_not_spoil_the_list() {
    let mut driver = Driver::new().with(&["--backends=directory"]);
    driver.start();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut lives = tokio::task::JoinSet::new();
    for n in 0..4 {
        let (mut controller, stop) = (driver.controller().await, stop.clone());
        let request = create(&format!("v{n}"), MIB, &mount(""), DIRECTORY);
        lives.spawn(async move {
            let mut lived = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let made = controller.create_volume(request.clone()).await.unwrap().into_inner();
                let volume_id = made.volume.unwrap().volume_id;
                controller.delete_volume(csi::DeleteVolumeRequest { volume_id, ..Default::default() }).await.unwrap();
                lived += 1;
            }
            lived
        });
    }
    // Also more lists at once than looks at one volume.
    let mut lists = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let mut controller = driver.controller().await;
        lists.spawn(async move {
            for _ in 0..40 {
                let request = csi::ControllerListVolumeHealthRequest::default();
                controller.controller_list_volume_health(request).await.unwrap();
            }
        });
    }
    while let Some(done) = lists.join_next().await {
        done.unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let lived: usize = lives.join_all().await.into_iter().sum();
    assert!(lived > 8, "{lived}");
    driver.assert_clean();
}
