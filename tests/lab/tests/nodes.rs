//! The lab itself: machines that see each other, keep what a disk keeps, and leave nothing behind.
use std::fs;
use std::path::Path;

use keelway_lab::sh::{SOON, run, wait_for};
use keelway_lab::{Lab, cgroup, clean};

fn traces(id: &str) -> Vec<String> {
    let mut found = Vec::new();
    let namespaces = run(&["ip", "netns", "list"]).unwrap();
    found.extend(namespaces.lines().filter(|line| line.contains(&format!("kw-{id}-"))).map(str::to_owned));
    for hierarchy in cgroup::hierarchies().unwrap() {
        let group = hierarchy.mount.join(cgroup::TOP).join(id);
        found.extend(group.exists().then(|| group.display().to_string()));
    }
    let dir = clean::base().join(id);
    found.extend(dir.exists().then(|| dir.display().to_string()));
    let loops = run(&["losetup", "--list", "--noheadings"]).unwrap();
    found.extend(loops.lines().filter(|line| line.contains(&format!("lab-{id}"))).map(str::to_owned));
    found
}

#[test]
fn machines_reach_each_other_in_both_families_until_cut() {
    let lab = Lab::new(2).unwrap();
    let (one, two) = (lab.node(1), lab.node(2));
    for (from, to) in [
        (&lab.outside, two.v4.to_string()),
        (one, two.v6.to_string()),
        (one, "203.0.113.10".to_owned()),
        (one, "2001:db8:113::10".to_owned()),
    ] {
        from.run(&["busybox", "ping", "-c1", "-W10", &to]).unwrap();
    }
    two.cut().unwrap();
    assert!(
        !one.exec(&["busybox", "ping", "-c1", "-W1", &two.v4.to_string()]).unwrap().status.success(),
        "a cut node answered"
    );
    two.heal().unwrap();
    // The kernel takes up to a second to notice a cable, and what is sent until then is lost.
    let answers = || one.run(&["busybox", "ping", "-c1", "-W5", &two.v4.to_string()]);
    wait_for("the cable", SOON, answers).unwrap();
}

#[test]
fn a_node_has_its_own_name_processes_devices_bpffs_and_cgroup() {
    let lab = Lab::new(1).unwrap();
    let node = lab.node(1);
    assert_eq!(node.run(&["uname", "-n"]).unwrap().trim(), "node1");
    assert_eq!(node.run(&["cat", "/proc/1/comm"]).unwrap().trim(), "keelway-lab");
    let devices = node.run(&["ls", "/sys/class/net"]).unwrap();
    assert!(devices.contains("eth0") && devices.split_whitespace().count() <= 4, "{devices}");
    assert_eq!(node.run(&["stat", "-f", "-c%T", "/sys/fs/bpf"]).unwrap().trim(), "bpf_fs");
    node.run(&["mkdir", "/sys/fs/bpf/mine"]).unwrap();
    assert!(!Path::new("/sys/fs/bpf/mine").exists());
    // The node's own group looks like the root of the tree, and the process is in it.
    let groups = node.run(&["cat", "/proc/self/cgroup"]).unwrap();
    assert!(groups.lines().all(|line| line.ends_with(":/system")), "{groups}");
    let mut sleeper = node.spawn("sleep", &["sleep", "1000"]).unwrap();
    let procs = fs::read_to_string(node.cgroup_v2().unwrap().join("system/cgroup.procs")).unwrap();
    assert!(procs.lines().any(|pid| pid == sleeper.pid().to_string()), "{procs}");
    assert!(node.run(&["pgrep", "-x", "sleep"]).is_ok());
    assert_eq!(sleeper.stop(nix::sys::signal::Signal::SIGKILL).unwrap().code(), Some(137));
    assert!(node.run(&["pgrep", "-x", "sleep"]).is_err());
}

#[test]
fn a_power_cut_keeps_the_disk_and_forgets_the_rest() {
    let lab = Lab::new(1).unwrap();
    let node = lab.node(1);
    let on_disk = ["/var/lib/keelway/lease", "/etc/cni/net.d/05-x.conflist", "/opt/cni/bin/x", "/var/lib/kubelet/x"];
    let in_memory = ["/run/keelway/x", "/run/netns/x"];
    for file in on_disk.iter().chain(&in_memory) {
        node.run(&["touch", file]).unwrap();
    }
    node.run(&["mkdir", "/sys/fs/bpf/x"]).unwrap();
    node.run(&["ip", "link", "add", "left", "type", "veth", "peer", "name", "right"]).unwrap();
    let mut process = node.spawn("sleep", &["sleep", "1000"]).unwrap();
    node.kill_node().unwrap();
    process.wait(SOON).unwrap();
    assert!(lab.outside.run(&["busybox", "ping", "-c1", "-W1", &node.v4.to_string()]).is_err(), "a dead node answered");
    node.boot_node().unwrap();
    for file in on_disk {
        node.run(&["test", "-e", file]).unwrap();
        assert!(!Path::new(file).exists(), "{file} is on the machine itself");
    }
    for file in in_memory.iter().chain(&["/sys/fs/bpf/x", "/sys/class/net/left"]) {
        assert!(node.run(&["test", "-e", file]).is_err(), "{file} survived");
    }
    let answers = || lab.outside.run(&["busybox", "ping", "-c1", "-W2", &node.v4.to_string()]);
    wait_for("the node to answer", SOON, answers).unwrap();
}

/// Whoever tests volumes at the same time finds them unmounted when he has unmounted them.
#[test]
fn a_node_holds_no_disk_of_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("disk").display().to_string(), dir.path().join("at").display().to_string());
    fs::create_dir(&at).unwrap();
    for argv in
        [&["truncate", "-s", "16M", &image][..], &["mkfs.ext4", "-q", &image], &["mount", "-o", "loop", &image, &at]]
    {
        run(argv).unwrap();
    }
    let lab = Lab::new(1);
    run(&["umount", &at]).unwrap();
    let lab = lab.unwrap();
    lab.node(1).run(&["true"]).unwrap();
    wait_for("the loop device to be let go", SOON, || {
        let loops = run(&["losetup", "--list", "--noheadings"])?;
        anyhow::ensure!(!loops.contains(&image), "{loops}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn nothing_is_left_after_a_panic() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let panicked = std::thread::spawn(move || {
        let lab = Lab::new(1).unwrap();
        let node = lab.node(1);
        let image = format!("/var/lib/keelway/lab-{}.img", lab.id);
        node.run(&["truncate", "-s", "16M", &image]).unwrap();
        node.run(&["losetup", "--find", &image]).unwrap();
        node.spawn("sleep", &["sleep", "1000"]).unwrap().keep();
        assert!(traces(&lab.id).len() > 4, "{:?}", traces(&lab.id));
        sender.send(lab.id.clone()).unwrap();
        panic!("on purpose");
    });
    assert!(panicked.join().is_err());
    let id = receiver.recv().unwrap();
    assert_eq!(traces(&id), Vec::<String>::new());
}

#[test]
fn nothing_is_left_after_the_owner_was_killed() {
    // `keelway-lab lab` owns a lab and is killed without a chance to clean up.
    let mut owner = std::process::Command::new(env!("CARGO_BIN_EXE_keelway-lab"))
        .args(["lab", "1", "--bare", "--id", "killed"])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid1 = clean::base().join("killed/node1/pid1");
    wait_for("the lab", SOON, || Ok(fs::read(&pid1)?)).unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    wait_for("the guard", SOON, || {
        let left = traces("killed");
        anyhow::ensure!(left.is_empty(), "left: {left:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn clean_removes_what_is_left_when_the_guard_was_killed_too() {
    let quiet = std::process::Stdio::null;
    let mut owner = std::process::Command::new(env!("CARGO_BIN_EXE_keelway-lab"))
        .args(["lab", "1", "--bare", "--id", "gkilled"])
        .stdin(quiet())
        .stdout(quiet())
        .spawn()
        .unwrap();
    let dir = clean::base().join("gkilled");
    wait_for("the lab", SOON, || Ok(fs::read(dir.join("node1/pid1"))?)).unwrap();
    let kept = Lab::new(0).unwrap();
    let guard: i32 = fs::read_to_string(dir.join("guard")).unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(guard), nix::sys::signal::Signal::SIGKILL).unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert!(traces("gkilled").len() > 2, "{:?}", traces("gkilled"));
    // As `keelway-lab clean` does, but for this lab only: other labs of this machine are not this test's.
    let left = clean::leftovers(false).unwrap();
    assert!(left.contains(&"gkilled".to_owned()) && !left.contains(&kept.id), "{left:?}");
    clean::remove("gkilled").unwrap();
    assert_eq!(traces("gkilled"), Vec::<String>::new());
    // Once more is no error.
    clean::remove("gkilled").unwrap();
}
