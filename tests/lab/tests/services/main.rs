//! Services as the outside, the host and pods meet them: node ports, load balancers, external addresses, affinity, traffic policies,
//! draining. Every assertion is about who answered and whom they saw.
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use keelway_lab::Host;
use keelway_lab::probe::{Asked, eventually};
use keelway_lab::services::Backend;
use keelway_lab::sh;
use keelway_lab::standalone::{Pod, Standalone};
use keelway_lab::standalone_or_skip;
use serde_json::{Value, json};

mod leaving;

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
