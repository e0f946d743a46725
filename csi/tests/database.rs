//! A real PostgreSQL on a volume, killed with everything while it commits, and restored from snapshots that were taken
//! meanwhile; and fio, which knows each block that it wrote.
//!
//! `cargo test -p keelway-csi --test database -- --ignored --nocapture`, as root, with Debian's postgresql and fio.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Calls, Driver, MIB, bring, delete, drop_snapshot, mount, run, snapshot, take, try_made};

const ROUNDS: usize = 3;

/// Debian's newest PostgreSQL.
fn postgres(program: &str) -> PathBuf {
    let mut versions = common::list(Path::new("/usr/lib/postgresql"));
    versions.pop().expect("Debian's postgresql: apt-get install postgresql").join("bin").join(program)
}

/// A server on a data directory. It does not run as root, and dies with this value.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(data: &Path) -> Self {
        let socket = data.with_file_name("socket");
        std::fs::create_dir_all(&socket).unwrap();
        own(&socket);
        // Replaced by the server, so that this process waits for it: its number must be free when it starts again.
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(postgres("postgres"));
        command.arg("-D").arg(data).arg("-k").arg(&socket);
        command.args(["-c", "listen_addresses=", "-c", "shared_buffers=16MB", "-c", "logging_collector=off"]);
        let log = data.with_file_name("log");
        let out = std::fs::File::create(&log).unwrap();
        let child = command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(out).spawn();
        let server = Self { child: child.unwrap(), socket };
        let start = Instant::now();
        while server.ask("select 1").is_err() {
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(start.elapsed() < Duration::from_secs(60), "no database after 60 s: {}", said());
            std::thread::sleep(Duration::from_millis(100));
        }
        server
    }

    fn client(&self) -> Command {
        let mut command = Command::new(postgres("psql"));
        command.args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-h"]).arg(&self.socket);
        command
    }

    fn ask(&self, statement: &str) -> Result<String, String> {
        let output = self.client().args(["-c", statement, "postgres"]).output().unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// Commits one row after another until the server is gone; `acked` is the last one that the server said to have.
    fn write(&self, from: u64, acked: Arc<AtomicU64>, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
        let mut client = self
            .client()
            .arg("postgres")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::spawn(move || {
            let mut input = client.stdin.take().unwrap();
            let mut answers = BufReader::new(client.stdout.take().unwrap()).lines();
            for row in from.. {
                let said = writeln!(input, "insert into rows values ({row}, repeat(md5('{row}'), 20)) returning n;");
                let answer = said.ok().and_then(|()| answers.next()).and_then(Result::ok);
                if answer.as_deref() != Some(&row.to_string()) {
                    break;
                }
                acked.store(row, Ordering::SeqCst);
                if stop.load(Ordering::SeqCst) {
                    break;
                }
            }
            drop(input);
            let _ = client.wait();
        })
    }

    /// All its processes at once, as a power cut does.
    fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let group = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        let _ = self.child.wait();
        // Backends have sessions of their own, and end when they see that the postmaster is gone.
        let socket = self.socket.with_file_name("data");
        let start = Instant::now();
        while users(&socket) && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether a process of this machine works in this directory.
fn users(directory: &Path) -> bool {
    common::list(Path::new("/proc"))
        .iter()
        .any(|process| std::fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(directory)))
}

fn own(path: &Path) {
    run("chown", &["postgres:postgres", path.to_str().unwrap()]);
}

/// Every row that was acknowledged when the snapshot was asked for is there, none is missing in between, no page is torn.
fn consistent(server: &Server, at_least: u64) -> u64 {
    let answer = server
        .ask("select count(*), coalesce(max(n), 0), count(*) filter (where t <> repeat(md5(n::text), 20)) from rows")
        .unwrap();
    let figures: Vec<u64> = answer.split('|').map(|figure| figure.parse().unwrap()).collect();
    let [count, last, wrong] = figures[..] else { panic!("{answer}") };
    assert_eq!((count, wrong), (last, 0), "rows are missing or wrong: {answer}");
    assert!(last >= at_least, "the server had acknowledged {at_least} rows, there are {last}");
    let mut check = Command::new(postgres("pg_amcheck"));
    check.args(["-U", "postgres", "--install-missing", "--heapallindexed", "-h"]).arg(&server.socket).arg("postgres");
    let output = check.output().unwrap();
    assert!(output.status.success(), "pg_amcheck: {}", String::from_utf8_lossy(&output.stdout));
    last
}

struct Volume {
    calls: Calls,
}

impl Volume {
    async fn make(driver: &Driver, name: &str, size: i64, from: Option<&str>) -> Self {
        let from = from.and_then(snapshot);
        let calls = try_made(driver, name, size, &mount("ext4"), &[], from).await.unwrap();
        let volume = Self { calls };
        volume.up(driver).await;
        volume
    }

    async fn up(&self, driver: &Driver) {
        bring(driver, &self.calls).await;
    }

    async fn down(&self, driver: &Driver) {
        let mut node = driver.node().await;
        node.node_unpublish_volume(self.calls.unpublish()).await.unwrap();
        // Someone who makes a mount namespace, as for a container, holds all mounts for a moment.
        let start = Instant::now();
        while let Err(status) = node.node_unstage_volume(self.calls.unstage()).await {
            assert!(start.elapsed() < Duration::from_secs(30), "{status}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn end(self, driver: &Driver) {
        self.down(driver).await;
        delete(driver, &self.calls).await;
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(&self.calls.target).join(name)
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root, loop devices and Debian's postgresql"]
async fn a_database_survives_kills_and_is_whole_in_every_snapshot() {
    let mut driver = Driver::on("xfs", 3072);
    // The server is not root, and has to get to its volume.
    for path in ["", "kubelet", "kubelet/pods"] {
        std::fs::set_permissions(driver.path(path), PermissionsExt::from_mode(0o755)).unwrap();
    }
    driver.start();
    let volume = Volume::make(&driver, "origin", 512 * MIB, None).await;
    let data = volume.path("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::set_permissions(&volume.calls.target, PermissionsExt::from_mode(0o755)).unwrap();
    own(&data);
    let init = postgres("initdb");
    run(
        "runuser",
        &["-u", "postgres", "--", init.to_str().unwrap(), "-k", "-A", "trust", "-D", data.to_str().unwrap()],
    );
    let mut server = Server::start(&data);
    server.ask("create table rows (n bigint primary key, t text)").unwrap();
    for round in 0..ROUNDS {
        let (acked, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let had = consistent(&server, 0);
        let writer = server.write(had + 1, acked.clone(), stop.clone());
        std::thread::sleep(Duration::from_secs(2));
        let (mut before, start) = (acked.load(Ordering::SeqCst), Instant::now());
        while before <= had {
            assert!(start.elapsed() < Duration::from_secs(60), "nothing was written");
            std::thread::sleep(Duration::from_millis(10));
            before = acked.load(Ordering::SeqCst);
        }
        let taken = take(&driver, &format!("s{round}"), &volume.calls).await;
        std::thread::sleep(Duration::from_millis(500));
        // Everything at once: the database, the driver, and with the latter gone the mounts must hold all the same.
        driver.kill();
        let last = acked.load(Ordering::SeqCst);
        server.kill();
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap();
        driver.start();
        volume.down(&driver).await;
        volume.up(&driver).await;

        let restored = Volume::make(&driver, &format!("restored{round}"), 512 * MIB, Some(&taken.snapshot_id)).await;
        let copy = Server::start(&restored.path("data"));
        let found = consistent(&copy, before);
        copy.kill();
        restored.end(&driver).await;
        drop_snapshot(&driver, &taken.snapshot_id).await;

        server = Server::start(&data);
        let kept = consistent(&server, last);
        println!(
            "round {round}: {before} rows before the snapshot, {found} in it; {last} at the kill, {kept} after it"
        );
    }
    server.kill();
    volume.end(&driver).await;
    driver.assert_clean();
}

#[tokio::test]
#[ignore = "needs root, loop devices and fio"]
async fn every_block_that_fio_wrote_is_read_back() {
    let mut driver = Driver::new();
    driver.start();
    let volume = Volume::make(&driver, "blocks", 256 * MIB, None).await;
    let file = format!("--filename={}", volume.path("file").display());
    let common =
        ["--name=blocks", &file, "--size=96m", "--bs=4k", "--rw=randwrite", "--ioengine=libaio", "--iodepth=16"];
    let verify = ["--direct=1", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=7"];
    run("fio", &[&common[..], &verify, &["--do_verify=0", "--end_fsync=1"]].concat());
    driver.kill();
    driver.start();
    volume.down(&driver).await;
    volume.up(&driver).await;
    run("fio", &[&common[..], &verify, &["--verify_only=1"]].concat());
    volume.end(&driver).await;
    driver.assert_clean();
}
