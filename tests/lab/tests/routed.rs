//! `--routing routed`: pods of two nodes reach each other by plain routes, and everything else holds as with the tunnel.
mod wire;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use keelway_lab::probe::Asked;
use keelway_lab::sh::SOON;
use keelway_lab::standalone::{self, Pod, Standalone};

use wire::{Fate, PORT, Place};

const VIPS: [&str; 2] = ["10.96.0.40", "fd00:10:96::40"];
const ISOLATE_C: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-a, namespace: default}
spec:
  podSelector: {matchLabels: {app: c}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: a}}}]
    ports: [{protocol: TCP, port: 8080}]
";

fn at(address: IpAddr, port: u16) -> String {
    SocketAddr::new(address, port).to_string()
}

fn ask(s: &Standalone, from: &Pod, target: &str, udp: bool) -> Asked {
    let transport: &[&str] = if udp { &["--udp"] } else { &[] };
    s.probe(from, &[&["ask", target, "--count", "5"], transport].concat()).unwrap()
}

/// The same where there may be no answer: without the patience of the others.
fn knock(s: &Standalone, from: &Pod, target: &str, udp: bool) -> Asked {
    let transport: &[&str] = if udp { &["--udp"] } else { &[] };
    s.probe(from, &[&["ask", target, "--count", "5", "--timeout", "300"], transport].concat()).unwrap()
}

#[track_caller]
fn eventually(what: &str, limit: Duration, check: impl Fn() -> Result<(), String>) {
    keelway_lab::sh::wait_for(what, limit, || check().map_err(anyhow::Error::msg)).unwrap();
}

#[test]
fn pods_services_and_policies_work_by_plain_routes_and_lies_are_dropped() {
    if let Some(reason) = standalone::missing() {
        println!("skipped: {reason}");
        return;
    }
    let s = Standalone::new(2, &["--routing", "routed"]).unwrap();
    let a = s.pod(1, "a", &[("app", "a")]).unwrap();
    let b = s.pod(1, "b", &[("app", "b")]).unwrap();
    let c = s.pod(2, "c", &[("app", "c")]).unwrap();
    s.service("both", VIPS, "TCP", 80, &[&b, &c]).unwrap();
    let links = s.node(1).run(&["ip", "-o", "link"]).unwrap();
    assert!(!links.contains("vxlan"), "{links}");
    let [in_a, in_c] = [&a, &c].map(|pod| Place::pod(&s, pod));
    in_c.serve();

    for v6 in [false, true] {
        // Each way, under the pod's own address, and no tunnel takes of the packets' size.
        for (from, to) in [(&a, &c), (&c, &a), (&a, &b)] {
            for udp in [false, true] {
                let report = ask(&s, from, &at(to.address(v6), 8080), udp);
                assert_eq!(report.answers.get(&to.name), Some(&5), "{report:?}");
                let own = from.address(v6).to_string();
                assert_eq!(report.seen_as.keys().collect::<Vec<_>>(), [&own], "{report:?}");
            }
        }
        let target = SocketAddr::new(c.address(v6), PORT);
        assert_eq!(in_a.send(target, 1500), Fate::Answered);
        assert_eq!(in_a.send(target, 1501), Fate::TooBig(1500));
        assert_eq!(in_a.stream(target, 16 << 20).0, 16 << 20);
        // A Service, by socket hooks and packet by packet, with backends on both nodes.
        let vip = at(VIPS[usize::from(v6)].parse().unwrap(), 80);
        eventually("the Service on both nodes", SOON, || {
            let reports = [knock(&s, &a, &vip, false), knock(&s, &c, &vip, false)];
            if reports.iter().all(|report| report.answered() == 5) { Ok(()) } else { Err(format!("{reports:?}")) }
        });
        let many = ["ask", &vip, "--count", "60"];
        for report in [s.probe::<Asked>(&a, &many).unwrap(), s.probe_past_sockets(&a, &many).unwrap()] {
            assert_eq!(report.answered(), 60, "{report:?}");
            assert_eq!(report.answers.keys().collect::<Vec<_>>(), ["b", "c"], "{report:?}");
            assert_eq!(report.seen_as.keys().collect::<Vec<_>>(), [&a.address(v6).to_string()], "{report:?}");
        }
        // The host of one node to a pod of the other.
        let report: Asked = s.probe_on_node(1, &["ask", &at(c.address(v6), 8080), "--count", "3"]).unwrap();
        assert_eq!(report.answered(), 3, "{report:?}");
    }

    // A policy on the other node knows who asks.
    s.write("policy", ISOLATE_C).unwrap();
    for v6 in [false, true] {
        let target = at(c.address(v6), 8080);
        eventually("the policy to hold", SOON, || {
            let (from_a, from_b, by_udp) =
                (knock(&s, &a, &target, false), knock(&s, &b, &target, false), knock(&s, &a, &target, true));
            let holds = from_a.answered() == 5 && from_b.answered() == 0 && by_udp.answered() == 0;
            if holds { Ok(()) } else { Err(format!("{from_a:?} {from_b:?} {by_udp:?}")) }
        });
    }
    s.remove_file("policy").unwrap();
    for v6 in [false, true] {
        let target = at(c.address(v6), 8080);
        eventually("the policy to be gone", SOON, || {
            let report = knock(&s, &b, &target, false);
            if report.answered() == 5 { Ok(()) } else { Err(format!("{report:?}")) }
        });
    }

    lies(&s, [&a, &c], [&in_a, &in_c]);
}

/// Sources that are not the sender's, from a machine on the nodes' network and from a pod.
fn lies(s: &Standalone, [a, c]: [&Pod; 2], [in_a, in_c]: [&Place; 2]) {
    let outside = Place::host(&s.lab.outside);
    let heard = in_c.listen();
    let arrives = || heard.recv_timeout(SOON).ok();
    let next = || heard.recv_timeout(Duration::from_millis(500)).ok();
    for v6 in [false, true] {
        let to = c.address(v6);
        let (node, own): (IpAddr, IpAddr) = if v6 {
            (s.node(2).v6.into(), s.lab.outside.v6.into())
        } else {
            (s.node(2).v4.into(), s.lab.outside.v4.into())
        };
        let bits = if v6 { 128 } else { 32 };
        outside.ip(&format!("route replace {to}/{bits} via {node}"));
        outside.whisper(own, to);
        assert_eq!(arrives(), Some(own), "what is true arrives");
        // As if from a pod of the node that receives it.
        let neighbour = s.pod(2, if v6 { "d6" } else { "d4" }, &[]).unwrap().address(v6);
        let nodad = if v6 { "nodad" } else { "" };
        outside.ip(&format!("addr add {neighbour}/{bits} dev lo {nodad}"));
        outside.whisper(neighbour, to);
        assert_eq!(next(), None, "from outside, with the source of a pod of this node");
        // A pod with an address that is not its own.
        let [pods, nobodys] = if v6 { ["fd00:10:244:1::fe", "2001:db8::1"] } else { ["10.244.1.254", "198.51.100.7"] };
        in_a.whisper(a.address(v6), to);
        assert_eq!(arrives(), Some(a.address(v6)), "what is true arrives");
        for lie in [pods, nobodys] {
            in_a.ip(&format!("addr add {lie}/{bits} dev eth0 {nodad}"));
            in_a.whisper(lie.parse().unwrap(), to);
            assert_eq!(next(), None, "from a pod, with the source {lie}");
        }
        in_a.whisper(a.address(v6), to);
        assert_eq!(arrives(), Some(a.address(v6)), "the truth still arrives");
    }
}
