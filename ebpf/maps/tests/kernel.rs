//! Against the kernel, as root: every program passes the verifier, pins are checked, generations change over, hooks outlive
//! the process that attached them.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::Bpffs;
use keelway_layout::{Addr, Endpoint, Hook};
use keelway_maps::{Datapath, Error, Table, cleanup};

/// A cgroup of the test's own.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("a cgroup v2 mount");
        let path = Path::new(root.split(' ').nth(1).unwrap()).join(format!("kwmaps-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn a_second_open_finds_what_the_first_wrote_and_switches_the_generation() {
    let bpffs = Bpffs::new();
    let addr = Addr::from("10.0.0.1".parse::<std::net::IpAddr>().unwrap());
    let written = Endpoint { ifindex: 7, id: 9, ..Endpoint::default() };
    {
        let mut first = Datapath::open(bpffs.path()).unwrap();
        first.tables.endpoints.put(&addr, &written).unwrap();
        assert_eq!(first.switch().unwrap(), 1);
    }
    let mut second = Datapath::open(bpffs.path()).unwrap();
    assert_eq!(second.tables.endpoints.get(&addr).unwrap(), Some(written));
    assert_eq!(second.switch().unwrap(), 2);
    assert!(!cleanup(bpffs.path()).unwrap().is_empty());
    assert!(!bpffs.path().join("keelway").exists());
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn socket_hooks_outlive_the_process_and_are_not_attached_twice() {
    let bpffs = Bpffs::new();
    let cgroup = Cgroup::new("sock");
    let ids = || {
        let mut datapath = Datapath::open(bpffs.path()).unwrap();
        datapath.attach_cgroup(&cgroup.0).unwrap();
        let hooks = datapath.hooks();
        assert_eq!(hooks.len(), 10);
        assert!(hooks.iter().all(|hook| hook.alive));
        hooks.iter().map(|hook| (hook.hook, hook.link_id)).collect::<Vec<_>>()
    };
    let first: Vec<(Hook, u32)> = ids();
    assert_eq!(first, ids());
    cleanup(bpffs.path()).unwrap();
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn a_foreign_map_under_our_name_is_named() {
    let bpffs = Bpffs::new();
    let folder = bpffs.path().join("keelway/v1");
    std::fs::create_dir_all(&folder).unwrap();
    let pin = folder.join(keelway_layout::maps::BACKENDS);
    let made = Command::new("bpftool")
        .args([
            "map",
            "create",
            pin.to_str().unwrap(),
            "type",
            "hash",
            "key",
            "4",
            "value",
            "3",
            "entries",
            "5",
            "name",
            "x",
        ])
        .status()
        .expect("bpftool runs: `hack/setup lab` installs it");
    assert!(made.success());
    match Datapath::open(bpffs.path()) {
        Err(Error::ForeignMap { path, what, found, .. }) => {
            assert_eq!((path, what, found.as_str()), (pin, "its value size", "3"));
        }
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("it was accepted"),
    }
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn a_folder_that_is_no_bpffs_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = Datapath::open(dir.path()).err().expect("an error");
    assert!(matches!(error, Error::NotBpffs { .. }), "{error}");
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn a_newer_layout_is_left_alone() {
    let bpffs = Bpffs::new();
    std::fs::create_dir_all(bpffs.path().join("keelway/v99")).unwrap();
    let error = Datapath::open(bpffs.path()).err().expect("an error");
    assert!(matches!(error, Error::NewerLayout { found: 99, .. }), "{error}");
}

/// Runs `work` in a thread for which the system call bpf(2) fails with `errno`.
#[cfg(target_arch = "x86_64")]
fn with_bpf_failing<T: Send>(errno: i32, work: impl FnOnce() -> T + Send) -> T {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};
    let op = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    let filter = [
        op(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
        op(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, libc::SYS_bpf as u32),
        op(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        op(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let confined = || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: the filter is read, for its length, before the call returns; it holds for this thread alone, which ends soon.
        let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        work()
    };
    std::thread::scope(|scope| scope.spawn(confined).join().unwrap())
}

#[test]
#[cfg(target_arch = "x86_64")]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn a_kernel_without_bpf_and_a_process_that_may_not_are_told_apart() {
    let bpffs = Bpffs::new();
    let opened = |errno| with_bpf_failing(errno, || Datapath::open(bpffs.path()).err().unwrap());
    let missing = opened(libc::ENOSYS);
    assert!(matches!(&missing, Error::NoFeature { option: "CONFIG_BPF_SYSCALL", .. }), "{missing}");
    assert!(missing.to_string().contains("does not have the bpf system call"), "{missing}");
    let forbidden = opened(libc::EPERM);
    assert!(matches!(&forbidden, Error::NotPermitted), "{forbidden}");
    assert!(!bpffs.path().join("keelway").exists(), "nothing was begun");
}
