//! Random operations on a few volumes and snapshots, with the driver killed in the middle of many of them: what was
//! written is what is found, and in the end nothing is left.
//!
//! `KEELWAY_RANDOM_OPS=10000 cargo test -p keelway-csi --test random -- --ignored --nocapture`, as root.
//! `KEELWAY_RANDOM_SEED` repeats a run.

mod common;

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use common::{BTRFS, Calls, Driver, MIB, create, filled, mount, snapshot, volume};
use keelway_csi::csi;
use keelway_csi::csi::volume_content_source::Type;
use tonic::{Code, Status};

/// xorshift64: the same numbers for the same seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % most as u64) as usize
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Rest,
    Staged,
    Published,
}

struct Volume {
    calls: Calls,
    at: At,
    /// What was last written; 0 before that.
    data: u64,
    size: i64,
}

struct World {
    class: &'static [(&'static str, &'static str)],
    base: i64,
    driver: Driver,
    numbers: Numbers,
    volumes: Vec<Volume>,
    snapshots: Vec<(String, u64, i64)>,
    made: usize,
    written: u64,
    kills: usize,
    /// A kill comes within this many microseconds of a call: somewhere within what one takes.
    patience: usize,
}

/// A macro, since each call has types of its own: tries it, with a kill now and then, until it succeeds.
macro_rules! insist {
    ($world:expr, $client:ident, $call:ident, $request:expr) => {{
        let start = Instant::now();
        let request = $request;
        loop {
            let mut client = $world.driver.$client().await;
            let outcome: Result<_, Status> = if $world.numbers.below(8) == 0 {
                let within = Duration::from_micros($world.numbers.below($world.patience) as u64);
                let task = tokio::spawn({
                    let request = request.clone();
                    async move { client.$call(request).await }
                });
                tokio::time::sleep(within).await;
                // With what it runs, or without it.
                if $world.numbers.below(2) == 0 {
                    $world.driver.kill_with_helpers();
                } else {
                    $world.driver.kill();
                }
                $world.kills += 1;
                let outcome = task.await.unwrap();
                $world.driver.start();
                outcome
            } else {
                client.$call(request.clone()).await
            };
            match outcome {
                Ok(answer) => break answer.into_inner(),
                Err(status)
                    if [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::Aborted].contains(&status.code()) => {}
                Err(status) => panic!("{}: {status}\n{:?}\n{}", stringify!($call), request, $world.driver.log()),
            }
            assert!(start.elapsed() < Duration::from_secs(120), "{}: no end", stringify!($call));
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }};
}

impl World {
    async fn make(&mut self, from: Option<Type>, data: u64, least: i64) {
        self.made += 1;
        let (name, capability) = (format!("v{}", self.made), mount(""));
        let request = filled(from, create(&name, least.max(self.base), &capability, self.class));
        let volume = insist!(self, controller, create_volume, request).volume.unwrap();
        let calls = Calls::named(&self.driver, &name, &volume.volume_id, capability);
        self.volumes.push(Volume { calls, at: At::Rest, data, size: volume.capacity_bytes });
    }

    async fn step(&mut self) {
        let (volumes, snapshots) = (self.volumes.len(), self.snapshots.len());
        if volumes == 0 || (volumes < 5 && self.numbers.below(6) == 0) {
            return match self.numbers.below(3) {
                0 if snapshots > 0 => {
                    let (id, data, size) = self.snapshots[self.numbers.below(snapshots)].clone();
                    self.make(snapshot(&id), data, size).await
                }
                1 if volumes > 0 => {
                    let at = self.numbers.below(volumes);
                    let (id, data) = (self.volumes[at].calls.id.clone(), self.volumes[at].data);
                    let size = self.volumes[at].size;
                    self.make(volume(&id), data, size).await
                }
                _ => self.make(None, 0, 0).await,
            };
        }
        let n = self.numbers.below(volumes);
        let calls = self.volumes[n].calls.clone();
        match (self.volumes[n].at, self.numbers.below(6)) {
            (_, 0) if snapshots < 4 => {
                self.made += 1;
                let request = calls.snapshot(&format!("s{}", self.made));
                let taken = insist!(self, controller, create_snapshot, request).snapshot.unwrap();
                self.snapshots.push((taken.snapshot_id, self.volumes[n].data, taken.size_bytes));
            }
            (_, 1) if snapshots > 0 => {
                let at = self.numbers.below(snapshots);
                let (id, ..) = self.snapshots.remove(at);
                let request = csi::DeleteSnapshotRequest { snapshot_id: id, ..Default::default() };
                insist!(self, controller, delete_snapshot, request);
            }
            (At::Rest, 2) => {
                insist!(self, controller, delete_volume, calls.delete());
                self.volumes.remove(n);
            }
            (At::Rest, 3) if self.volumes[n].size < 3 * self.base => {
                let request = calls.expand(self.volumes[n].size + 8 * MIB);
                let answer = insist!(self, controller, controller_expand_volume, request);
                self.volumes[n].size = answer.capacity_bytes;
            }
            (At::Rest, _) => {
                insist!(self, node, node_stage_volume, calls.stage());
                self.volumes[n].at = At::Staged;
            }
            (At::Staged, 2 | 3) => {
                insist!(self, node, node_unstage_volume, calls.unstage());
                self.volumes[n].at = At::Rest;
            }
            (At::Staged, _) => {
                insist!(self, node, node_publish_volume, calls.publish());
                self.volumes[n].at = At::Published;
                self.check(n);
            }
            (At::Published, 2 | 3) => {
                self.check(n);
                insist!(self, node, node_unpublish_volume, calls.unpublish());
                self.volumes[n].at = At::Staged;
            }
            (At::Published, _) => {
                self.written += 1;
                let mut file = fs::File::create(format!("{}/data", calls.target)).unwrap();
                file.write_all(&page(self.written)).and_then(|()| file.sync_all()).unwrap();
                self.volumes[n].data = self.written;
            }
        }
    }

    fn check(&self, n: usize) {
        let volume = &self.volumes[n];
        let found = fs::read(format!("{}/data", volume.calls.target)).unwrap_or_default();
        let want = if volume.data == 0 { Vec::new() } else { page(volume.data) };
        assert!(found == want, "{}: other data than was written\n{}", volume.calls.id, self.driver.log());
    }

    async fn end(&mut self) {
        while let Some(volume) = self.volumes.pop() {
            let calls = volume.calls;
            insist!(self, node, node_unpublish_volume, calls.unpublish());
            insist!(self, node, node_unstage_volume, calls.unstage());
            insist!(self, controller, delete_volume, calls.delete());
        }
        while let Some((id, ..)) = self.snapshots.pop() {
            let request = csi::DeleteSnapshotRequest { snapshot_id: id, ..Default::default() };
            insist!(self, controller, delete_snapshot, request);
        }
        self.driver.assert_clean();
    }
}

/// A page that says which write it is from, all through.
fn page(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(1024)
}

async fn live(name: &str, driver: Driver, class: &'static [(&'static str, &'static str)]) {
    let number = |key: &str| std::env::var(key).ok().and_then(|text| text.parse().ok());
    let operations = number("KEELWAY_RANDOM_OPS").unwrap_or(600);
    let seed = number("KEELWAY_RANDOM_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 17 | 1);
    eprintln!("{name}: {operations} operations, seed {seed}");
    let (volumes, snapshots) = (Vec::new(), Vec::new());
    let numbers = Numbers(seed);
    let (made, written, kills, patience) = (0, 0, 0, number("KEELWAY_RANDOM_PATIENCE_US").unwrap_or(40_000) as usize);
    let mut world =
        World { class, base: 16 * MIB, driver, numbers, volumes, snapshots, made, written, kills, patience };
    world.driver.start();
    let start = Instant::now();
    let mut done = 0;
    // A short life in which nothing was written, or nobody killed, shows nothing: it goes on until something was.
    while done < operations || (done < operations + 1000 && (world.kills == 0 || world.written == 0)) {
        world.step().await;
        done += 1;
    }
    world.end().await;
    let (kills, made, written) = (world.kills, world.made, world.written);
    eprintln!(
        "{name}: {done} operations, {kills} kills, {made} volumes and snapshots, {written} writes; \
         nothing lost or left, in {:.1?}",
        start.elapsed()
    );
    assert!(kills > 0 && written > 0);
}

#[tokio::test]
#[ignore = "needs root and loop devices"]
async fn images_that_are_copied() {
    live("images by copy", Driver::new(), &[]).await;
}

#[tokio::test]
#[ignore = "needs root, loop devices and XFS"]
async fn images_that_share_blocks() {
    live("images on XFS", Driver::on("xfs", 2048), &[]).await;
}

#[tokio::test]
#[ignore = "needs root and btrfs"]
async fn subvolumes() {
    let driver = Driver::on("btrfs", 2048).with(&["--backends=btrfs"]);
    live("subvolumes", driver, BTRFS).await;
}

#[tokio::test]
#[ignore = "needs root and device-mapper"]
async fn logical_volumes() {
    if common::no_device_mapper() {
        return;
    }
    live("thin volumes", Driver::new().lvm(2048, "lvm-thin"), &[("backend", "lvm-thin")]).await;
}
