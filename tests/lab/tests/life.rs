//! The life of a node: what comes back after a power cut, what happens while no agent runs, what `cleanup` leaves, and what is
//! said of bad input.
use std::net::SocketAddr;

use keelway_lab::probe::Asked;
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::standalone::{Pod, Standalone};
use keelway_lab::standalone_or_skip;
use nix::sys::signal::Signal;

fn target(pod: &Pod, v6: bool) -> String {
    SocketAddr::from((pod.address(v6), 8080)).to_string()
}

#[track_caller]
fn answered(s: &Standalone, from: &Pod, to: &Pod) {
    for v6 in [false, true] {
        let report: Asked = s.probe(from, &["ask", &target(to, v6), "--count", "3"]).unwrap();
        assert_eq!(report.answers.get(&to.name), Some(&3), "{report:?}");
    }
}

/// Devices, routes and pins of ours on a node.
fn traces(s: &Standalone, number: usize) -> Vec<String> {
    let node = s.node(number);
    let mut found = Vec::new();
    for link in node.run(&["ip", "-o", "link"]).unwrap().lines() {
        found.extend(
            link.split(' ').nth(1).filter(|name| name.starts_with("kw") || name.starts_with("keelway")).map(Into::into),
        );
    }
    for family in ["-4", "-6"] {
        let routes = node.run(&["ip", family, "route", "show", "proto", "75"]).unwrap();
        found.extend(routes.lines().map(ToOwned::to_owned));
    }
    let pins = node.path("/sys/fs/bpf/keelway").unwrap();
    found.extend(pins.exists().then(|| "pins".to_owned()));
    let tables = node.run(&["nft", "list", "tables"]).unwrap();
    found.extend(tables.lines().filter(|table| table.contains("keelway")).map(ToOwned::to_owned));
    found
}

#[test]
fn after_a_power_cut_leases_are_kept_and_pods_come_back() {
    let mut s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[("app", "a")]).unwrap();
    let c = s.pod(2, "c", &[("app", "c")]).unwrap();
    answered(&s, &c, &a);
    let old = a.address(false);
    s.reboot(1).unwrap();
    s.wait_synced(1).unwrap();
    let status = s.status(1).unwrap();
    assert_eq!(status["counts"]["endpoints"], 0, "{status}");
    // The old sandbox is still known to the runtime: its address is not given to another pod.
    let b = s.pod(1, "b", &[("app", "b")]).unwrap();
    assert_ne!(b.address(false), old);
    answered(&s, &c, &b);
    answered(&s, &b, &c);
    // The kubelet would end the dead sandbox and start the pod again.
    let cri = s.cri(1).unwrap();
    for sandbox in cri.list().unwrap() {
        if sandbox != b.sandbox.id {
            cri.remove(&sandbox).unwrap();
        }
    }
    let again = s.pod(1, "a", &[("app", "a")]).unwrap();
    answered(&s, &c, &again);
    let leases = std::fs::read_to_string(s.node(1).path("/var/lib/keelway/leases").unwrap()).unwrap();
    assert!(leases.contains("\"op\":\"del\"") || leases.contains("del"), "{leases}");
    assert_eq!(s.status(1).unwrap()["counts"]["endpoints"], 2);
}

#[test]
fn without_an_agent_pods_go_on_new_ones_wait_and_ended_ones_are_settled_later() {
    let s = standalone_or_skip!(1);
    let a = s.pod(1, "a", &[]).unwrap();
    let b = s.pod(1, "b", &[]).unwrap();
    s.stop_agent(1, Signal::SIGTERM).unwrap();
    answered(&s, &a, &b);
    let error = format!("{:?}", s.pod(1, "late", &[]).unwrap_err());
    assert!(error.contains("agent"), "{error}");
    s.cri(1).unwrap().remove(&b.sandbox.id).unwrap();
    let waiting = s.node(1).path("/var/lib/keelway/cni-del").unwrap();
    assert!(std::fs::read_dir(&waiting).unwrap().count() > 0);
    s.start_agent(1).unwrap();
    s.wait_synced(1).unwrap();
    wait_for("the DEL that waited", SOON, || {
        anyhow::ensure!(std::fs::read_dir(&waiting)?.count() == 0, "it still waits");
        anyhow::ensure!(s.status(1)?["counts"]["endpoints"] == 1, "{}", s.status(1)?);
        Ok(())
    })
    .unwrap();
    let late = s.pod(1, "late", &[]).unwrap();
    answered(&s, &a, &late);
}

#[test]
fn cleanup_leaves_nothing_of_ours_on_the_node() {
    let s = standalone_or_skip!(1);
    let a = s.pod(1, "a", &[]).unwrap();
    let b = s.pod(1, "b", &[]).unwrap();
    answered(&s, &a, &b);
    let agent = sh::own("keelway-agent").unwrap().display().to_string();
    let clean = [agent.as_str(), "cleanup", "--manifests", &s.manifests.display().to_string(), "--node-name", "node1"];
    let refused = s.node(1).exec(&clean).unwrap();
    assert!(!refused.status.success(), "cleanup went ahead beside a running agent");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("another keelway-agent runs"), "{refused:?}");
    s.stop_agent(1, Signal::SIGTERM).unwrap();
    // What keeps a former kube-proxy's connections going is ours too.
    let holding = "for family in ip ip6; do nft add table $family keelway-adopted; \
        nft add chain $family keelway-adopted prerouting '{ type nat hook prerouting priority -100; }'; done";
    s.node(1).run(&["sh", "-c", holding]).unwrap();
    assert!(traces(&s, 1).iter().any(|trace| trace.contains("keelway-adopted")));
    s.node(1).run(&clean).unwrap();
    assert_eq!(traces(&s, 1), Vec::<String>::new());
    // Once more is no error.
    s.node(1).run(&clean).unwrap();
}

#[test]
fn bad_input_is_named_and_nothing_starts() {
    let s = standalone_or_skip!(1);
    let node = s.node(1);
    let agent = sh::own("keelway-agent").unwrap().display().to_string();
    let manifests = s.manifests.display().to_string();
    let refused = |args: &[&str], words: &[&str]| {
        let output = node.exec(&[&[agent.as_str()], args].concat()).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{args:?} was accepted");
        for word in words {
            assert!(said.contains(word), "{args:?}: {word:?} is not in {said:?}");
        }
    };
    let base = ["--manifests", manifests.as_str(), "--node-name", "node1"];
    // While the first agent runs, a second one is refused before it touches anything.
    refused(&base, &["another keelway-agent runs"]);
    s.stop_agent(1, Signal::SIGTERM).unwrap();
    refused(&[&base[..], &["--bpffs", "/tmp"]].concat(), &["/tmp", "bpf"]);
    refused(&[&base[..], &["--routing", "ipip"]].concat(), &["routing", "ipip", "vxlan"]);
    let config = s.lab.dir.join("agent.yaml");
    std::fs::write(&config, "snat-prots: 1-2\n").unwrap();
    refused(&[&base[..], &["--config", &config.display().to_string()]].concat(), &["snat-prots"]);
    std::fs::write(s.manifests.join("broken.yaml"), "kind: Service\nmetadata: {name: [}\n").unwrap();
    refused(&base, &["broken.yaml"]);
    std::fs::remove_file(s.manifests.join("broken.yaml")).unwrap();
    // Somebody else's map under our name.
    node.run(&["rm", "/sys/fs/bpf/keelway/v1/kw_backends"]).unwrap();
    let bpftool = sh::system("bpftool").unwrap().display().to_string();
    let pin = "/sys/fs/bpf/keelway/v1/kw_backends";
    let create = ["map", "create", pin, "type", "hash", "key", "4", "value", "8", "entries", "4", "name", "other"];
    node.run(&[&[bpftool.as_str()], &create[..]].concat()).unwrap();
    refused(&base, &["kw_backends", "value size", "8"]);
    node.run(&["rm", pin]).unwrap();
}
