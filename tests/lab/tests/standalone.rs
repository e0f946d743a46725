//! Keelway on two nodes without Kubernetes: every assertion is about what pods and processes saw.
use std::collections::BTreeMap;
use std::net::SocketAddr;

use keelway_lab::probe::{Asked, Flowed, eventually};
use nix::sys::signal::Signal;

use keelway_lab::sh;
use keelway_lab::standalone::Pod;
use keelway_lab::standalone_or_skip;

fn target(pod: &Pod, v6: bool) -> String {
    SocketAddr::from((pod.address(v6), 8080)).to_string()
}

fn vip(v6: bool, port: u16) -> String {
    if v6 { format!("[fd00:10:96::10]:{port}") } else { format!("10.96.0.10:{port}") }
}

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

#[track_caller]
fn all_answered(report: &Asked, by: &[&str]) {
    assert!(report.failures.is_empty(), "{report:?}");
    assert_eq!((report.answered(), report.resent), (report.tried, 0), "{report:?}");
    let names: Vec<&str> = report.answers.keys().map(String::as_str).collect();
    assert_eq!(names, by, "{report:?}");
}

#[track_caller]
fn none_answered(report: &Asked) {
    assert_eq!(report.answers, BTreeMap::new(), "{report:?}");
}

const TRANSPORTS: [&[&str]; 3] = [&[], &["--udp"], &["--udp", "--unconnected"]];

#[test]
fn pods_reach_pods_nodes_and_the_outside_and_are_reached() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[("app", "a")]).unwrap();
    let b = s.pod(1, "b", &[("app", "b")]).unwrap();
    let c = s.pod(2, "c", &[("app", "c")]).unwrap();
    // A node that forwards takes router advertisements only when told so twice.
    let accept_ra = s.node(1).run(&["cat", "/proc/sys/net/ipv6/conf/eth0/accept_ra"]).unwrap();
    assert_eq!(accept_ra.trim(), "2");
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let mut servers = vec![s.lab.outside.spawn("server", &[&probe, "serve", "--name", "outside"]).unwrap()];
    for number in [1, 2] {
        let name = format!("node{number}");
        servers.push(s.node(number).spawn("server", &[&probe, "serve", "--name", &name]).unwrap());
    }
    let host = |host: &keelway_lab::Host, v6: bool| {
        if v6 { SocketAddr::from((host.v6, 8080)).to_string() } else { SocketAddr::from((host.v4, 8080)).to_string() }
    };
    for v6 in [false, true] {
        for transport in TRANSPORTS {
            let ask =
                |at: &str| [&["ask", at, "--count", "5"], transport].concat().iter().map(ToString::to_string).collect();
            let from_pod = |from: &Pod, at: &str| -> Asked {
                let args: Vec<String> = ask(at);
                s.probe(from, &args.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
            };
            // Pod to pod, on the same node and on another: under its own address.
            for (from, to) in [(&a, &b), (&a, &c), (&c, &a)] {
                let report = from_pod(from, &target(to, v6));
                all_answered(&report, &[&to.name]);
                assert!(report.seen_as.keys().all(|seen| *seen == from.address(v6).to_string()), "{report:?}");
            }
            // Pod to its node and to another, under its own address; to the outside under its node's.
            for number in [1, 2] {
                let report = from_pod(&a, &host(s.node(number), v6));
                all_answered(&report, &[&format!("node{number}")]);
                assert!(report.seen_as.keys().all(|seen| *seen == a.address(v6).to_string()), "{report:?}");
            }
            let report = from_pod(&c, &host(&s.lab.outside, v6));
            all_answered(&report, &["outside"]);
            let node = s.node(2);
            let own = if v6 { node.v6.to_string() } else { node.v4.to_string() };
            assert!(report.seen_as.keys().all(|seen| *seen == own), "{report:?}");
            // Node to pod, on it and on another.
            for number in [1, 2] {
                let args: Vec<String> = ask(&target(&c, v6));
                let args: Vec<&str> = args.iter().map(String::as_str).collect();
                all_answered(&s.probe_on_node(number, &args).unwrap(), &["c"]);
            }
        }
    }
    // A closed port on the outside is known as closed: errors find their way back through masquerading.
    for v6 in [false, true] {
        let closed = host(&s.lab.outside, v6).replace(":8080", ":9");
        let report: Asked = s.probe(&a, &["ask", &closed, "--udp", "--count", "3"]).unwrap();
        assert_eq!(report.failures.get("refused"), Some(&3), "{closed}: {report:?}");
    }
}

#[test]
fn services_spread_over_their_backends_and_refuse_without_any() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[("app", "a")]).unwrap();
    let b = s.pod(1, "b", &[("app", "b")]).unwrap();
    let c = s.pod(2, "c", &[("app", "c")]).unwrap();
    s.service("tcp", VIPS, "TCP", 80, &[&b, &c]).unwrap();
    s.service("udp", ["10.96.0.11", "fd00:10:96::11"], "UDP", 53, &[&b, &c]).unwrap();
    s.service("empty", ["10.96.0.12", "fd00:10:96::12"], "TCP", 80, &[]).unwrap();
    eventually("served", || s.probe(&a, &["ask", &vip(true, 80)]).unwrap(), |report| report.answered() == 1);
    for v6 in [false, true] {
        let tcp = vip(v6, 80);
        let udp = vip(v6, 53).replace("0.10:", "0.11:").replace("::10]", "::11]");
        let empty = vip(v6, 80).replace("0.10:", "0.12:").replace("::10]", "::12]");
        let spread = |report: &Asked| {
            all_answered(report, &["b", "c"]);
            assert!(report.answers.values().all(|count| *count > 20), "{report:?}");
            assert_eq!(report.wrong_source, 0, "{report:?}");
        };
        for from in [&a, &c] {
            spread(&s.probe(from, &["ask", &tcp, "--count", "100"]).unwrap());
            spread(&s.probe(from, &["ask", &udp, "--udp", "--count", "100"]).unwrap());
            let report: Asked = s.probe(from, &["ask", &udp, "--udp", "--unconnected", "--count", "100"]).unwrap();
            assert_eq!((report.answered(), report.wrong_source), (100, 0), "{report:?}");
            let report: Asked = s.probe(from, &["ask", &empty, "--count", "3", "--timeout", "3000"]).unwrap();
            assert_eq!((report.failures.get("refused"), report.resent), (Some(&3), 0), "{report:?}");
        }
        spread(&s.probe_on_node(1, &["ask", &tcp, "--count", "100"]).unwrap());
        spread(&s.probe_on_node(2, &["ask", &udp, "--udp", "--count", "100"]).unwrap());
        // Packets that no socket hook has seen: the same, by the veth's hook.
        let report: Asked = s.probe_past_sockets(&a, &["ask", &tcp, "--count", "100"]).unwrap();
        // The client's own address cannot be a backend's here, so both serve.
        spread(&report);
        let report: Asked = s.probe_past_sockets(&a, &["ask", &udp, "--udp", "--count", "100"]).unwrap();
        spread(&report);
        let report: Asked = s.probe_past_sockets(&a, &["ask", &empty, "--count", "3", "--timeout", "3000"]).unwrap();
        assert_eq!((report.failures.get("refused"), report.resent), (Some(&3), 0), "{report:?}");
    }
    // A backend that leaves gets nothing more.
    s.service("tcp", VIPS, "TCP", 80, &[&c]).unwrap();
    for v6 in [false, true] {
        eventually(
            "without b",
            || s.probe(&a, &["ask", &vip(v6, 80), "--count", "50"]).unwrap(),
            |report| report.answers.keys().eq(["c"]) && report.failures.is_empty(),
        );
    }
}

const DENY_ALL: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny, namespace: default}\n\
    spec: {podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress]}\n";
const ALLOW_A: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: allow, namespace: default}\n\
    spec: {podSelector: {matchLabels: {app: b}}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}], \
    ports: [{protocol: TCP, port: 8080}]}]}\n";
const EGRESS_A: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: egress, namespace: default}\n\
    spec: {podSelector: {matchLabels: {app: a}}, policyTypes: [Egress], \
    egress: [{to: [{ipBlock: {cidr: 10.244.0.0/16, except: [10.244.2.0/24]}}, {ipBlock: {cidr: 'fd00:10:244::/56', \
    except: ['fd00:10:244:2::/64']}}]}]}\n";

#[test]
fn policies_hold_in_both_directions_on_one_node_and_between_two() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[("app", "a")]).unwrap();
    let b = s.pod(1, "b", &[("app", "b")]).unwrap();
    let c = s.pod(2, "c", &[("app", "c")]).unwrap();
    let d = s.pod(2, "d", &[("app", "a")]).unwrap();
    let ask =
        |from: &Pod, to: &Pod, v6: bool| -> Asked { s.probe(from, &["ask", &target(to, v6), "--count", "2"]).unwrap() };
    // In vain, perhaps.
    let knock = |from: &Pod, to: &Pod, v6: bool, udp: bool| -> Asked {
        let at = target(to, v6);
        let mut args = vec!["ask", &at, "--count", "2", "--timeout", "300"];
        args.extend(udp.then_some("--udp"));
        s.probe(from, &args).unwrap()
    };
    let open = |report: &Asked| report.answered() == 2;
    let shut = |report: &Asked| report.answered() == 0 && report.failures.get("timeout") == Some(&2);
    for v6 in [false, true] {
        all_answered(&ask(&c, &b, v6), &["b"]);
    }
    s.write("deny", DENY_ALL).unwrap();
    eventually("shut", || knock(&a, &b, false, false), shut);
    for v6 in [false, true] {
        none_answered(&knock(&a, &b, v6, false));
        none_answered(&knock(&c, &b, v6, false));
        // What the isolated pod itself opens is answered.
        all_answered(&ask(&b, &c, v6), &["c"]);
    }
    // The node reaches its own pods whatever the policies say.
    all_answered(&s.probe_on_node(1, &["ask", &target(&b, false)]).unwrap(), &["b"]);
    none_answered(&s.probe_on_node(2, &["ask", &target(&b, false), "--timeout", "300"]).unwrap());
    s.write("allow", ALLOW_A).unwrap();
    eventually("open", || knock(&a, &b, false, false), open);
    for v6 in [false, true] {
        all_answered(&ask(&a, &b, v6), &["b"]);
        all_answered(&ask(&d, &b, v6), &["b"]);
        none_answered(&knock(&a, &b, v6, true));
        none_answered(&knock(&c, &b, v6, false));
    }
    s.write("egress", EGRESS_A).unwrap();
    eventually("shut", || knock(&a, &c, false, false), shut);
    for v6 in [false, true] {
        all_answered(&ask(&a, &b, v6), &["b"]);
        none_answered(&knock(&a, &c, v6, false));
        all_answered(&ask(&c, &a, v6), &["a"]);
    }
    let status = s.status(1).unwrap();
    let drops = |reason: &str| {
        let all = status["drops"].as_array().unwrap().iter();
        all.filter(|drop| drop["reason"] == reason).filter_map(|drop| drop["packets"].as_u64()).sum::<u64>()
    };
    assert!(drops("policy-ingress") > 0 && drops("policy-egress") > 0, "{status}");
    for file in ["deny", "allow", "egress"] {
        s.remove_file(file).unwrap();
    }
    eventually("open again", || knock(&a, &c, false, false), open);
}

#[test]
fn an_agent_killed_and_started_again_under_load_is_not_noticed() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[("app", "a")]).unwrap();
    let b = s.pod(1, "b", &[("app", "b")]).unwrap();
    let c = s.pod(2, "c", &[("app", "c")]).unwrap();
    s.service("tcp", VIPS, "TCP", 80, &[&b, &c]).unwrap();
    s.write("deny", &DENY_ALL.replace("app: b", "app: c")).unwrap();
    s.write("allow", &ALLOW_A.replace("app: b", "app: c")).unwrap();
    eventually(
        "served",
        || s.probe(&a, &["ask", &vip(false, 80), "--count", "20"]).unwrap(),
        |report| report.failures.is_empty() && report.answers.len() == 2,
    );
    eventually(
        "shut",
        || s.probe(&b, &["ask", &target(&c, false), "--timeout", "200"]).unwrap(),
        |report| report.answered() == 0,
    );
    let (at, service) = (target(&c, false), vip(false, 80));
    let (flow, asked, forbidden) = std::thread::scope(|scope| {
        let flow =
            scope.spawn(|| -> Flowed { s.probe(&a, &["flow", &at, "--seconds", "8", "--rate", "200"]).unwrap() });
        let asked =
            scope.spawn(|| -> Asked { s.probe(&a, &["ask", &service, "--count", "800", "--rate", "100"]).unwrap() });
        let forbidden = scope.spawn(|| -> Asked {
            s.probe(&b, &["ask", &at, "--count", "30", "--rate", "4", "--timeout", "250"]).unwrap()
        });
        s.lab.wait_for_flows(1).unwrap();
        for number in [1, 2, 1] {
            s.stop_agent(number, Signal::SIGKILL).unwrap();
            std::thread::sleep(std::time::Duration::from_secs(1));
            s.start_agent(number).unwrap();
            s.wait_synced(number).unwrap();
        }
        (flow.join().unwrap(), asked.join().unwrap(), forbidden.join().unwrap())
    });
    assert_eq!((flow.lost(), flow.failures.len()), (0, 0), "{flow:?}");
    assert_eq!((asked.answered(), asked.failures.len(), asked.resent), (800, 0, 0), "{asked:?}");
    none_answered(&forbidden);
}

#[test]
fn a_deny_cuts_flows_that_are_under_way() {
    let s = standalone_or_skip!(2);
    let b = s.pod(1, "b", &[("app", "b")]).unwrap();
    for (number, v6) in [(1, false), (2, true)] {
        let name = format!("from{number}");
        let from = s.pod(number, &name, &[("app", "c")]).unwrap();
        let at = target(&b, v6);
        let flow = std::thread::scope(|scope| {
            let flow = scope.spawn(|| -> Flowed {
                s.probe(&from, &["flow", &at, "--udp", "--seconds", "8", "--rate", "100"]).unwrap()
            });
            s.lab.wait_for_flows(1).unwrap();
            std::thread::sleep(std::time::Duration::from_secs(1));
            s.write("deny", DENY_ALL).unwrap();
            flow.join().unwrap()
        });
        // Something came back before, and what was sent in the last seconds did not.
        assert!(flow.answered > 20 && flow.lost() > 150, "{flow:?}");
        s.remove_file("deny").unwrap();
        eventually(
            "open again",
            || s.probe(&from, &["ask", &at, "--timeout", "200"]).unwrap(),
            |report| report.answered() == 1,
        );
    }
}
