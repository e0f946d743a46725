//! Logical volumes, thick and thin.
//!
//! `cargo test -p keelway-csi --test lvm -- --ignored`, as root, on a kernel with device-mapper; `cargo xtask kernels` runs it
//! on Debian's.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;

use common::{
    Calls, Driver, MIB, available, block, bring, create, delete, drop_group, drop_snapshot, end, lvm, made, mount,
    no_device_mapper, snapshot, take, take_away, take_group, try_made, try_take, try_take_group, volume,
};
use keelway_csi::csi;
use keelway_csi::csi::volume_capability::access_mode::Mode;
use tonic::Code;

const THICK: &[(&str, &str)] = &[("backend", "lvm")];
const THIN: &[(&str, &str)] = &[("backend", "lvm-thin")];
const BOTH: &str = "lvm,lvm-thin";
const DATA: &[u8] = &[0x5a; 1 << 16];

async fn grow(driver: &Driver, calls: &Calls, mebibytes: i64) {
    let answer = driver.controller().await.controller_expand_volume(calls.expand(mebibytes * MIB)).await.unwrap();
    assert_eq!(answer.into_inner().capacity_bytes, mebibytes * MIB);
    driver.node().await.node_expand_volume(calls.node_expand(mebibytes * MIB)).await.unwrap();
}

/// Where the bytes of a volume are: a file of it, or the device itself.
fn path(calls: &Calls) -> String {
    if calls.capability == block() { calls.target.clone() } else { format!("{}/data", calls.target) }
}

fn write(calls: &Calls, data: &[u8], at: u64) {
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path(calls)).unwrap();
    file.write_all_at(data, at).unwrap();
    file.sync_all().unwrap();
}

fn read(calls: &Calls, at: u64, length: usize) -> Vec<u8> {
    let mut found = vec![0; length];
    fs::File::open(path(calls)).unwrap().read_exact_at(&mut found, at).unwrap();
    found
}

fn mebibytes_of(calls: &Calls) -> u64 {
    let stat = rustix::fs::statvfs(calls.target.as_str()).unwrap();
    (stat.f_blocks * stat.f_frsize) >> 20
}

#[tokio::test]
#[ignore = "needs root and device-mapper"]
async fn volumes_hold_their_data_and_grow_in_use() {
    if no_device_mapper() {
        return;
    }
    let mut driver = Driver::new().lvm(2048, BOTH);
    driver.start();
    for class in [THICK, THIN] {
        for (kind, first, then) in [(mount("ext4"), 64, 128), (mount("xfs"), 300, 500), (block(), 16, 32)] {
            let calls = made(&driver, "pvc-1", first * MIB, &kind, class).await;
            bring(&driver, &calls).await;
            write(&calls, DATA, 0);
            driver.kill();
            driver.start();
            bring(&driver, &calls).await;
            grow(&driver, &calls, then).await;
            if kind == block() {
                let file = fs::File::open(&calls.target).unwrap();
                assert_eq!(keelway_csi::sys::block::size(&file).unwrap(), (then as u64) << 20);
            } else {
                let now = mebibytes_of(&calls);
                assert!(now > then as u64 * 8 / 10 && now <= then as u64, "{now} MiB of {then}");
            }
            assert_eq!(read(&calls, 0, DATA.len()), DATA);
            let refused = driver.controller().await.delete_volume(calls.delete()).await;
            assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition);
            take_away(&driver, &calls).await;
            // At rest it grows, too, and is whole when it is staged next.
            if kind != block() {
                let more = then + 64;
                driver.controller().await.controller_expand_volume(calls.expand(more * MIB)).await.unwrap();
                bring(&driver, &calls).await;
                assert!(mebibytes_of(&calls) > more as u64 * 8 / 10);
                assert_eq!(read(&calls, 0, DATA.len()), DATA);
                take_away(&driver, &calls).await;
            }
            delete(&driver, &calls).await;
        }
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and device-mapper"]
async fn a_block_volume_holds_nothing_of_others() {
    if no_device_mapper() {
        return;
    }
    let mut driver = Driver::new().lvm(512, BOTH);
    driver.start();
    for class in [THICK, THIN] {
        let first = made(&driver, "first", 128 * MIB, &block(), class).await;
        bring(&driver, &first).await;
        write(&first, &vec![0x77; 128 << 20], 0);
        end(&driver, &first).await;
        let second = made(&driver, "second", 32 * MIB, &block(), class).await;
        bring(&driver, &second).await;
        grow(&driver, &second, 128).await;
        assert!(read(&second, 0, 128 << 20).iter().all(|&byte| byte == 0), "another's data can be read");
        end(&driver, &second).await;
    }
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and device-mapper"]
async fn a_block_volume_is_staged_before_it_is_published() {
    if no_device_mapper() {
        return;
    }
    let mut driver = Driver::new().lvm(512, BOTH);
    driver.start();
    let publish = async |driver: &Driver, calls: &Calls| driver.node().await.node_publish_volume(calls.publish()).await;
    for class in [THICK, THIN] {
        let calls = made(&driver, "pvc-1", 16 * MIB, &block(), class).await;
        // Its device is there all the time.
        assert_eq!(publish(&driver, &calls).await.unwrap_err().code(), Code::FailedPrecondition);
        driver.node().await.node_stage_volume(calls.stage()).await.unwrap();
        let refused = driver.controller().await.delete_volume(calls.delete()).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        bring(&driver, &calls).await;
        take_away(&driver, &calls).await;
        assert_eq!(publish(&driver, &calls).await.unwrap_err().code(), Code::FailedPrecondition);
        driver.node().await.node_unpublish_volume(calls.unpublish()).await.unwrap();
        delete(&driver, &calls).await;
    }
    // Staged read-only it is well.
    let kind = mount("ext4");
    let reader = made(&driver, "pvc-2", 64 * MIB, &common::as_mode(Mode::SingleNodeReaderOnly, &kind), THICK).await;
    bring(&driver, &reader).await;
    assert_eq!(driver.health(&reader.id).await, []);
    end(&driver, &reader).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and device-mapper"]
async fn thin_volumes_are_snapshotted_restored_and_cloned() {
    if no_device_mapper() {
        return;
    }
    let mut driver = Driver::new().lvm(4096, BOTH);
    driver.start();
    for (kind, size) in [(mount("ext4"), 64), (mount("xfs"), 300), (block(), 64)] {
        let first = made(&driver, "first", size * MIB, &kind, THIN).await;
        bring(&driver, &first).await;
        write(&first, DATA, 0);
        let taken = take(&driver, "s", &first).await.snapshot_id;
        write(&first, &[0x11; 4096], 0);
        let from = snapshot(&taken);
        let restored = try_made(&driver, "restored", (size + 100) * MIB, &kind, THIN, from).await.unwrap();
        let from = volume(&first.id);
        let clone = try_made(&driver, "clone", size * MIB, &kind, THIN, from).await.unwrap();
        write(&first, &[0x22; 4096], 0);
        driver.kill();
        driver.start();
        for (calls, want) in [(&restored, 0x5a), (&clone, 0x11), (&first, 0x22)] {
            bring(&driver, calls).await;
            assert_eq!(read(calls, 0, 4096), [want; 4096]);
            assert_eq!(read(calls, 4096, 4096), [0x5a; 4096]);
        }
        if kind != block() {
            assert!(mebibytes_of(&restored) > (size + 100) as u64 * 8 / 10, "it is as large as was asked for");
        }
        // A group is of one moment; both filesystems are in use.
        let both = [&first, &clone];
        if kind == block() {
            // Nothing holds the two still at once: what would not be of one moment is not taken while they are in use.
            let refused = try_take_group(&driver, "g", &both).await.unwrap_err();
            assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("moment"), "{refused}");
            for calls in both {
                driver.node().await.node_unpublish_volume(calls.unpublish()).await.unwrap();
            }
        }
        let group = take_group(&driver, "g", &both).await;
        if kind != block() {
            write(&first, &[0x33; 4096], 0);
        }
        drop_group(&driver, &group).await;
        for calls in [&restored, &clone, &first] {
            end(&driver, calls).await;
        }
        drop_snapshot(&driver, &taken).await;
        driver.assert_clean();
    }
    // A thick one has none, and says so.
    let thick = made(&driver, "thick", 16 * MIB, &block(), THICK).await;
    let refused = try_take(&driver, "s", &thick).await.unwrap_err();
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("lvm-thin"), "{refused}");
    delete(&driver, &thick).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and device-mapper"]
async fn no_extent_is_promised_twice_and_a_pool_stops_at_its_watermark() {
    if no_device_mapper() {
        return;
    }
    let mut driver = Driver::new().lvm(512, BOTH).with(&["--lvm-watermark=40"]);
    driver.start();
    // Of the group, and of the pool: what is there, in sizes that it can have.
    for class in [THICK, THIN] {
        let free = available(&driver, class).await / MIB;
        assert!(free > 100, "{free}");
        let calls = made(&driver, "pvc-1", 65 * MIB, &block(), class).await;
        assert_eq!(available(&driver, class).await / MIB, free - 68);
        let refused = try_made(&driver, "pvc-2", (free - 64) * MIB, &block(), class, None).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        let range = csi::CapacityRange { required_bytes: 65 * MIB, limit_bytes: 66 * MIB };
        let request = csi::CreateVolumeRequest { capacity_range: Some(range), ..create("pvc-3", 0, &block(), class) };
        let refused = driver.controller().await.create_volume(request).await.unwrap_err();
        assert!(refused.code() == Code::OutOfRange && refused.message().contains("multiples"), "{refused}");
        delete(&driver, &calls).await;
    }
    // At once, more than fit: each that was made has its room.
    let size = available(&driver, THIN).await / MIB * 2 / 5;
    let mut tries = Vec::new();
    for n in 0..4 {
        let mut controller = driver.controller().await;
        let request = create(&format!("at-once-{n}"), size * MIB, &block(), THIN);
        tries.push(tokio::spawn(async move { controller.create_volume(request).await }));
    }
    let mut made = Vec::new();
    for outcome in tries {
        match outcome.await.unwrap() {
            Ok(answer) => made.push(answer.into_inner().volume.unwrap().volume_id),
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
        }
    }
    assert!((1..=2).contains(&made.len()), "{} of {size} MiB", made.len());
    for id in made {
        delete(&driver, &Calls::new(&driver, &id, block())).await;
    }
    let calls = common::made(&driver, "pvc-1", 160 * MIB, &block(), THIN).await;
    bring(&driver, &calls).await;
    write(&calls, &vec![7; 120 << 20], 0);
    assert_eq!(available(&driver, THIN).await, 0);
    let refused = try_made(&driver, "pvc-2", 16 * MIB, &block(), THIN, None).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(driver.log().contains("at its watermark"), "{}", driver.log());
    end(&driver, &calls).await;
    assert!(available(&driver, THIN).await > 100 * MIB);
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root and device-mapper"]
async fn what_is_not_ours_or_not_the_same_is_left_alone() {
    if no_device_mapper() {
        return;
    }
    let mut driver = Driver::new().lvm(512, BOTH);
    driver.start();
    let calls = made(&driver, "pvc-1", 16 * MIB, &mount("ext4"), THICK).await;
    let volume = format!("kw-test/{}", calls.id);

    // After a boot nobody but the driver activates it.
    driver.kill();
    lvm(&["vgchange", "-q", "-an", "kw-test"]);
    lvm(&["vgchange", "-q", "-aay", "kw-test"]);
    let mapped = || keelway_csi::sys::lvm::mapped().unwrap();
    assert!(!mapped().iter().any(|device| device.name.contains("kwl")));
    driver.start();
    bring(&driver, &calls).await;
    write(&calls, DATA, 0);

    // What LVM leaves behind when it is killed at the wrong moment: a suspended device. The next start lets it go on.
    driver.kill();
    let name = mapped().into_iter().find(|device| device.name.contains("kwl")).unwrap().name;
    common::run("dmsetup", &["suspend", &name]);
    driver.start();
    assert!(mapped().iter().all(|device| !device.suspended));
    assert_eq!(read(&calls, 0, DATA.len()), DATA);
    take_away(&driver, &calls).await;

    // One of the same name that somebody else made: not mounted, not formatted, not removed.
    driver.kill();
    lvm(&["lvremove", "-q", "-f", "-y", &volume]);
    lvm(&["lvcreate", "-q", "-y", "-L", "16m", "-n", &calls.id, "kw-test"]);
    lvm(&["lvcreate", "-q", "-y", "-L", "16m", "--addtag", "keelway", "-n", "stray", "kw-test"]);
    driver.start();
    assert!(driver.log().contains("stray belongs to no volume"), "{}", driver.log());
    let refused = driver.node().await.node_stage_volume(calls.stage()).await.unwrap_err();
    assert_eq!(refused.code(), Code::DataLoss, "{refused}");
    let refused = driver.controller().await.delete_volume(calls.delete()).await.unwrap_err();
    assert!([Code::DataLoss, Code::FailedPrecondition].contains(&refused.code()), "{refused}");
    assert_eq!(driver.logical().len(), 2);

    // Without a group or a pool it does not start, and says which is missing.
    driver.kill();
    lvm(&["lvremove", "-q", "-f", "-y", "kw-test/pool"]);
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.start()));
    assert!(refused.is_err() && driver.log().contains("kw-test/pool"), "{}", driver.log());
}
