//! The hook before the kernel's stack on a device of a namespace of the test's own: attached once, moved, taken away, and never
//! in place of another's.

mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use common::Bpffs;
use keelway_maps::{Datapath, Mechanism, XdpMode};

const DEVICE: &str = "out";

fn sh(script: &str) -> String {
    let done = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

fn wanted(modes: &[XdpMode]) -> BTreeMap<String, Vec<XdpMode>> {
    BTreeMap::from([(DEVICE.to_owned(), modes.to_vec())])
}

/// As an agent's start does it: by what, and the link's number.
fn start(bpffs: &Bpffs, modes: &[XdpMode]) -> (Option<(Mechanism, u32)>, Vec<String>) {
    let mut datapath = Datapath::open(bpffs.path()).unwrap();
    datapath.attach_xdp(&wanted(modes)).unwrap();
    let hooks = datapath.hooks();
    assert!(hooks.iter().all(|hook| hook.alive && hook.to == DEVICE), "{hooks:?}");
    (hooks.first().map(|hook| (hook.mechanism, hook.link_id)), datapath.others())
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn it_is_attached_once_moves_goes_and_leaves_anothers_alone() {
    let (ours, theirs) = (Bpffs::new(), Bpffs::new());
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    sh("ip link add out type veth peer name beyond && ip link set out up && ip link set beyond up");
    let shown = || sh("ip -j link show dev out");

    let (generic, problems) = start(&ours, &[XdpMode::Generic]);
    assert!(matches!(generic, Some((Mechanism::XdpGeneric, _))) && problems.is_empty(), "{generic:?} {problems:?}");
    assert_eq!(start(&ours, &[XdpMode::Native, XdpMode::Generic]).0, generic, "what serves stays");
    assert!(shown().contains("xdp"));
    let (native, problems) = start(&ours, &[XdpMode::Native]);
    assert!(matches!(native, Some((Mechanism::XdpNative, _))) && problems.is_empty(), "{native:?} {problems:?}");

    // To this one, what the other holds is somebody else's.
    let (none, problems) = start(&theirs, &[XdpMode::Native, XdpMode::Generic]);
    assert_eq!(none, None);
    let [problem] = &problems[..] else { panic!("{problems:?}") };
    assert!(problem.starts_with("out: no XDP") && problem.contains(r#"program "node_xdp""#), "{problem}");
    assert_eq!(start(&ours, &[XdpMode::Native]).0, native, "it was left alone");

    assert_eq!(start(&ours, &[]), (None, vec![]));
    assert!(!shown().contains("xdp"), "{}", shown());
    assert!(start(&theirs, &[XdpMode::Native]).0.is_some());
    keelway_maps::cleanup(theirs.path()).unwrap();
    // Once the kernel comes to that.
    let waiting = Instant::now();
    while shown().contains("xdp") {
        assert!(waiting.elapsed() < Duration::from_secs(60), "{}", shown());
        std::thread::sleep(Duration::from_millis(10));
    }
    // A driver that cannot: the kernel can for it.
    sh("ip link del out && ip link add out type bridge && ip link set out up");
    let (none, problems) = start(&ours, &[XdpMode::Native]);
    assert!(none.is_none() && problems[0].contains("native: "), "{problems:?}");
    let (generic, problems) = start(&ours, &[XdpMode::Native, XdpMode::Generic]);
    assert!(matches!(generic, Some((Mechanism::XdpGeneric, _))) && problems.is_empty(), "{generic:?} {problems:?}");
}
