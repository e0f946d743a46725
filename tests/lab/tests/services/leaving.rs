//! Backends that drain and leave: what becomes of connections, of datagram flows and of the host's own sockets.
use std::net::IpAddr;
use std::time::Duration;

use keelway_lab::probe::{Asked, Flowed, eventually, unix_micros};
use keelway_lab::services::Backend;
use keelway_lab::standalone::Pod;
use keelway_lab::{sh, standalone_or_skip};
use serde_json::json;

use super::{answered_by, ask_from, at, node_port, of, vip};

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
