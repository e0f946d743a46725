//! Services as the outside, the host and pods meet them: node ports, load balancers, external addresses, affinity, traffic policies,
//! draining. Every assertion is about who answered and whom they saw.
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use keelway_lab::Host;
use keelway_lab::probe::{Asked, Flowed, unix_micros};
use keelway_lab::services::Backend;
use keelway_lab::sh;
use keelway_lab::standalone::{self, Pod, Standalone};
use serde_json::{Value, json};

/// Skips the test, with the reason, where programs are missing.
macro_rules! standalone_or_skip {
    ($nodes:expr) => {{
        if let Some(reason) = standalone::missing() {
            println!("skipped: {reason}");
            return;
        }
        Standalone::new($nodes, &[]).unwrap()
    }};
}

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

fn at(address: impl Into<IpAddr>, port: u16) -> String {
    SocketAddr::from((address.into(), port)).to_string()
}

fn of(host: &Host, v6: bool) -> IpAddr {
    if v6 { host.v6.into() } else { host.v4.into() }
}

fn vip(v6: bool, port: u16) -> String {
    at(VIPS[usize::from(v6)].parse::<IpAddr>().unwrap(), port)
}

/// Asks from a machine that is no node.
fn ask_from(host: &Host, args: &[&str]) -> Asked {
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    serde_json::from_str(&host.run(&[&[probe.as_str(), "ask"], args].concat()).unwrap()).unwrap()
}

#[track_caller]
fn answered_by(report: &Asked, by: &[&str]) {
    assert!(report.failures.is_empty() && report.wrong_source == 0, "{report:?}");
    assert_eq!((report.answered(), report.resent), (report.tried, 0), "{report:?}");
    assert_eq!(report.answers.keys().map(String::as_str).collect::<Vec<_>>(), by, "{report:?}");
}

#[track_caller]
fn all_fail(report: &Asked, how: &str) {
    assert_eq!(report.failures, BTreeMap::from([(how.to_owned(), report.tried)]), "{report:?}");
    // Refused is refused at once, not when the client asks again.
    assert!(how != "refused" || report.resent == 0, "{report:?}");
}

/// Asks until it is as wanted: the directory is read within a moment, not at once.
#[track_caller]
fn eventually(what: &str, mut ask: impl FnMut() -> Asked, wanted: impl Fn(&Asked) -> bool) {
    let attempt = || {
        let asked = ask();
        anyhow::ensure!(wanted(&asked), "{asked:?}");
        Ok(())
    };
    sh::wait_for(what, sh::SOON, attempt).unwrap();
}

/// What the nodes dropped, for messages.
fn drops(s: &Standalone) -> String {
    [1, 2].map(|number| s.status(number).map(|status| status["drops"].to_string()).unwrap_or_default()).join("\n")
}

fn node_port(protocol: &str, extra: &Value) -> Value {
    let mut spec = json!({
        "type": "NodePort", "clusterIP": VIPS[0], "clusterIPs": VIPS,
        "ports": [{"protocol": protocol, "port": 80, "nodePort": 30080, "targetPort": 8080}],
    });
    for (key, value) in extra.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    spec
}

const TRANSPORTS: [(&str, &[&str]); 3] = [("TCP", &[]), ("UDP", &["--udp"]), ("UDP", &["--udp", "--unconnected"])];

#[test]
fn node_ports_answer_everybody_on_every_node() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[]).unwrap();
    let b = s.pod(1, "b", &[]).unwrap();
    let c = s.pod(2, "c", &[]).unwrap();
    let backends = [Backend::pod(&s, &b), Backend::pod(&s, &c)];
    for (protocol, flags) in TRANSPORTS {
        s.put_service("np", &node_port(protocol, &json!({})), &json!({}), &backends).unwrap();
        let with = |target: &str, count: &str| -> Vec<String> {
            [&[target, "--count", count], flags].concat().iter().map(ToString::to_string).collect()
        };
        let outside = |target: &str, count: &str| {
            let args = with(target, count);
            ask_from(&s.lab.outside, &args.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let pod = |pod: &Pod, target: &str| -> Asked {
            let count = if target.starts_with("127.") { "2" } else { "60" };
            let args = [vec!["ask".to_owned()], with(target, count)].concat();
            s.probe(pod, &args.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
        };
        let host = |number: usize, target: &str, count: &str| -> Asked {
            let args = [vec!["ask".to_owned()], with(target, count)].concat();
            s.probe_on_node(number, &args.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
        };
        for number in [1, 2] {
            eventually("served", || outside(&at(s.node(number).v4, 30080), "1"), |report| report.answered() == 1);
        }
        for v6 in [false, true] {
            for number in [1, 2] {
                let target = at(of(s.node(number), v6), 30080);
                let report = outside(&target, "60");
                answered_by(&report, &["b", "c"]);
                // The backend on the node that was dialled sees the client, the other one that node.
                let seen: Vec<String> =
                    [of(&s.lab.outside, v6), of(s.node(number), v6)].iter().map(ToString::to_string).collect();
                assert!(report.seen_as.keys().all(|who| seen.contains(who)) && report.seen_as.len() == 2, "{report:?}");
                for from in [&a, &c] {
                    let report = pod(from, &target);
                    assert!(
                        report.failures.is_empty() && report.answered() == 60,
                        "{protocol} {target}: {report:?}\n{}",
                        drops(&s)
                    );
                }
                let report = host(number, &target, "20");
                assert!(report.failures.is_empty() && report.answered() == 20, "{protocol} {target}: {report:?}");
                let other = at(of(s.node(3 - number), v6), 30080);
                let report = host(number, &other, "20");
                assert!(report.failures.is_empty() && report.answered() == 20, "{protocol} {other}: {report:?}");
            }
            let cluster_ip = vip(v6, 80);
            answered_by(&pod(&a, &cluster_ip), &["b", "c"]);
        }
        // The loopback address is the host's; in a pod it is the pod's own.
        let report = host(1, "127.0.0.1:30080", "20");
        assert!(report.failures.is_empty() && report.answered() == 20, "{protocol}: {report:?}");
        assert_eq!(pod(&a, "127.0.0.1:30080").answered(), 0);
    }
    // Nobody behind it: said at once.
    s.put_service("np", &node_port("TCP", &json!({})), &json!({}), &[]).unwrap();
    let target = at(s.node(1).v4, 30080);
    eventually(
        "refused",
        || ask_from(&s.lab.outside, &[&target, "--timeout", "2000"]),
        |report| report.failures.contains_key("refused"),
    );
    for v6 in [false, true] {
        let target = at(of(s.node(2), v6), 30080);
        all_fail(&ask_from(&s.lab.outside, &[&target, "--count", "2", "--timeout", "2000"]), "refused");
    }
}

#[test]
fn external_traffic_policy_local_keeps_the_client_and_the_node() {
    let s = standalone_or_skip!(2);
    let a = s.pod(2, "a", &[]).unwrap();
    let b = s.pod(1, "b", &[]).unwrap();
    let c = s.pod(1, "c", &[]).unwrap();
    let local = node_port("TCP", &json!({"externalTrafficPolicy": "Local"}));
    s.put_service("np", &local, &json!({}), &[Backend::pod(&s, &b)]).unwrap();
    for v6 in [false, true] {
        let (has, has_not) = (at(of(s.node(1), v6), 30080), at(of(s.node(2), v6), 30080));
        eventually("served", || ask_from(&s.lab.outside, &[&has]), |report| report.answered() == 1);
        let report = ask_from(&s.lab.outside, &[&has, "--count", "10"]);
        answered_by(&report, &["b"]);
        assert_eq!(report.seen_as.keys().collect::<Vec<_>>(), [&of(&s.lab.outside, v6).to_string()], "{report:?}");
        all_fail(&ask_from(&s.lab.outside, &[&has_not, "--count", "2", "--timeout", "300"]), "timeout");
        // The node itself and its pods are not "external".
        answered_by(&s.probe(&a, &["ask", &has_not, "--count", "5"]).unwrap(), &["b"]);
        answered_by(&s.probe_on_node(2, &["ask", &has_not, "--count", "5"]).unwrap(), &["b"]);
        // Other nodes and their pods are: who picks a node meets its policy.
        let ask = ["ask", &has_not, "--count", "2", "--timeout", "300"];
        all_fail(&s.probe(&c, &ask).unwrap(), "timeout");
        all_fail(&s.probe_on_node(1, &ask).unwrap(), "timeout");
        let report = s.probe(&a, &["ask", &has, "--count", "5"]).unwrap();
        answered_by(&report, &["b"]);
        assert_eq!(report.seen_as.keys().collect::<Vec<_>>(), [&a.address(v6).to_string()], "{report:?}");
    }
}

#[test]
fn internal_traffic_policy_local_serves_from_this_node_or_drops() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[]).unwrap();
    let b = s.pod(1, "b", &[]).unwrap();
    let c = s.pod(2, "c", &[]).unwrap();
    let local = node_port("TCP", &json!({"type": "ClusterIP", "internalTrafficPolicy": "Local"}));
    let both = [Backend::pod(&s, &b), Backend::pod(&s, &c)];
    s.put_service("itp", &local, &json!({}), &both).unwrap();
    eventually("served", || s.probe(&a, &["ask", &vip(false, 80)]).unwrap(), |report| report.answered() == 1);
    for v6 in [false, true] {
        answered_by(&s.probe(&a, &["ask", &vip(v6, 80), "--count", "20"]).unwrap(), &["b"]);
        answered_by(&s.probe_on_node(1, &["ask", &vip(v6, 80), "--count", "20"]).unwrap(), &["b"]);
    }
    s.put_service("itp", &local, &json!({}), &both[1..]).unwrap();
    eventually(
        "dropped",
        || s.probe(&a, &["ask", &vip(false, 80), "--timeout", "300"]).unwrap(),
        |report| report.failures.contains_key("timeout"),
    );
}

#[test]
fn load_balancer_and_external_addresses_are_served_and_ranges_hold() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[]).unwrap();
    let b = s.pod(1, "b", &[]).unwrap();
    let c = s.pod(2, "c", &[]).unwrap();
    let both = [Backend::pod(&s, &b), Backend::pod(&s, &c)];
    let external = [["198.51.100.10", "2001:db8:51::10"], ["198.51.100.20", "2001:db8:51::20"]];
    for (v4, v6) in external.iter().map(|[v4, v6]| (v4, v6)) {
        s.lab.outside.run(&["ip", "route", "add", v4, "via", &s.node(1).v4.to_string()]).unwrap();
        s.lab.outside.run(&["ip", "-6", "route", "add", v6, "via", &s.node(1).v6.to_string()]).unwrap();
    }
    let status = json!({"loadBalancer": {"ingress": [{"ip": external[0][0]}, {"ip": external[0][1]}]}});
    let spec = |ranges: Value| {
        node_port(
            "TCP",
            &json!({"type": "LoadBalancer", "externalIPs": external[1], "loadBalancerSourceRanges": ranges}),
        )
    };
    s.put_service("lb", &spec(json!([])), &status, &both).unwrap();
    for v6 in [0, 1] {
        for address in [external[0][v6], external[1][v6]] {
            let target = at(address.parse::<IpAddr>().unwrap(), 80);
            eventually("served", || ask_from(&s.lab.outside, &[&target]), |report| report.answered() == 1);
            answered_by(&ask_from(&s.lab.outside, &[&target, "--count", "60"]), &["b", "c"]);
            answered_by(&s.probe(&a, &["ask", &target, "--count", "60"]).unwrap(), &["b", "c"]);
            answered_by(&s.probe_on_node(2, &["ask", &target, "--count", "60"]).unwrap(), &["b", "c"]);
        }
    }
    // Only pods of the first node, and nobody outside, at the load balancer's address; the others are open as before.
    s.put_service("lb", &spec(json!(["10.244.1.0/24", " fd00:10:244:1::/64"])), &status, &both).unwrap();
    for v6 in [0, 1] {
        let target = at(external[0][v6].parse::<IpAddr>().unwrap(), 80);
        let closed = || ask_from(&s.lab.outside, &[&target, "--timeout", "300"]);
        eventually("closed", closed, |report| report.failures.contains_key("timeout"));
        answered_by(&s.probe(&a, &["ask", &target, "--count", "20"]).unwrap(), &["b", "c"]);
        all_fail(&s.probe(&c, &["ask", &target, "--count", "2", "--timeout", "300"]).unwrap(), "timeout");
        let open = at(external[1][v6].parse::<IpAddr>().unwrap(), 80);
        answered_by(&ask_from(&s.lab.outside, &[&open, "--count", "20"]), &["b", "c"]);
    }
}

#[test]
fn a_client_keeps_its_backend_by_affinity_while_the_service_has_it() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[]).unwrap();
    let backends: Vec<Pod> =
        ["b", "c", "d", "e"].iter().zip([1, 1, 2, 2]).map(|(name, node)| s.pod(node, name, &[]).unwrap()).collect();
    let all: Vec<Backend> = backends.iter().map(|pod| Backend::pod(&s, pod)).collect();
    let spec = node_port("TCP", &json!({"sessionAffinity": "ClientIP"}));
    s.put_service("np", &spec, &json!({}), &all).unwrap();
    let node = at(s.node(1).v4, 30080);
    eventually("served", || ask_from(&s.lab.outside, &[&node]), |report| report.answered() == 1);
    let one = |report: &Asked| {
        assert!(report.failures.is_empty() && report.answers.len() == 1 && report.resent == 0, "{report:?}");
        report.answers.keys().next().unwrap().clone()
    };
    for v6 in [false, true] {
        let (service, node) = (vip(v6, 80), at(of(s.node(1), v6), 30080));
        one(&ask_from(&s.lab.outside, &[&node, "--count", "20"]));
        one(&s.probe_on_node(1, &["ask", &service, "--count", "20"]).unwrap());
        let chosen = one(&s.probe(&a, &["ask", &service, "--count", "20"]).unwrap());
        // By sockets or by packets, the client is the same.
        assert_eq!(one(&s.probe_past_sockets(&a, &["ask", &service, "--count", "20"]).unwrap()), chosen);
        // And so is its backend whichever address it dials.
        assert_eq!(one(&s.probe(&a, &["ask", &node, "--count", "20"]).unwrap()), chosen);
        assert_eq!(one(&s.probe_past_sockets(&a, &["ask", &node, "--count", "20"]).unwrap()), chosen);
        // Others leave: nothing changes. It leaves: another one, and that one then.
        let without = |name: &str| -> Vec<Backend> {
            let kept = backends.iter().filter(|pod| pod.name != name);
            kept.map(|pod| Backend::pod(&s, pod)).collect()
        };
        let other = backends.iter().find(|pod| pod.name != chosen).unwrap();
        s.put_service("np", &spec, &json!({}), &without(&other.name)).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(one(&s.probe(&a, &["ask", &service, "--count", "20"]).unwrap()), chosen);
        s.put_service("np", &spec, &json!({}), &without(&chosen)).unwrap();
        eventually(
            "moved",
            || s.probe(&a, &["ask", &service]).unwrap(),
            |report| report.answered() == 1 && !report.answers.contains_key(&chosen),
        );
        one(&s.probe(&a, &["ask", &service, "--count", "20"]).unwrap());
        s.put_service("np", &spec, &json!({}), &all).unwrap();
    }
}

#[test]
fn backends_in_the_hosts_network_serve_everybody() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[]).unwrap();
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let serve = |number: usize| {
        let name = format!("host{number}");
        s.node(number).spawn("server", &[&probe, "serve", "--port", "8090", "--name", &name]).unwrap()
    };
    let _servers = [serve(1), serve(2)];
    let backends = [Backend::host(&s, 1, 8090), Backend::host(&s, 2, 8090)];
    for (protocol, flags) in TRANSPORTS {
        s.put_service("np", &node_port(protocol, &json!({})), &json!({}), &backends).unwrap();
        for v6 in [false, true] {
            let (service, node) = (vip(v6, 80), at(of(s.node(1), v6), 30080));
            let with = |target| [&[target, "--count", "60"], flags].concat();
            let outside = || ask_from(&s.lab.outside, &[&[node.as_str()], flags].concat());
            eventually("served", outside, |report| report.answered() == 1);
            answered_by(&ask_from(&s.lab.outside, &with(&node)), &["host1", "host2"]);
            let report: Asked = s.probe(&a, &[&["ask"], with(&service).as_slice()].concat()).unwrap();
            assert!(report.failures.is_empty() && report.answered() == 60 && report.wrong_source == 0, "{report:?}");
            let report: Asked = s.probe_on_node(2, &[&["ask"], with(&service).as_slice()].concat()).unwrap();
            assert!(report.failures.is_empty() && report.answered() == 60 && report.wrong_source == 0, "{report:?}");
        }
    }
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    let s = standalone_or_skip!(1);
    let b = s.pod(1, "b", &[]).unwrap();
    for (protocol, flags) in TRANSPORTS {
        s.put_service("np", &node_port(protocol, &json!({})), &json!({}), &[Backend::pod(&s, &b)]).unwrap();
        for v6 in [false, true] {
            for target in [vip(v6, 80), at(of(s.node(1), v6), 30080)] {
                let args = [&["ask", &target, "--count", "20"], flags].concat();
                eventually("served", || s.probe(&b, &args).unwrap(), |report| report.answered() == 20);
                answered_by(&s.probe(&b, &args).unwrap(), &["b"]);
                answered_by(&s.probe_past_sockets(&b, &args).unwrap(), &["b"]);
            }
        }
    }
}

#[test]
fn connections_live_on_while_their_backend_drains_and_new_ones_go_elsewhere() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[]).unwrap();
    let b = s.pod(2, "b", &[]).unwrap();
    let c = s.pod(2, "c", &[]).unwrap();
    let spec = node_port("TCP", &json!({}));
    s.put_service("np", &spec, &json!({}), &[Backend::pod(&s, &b)]).unwrap();
    let both = [false, true].map(|v6| (at(of(s.node(1), v6), 30080), vip(v6, 80)));
    for (node, _) in &both {
        eventually("served", || ask_from(&s.lab.outside, &[node]), |report| report.answered() == 1);
    }
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let args = |target: &str| ["flow", target, "--seconds", "12", "--rate", "50"].map(ToOwned::to_owned);
    let flows: Vec<Flowed> = std::thread::scope(|scope| {
        let mut flows = Vec::new();
        for (node, service) in &both {
            let (words, s, a, probe) = (args(node), &s, &a, &probe);
            flows.push(scope.spawn(move || -> Flowed {
                let argv = [vec![probe.clone()], words.to_vec()].concat();
                serde_json::from_str(&s.lab.outside.run(&argv).unwrap()).unwrap()
            }));
            for past in [false, true] {
                let words = args(service);
                flows.push(scope.spawn(move || -> Flowed {
                    let words: Vec<&str> = words.iter().map(String::as_str).collect();
                    if past { s.probe_past_sockets(a, &words).unwrap() } else { s.probe(a, &words).unwrap() }
                }));
            }
        }
        s.lab.wait_for_flows(6).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let draining = [Backend::pod(&s, &b).terminating(true), Backend::pod(&s, &c)];
        s.put_service("np", &spec, &json!({}), &draining).unwrap();
        for (node, service) in &both {
            eventually("moved", || ask_from(&s.lab.outside, &[node]), |report| report.answers.contains_key("c"));
            answered_by(&ask_from(&s.lab.outside, &[node, "--count", "30"]), &["c"]);
            answered_by(&s.probe(&a, &["ask", service, "--count", "30"]).unwrap(), &["c"]);
            answered_by(&s.probe_past_sockets(&a, &["ask", service, "--count", "30"]).unwrap(), &["c"]);
        }
        flows.into_iter().map(|flow| flow.join().unwrap()).collect()
    });
    for flow in flows {
        assert_eq!((flow.lost(), flow.failures.len()), (0, 0), "{flow:?}");
        assert_eq!(flow.answers.keys().collect::<Vec<_>>(), ["b"], "{flow:?}");
    }
    // Nobody is ready: those on their way out that still serve are better than nobody.
    s.put_service("np", &spec, &json!({}), &[Backend::pod(&s, &b).terminating(true)]).unwrap();
    for (node, _) in &both {
        eventually("back", || ask_from(&s.lab.outside, &[node]), |report| report.answers.contains_key("b"));
    }
    s.put_service("np", &spec, &json!({}), &[Backend::pod(&s, &b).terminating(false)]).unwrap();
    for (node, _) in &both {
        let at_once = |report: &Asked| report.failures.contains_key("refused") && report.resent == 0;
        eventually("refused", || ask_from(&s.lab.outside, &[node]), at_once);
    }
}

#[test]
fn connected_datagram_sockets_leave_a_backend_that_left() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[]).unwrap();
    let b = s.pod(2, "b", &[]).unwrap();
    let c = s.pod(1, "c", &[]).unwrap();
    let spec = node_port("UDP", &json!({}));
    s.put_service("np", &spec, &json!({}), &[Backend::pod(&s, &b)]).unwrap();
    let both = [false, true].map(|v6| (at(of(s.node(1), v6), 30080), vip(v6, 80)));
    for (node, _) in &both {
        eventually("served", || ask_from(&s.lab.outside, &[node, "--udp"]), |report| report.answered() == 1);
    }
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let flows: Vec<Flowed> = std::thread::scope(|scope| {
        let mut flows = Vec::new();
        for (node, service) in &both {
            let (s, a, probe) = (&s, &a, &probe);
            flows.push(scope.spawn(move || -> Flowed {
                let argv = [probe.as_str(), "flow", node, "--udp", "--seconds", "12", "--rate", "50"];
                serde_json::from_str(&s.lab.outside.run(&argv).unwrap()).unwrap()
            }));
            flows.push(scope.spawn(move || -> Flowed {
                s.probe(a, &["flow", service, "--udp", "--seconds", "12", "--rate", "50"]).unwrap()
            }));
        }
        s.lab.wait_for_flows(4).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        // It leaves the Service and lives on: nothing but the Service's change can tell the sockets.
        s.put_service("np", &spec, &json!({}), &[Backend::pod(&s, &c)]).unwrap();
        flows.into_iter().map(|flow| flow.join().unwrap()).collect()
    });
    for flow in flows {
        assert_eq!((flow.lost(), flow.failures.len()), (0, 0), "{flow:?}");
        // The move takes the time in which a changed file is seen: the last two seconds are the other's at least.
        assert!(flow.answers.get("c").is_some_and(|count| *count > 100), "{flow:?}");
        assert!(flow.answers.get("b").is_some_and(|count| *count > 20), "{flow:?}");
    }
}

/// Of datagrams none says that it begins a flow: a flow stays with a backend on its way out for as long as that serves, and leaves at
/// once when it does not; sockets that are not connected, and the host's, do likewise.
#[test]
fn datagram_flows_live_on_while_their_backend_drains_and_leave_when_it_serves_no_longer() {
    let s = standalone_or_skip!(2);
    let a = s.pod(1, "a", &[]).unwrap();
    let b = s.pod(2, "b", &[]).unwrap();
    let c = s.pod(1, "c", &[]).unwrap();
    let spec = node_port("UDP", &json!({}));
    s.put_service("np", &spec, &json!({}), &[Backend::pod(&s, &b)]).unwrap();
    let node = |v6| at(of(s.node(1), v6), 30080);
    for v6 in [false, true] {
        eventually("served", || ask_from(&s.lab.outside, &[&node(v6), "--udp"]), |report| report.answered() == 1);
    }
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let args = |target: &str, more: &[&str]| -> Vec<String> {
        let words = ["flow", target, "--udp", "--seconds", "20", "--rate", "20"];
        words.iter().chain(more).map(|word| (*word).to_owned()).collect()
    };
    let run = |from: &str, v6: bool| -> Flowed {
        let unconnected: &[&str] = if from.ends_with("unconnected") { &["--unconnected"] } else { &[] };
        let words = args(&if from == "outside" { node(v6) } else { vip(v6, 80) }, unconnected);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match from {
            "outside" => {
                let argv = [&[probe.as_str()], words.as_slice()].concat();
                serde_json::from_str(&s.lab.outside.run(&argv).unwrap()).unwrap()
            }
            "host" | "host unconnected" => s.probe_on_node(1, &words).unwrap(),
            "pod past sockets" => s.probe_past_sockets(&a, &words).unwrap(),
            _ => s.probe(&a, &words).unwrap(),
        }
    };
    let ways = ["outside", "pod", "pod unconnected", "pod past sockets", "host", "host unconnected"];
    let (flows, last): (Vec<(&str, bool, Flowed)>, u64) = std::thread::scope(|scope| {
        let flows: Vec<_> = [false, true]
            .into_iter()
            .flat_map(|v6| ways.map(|from| (from, v6)))
            .map(|(from, v6)| (from, v6, scope.spawn(move || run(from, v6))))
            .collect();
        s.lab.wait_for_flows(12).unwrap();
        let leaving = |serving| [Backend::pod(&s, &b).terminating(serving), Backend::pod(&s, &c)];
        s.put_service("np", &spec, &json!({}), &leaving(true)).unwrap();
        eventually(
            "moved",
            || ask_from(&s.lab.outside, &[&node(false), "--udp"]),
            |report| report.answers.contains_key("c"),
        );
        let drained = std::time::Instant::now();
        for v6 in [false, true] {
            answered_by(&ask_from(&s.lab.outside, &[&node(v6), "--udp", "--count", "10"]), &["c"]);
            answered_by(&s.probe(&a, &["ask", &vip(v6, 80), "--udp", "--count", "10"]).unwrap(), &["c"]);
            answered_by(&s.probe_on_node(1, &["ask", &vip(v6, 80), "--udp", "--count", "10"]).unwrap(), &["c"]);
        }
        std::thread::sleep(Duration::from_secs(4).saturating_sub(drained.elapsed()));
        let last = unix_micros();
        s.put_service("np", &spec, &json!({}), &leaving(false)).unwrap();
        (flows.into_iter().map(|(from, v6, flow)| (from, v6, flow.join().unwrap())).collect(), last)
    });
    for (from, v6, flow) in flows {
        // It drained for four seconds, and answered to the end of them.
        assert!(flow.heard.get("b").is_some_and(|(_, end)| *end > last - 750_000), "{from} {v6}: {last} {flow:?}");
        if from == "host" {
            // Its socket is ended, once.
            assert!(flow.failures.values().sum::<u64>() >= 1 && flow.answers.len() == 1, "{from} {v6}: {flow:?}");
        } else {
            assert!(flow.answers.get("c").is_some_and(|count| *count > 40), "{from} {v6}: {flow:?}");
            assert_eq!((flow.lost(), flow.failures.len()), (0, 0), "{from} {v6}: {flow:?}");
        }
    }
}

/// The host's own sockets are translated when they connect: a datagram one is ended so that its program dials again, a connection
/// once its pod is no more; neither while the backend lives and serves.
#[test]
fn the_hosts_sockets_are_ended_when_their_backend_is_gone() {
    let s = standalone_or_skip!(2);
    let b = s.pod(2, "b", &[]).unwrap();
    let c = s.pod(1, "c", &[]).unwrap();
    let spec = |protocol| node_port(protocol, &json!({"type": "ClusterIP"}));
    let other = ["10.96.0.20", "fd00:10:96::20"];
    s.put_service("tcp", &spec("TCP"), &json!({}), &[Backend::pod(&s, &b)]).unwrap();
    let mut udp = spec("UDP");
    udp["clusterIP"] = json!(other[0]);
    udp["clusterIPs"] = json!(other);
    s.put_service("udp", &udp, &json!({}), &[Backend::pod(&s, &b)]).unwrap();
    let both = [false, true].map(|v6| {
        let udp_at = at(other[usize::from(v6)].parse::<IpAddr>().unwrap(), 80);
        (vip(v6, 80), udp_at, at(b.address(v6), 8080))
    });
    for (tcp_at, udp_at, _) in &both {
        eventually("served", || s.probe_on_node(1, &["ask", tcp_at]).unwrap(), |report| report.answered() == 1);
        eventually(
            "served",
            || s.probe_on_node(1, &["ask", udp_at, "--udp"]).unwrap(),
            |report| report.answered() == 1,
        );
    }
    let flow = |target: &str, udp: bool| -> Flowed {
        let mut args = vec!["flow", target, "--seconds", "20", "--rate", "20"];
        args.extend(udp.then_some("--udp"));
        s.probe_on_node(1, &args).unwrap()
    };
    let (seen, removing): (Vec<[Flowed; 3]>, u64) = std::thread::scope(|scope| {
        let flow = &flow;
        // The last one dialled the pod itself, and its answers stop with it: nothing of a Service.
        let begin = |(tcp_at, udp_at, direct)| {
            [(tcp_at, false), (udp_at, true), (direct, true)].map(|(at, udp)| scope.spawn(move || flow(at, udp)))
        };
        let flows = both.each_ref().map(|(tcp_at, udp_at, direct)| begin((tcp_at, udp_at, direct)));
        s.lab.wait_for_flows(6).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        s.put_service("udp", &udp, &json!({}), &[Backend::pod(&s, &c)]).unwrap();
        s.put_service("tcp", &spec("TCP"), &json!({}), &[Backend::pod(&s, &c)]).unwrap();
        // Left the Service, and lives: the connection goes on.
        std::thread::sleep(Duration::from_secs(4));
        let removing = unix_micros();
        s.remove_pod(&b).unwrap();
        (flows.into_iter().map(|three| three.map(|flow| flow.join().unwrap())).collect(), removing)
    });
    for [stream, datagrams, unconcerned] in &seen {
        let end = |flow: &Flowed| flow.heard.get("b").map_or(0, |(_, end)| *end);
        assert!(datagrams.failures.values().sum::<u64>() >= 1, "{datagrams:?}");
        // Half a second after it was said; until the pod went it would have been answered.
        assert!(end(datagrams) < removing - 500_000 && datagrams.answers.len() == 1, "{removing} {datagrams:?}");
        assert_eq!(stream.failures.values().sum::<u64>(), 1, "{stream:?}");
        assert!(end(stream) > removing - 750_000 && stream.answers.len() == 1, "{removing} {stream:?}");
        assert!(unconcerned.sent > 300, "{unconcerned:?}");
    }
    // The next one is served.
    for (tcp_at, udp_at, _) in &both {
        answered_by(&s.probe_on_node(1, &["ask", tcp_at]).unwrap(), &["c"]);
        answered_by(&s.probe_on_node(1, &["ask", udp_at, "--udp"]).unwrap(), &["c"]);
    }
}

/// Two Services have one backend, and one of them goes on without it: that one's sockets go elsewhere, the other's stay.
#[test]
fn the_hosts_datagram_socket_is_ended_by_its_own_service_only() {
    let s = standalone_or_skip!(1);
    let b = s.pod(1, "b", &[]).unwrap();
    let c = s.pod(1, "c", &[]).unwrap();
    let services = [("one", "10.96.0.20"), ("two", "10.96.0.21")];
    let put = |(name, vip): (&str, &str), backend: &Pod| {
        let mut spec = node_port("UDP", &json!({"type": "ClusterIP"}));
        spec["clusterIP"] = json!(vip);
        spec["clusterIPs"] = json!([vip]);
        s.put_service(name, &spec, &json!({}), &[Backend::pod(&s, backend)]).unwrap();
    };
    services.iter().for_each(|service| put(*service, &b));
    let target = |vip: &str| at(vip.parse::<IpAddr>().unwrap(), 80);
    let flow = |vip: &str| -> Flowed {
        let target = target(vip);
        eventually("served", || s.probe_on_node(1, &["ask", &target, "--udp"]).unwrap(), |seen| seen.answered() == 1);
        s.probe_on_node(1, &["flow", &target, "--udp", "--seconds", "10", "--rate", "20"]).unwrap()
    };
    let [left, stays] = std::thread::scope(|scope| {
        let flows = services.map(|(_, vip)| scope.spawn(move || flow(vip)));
        s.lab.wait_for_flows(2).unwrap();
        put(services[0], &c);
        flows.map(|flow| flow.join().unwrap())
    });
    assert!(left.failures.values().sum::<u64>() >= 1 && left.answered < 180, "{left:?}");
    assert_eq!((stays.failures.len(), stays.lost()), (0, 0), "{stays:?}");
    answered_by(&s.probe_on_node(1, &["ask", &target(services[0].1), "--udp"]).unwrap(), &["c"]);
}

#[test]
fn a_node_port_is_taken_for_the_host_and_free_for_pods() {
    let s = standalone_or_skip!(1);
    let b = s.pod(1, "b", &[]).unwrap();
    s.put_service("np", &node_port("TCP", &json!({})), &json!({}), &[Backend::pod(&s, &b)]).unwrap();
    let node = at(s.node(1).v4, 30080);
    eventually("served", || ask_from(&s.lab.outside, &[&node]), |report| report.answered() == 1);
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let (v4, v6) = (s.node(1).v4.to_string(), s.node(1).v6.to_string());
    for address in ["::", "0.0.0.0", &v4, &v6] {
        let serve = |port: &str, patience: &str| {
            let argv = ["timeout", patience, &probe, "serve", "--port", port, "--address", address];
            s.node(1).exec(&argv).unwrap()
        };
        let taken = serve("30080", "5");
        assert!(String::from_utf8_lossy(&taken.stderr).contains("Address already in use"), "{address}: {taken:?}");
        // Another port is free, and so is this one inside of a pod.
        assert_eq!(serve("30081", "1").status.code(), Some(124), "{address}");
    }
    for address in ["::", "0.0.0.0"] {
        let serve = ["timeout", "1", "keelway-probe", "serve", "--port", "30080", "--address", address];
        let free = s.exec(&b, &serve).unwrap();
        assert!(!free.stderr.contains("in use"), "{address}: {free:?}");
    }
}
