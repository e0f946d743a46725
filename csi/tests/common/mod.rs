//! A driver of one's own: started, killed and cleaned up after, whatever happens in between.
#![allow(dead_code, unused_imports)]

mod calls;
mod life;

use std::cell::Cell;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use keelway_csi::csi;
use keelway_csi::csi::controller_client::ControllerClient;
use keelway_csi::csi::group_controller_client::GroupControllerClient;
use keelway_csi::csi::node_client::NodeClient;
use keelway_csi::sys::loopdev::LoopDevice;
use keelway_csi::sys::mountinfo;
use rustix::mount::MountPropagationFlags;
use tonic::transport::{Channel, Endpoint, Uri};

pub use calls::*;
pub use life::*;

pub const MIB: i64 = 1 << 20;

/// What may be a filesystem of a test's own, below its directory.
const FILESYSTEMS: [&str; 3] = ["pool", "state", "below"];

/// A driver with directories of its own below a temporary one. What it mounts is for the thread that made it, and for what
/// that one starts.
pub struct Driver {
    pub dir: tempfile::TempDir,
    child: Option<Child>,
    args: Vec<String>,
    disks: Vec<String>,
    group: Option<Group>,
}

/// A volume group. There is one at a time: its name is the same in all tests, and so may its disk be.
struct Group {
    name: &'static str,
    disk: String,
    _only: MutexGuard<'static, ()>,
}

/// The driver as it was built: of this package, or beside the test of another one.
fn built() -> std::ffi::OsString {
    if let Some(program) = option_env!("CARGO_BIN_EXE_keelway-csi") {
        return program.into();
    }
    let test = std::env::current_exe().expect("the path of this test");
    let program = test.ancestors().nth(2).expect("a directory of programs").join("keelway-csi");
    assert!(program.exists(), "no {}: cargo build -p keelway-csi", program.display());
    program.into()
}

/// What LVM must not do in a test: wait for a udev that may not be there.
const LVM: &str = "activation{udev_sync=0 udev_rules=0 monitoring=0} backup{archive=0 backup=0}";

/// LVM, by its program.
pub fn lvm(args: &[&str]) -> String {
    let (command, rest) = args.split_first().unwrap();
    run("lvm", &[&[*command, "--config", LVM], rest].concat())
}

/// Whether there is no device-mapper to make logical volumes with, which is said.
pub fn no_device_mapper() -> bool {
    let none = !Path::new("/sys/class/misc/device-mapper").exists();
    if none {
        eprintln!("skipped: this kernel has no device-mapper; cargo xtask kernels runs it on one that has");
    }
    none
}

/// Tests that need root say so loudly instead of passing.
pub fn need_root() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts filesystems: run it as root");
}

/// Mounts of a test are seen by nobody else: who makes a mount namespace of all that this machine has mounted, as each
/// container that starts does, would hold a volume's device for as long.
fn own_mounts() {
    thread_local!(static OWN: Cell<bool> = const { Cell::new(false) });
    if !OWN.replace(true) {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a mount namespace of its own");
        let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", flags).expect("mounts that nobody else sees");
    }
}

impl Driver {
    pub fn new() -> Self {
        need_root();
        own_mounts();
        let dir = tempfile::Builder::new().prefix("keelway-csi-").tempdir().expect("a temporary directory");
        for name in ["kubelet/staging", "kubelet/pods"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        Self { dir, child: None, args: Vec::new(), disks: Vec::new(), group: None }
    }

    /// With a pool on a filesystem of its own, of this type and with this many MiB.
    pub fn on(fs: &str, mebibytes: u64) -> Self {
        Self::on_mounted(fs, mebibytes, &[], "loop").unwrap_or_else(|| panic!("{fs} cannot be mounted"))
    }

    /// As [`Driver::on`], made and mounted with these options. `None` when the kernel does not mount it.
    pub fn on_mounted(fs: &str, mebibytes: u64, make: &[&str], options: &str) -> Option<Self> {
        let driver = Self::new();
        let (image, pool) = (driver.path("pool.disk"), driver.path("pool"));
        std::fs::create_dir(&pool).unwrap();
        std::fs::File::create(&image).unwrap().set_len(mebibytes << 20).unwrap();
        let (image, pool) = (image.to_str().unwrap(), pool.to_str().unwrap());
        run(&format!("mkfs.{fs}"), &[&["-q"], make, &[image]].concat());
        let mounted = Command::new("mount").args(["-t", fs, "-o", options, image, pool]).status();
        if !mounted.unwrap().success() {
            return None;
        }
        // ext4's own; what is left in a pool is looked at.
        let _ = std::fs::remove_dir(driver.path("pool/lost+found"));
        Some(driver)
    }

    /// With its state on a filesystem of its own, of this type and with this many MiB.
    pub fn state_on(self, fs: &str, mebibytes: u64) -> Self {
        let (image, state) = (self.path("state.disk"), self.path("state"));
        std::fs::create_dir(&state).unwrap();
        std::fs::File::create(&image).unwrap().set_len(mebibytes << 20).unwrap();
        let (image, state) = (image.to_str().unwrap(), state.to_str().unwrap());
        run(&format!("mkfs.{fs}"), &["-q", image]);
        run("mount", &["-t", fs, "-o", "loop", image, state]);
        self
    }

    /// With a filesystem for the files of the first disks that [`Driver::disks`] makes: while it is held still, writes to
    /// those disks do not come back.
    pub fn disks_below(self, count: usize) -> Self {
        let (image, below) = (self.path("below.disk"), self.path("below"));
        std::fs::create_dir(&below).unwrap();
        std::fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
        run("mkfs.xfs", &["-q", image.to_str().unwrap()]);
        run("mount", &["-o", "loop", image.to_str().unwrap(), below.to_str().unwrap()]);
        for disk in (0..count).map(|n| format!("disk{n}")) {
            std::os::unix::fs::symlink(format!("below/{disk}"), self.path(&disk)).unwrap();
            std::fs::File::create(below.join(disk)).unwrap();
        }
        self
    }

    /// With disks of its own, for the raw backend.
    pub fn disks(mut self, count: usize, mebibytes: u64) -> Self {
        for n in self.disks.len()..self.disks.len() + count {
            let file = self.path(&format!("disk{n}"));
            std::fs::File::create(&file).unwrap().set_len(mebibytes << 20).unwrap();
            self.disks.push(run("losetup", &["--find", "--show", file.to_str().unwrap()]).trim().to_owned());
            std::os::unix::fs::symlink(&self.disks[n], self.by_id(n)).unwrap();
        }
        let names: Vec<_> = (0..self.disks.len()).map(|n| self.by_id(n).display().to_string()).collect();
        let list = format!("--raw-devices={}", names.join(","));
        self.args.retain(|arg| !arg.starts_with("--raw-devices=") && arg != "--backends=raw");
        self.args.extend(["--backends=raw".to_owned(), list]);
        self
    }

    /// With a volume group of its own and a thin pool in it, on the disk that KEELWAY_LVM_DISK names, or a loop device.
    pub fn lvm(mut self, mebibytes: u64, backends: &str) -> Self {
        static ONLY: Mutex<()> = Mutex::new(());
        let only = ONLY.lock().unwrap_or_else(PoisonError::into_inner);
        let disk = std::env::var("KEELWAY_LVM_DISK").unwrap_or_else(|_| {
            let file = self.path("group.disk");
            std::fs::File::create(&file).unwrap().set_len(mebibytes << 20).unwrap();
            run("losetup", &["--find", "--show", file.to_str().unwrap()]).trim().to_owned()
        });
        if disk.starts_with("/dev/loop") {
            self.disks.push(disk.clone());
            self.args.push(format!("--lvm-devices={disk}"));
        }
        // A dash, which device-mapper writes twice.
        let name = "kw-test";
        lvm(&["pvcreate", "-q", "-q", "-ff", "-y", &disk]);
        lvm(&["vgcreate", "-q", "-q", name, &disk]);
        self.group = Some(Group { name, disk, _only: only });
        let size = format!("{}m", mebibytes / 2);
        lvm(&["lvcreate", "-q", "-q", "-y", "--type", "thin-pool", "--size", &size, "--name", "pool", name]);
        let backends = format!("--backends={backends}");
        self.with(&[&backends, "--lvm-volume-group=kw-test", "--lvm-thin-pool=pool"])
    }

    /// Logical volumes of the group, but for the pool.
    pub fn logical(&self) -> Vec<String> {
        let Some(group) = &self.group else { return Vec::new() };
        let all = lvm(&["lvs", "--noheadings", "-o", "lv_name", group.name]);
        all.split_whitespace().filter(|name| *name != "pool").map(str::to_owned).collect()
    }

    /// The name by which the driver knows a disk.
    pub fn by_id(&self, n: usize) -> PathBuf {
        self.path(&format!("by-id-{n}"))
    }

    pub fn disk(&self, n: usize) -> &str {
        &self.disks[n]
    }

    /// With more flags.
    pub fn with(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// With another value of a flag from its next start on.
    pub fn set(&mut self, flag: &str, value: &str) {
        let flag = format!("{flag}=");
        self.args.retain(|arg| !arg.starts_with(&flag));
        self.args.push(flag + value);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn kubelet(&self, name: &str) -> String {
        self.path("kubelet").join(name).to_str().unwrap().to_owned()
    }

    pub fn socket(&self) -> PathBuf {
        self.path("csi.sock")
    }

    /// Starts the driver and waits until it listens.
    pub fn start(&mut self) -> u32 {
        assert!(self.child.is_none());
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        // Elsewhere than it was built, as on another kernel.
        let program = std::env::var_os("KEELWAY_CSI").unwrap_or_else(built);
        let child = Command::new(program)
            .args(["--mode", "all", "--driver", "local", "--node-name", "node1"])
            .arg("--endpoint")
            .arg(format!("unix://{}", self.socket().display()))
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--pool-dir")
            .arg(self.path("pool"))
            .arg("--kubelet-dir")
            .arg(self.path("kubelet"))
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start keelway-csi");
        let pid = child.id();
        self.child = Some(child);
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the driver ended: {ended:?}\n{}", self.log());
            assert!(start.elapsed() < Duration::from_secs(60), "no socket after 60 s\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        pid
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// kill -9, as the out-of-memory killer does it.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// kill -9 of the driver together with the programs that it runs, as the end of its container does it.
    pub fn kill_with_helpers(&mut self) {
        let Some(pid) = self.pid() else { return };
        // Stopped, it starts no more of them.
        let _ = Command::new("kill").args(["-STOP", &pid.to_string()]).status();
        for process in list(Path::new("/proc")) {
            let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
            // PID (NAME) STATE PARENT ...
            let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1));
            if parent == Some(&pid.to_string())
                && let Some(child) = process.file_name().and_then(|name| name.to_str())
            {
                let _ = Command::new("kill").args(["-KILL", child]).status();
            }
        }
        self.kill();
    }

    /// Forgets a child that somebody else killed and waited for.
    pub fn lost(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }

    /// SIGTERM; returns the exit code. Only without connections of our own: they would not answer meanwhile, and the driver
    /// waits a second for those.
    pub fn stop(&mut self) -> Option<i32> {
        self.terminate().wait().unwrap().code()
    }

    /// The same while our connections go on.
    pub async fn stop_with_connections(&mut self) -> Option<i32> {
        let mut child = self.terminate();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn terminate(&mut self) -> Child {
        let child = self.child.take().expect("a driver to stop");
        let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        child
    }

    pub async fn channel(&self) -> Channel {
        self.try_channel().await.unwrap()
    }

    pub async fn try_channel(&self) -> Result<Channel, tonic::transport::Error> {
        let socket = self.socket();
        let dial = move |_: Uri| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
        };
        Endpoint::from_static("http://localhost").connect_with_connector(tower::service_fn(dial)).await
    }

    pub async fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel().await)
    }

    pub async fn groups(&self) -> GroupControllerClient<Channel> {
        GroupControllerClient::new(self.channel().await)
    }

    pub async fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel().await)
    }

    /// What the driver finds wrong with a volume: how bad, and why.
    pub async fn health(&self, id: &str) -> Vec<(i32, String)> {
        let request = csi::ControllerGetVolumeHealthRequest { volume_id: id.into(), ..Default::default() };
        let answer = self.controller().await.controller_get_volume_health(request).await.unwrap().into_inner();
        answer.volume_health.unwrap().health_statuses.into_iter().map(|entry| (entry.status, entry.reason)).collect()
    }

    /// Mounts below our directory.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let root = self.dir.path().canonicalize().unwrap();
        let mounts = mountinfo::read().unwrap().into_iter().map(|mount| mount.target);
        let own = FILESYSTEMS.map(|name| root.join(name));
        mounts.filter(|target| target.starts_with(&root) && !own.contains(target)).collect()
    }

    /// Loop devices on our images.
    pub fn loops(&self) -> Vec<LoopDevice> {
        self.images().iter().filter_map(|image| loop_of(image)).collect()
    }

    pub fn images(&self) -> Vec<PathBuf> {
        list(&self.path("pool")).into_iter().filter(|path| path.extension().is_some_and(|e| e == "img")).collect()
    }

    pub fn records(&self) -> Vec<PathBuf> {
        list(&self.path("state/volumes"))
    }

    /// Nothing of any volume is left on this machine.
    pub fn assert_clean(&self) {
        assert_eq!(self.mounts(), Vec::<PathBuf>::new(), "mounts are left\n{}", self.log());
        assert_eq!(self.logical(), Vec::<String>::new(), "logical volumes are left\n{}", self.log());
        // Other tests' drivers have none, and see those of the one that has the group.
        if self.group.is_some() {
            let mapped = keelway_csi::sys::lvm::mapped().unwrap().into_iter().map(|device| device.name);
            let mapped: Vec<_> = mapped.filter(|name| name.starts_with("kw--test-kw")).collect();
            assert_eq!(mapped, Vec::<String>::new(), "mapped devices are left\n{}", self.log());
        }
        assert!(self.loops().is_empty(), "loop devices are left\n{}", self.log());
        assert_eq!(list(&self.path("pool")), [self.path("pool/.keelway-pool")], "images are left\n{}", self.log());
        assert_eq!(self.records(), Vec::<PathBuf>::new(), "records are left\n{}", self.log());
        assert_eq!(list(&self.path("state/uses")), Vec::<PathBuf>::new(), "uses are left\n{}", self.log());
        assert_eq!(list(&self.path("state/snapshots")), Vec::<PathBuf>::new(), "snapshots are left\n{}", self.log());
        assert_eq!(list(&self.path("kubelet/pods")), Vec::<PathBuf>::new(), "targets are left\n{}", self.log());
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.kill();
        for _ in 0..100 {
            let mounts = self.mounts();
            let Some(last) = mounts.last() else { break };
            let _ = rustix::mount::unmount(last, rustix::mount::UnmountFlags::DETACH);
        }
        for device in self.loops() {
            let _ = device.unbind(Duration::from_secs(2));
        }
        if let Some(Group { name, disk, .. }) = &self.group {
            let _ = Command::new("lvm").args(["vgremove", "--config", LVM, "-q", "-ff", "-y", name]).output();
            let _ = Command::new("lvm").args(["pvremove", "--config", LVM, "-q", "-ff", "-y", disk]).output();
        }
        for disk in &self.disks {
            let _ = Command::new("losetup").args(["--detach", disk]).output();
        }
        for name in FILESYSTEMS {
            if self.path(&format!("{name}.disk")).exists() {
                let _ = rustix::mount::unmount(self.path(name), rustix::mount::UnmountFlags::DETACH);
            }
        }
        if std::thread::panicking() {
            eprintln!("--- the driver's log\n{}", self.log());
        }
    }
}

/// A filesystem that is held still: whoever writes to it waits. It is let go also when a test fails, since a driver that
/// waits there could not even be killed.
pub struct Still(String);

impl Still {
    pub fn hold(path: &str) -> Self {
        run("fsfreeze", &["--freeze", path]);
        Self(path.to_owned())
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        let done = Command::new("fsfreeze").args(["--unfreeze", &self.0]).status();
        assert!(std::thread::panicking() || done.is_ok_and(|status| status.success()), "{} was let go", self.0);
    }
}

/// Runs a program that must succeed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn list(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

pub fn loop_of(image: &Path) -> Option<LoopDevice> {
    let meta = std::fs::metadata(image).ok()?;
    LoopDevice::find(meta.dev(), meta.ino()).unwrap()
}
