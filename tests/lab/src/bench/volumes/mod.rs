//! `make bench-csi`: what volumes cost, beside Debian's tools by hand on the same file system in the same run.
mod driver;
mod hand;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tonic::transport::Channel;

use self::driver::Driver;
use super::part;
use super::report::{Goal, Report};
use crate::sh;

const PEER: &str = "by hand";
/// Volumes one after the other in a run, and at once; p99 is taken of each run.
const ALONE: usize = 60;
const AT_ONCE: usize = 50;
const RUNS: usize = 3;
/// fio's blocks of each side, in turn.
const BLOCKS: usize = 5;

/// A kind of volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    Image,
    Btrfs,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Directory, Self::Image, Self::Btrfs];

    fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Image => "image, ext4",
            Self::Btrfs => "btrfs subvolume",
        }
    }

    fn parameters(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Directory => &[("backend", "directory"), ("capacity", "unenforced")],
            Self::Image => &[("allocation", "full")],
            Self::Btrfs => &[("backend", "btrfs"), ("capacity", "quota")],
        }
    }

    fn fs_type(self) -> &'static str {
        if self == Self::Image { "ext4" } else { "" }
    }

    /// What create, stage and publish may take of the slowest hundredth, in milliseconds.
    fn goal(self) -> Option<f64> {
        match self {
            Self::Directory => Some(5.0),
            Self::Image => Some(60.0),
            Self::Btrfs => None,
        }
    }
}

/// Where all of it happens; removed at the end. Mounts are this process' own.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        // Of a part that failed, too: the latest mount first, then what was under it.
        let ours = |text: &str| text.contains(&*self.0.to_string_lossy());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for target in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(|target| ours(target)) {
            let _ = sh::run(&["umount", "--lazy", target]);
        }
        let loops = sh::run(&["losetup", "--list", "--noheadings", "--output=NAME,BACK-FILE"]).unwrap_or_default();
        for device in loops.lines().filter(|line| ours(line)).filter_map(|line| line.split_whitespace().next()) {
            let _ = sh::run(&["losetup", "--detach", device]);
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Place {
    fn new() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace of its own: run as root")?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        let place = Self(std::env::temp_dir().join(format!("keelway-bench-{}", std::process::id())));
        for dir in ["ext/bare", "btrfs", "kubelet/staging", "kubelet/pods", "kubelet/plugins_registry", "hand"] {
            fs::create_dir_all(place.0.join(dir))?;
        }
        let disk = place.path("btrfs.disk");
        sh::run(&["truncate", "-s", "8G", &disk])?;
        sh::run(&["mkfs.btrfs", "-q", &disk])?;
        sh::run(&["mount", "-o", "loop", &disk, &place.path("btrfs")])?;
        fs::create_dir(place.0.join("btrfs/bare"))?;
        Ok(place)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }

    fn ensure_empty(&self) -> Result<()> {
        let pools = [Kind::Image, Kind::Btrfs].map(|kind| fs::read_dir(self.base(kind).join("pool")));
        let left: Vec<_> = pools.into_iter().flatten().flatten().flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.iter().all(|name| name == ".keelway-pool"), "in the pools: {left:?}");
        Ok(())
    }

    /// The directory of the file system that this kind of volume is on.
    fn base(&self, kind: Kind) -> PathBuf {
        self.0.join(if kind == Kind::Btrfs { "btrfs" } else { "ext" })
    }
}

/// Runs it all, some four minutes; whether every figure could be measured.
pub fn run() -> Result<bool> {
    let tools = ["losetup", "mkfs.ext4", "mkfs.btrfs", "btrfs", "fallocate", "truncate", "mount", "umount"];
    if let Some(reason) = sh::missing(&tools, &["keelway-csi"]) {
        anyhow::bail!(reason);
    }
    println!("programs: {}", sh::own("keelway-csi")?.display());
    let place = Place::new()?;
    let mut report = Report::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ext = Driver::start(&place.0, "ext", "image,directory")?;
    let btrfs = Driver::start(&place.0, "btrfs", "btrfs")?;
    for kind in Kind::ALL {
        let driver = if kind == Kind::Btrfs { &btrfs } else { &ext };
        let measure = Measure { runtime: &runtime, channel: runtime.block_on(driver.dial())?, place: &place, kind };
        println!("{}", kind.name());
        part(&mut report, &format!("{}: calls", kind.name()), |report| measure.calls(report));
        part(&mut report, &format!("{}: {AT_ONCE} at once", kind.name()), |report| measure.at_once(report));
        match sh::missing(&["fio"], &[]) {
            Some(reason) => report.skip(&format!("{}: fio", kind.name()), &reason),
            None => part(&mut report, &format!("{}: fio", kind.name()), |report| measure.fio(report)),
        }
    }
    drop((ext, btrfs));
    part(&mut report, "nothing left of any volume", |_| place.ensure_empty());
    report.end("bench-csi")
}

struct Measure<'a> {
    runtime: &'a tokio::runtime::Runtime,
    channel: Channel,
    place: &'a Place,
    kind: Kind,
}

/// Milliseconds there (create, stage, publish) and back.
type Times = [f64; 2];

const WAYS: [&str; 2] = ["create+stage+publish", "and back"];

impl Measure<'_> {
    fn calls(&self, report: &mut Report) -> Result<()> {
        let mut pairs = [Vec::new(), Vec::new()];
        let mut last = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
        for run in 0..RUNS {
            let mut seen: [Vec<Times>; 2] = Default::default();
            for round in 0..ALONE {
                let name = format!("alone-{run}-{round}");
                let ours = self.runtime.block_on(self.ours(&name))?;
                let peer = hand::cycle(self.place, self.kind, &name)?;
                for way in 0..2 {
                    pairs[way].push([ours[way], peer[way]]);
                }
                seen[0].push(ours);
                seen[1].push(peer);
            }
            for (side, seen) in seen.iter().enumerate() {
                for way in 0..2 {
                    last[way][side].push(p99(seen.iter().map(|times| times[way])));
                }
            }
        }
        for (way, [ours, peer]) in last.into_iter().enumerate() {
            let what = format!("{}: {}", self.kind.name(), WAYS[way]);
            report.pairs(&what, "ms", &pairs[way], PEER);
            let slowest = format!("{what}, p99 of {ALONE}");
            report.row(&slowest, "ms", ours, Some((peer, PEER)));
            if let (0, Some(goal)) = (way, self.kind.goal()) {
                report.goal(&slowest, Goal::OursAtMost(goal));
            }
        }
        Ok(())
    }

    fn at_once(&self, report: &mut Report) -> Result<()> {
        let (mut all, mut last) = ([[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]], [Vec::new(), Vec::new()]);
        for run in 0..RUNS {
            let sides = [self.ours_at_once(run)?, self.hand_at_once(run)?];
            for (side, seen) in sides.iter().enumerate() {
                last[side].push(p99(seen.iter().map(|times| times[0])));
                for way in 0..2 {
                    all[way][side].extend(seen.iter().map(|times| times[way]));
                }
            }
        }
        for (way, [ours, peer]) in all.into_iter().enumerate() {
            let what = format!("{}: {}, {AT_ONCE} at once", self.kind.name(), WAYS[way]);
            report.row(&what, "ms", ours, Some((peer, PEER)));
        }
        let [ours, peer] = last;
        let what = format!("{}: {}, {AT_ONCE} at once, p99", self.kind.name(), WAYS[0]);
        report.row(&what, "ms", ours, Some((peer, PEER)));
        Ok(())
    }

    async fn ours(&self, name: &str) -> Result<Times> {
        let volume = driver::Volume::new(self.channel.clone(), &self.place.0, self.kind, name)?;
        cycle(volume).await
    }

    fn ours_at_once(&self, run: usize) -> Result<Vec<Times>> {
        self.runtime.block_on(async {
            let mut tasks = Vec::new();
            for n in 0..AT_ONCE {
                let name = format!("once-{run}-{n}");
                tasks.push(tokio::spawn(cycle(driver::Volume::new(
                    self.channel.clone(),
                    &self.place.0,
                    self.kind,
                    &name,
                )?)));
            }
            let mut all = Vec::new();
            for task in tasks {
                all.push(task.await??);
            }
            Ok(all)
        })
    }

    fn hand_at_once(&self, run: usize) -> Result<Vec<Times>> {
        std::thread::scope(|scope| {
            let start = |n| scope.spawn(move || hand::cycle(self.place, self.kind, &format!("once-{run}-{n}")));
            let threads: Vec<_> = (0..AT_ONCE).map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("a turn does not panic")).collect()
        })
    }

    /// The same jobs on a volume and on the file system that it is on, in turn.
    fn fio(&self, report: &mut Report) -> Result<()> {
        let mut volume = driver::Volume::new(self.channel.clone(), &self.place.0, self.kind, "fio")?;
        // Of btrfs, what is written anew counts twice until the next commit.
        volume.mebibytes = 1024;
        self.runtime.block_on(volume.there())?;
        let (ours, bare) = (volume.target.join("file"), self.place.base(self.kind).join("bare/file"));
        for file in [&ours, &bare] {
            fio(file, "write", "1M", &["--end_fsync=1"])?;
        }
        for (job, size) in [("randread", "4k"), ("randwrite", "4k"), ("write", "1M")] {
            let timed = ["--time_based", "--runtime=2"];
            let mut pairs = Vec::new();
            for block in 0..BLOCKS {
                // Who is first changes, so that neither has the better half of what drifts.
                let (one, other) = if block % 2 == 0 { (&ours, &bare) } else { (&bare, &ours) };
                let (a, b) = (fio(one, job, size, &timed)?, fio(other, job, size, &timed)?);
                pairs.push(if block % 2 == 0 { [a, b] } else { [b, a] });
            }
            let what = format!("{}: fio {job} of {size}", self.kind.name());
            report.pairs(&what, "MiB/s", &pairs, "bare file system");
            if self.kind != Kind::Image {
                report.goal(&what, Goal::RatioAtLeast(0.97));
            }
        }
        fs::remove_file(&bare)?;
        self.runtime.block_on(volume.back())
    }
}

async fn cycle(mut volume: driver::Volume) -> Result<Times> {
    let start = Instant::now();
    volume.there().await?;
    let there = start.elapsed();
    volume.back().await?;
    Ok(times(there, start.elapsed()))
}

fn times(there: Duration, all: Duration) -> Times {
    [there, all - there].map(|time| time.as_secs_f64() * 1e3)
}

fn p99(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_unstable_by(f64::total_cmp);
    let rank = (figures.len() * 99).div_ceil(100);
    figures[rank - 1]
}

/// Runs one job with direct I/O on a file of 128 MiB and gives its MiB a second.
fn fio(file: &Path, job: &str, size: &str, more: &[&str]) -> Result<f64> {
    let (file, rw, bs) = (format!("--filename={}", file.display()), format!("--rw={job}"), format!("--bs={size}"));
    let fixed =
        ["--name=job", "--size=128M", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--output-format=json"];
    let text = sh::run(&[&["fio", &file, &rw, &bs], &fixed[..], more].concat())?;
    let read: serde_json::Value = serde_json::from_str(&text).context("fio's report")?;
    let side = if job.contains("read") { "read" } else { "write" };
    let bytes = read["jobs"][0][side]["bw_bytes"].as_f64().context("fio's report has no bw_bytes")?;
    Ok(bytes / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    #[test]
    fn p99_is_the_slowest_hundredth() {
        assert_eq!(super::p99((1..=200).map(f64::from)), 198.0);
        assert_eq!(super::p99([3.0, 1.0].into_iter()), 3.0);
    }
}
