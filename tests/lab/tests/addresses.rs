//! The node's own addresses: on which of them node ports answer, when they come and go, and when one of them is a backend's.
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use keelway_lab::probe::Asked;
use keelway_lab::services::Backend;
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::standalone::{self, Standalone};
use serde_json::json;

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const PORT: u16 = 30_080;
/// An address is noticed at once; this is what a busy machine takes to ask. The agent itself looks twice a minute.
const AT_ONCE: Duration = Duration::from_secs(12);

fn start(nodes: u8, args: &[&str]) -> Option<Standalone> {
    if let Some(reason) = standalone::missing() {
        println!("skipped: {reason}");
        return None;
    }
    Some(Standalone::new(nodes, args).unwrap())
}

/// Asks once, in vain perhaps.
fn knock(s: &Standalone, address: IpAddr) -> Asked {
    outside(s, address, &["--timeout", "300"])
}

fn outside(s: &Standalone, address: IpAddr, more: &[&str]) -> Asked {
    let (probe, target) = (sh::own("keelway-probe").unwrap().display().to_string(), SocketAddr::new(address, PORT));
    let target = target.to_string();
    let text = s.lab.outside.run(&[&[probe.as_str(), "ask", &target], more].concat()).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn node_port() -> serde_json::Value {
    json!({"type": "NodePort", "clusterIP": VIPS[0], "clusterIPs": VIPS,
        "ports": [{"protocol": "TCP", "port": 80, "nodePort": PORT, "targetPort": 8080}]})
}

/// Asks until it is answered or not, as wanted; answers how long that took.
#[track_caller]
fn becomes(s: &Standalone, address: IpAddr, answered: bool, patience: Duration) -> Duration {
    let begun = Instant::now();
    loop {
        let asked = knock(s, address);
        if (asked.answered() == 1) == answered {
            return begun.elapsed();
        }
        assert!(
            begun.elapsed() < patience,
            "{address} answered: not {answered} after {:?}: {asked:?}",
            begun.elapsed()
        );
    }
}

#[test]
fn node_ports_answer_where_they_are_wanted_and_follow_the_nodes_addresses() {
    // Of IPv6 nothing is said: all of it.
    let Some(s) = start(1, &["--nodeport-addresses", "192.168.77.0/24,10.99.0.0/16"]) else { return };
    let (node, b) = (s.node(1), s.pod(1, "b", &[]).unwrap());
    s.put_service("np", &node_port(), &json!({}), &[Backend::pod(&s, &b)]).unwrap();
    for own in [node.v4.into(), node.v6.into()] {
        becomes(&s, own, true, SOON);
    }
    let addresses = ["10.99.0.5", "fd00:99::5", "10.98.0.5"].map(|text| text.parse::<IpAddr>().unwrap());
    let change = |verb: &str, address: &IpAddr| {
        let prefix = format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 });
        let flags: &[&str] = if address.is_ipv6() && verb == "add" { &["nodad"] } else { &[] };
        node.run(&[&["ip", "addr", verb, &prefix, "dev", "eth0"], flags].concat()).unwrap();
    };
    for address in &addresses {
        // Whoever has it, the node is the way there.
        let gateway: IpAddr = if address.is_ipv4() { node.v4.into() } else { node.v6.into() };
        s.lab.outside.run(&["ip", "route", "add", &address.to_string(), "via", &gateway.to_string()]).unwrap();
        assert_eq!(knock(&s, *address).answered(), 0, "nobody has it yet");
    }
    for round in 0..2 {
        for address in &addresses[..2] {
            change("add", address);
            let took = becomes(&s, *address, true, AT_ONCE);
            println!("round {round}: {address} came, and answered after {took:?}");
        }
        for address in &addresses[..2] {
            change("del", address);
            let took = becomes(&s, *address, false, AT_ONCE);
            println!("round {round}: {address} left, and was silent after {took:?}");
        }
    }
    // Not among those that are wanted: the node's own stack has it, and nothing listens there.
    change("add", &addresses[2]);
    wait_for("the node to answer for itself", SOON, || {
        let asked = knock(&s, addresses[2]);
        anyhow::ensure!(asked.failures.contains_key("refused"), "{asked:?}");
        Ok(())
    })
    .unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(knock(&s, addresses[2]).failures.get("refused"), Some(&1));
}

#[test]
fn a_backend_on_any_address_of_the_node_serves() {
    let Some(s) = start(2, &[]) else { return };
    let node = s.node(1);
    let (a, c) = (s.pod(1, "a", &[]).unwrap(), s.pod(2, "c", &[]).unwrap());
    // As a container runtime's bridge has them.
    let backend = Backend {
        addresses: ["172.31.7.1".parse().unwrap(), "fd00:31:7::1".parse().unwrap()],
        node: node.name.clone(),
        conditions: json!({"ready": true}),
        port: 8090,
    };
    node.run(&["ip", "link", "add", "runtime0", "type", "bridge"]).unwrap();
    node.run(&["ip", "link", "set", "runtime0", "up"]).unwrap();
    node.run(&["ip", "addr", "add", "172.31.7.1/24", "dev", "runtime0"]).unwrap();
    node.run(&["ip", "addr", "add", "fd00:31:7::1/64", "dev", "runtime0", "nodad"]).unwrap();
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let _server = node.spawn("server", &[&probe, "serve", "--port", "8090", "--name", "bridge"]).unwrap();
    s.put_service("np", &node_port(), &json!({}), &[backend]).unwrap();
    for v6 in [false, true] {
        let own: IpAddr = if v6 { node.v6.into() } else { node.v4.into() };
        becomes(&s, own, true, SOON);
        let node_port = SocketAddr::new(own, PORT).to_string();
        let cluster_ip = SocketAddr::new(VIPS[usize::from(v6)].parse().unwrap(), 80).to_string();
        let reports = [
            ("outside", outside(&s, own, &["--count", "10"])),
            ("a pod here", s.probe(&a, &["ask", &cluster_ip, "--count", "10"]).unwrap()),
            ("its packets", s.probe_past_sockets(&a, &["ask", &cluster_ip, "--count", "10"]).unwrap()),
            ("the host", s.probe_on_node(1, &["ask", &cluster_ip, "--count", "10"]).unwrap()),
            ("a pod elsewhere", s.probe(&c, &["ask", &node_port, "--count", "10"]).unwrap()),
            ("another node", s.probe_on_node(2, &["ask", &node_port, "--count", "10"]).unwrap()),
        ];
        for (from, report) in reports {
            let drops = || s.status(1).map(|status| status["drops"].to_string()).unwrap_or_default();
            assert_eq!(report.answers.get("bridge"), Some(&10), "{from} v6 {v6}: {report:?}\n{}", drops());
            assert_eq!(report.wrong_source, 0, "{from} v6 {v6}: {report:?}");
        }
    }
}
