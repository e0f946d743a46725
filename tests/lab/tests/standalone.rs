//! Keelway on two nodes without Kubernetes: every assertion is about what pods and processes saw.
use std::collections::BTreeMap;
use std::net::SocketAddr;

use keelway_lab::probe::Asked;
use keelway_lab::standalone::{self, Pod, Standalone};

fn target(pod: &Pod, v6: bool) -> String {
    SocketAddr::from((pod.address(v6), 8080)).to_string()
}

fn vip(v6: bool, port: u16) -> String {
    if v6 { format!("[fd00:10:96::10]:{port}") } else { format!("10.96.0.10:{port}") }
}

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

fn all_answered(report: &Asked, by: &[&str]) {
    assert!(report.failures.is_empty(), "{report:?}");
    assert_eq!(report.answered(), report.tried, "{report:?}");
    let names: Vec<&str> = report.answers.keys().map(String::as_str).collect();
    assert_eq!(names, by, "{report:?}");
}

fn none_answered(report: &Asked) {
    assert_eq!(report.answers, BTreeMap::new(), "{report:?}");
}

#[test]
fn pods_reach_each_other_services_and_the_outside() {
    if let Some(reason) = standalone::missing() {
        println!("skipped: {reason}");
        return;
    }
    let s = Standalone::new(2, &[]).unwrap();
    let a = s.pod(1, "a", &[("app", "a")]).unwrap();
    let b = s.pod(1, "b", &[("app", "b")]).unwrap();
    let c = s.pod(2, "c", &[("app", "c")]).unwrap();
    s.service("both", VIPS, "TCP", 80, &[&b, &c]).unwrap();
    s.service("udp", ["10.96.0.11", "fd00:10:96::11"], "UDP", 53, &[&b, &c]).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1));
    for v6 in [false, true] {
        for udp in [&[][..], &["--udp"], &["--udp", "--unconnected"]] {
            // Same node, other node.
            for (from, to) in [(&a, &b), (&a, &c), (&c, &a)] {
                let at = target(to, v6);
                let report: Asked = s.probe(from, &[&["ask", &at, "--count", "5"], udp].concat()).unwrap();
                all_answered(&report, &[&to.name]);
                assert_eq!(report.seen_as.len(), 1);
            }
        }
        // A Service, spread, from pods of both nodes and from processes of the nodes.
        for from in [&a, &c] {
            let report: Asked = s.probe(from, &["ask", &vip(v6, 80), "--count", "100"]).unwrap();
            all_answered(&report, &["b", "c"]);
            assert!(report.answers.values().all(|count| *count > 20), "{report:?}");
        }
    }
}
