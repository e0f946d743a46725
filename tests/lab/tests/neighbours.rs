//! A node on which somebody else does the same work: each is named, and refused where both cannot be.
use std::collections::BTreeSet;
use std::fs::File;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use aya::programs::links::CgroupAttachMode;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{CgroupSockAddr, LinkOrder, SchedClassifier, TcAttachType};
use keelway_lab::Node;
use keelway_lab::cluster::{Cluster, programs};
use keelway_lab::probe::Asked;
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::standalone::Standalone;
use keelway_lab::standalone_or_skip;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

/// Longer than the agent takes between two looks around.
const LOOK: Duration = Duration::from_secs(90);

/// Waits until `keelway status` of node 1 shows a problem with all these words.
fn named(s: &Standalone, words: &[&str]) -> Result<String> {
    wait_for(&format!("a problem with {words:?}"), LOOK, || {
        let status = s.status(1)?;
        let problems = status["problems"].as_array().context("problems")?.iter().filter_map(|problem| problem.as_str());
        let mut all = problems.clone().filter(|problem| words.iter().all(|word| problem.contains(word)));
        all.next().map(ToOwned::to_owned).with_context(|| format!("{:?}", problems.collect::<Vec<_>>()))
    })
}

/// What an unsuccessful start of another agent says.
fn refused(node: &Node, argv: &[&str], words: &[&str]) {
    let output = node.exec(&[&["timeout", "120"], argv].concat()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!matches!(output.status.code(), Some(0 | 124)), "{argv:?} was accepted: {said}");
    for word in words {
        assert!(said.contains(word), "{argv:?}: {word:?} is not in {said:?}");
    }
}

/// A relocatable BPF object (ELF-64, little endian) of programs that return a number: (section, function, number).
fn object(programs: &[(&str, &str, i32)]) -> Vec<u8> {
    let (mut strings, mut name) = (vec![0_u8], Vec::new());
    let mut string = |text: &str| {
        let at = strings.len() as u32;
        strings.extend(text.bytes());
        strings.push(0);
        at
    };
    for (section, function, _) in programs {
        name.push((string(section), string(function)));
    }
    let (strtab, symtab) = (string(".strtab"), string(".symtab"));
    let mut body = Vec::new();
    // Null, then name, type, flags, offset, size, link, info, alignment, entry size.
    let mut sections = vec![[0_u64; 9]];
    let mut symbols = vec![0_u8; 24];
    for (index, (_, _, number)) in programs.iter().enumerate() {
        let offset = 64 + body.len() as u64;
        // r0 = number; exit
        body.extend([0xb7, 0, 0, 0]);
        body.extend(number.to_le_bytes());
        body.extend([0x95, 0, 0, 0, 0, 0, 0, 0]);
        sections.push([name[index].0.into(), 1, 6, offset, 16, 0, 0, 8, 0]);
        symbols.extend(name[index].1.to_le_bytes());
        // A global function of that section, at its start.
        symbols.extend([0x12, 0, index as u8 + 1, 0]);
        symbols.extend([0; 8]);
        symbols.extend(16_u64.to_le_bytes());
    }
    let at = 64 + body.len() as u64;
    sections.push([strtab.into(), 3, 0, at, strings.len() as u64, 0, 0, 1, 0]);
    let table = sections.len() as u64 - 1;
    body.extend(&strings);
    body.resize(body.len().next_multiple_of(8), 0);
    sections.push([symtab.into(), 2, 0, 64 + body.len() as u64, symbols.len() as u64, table, 1, 8, 24]);
    body.extend(symbols);
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [1_u16, 247] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for word in [0, 0, 64 + body.len() as u64] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64, 0, 0, 64, sections.len() as u16, table as u16] {
        file.extend(half.to_le_bytes());
    }
    file.extend(body);
    for [name, kind, flags, offset, size, link, info, align, entry] in sections {
        for (value, wide) in [(name, false), (kind, false), (flags, true), (0, true), (offset, true), (size, true)] {
            file.extend(&value.to_le_bytes()[..if wide { 8 } else { 4 }]);
        }
        for (value, wide) in [(link, false), (info, false), (align, true), (entry, true)] {
            file.extend(&value.to_le_bytes()[..if wide { 8 } else { 4 }]);
        }
    }
    file
}

/// Somebody's programs on a device of the node and on its cgroup; they stay until this is dropped.
fn stranger(node: &Node, device: &str, order: fn() -> LinkOrder) -> Ebpf {
    let (netns, cgroup, device) = (node.netns(), node.cgroup_v2().unwrap(), device.to_owned());
    std::thread::spawn(move || {
        setns(File::open(netns).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        let programs = [("classifier", "stranger", -1), ("cgroup/connect4", "stranger4", 1)];
        let mut loaded = Ebpf::load(&object(&programs)).unwrap();
        let program: &mut SchedClassifier = loaded.program_mut("stranger").unwrap().try_into().unwrap();
        program.load().unwrap();
        program.attach_with_options(&device, TcAttachType::Ingress, TcAttachOptions::TcxOrder(order())).unwrap();
        let program: &mut CgroupSockAddr = loaded.program_mut("stranger4").unwrap().try_into().unwrap();
        program.load().unwrap();
        program.attach(File::open(cgroup).unwrap(), CgroupAttachMode::Single).unwrap();
        loaded
    })
    .join()
    .unwrap()
}

#[test]
fn programs_of_others_are_named_with_number_and_order() {
    let s = standalone_or_skip!(1);
    let (a, b) = (s.pod(1, "a", &[]).unwrap(), s.pod(1, "b", &[]).unwrap());
    assert_eq!(s.status(1).unwrap()["problems"], serde_json::json!([]));
    let links = s.node(1).run(&["ls", "/sys/class/net"]).unwrap();
    let veth = links.split_whitespace().find(|name| name.starts_with("kw")).unwrap().to_owned();
    for (device, order, when) in [
        ("eth0", LinkOrder::first as fn() -> LinkOrder, "runs before ours"),
        ("eth0", LinkOrder::last, "runs after ours"),
        // A pod's device has ours as a filter, and those come after every tcx program.
        (veth.as_str(), LinkOrder::last, "runs before ours"),
    ] {
        let programs = stranger(s.node(1), device, order);
        let id = programs.program("stranger").unwrap().info().unwrap().id();
        named(&s, &[device, "tcx ingress", "\"stranger\"", &format!("(id {id})"), "is another's", when]).unwrap();
        named(&s, &["connect4", "\"stranger4\"", "is another's and runs after ours"]).unwrap();
        // Both can be: traffic goes on, and a start does not mind.
        let target = std::net::SocketAddr::from((b.address(false), 8080)).to_string();
        let asked: Asked = s.probe(&a, &["ask", &target, "--count", "5"]).unwrap();
        assert_eq!(asked.answered(), 5, "{asked:?}");
        s.stop_agent(1, Signal::SIGKILL).unwrap();
        s.start_agent(1).unwrap();
        s.wait_synced(1).unwrap();
        drop(programs);
        assert_eq!(s.status(1).unwrap()["problems"], serde_json::json!([]));
    }
}

#[test]
fn another_plugins_configuration_is_named_and_not_overwritten() {
    let s = standalone_or_skip!(1);
    let node = s.node(1);
    let agent = sh::own("keelway-agent").unwrap().display().to_string();
    let cni = sh::own("keelway-cni").unwrap().display().to_string();
    let install = [agent.as_str(), "install-cni", "--from", &cni];
    let write = |name: &str, text: &str| {
        let path = format!("/etc/cni/net.d/{name}");
        node.run(&["busybox", "sh", "-c", &format!("printf '%s' '{text}' >{path}")]).unwrap();
    };
    let bridge = r#"{"cniVersion": "1.0.0", "name": "theirs", "plugins": [{"type": "bridge"}]}"#;
    write("00-theirs.conflist", bridge);
    s.stop_agent(1, Signal::SIGTERM).unwrap();
    s.start_agent(1).unwrap();
    named(&s, &["/etc/cni/net.d", "00-theirs.conflist", "\"theirs\"", "sorts before 05-keelway.conflist"]).unwrap();
    refused(node, &install, &["/etc/cni/net.d", "00-theirs.conflist", "\"theirs\"", "--allow-foreign-cni"]);
    node.run(&["rm", "/etc/cni/net.d/00-theirs.conflist"]).unwrap();
    // The file of our name.
    write("05-keelway.conflist", bridge);
    refused(node, &install, &["05-keelway.conflist", "\"theirs\"", "bridge", "--allow-foreign-cni"]);
    assert_eq!(node.run(&["cat", "/etc/cni/net.d/05-keelway.conflist"]).unwrap(), bridge);
    s.stop_agent(1, Signal::SIGTERM).unwrap();
    s.start_agent(1).unwrap();
    named(&s, &["is in the place of ours: 05-keelway.conflist", "\"theirs\"", "bridge"]).unwrap();
    node.run(&[&install[..], &["--allow-foreign-cni"]].concat()).unwrap();
    node.run(&["grep", "-q", "keelway-cni", "/etc/cni/net.d/05-keelway.conflist"]).unwrap();
}

#[test]
fn a_node_without_bpffs_or_cgroup_v2_is_told_which() {
    let s = standalone_or_skip!(1);
    let node = s.node(1);
    let agent = sh::own("keelway-agent").unwrap().display().to_string();
    s.stop_agent(1, Signal::SIGTERM).unwrap();
    let start = format!("exec {agent} --manifests {} --node-name node1", s.manifests.display());
    let without = |mounts: &str| format!("umount {mounts} && {start}");
    refused(node, &["unshare", "-m", "sh", "-c", &without("/sys/fs/bpf")], &["/sys/fs/bpf", "mount -t bpf bpf"]);
    let text = node.run(&["cat", "/proc/self/mountinfo"]).unwrap();
    let trees = text.lines().filter(|line| line.contains(" - cgroup2 ")).filter_map(|line| line.split(' ').nth(4));
    let trees: BTreeSet<&str> = trees.collect();
    let all = without(&trees.into_iter().collect::<Vec<_>>().join(" "));
    refused(node, &["unshare", "-m", "sh", "-c", &all], &["cgroup-root", "cgroup v2"]);
    s.start_agent(1).unwrap();
    s.wait_synced(1).unwrap();
}

#[test]
fn a_running_kube_proxy_is_named_and_refused_at_its_port() {
    let reason = programs::missing(programs::CLUSTER)
        .or_else(|| sh::missing(&["openssl", "runc", "nft"], &["keelway-probe", "keelway-agent", "keelway"]));
    if let Some(reason) = reason {
        println!("skipped: {reason}");
        return;
    }
    let cluster = Cluster::up("kproxy", 1).unwrap();
    let node = cluster.lab.node(1);
    let config = format!("--kubeconfig={}", cluster.kubeconfig().display());
    let proxy = cluster.bin.join("kube-proxy").display().to_string();
    let mode = ["--proxy-mode=nftables", "--hostname-override=node1", "--conntrack-max-per-core=0"];
    let mut running = node.spawn("kube-proxy", &[&[proxy.as_str(), &config], &mode[..]].concat()).unwrap();
    wait_for("kube-proxy's rules", SOON, || {
        running.check()?;
        let tables = node.run(&["nft", "list", "tables"])?;
        ensure!(tables.contains("kube-proxy"), "{tables}");
        Ok(())
    })
    .unwrap();
    let agent = sh::own("keelway-agent").unwrap().display().to_string();
    let start = [agent.as_str(), &config, "--node-name", "node1"];
    refused(node, &start, &["healthz-addr", ":10256", "kube-proxy", "nftables", "--healthz-addr"]);
    // Beside it, as while changing over: it runs, and says who else does.
    let _agent = node.spawn("agent", &[&start[..], &["--healthz-addr", ":10257"]].concat()).unwrap();
    let keelway = sh::own("keelway").unwrap().display().to_string();
    let problems = || -> Result<String> {
        let output = node.exec(&[&keelway, "status", "-o", "json"])?;
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).with_context(|| sh::words(&output))?;
        Ok(status["problems"].to_string())
    };
    wait_for("kube-proxy to be named", LOOK, || {
        let found = problems()?;
        ensure!(
            found.contains("kube-proxy") && found.contains("nftables") && found.contains("cleanup --kube-proxy"),
            "{found}"
        );
        Ok(())
    })
    .unwrap();
    running.stop(Signal::SIGTERM).unwrap();
    node.run(&[&proxy, "--cleanup"]).unwrap();
    wait_for("kube-proxy to be forgotten", LOOK, || {
        let found = problems()?;
        ensure!(!found.contains("kube-proxy"), "{found}");
        Ok(())
    })
    .unwrap();
    drop(cluster);
    let left = Command::new("ip").args(["netns", "list"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&left.stdout).contains("kproxy"), "{left:?}");
}
