//! Services of every shape, and changed in place, over both families, as the outside, the host and pods (by sockets and by packets)
//! meet them.
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use keelway_lab::probe::{Asked, Watched};
use keelway_lab::services::{Backend, slice};
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::standalone::{self, Pod, Standalone};
use keelway_lab::{Host, Process};
use serde_json::{Value, json};

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const EXTERNAL: [&str; 2] = ["198.51.100.10", "2001:db8:51::10"];
const OTHER: [&str; 2] = ["198.51.100.20", "2001:db8:51::20"];

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Pod,
    /// The same pod, where no socket hook sees it.
    Packets,
    Host,
    Outside,
}

const INSIDE: [From; 3] = [From::Pod, From::Packets, From::Host];
const ALL: [From; 4] = [From::Pod, From::Packets, From::Host, From::Outside];

struct Site {
    a: Pod,
    s: Standalone,
}

impl Site {
    /// A lab whose first node has the client; `None`, with the reason said, where programs are missing.
    fn new(nodes: u8) -> Option<Self> {
        if let Some(reason) = standalone::missing() {
            println!("skipped: {reason}");
            return None;
        }
        let s = Standalone::new(nodes, &[]).unwrap();
        let a = s.pod(1, "a", &[]).unwrap();
        let node = s.node(1);
        for [v4, v6] in [EXTERNAL, OTHER] {
            s.lab.outside.run(&["ip", "route", "add", v4, "via", &node.v4.to_string()]).unwrap();
            s.lab.outside.run(&["ip", "-6", "route", "add", v6, "via", &node.v6.to_string()]).unwrap();
        }
        Some(Self { a, s })
    }

    fn ask(&self, from: From, target: SocketAddr, more: &[&str]) -> Asked {
        let target = target.to_string();
        let args = [&["ask", &target], more].concat();
        match from {
            From::Pod => self.s.probe(&self.a, &args).unwrap(),
            From::Packets => self.s.probe_past_sockets(&self.a, &args).unwrap(),
            From::Host => self.s.probe_on_node(1, &args).unwrap(),
            From::Outside => {
                let probe = sh::own("keelway-probe").unwrap().display().to_string();
                let text = self.s.lab.outside.run(&[&[probe.as_str()], &args[..]].concat()).unwrap();
                serde_json::from_str(&text).unwrap()
            }
        }
    }

    /// Each of them is answered by all of these, and by nobody else, as soon as that is known.
    #[track_caller]
    fn served(&self, from: &[From], at: [&str; 2], port: u16, more: &[&str], by: &[&str]) {
        for (address, from) in at.iter().flat_map(|address| from.iter().map(move |from| (address, *from))) {
            let target = SocketAddr::new(address.parse().unwrap(), port);
            let count = if by.len() > 1 { "40" } else { "4" };
            let first = wait_for(&format!("{target} by {by:?} for {from:?}"), SOON, || {
                let asked = self.ask(from, target, &[&["--timeout", "1000"], more].concat());
                anyhow::ensure!(asked.answers.keys().all(|name| by.contains(&name.as_str())), "{asked:?}");
                anyhow::ensure!(asked.answered() == 1, "{asked:?}");
                Ok(())
            });
            first.unwrap();
            let asked = self.ask(from, target, &[&["--count", count], more].concat());
            assert_eq!(asked.answers.keys().collect::<Vec<_>>(), by, "{from:?} {target}: {asked:?}");
            assert!(asked.failures.is_empty(), "{from:?} {target}: {asked:?}");
            assert_eq!((asked.wrong_source, asked.resent), (0, 0), "{from:?} {target}: {asked:?}");
        }
    }

    /// None of them is answered, as soon as that is known.
    #[track_caller]
    fn silent(&self, from: &[From], at: [&str; 2], port: u16) {
        for (address, from) in at.iter().flat_map(|address| from.iter().map(move |from| (address, *from))) {
            let target = SocketAddr::new(address.parse().unwrap(), port);
            let ask = || {
                let asked = self.ask(from, target, &["--timeout", "300"]);
                anyhow::ensure!(asked.answered() == 0, "{asked:?}");
                Ok(())
            };
            wait_for(&format!("silence at {target} for {from:?}"), SOON, ask).unwrap();
        }
    }

    /// Writes the Service `name` and its slices: their ports, and who is in them.
    fn put(&self, name: &str, labels: &Value, spec: &Value, status: &Value, slices: &[(Value, &[Backend])]) {
        let mut full = json!({"type": "ClusterIP", "clusterIP": VIPS[0], "clusterIPs": VIPS,
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"});
        for (key, value) in spec.as_object().unwrap() {
            full[key] = value.clone();
        }
        let metadata = json!({"name": name, "namespace": "default", "labels": labels});
        let mut objects =
            vec![json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": full, "status": status})];
        for (number, (ports, backends)) in slices.iter().enumerate() {
            objects.extend([false, true].map(|v6| slice(&format!("{name}-{number}"), name, v6, ports, backends)));
        }
        self.s.put_objects(&format!("service-{name}"), &objects).unwrap();
    }

    fn node(&self) -> [String; 2] {
        let node = self.s.node(1);
        [node.v4.to_string(), node.v6.to_string()]
    }

    /// `keelway` on the node, with its answer as JSON; 3, which says that something is wrong, is an answer too.
    fn keelway(&self, args: &[&str]) -> Value {
        let keelway = sh::own("keelway").unwrap().display().to_string();
        let output = self.s.node(1).exec(&[&[keelway.as_str()], args, &["-o", "json"]].concat()).unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", sh::words(&output)))
    }

    /// How many backends the frontend of a cluster IP's port has.
    fn backends(&self, service: &str, target: &str) -> usize {
        let listed = self.keelway(&["services", service]);
        let frontends = listed["services"][0]["frontends"].as_array().cloned().unwrap_or_default();
        let found = frontends.iter().find(|f| format!("{}:{}", f["address"].as_str().unwrap(), f["port"]) == target);
        found.map_or(0, |frontend| frontend["backends"].as_array().unwrap().len())
    }
}

fn refs([v4, v6]: &[String; 2]) -> [&str; 2] {
    [v4, v6]
}

/// A server in a machine's own network.
fn server(host: &Host, port: u16, name: &str) -> Process {
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    host.spawn(name, &[&probe, "serve", "--port", &port.to_string(), "--name", name]).unwrap()
}

fn one_port() -> Value {
    json!([{"name": "p", "protocol": "TCP", "port": 8080}])
}

/// One port 80 named `p`.
fn plain(more: &Value) -> Value {
    let mut spec = json!({"ports": [{"name": "p", "protocol": "TCP", "port": 80, "targetPort": 8080}]});
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec
}

#[test]
fn several_ports_lead_to_their_own_and_an_endpoint_of_several_slices_counts_once() {
    let Some(site) = Site::new(2) else { return };
    let pods = [site.s.pod(1, "b", &[]).unwrap(), site.s.pod(2, "c", &[]).unwrap()];
    // Each of them has its own port behind the name `admin`.
    for (pod, port) in pods.iter().zip([9090, 9191]) {
        let serve = format!("keelway-probe serve --port {port} --name {}-admin </dev/null >/dev/null 2>&1 &", pod.name);
        site.s.exec(pod, &["sh", "-c", &serve]).unwrap();
    }
    let [b, c] = [0, 1].map(|index| [Backend::pod(&site.s, &pods[index])]);
    let spec = json!({"type": "NodePort", "ports": [
        {"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080, "nodePort": 30080},
        {"name": "admin", "protocol": "TCP", "port": 81, "targetPort": "admin", "nodePort": 30081},
        {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": 8080, "nodePort": 30053},
        {"name": "dns-tcp", "protocol": "TCP", "port": 53, "targetPort": 8080, "nodePort": 30053},
    ]});
    let ports = |admin: u16| {
        json!([{"name": "http", "protocol": "TCP", "port": 8080}, {"name": "admin", "protocol": "TCP", "port": admin},
            {"name": "dns", "protocol": "UDP", "port": 8080}, {"name": "dns-tcp", "protocol": "TCP", "port": 8080}])
    };
    let nothing = json!({});
    let put = |slices: &[(Value, &[Backend])]| site.put("web", &nothing, &spec, &nothing, slices);
    put(&[(ports(9090), &b), (ports(9191), &c)]);
    let node = site.node();
    for (port, node_port, more, by) in [
        (80, 30080, &[][..], ["b", "c"]),
        (81, 30081, &[], ["b-admin", "c-admin"]),
        (53, 30053, &["--udp"], ["b", "c"]),
        (53, 30053, &[], ["b", "c"]),
    ] {
        site.served(&INSIDE, VIPS, port, more, &by);
        site.served(&[From::Outside, From::Host], refs(&node), node_port, more, &by);
    }
    site.silent(&INSIDE[..1], VIPS, 82);

    // One in two slices counts once, and stays until it is in neither.
    put(&[(ports(9090), &b), (ports(9191), &c), (ports(9191), &c)]);
    let mark = json!({"type": "ClusterIP", "clusterIP": "10.96.0.90", "clusterIPs": ["10.96.0.90", "fd00:10:96::90"],
        "ports": [{"name": "p", "protocol": "TCP", "port": 80}]});
    site.put("mark", &nothing, &mark, &nothing, &[(one_port(), &b)]);
    site.served(&[From::Pod], ["10.96.0.90", "fd00:10:96::90"], 80, &[], &["b"]);
    for target in ["10.96.0.10:80", "fd00:10:96::10:80"] {
        assert_eq!(site.backends("web", target), 2, "{}", site.keelway(&["services", "web"]));
    }
    put(&[(ports(9090), &b), (ports(9191), &[]), (ports(9191), &c)]);
    site.served(&ALL[..3], VIPS, 80, &[], &["b", "c"]);
    site.served(&[From::Outside], refs(&node), 30081, &[], &["b-admin", "c-admin"]);
    put(&[(ports(9090), &b), (ports(9191), &[])]);
    wait_for("one of them to leave", SOON, || {
        let left = site.backends("web", "10.96.0.10:80") + site.backends("web", "fd00:10:96::10:80");
        anyhow::ensure!(left == 2, "{left}");
        Ok(())
    })
    .unwrap();
    site.served(&INSIDE, VIPS, 80, &[], &["b"]);
    site.served(&[From::Outside], refs(&node), 30081, &[], &["b-admin"]);
}

#[test]
fn what_changes_in_place_holds_from_then_on() {
    let Some(site) = Site::new(1) else { return };
    let b = [Backend::pod(&site.s, &site.s.pod(1, "b", &[]).unwrap())];
    let (nothing, node) = (json!({}), site.node());
    let put = |spec: &Value, status: &Value| site.put("web", &nothing, spec, status, &[(one_port(), &b)]);
    let node_port = |port: u16| json!([{"name": "p", "protocol": "TCP", "port": 80, "nodePort": port}]);

    // The list of ports.
    put(&plain(&nothing), &nothing);
    site.served(&INSIDE, VIPS, 80, &[], &["b"]);
    put(&json!({"ports": [{"name": "p", "protocol": "TCP", "port": 8000}]}), &nothing);
    site.served(&INSIDE, VIPS, 8000, &[], &["b"]);
    site.silent(&INSIDE, VIPS, 80);

    // The type: a node port comes, changes and goes; a balancer's address comes without one (allocateLoadBalancerNodePorts), and goes.
    put(&json!({"type": "NodePort", "ports": node_port(30080)}), &nothing);
    site.served(&ALL, refs(&node), 30080, &[], &["b"]);
    put(&json!({"type": "NodePort", "ports": node_port(30081)}), &nothing);
    site.served(&ALL, refs(&node), 30081, &[], &["b"]);
    site.silent(&ALL, refs(&node), 30080);
    let balancer = plain(&json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false}));
    let ingress = |[v4, v6]: [&str; 2]| json!({"loadBalancer": {"ingress": [{"ip": v4}, {"ip": v6}]}});
    put(&balancer, &ingress(EXTERNAL));
    site.served(&ALL, EXTERNAL, 80, &[], &["b"]);
    site.silent(&ALL, refs(&node), 30081);
    put(&balancer, &ingress(OTHER));
    site.served(&ALL, OTHER, 80, &[], &["b"]);
    site.silent(&ALL, EXTERNAL, 80);

    // External addresses, of a Service that is back to the simplest type.
    put(&plain(&json!({"externalIPs": EXTERNAL})), &ingress(OTHER));
    site.served(&ALL, EXTERNAL, 80, &[], &["b"]);
    put(&plain(&json!({"externalIPs": OTHER})), &nothing);
    site.served(&ALL, OTHER, 80, &[], &["b"]);
    site.silent(&ALL, EXTERNAL, 80);

    // Its own addresses.
    let others = ["10.96.0.11", "fd00:10:96::11"];
    put(&plain(&json!({"clusterIP": others[0], "clusterIPs": others})), &nothing);
    site.served(&INSIDE, others, 80, &[], &["b"]);
    site.silent(&INSIDE, VIPS, 80);
    site.silent(&ALL, OTHER, 80);
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let Some(site) = Site::new(1) else { return };
    let b = [Backend::pod(&site.s, &site.s.pod(1, "b", &[]).unwrap())];
    let nothing = json!({});
    let slices = [(one_port(), &b[..])];
    let external = plain(&json!({"externalIPs": EXTERNAL}));
    let put = |labels: &Value, spec: &Value| site.put("web", labels, spec, &nothing, &slices);

    // Another proxy's: as soon as the label is set, and not when it is gone again.
    put(&nothing, &external);
    site.served(&ALL, EXTERNAL, 80, &[], &["b"]);
    put(&json!({"service.kubernetes.io/service-proxy-name": "another"}), &external);
    site.silent(&ALL, EXTERNAL, 80);
    site.silent(&INSIDE, VIPS, 80);
    put(&nothing, &external);
    site.served(&ALL, EXTERNAL, 80, &[], &["b"]);
    // The other label is about slices: a Service that has an address is served.
    put(&json!({"service.kubernetes.io/headless": ""}), &external);
    site.served(&ALL, EXTERNAL, 80, &[], &["b"]);

    // Without an address of its own it is a name only, whatever else it says.
    put(&nothing, &plain(&json!({"clusterIP": "None", "clusterIPs": ["None"], "externalIPs": EXTERNAL})));
    site.silent(&ALL, EXTERNAL, 80);
    site.silent(&INSIDE, VIPS, 80);
    put(&nothing, &external);
    site.served(&ALL, EXTERNAL, 80, &[], &["b"]);
    let name = json!({"type": "ExternalName", "externalName": "db.example", "externalIPs": EXTERNAL});
    put(&nothing, &plain(&name));
    site.silent(&ALL, EXTERNAL, 80);
    site.silent(&INSIDE, VIPS, 80);

    // A balancer that wants to see its clients itself gets them: here it is the machine outside.
    let outside = &site.s.lab.outside;
    let [v4, v6] = OTHER;
    outside.run(&["ip", "route", "del", v4]).unwrap();
    outside.run(&["ip", "-6", "route", "del", v6]).unwrap();
    outside.run(&["ip", "addr", "add", &format!("{v4}/32"), "dev", "lo"]).unwrap();
    outside.run(&["ip", "addr", "add", &format!("{v6}/128"), "dev", "lo", "nodad"]).unwrap();
    let _balancer = server(outside, 80, "balancer");
    let balancer = plain(&json!({"type": "LoadBalancer"}));
    for (mode, by) in [("Proxy", "balancer"), ("VIP", "b"), ("Proxy", "balancer")] {
        let ingress = OTHER.map(|ip| json!({"ip": ip, "ipMode": mode}));
        let status = json!({"loadBalancer": {"ingress": ingress}});
        site.put("web", &nothing, &balancer, &status, &slices);
        site.served(&INSIDE, VIPS, 80, &[], &["b"]);
        site.served(&INSIDE, OTHER, 80, &[], &[by]);
    }
}

#[test]
fn the_api_servers_service_keeps_its_last_backend() {
    let Some(site) = Site::new(1) else { return };
    let outside = &site.s.lab.outside;
    let _servers = [server(outside, 6443, "api-1"), server(outside, 6444, "api-2")];
    let api = [Backend {
        addresses: [outside.v4.into(), outside.v6.into()],
        node: "elsewhere".into(),
        conditions: json!({"ready": true}),
        port: 0,
    }];
    let nothing = json!({});
    let spec = json!({"ports": [{"name": "https", "protocol": "TCP", "port": 443}]});
    let ports = |port: u16| json!([{"name": "https", "protocol": "TCP", "port": port}]);
    let put = |slices: &[(Value, &[Backend])]| site.put("kubernetes", &nothing, &spec, &nothing, slices);
    put(&[(ports(6443), &api)]);
    site.served(&INSIDE, VIPS, 443, &[], &["api-1"]);
    for (round, slices) in [&[(ports(6443), &[][..])][..], &[]].into_iter().enumerate() {
        put(slices);
        // What comes after it says that it has been read.
        let mark = json!({"clusterIP": "10.96.0.90", "clusterIPs": ["10.96.0.90", "fd00:10:96::90"],
            "ports": [{"name": "https", "protocol": "TCP", "port": 80 + round}]});
        site.put("mark", &nothing, &mark, &nothing, &[(ports(6444), &api)]);
        let port = 80 + u16::try_from(round).unwrap();
        site.served(&[From::Pod], ["10.96.0.90", "fd00:10:96::90"], port, &[], &["api-2"]);
        site.served(&INSIDE, VIPS, 443, &[], &["api-1"]);
    }
    put(&[(ports(6444), &api)]);
    site.served(&INSIDE, VIPS, 443, &[], &["api-2"]);
}

#[test]
fn what_the_host_may_not_dial_does_not_leave_it() {
    let Some(site) = Site::new(1) else { return };
    let (nothing, node, outside) = (json!({}), site.s.node(1), &site.s.lab.outside);
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let elsewhere = [Backend {
        addresses: [outside.v4.into(), outside.v6.into()],
        node: "elsewhere".into(),
        conditions: json!({"ready": true}),
        port: 0,
    }];
    let ports = json!([{"name": "t", "protocol": "TCP", "port": 80}, {"name": "u", "protocol": "UDP", "port": 80}]);
    let spec = json!({"type": "LoadBalancer", "internalTrafficPolicy": "Local", "ports": ports,
        "loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8:9::/64"]});
    let status = json!({"loadBalancer": {"ingress": EXTERNAL.map(|ip| json!({"ip": ip}))}});
    site.put("web", &nothing, &spec, &status, &[(ports.clone(), &elsewhere)]);
    let target = |address: &str| SocketAddr::new(address.parse::<IpAddr>().unwrap(), 80);
    wait_for("the Service", SOON, || {
        let asked = site.ask(From::Host, target(VIPS[1]), &["--timeout", "300"]);
        anyhow::ensure!(asked.failures.contains_key("denied"), "{asked:?}");
        Ok(())
    })
    .unwrap();

    // Nobody here has it (the cluster IP), or the host is not among those who may (the balancer's address).
    let seen_while = |ask: &dyn Fn()| -> Watched {
        std::thread::scope(|scope| {
            let watch = scope.spawn(|| outside.run(&[probe.as_str(), "watch", "--seconds", "4"]).unwrap());
            std::thread::sleep(Duration::from_millis(500));
            ask();
            serde_json::from_str(&watch.join().unwrap()).unwrap()
        })
    };
    let from_node = |seen: &Watched| seen.from(node.v4.into()) + seen.from(node.v6.into());
    let seen = seen_while(&|| {
        for address in VIPS.into_iter().chain(EXTERNAL) {
            for more in [&[][..], &["--udp"], &["--udp", "--unconnected"]] {
                let begun = Instant::now();
                let asked =
                    site.ask(From::Host, target(address), &[&["--count", "3", "--timeout", "2000"], more].concat());
                assert_eq!(asked.failures.get("denied"), Some(&3), "{address} {more:?}: {asked:?}");
                assert!(begun.elapsed() < Duration::from_secs(1), "{address} {more:?}: at once");
            }
        }
    });
    assert_eq!(from_node(&seen), 0, "{seen:?}");
    // What is nobody's does leave, and is seen there.
    let seen = seen_while(&|| {
        for address in ["198.51.100.99", "2001:db8:51::99"] {
            for more in [&[][..], &["--udp"]] {
                site.ask(From::Host, target(address), &[&["--timeout", "200"], more].concat());
            }
        }
    });
    assert!(from_node(&seen) >= 4, "{seen:?}");
}

#[test]
fn entries_that_cannot_be_used_are_named_and_the_rest_is_in_force() {
    let Some(site) = Site::new(1) else { return };
    let [b, c] = ["b", "c"].map(|name| Backend::pod(&site.s, &site.s.pod(1, name, &[]).unwrap()));
    let nothing = json!({});
    site.put("web", &nothing, &plain(&nothing), &nothing, &[(one_port(), &[b, c.clone()])]);
    site.served(&INSIDE, VIPS, 80, &[], &["b", "c"]);
    // One endpoint leaves, an address comes, and much else is wrong: what the API server lets through.
    let spec = plain(&json!({"externalIPs": ["", EXTERNAL[0], "198.51.100.300", EXTERNAL[1]]}));
    let mut ports = one_port();
    for (name, port) in [("zero", 0), ("negative", -1), ("large", 65_536)] {
        ports.as_array_mut().unwrap().push(json!({"name": name, "protocol": "TCP", "port": port}));
    }
    let mut slices = [false, true].map(|v6| slice("web-0", "web", v6, &ports, std::slice::from_ref(&c)));
    for slice in &mut slices {
        slice["endpoints"].as_array_mut().unwrap().push(json!({"addresses": ["nonsense"]}));
    }
    let mut objects =
        vec![json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": spec, "status": {}})];
    objects[0]["spec"]["clusterIPs"] = json!(VIPS);
    objects.extend(slices);
    site.s.put_objects("service-web", &objects).unwrap();
    site.served(&ALL, EXTERNAL, 80, &[], &["c"]);
    site.served(&INSIDE, VIPS, 80, &[], &["c"]);
    let problems = || site.keelway(&["status"])["problems"].to_string().replace("\\\"", "'");
    let said = problems();
    for words in [
        "default/web: ",
        "spec.externalIPs[]: '198.51.100.300'",
        "EndpointSlice web-0-ipv4: ports[].port: '0' is not a port",
        "EndpointSlice web-0-ipv6: ports[].port: '0' is not a port",
        "ports[].port: '65536'",
        "endpoints[].addresses[]: 'nonsense'",
    ] {
        assert!(said.contains(words), "{words} is not in {said}");
    }
    site.put("web", &nothing, &plain(&nothing), &nothing, &[(one_port(), &[c])]);
    wait_for("all to be well", SOON, || {
        let said = problems();
        anyhow::ensure!(!said.contains("default/web"), "{said}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn an_address_that_two_services_want_has_one_of_them_and_then_the_other() {
    let Some(site) = Site::new(1) else { return };
    let [b, c] = ["b", "c"].map(|name| [Backend::pod(&site.s, &site.s.pod(1, name, &[]).unwrap())]);
    let nothing = json!({});
    let put = |name: &str, vips: [&str; 2], external: [&str; 2], backends: &[Backend]| {
        let spec = plain(&json!({"clusterIP": vips[0], "clusterIPs": vips, "externalIPs": external}));
        site.put(name, &nothing, &spec, &nothing, &[(one_port(), backends)]);
    };
    let others = ["10.96.0.11", "fd00:10:96::11"];
    // By name, whoever came first; and by what the address is to them before that.
    put("late", others, EXTERNAL, &c);
    site.served(&ALL, EXTERNAL, 80, &[], &["c"]);
    put("early", VIPS, EXTERNAL, &b);
    site.served(&ALL, EXTERNAL, 80, &[], &["b"]);
    put("early", VIPS, others, &b);
    site.served(&ALL, EXTERNAL, 80, &[], &["c"]);
    site.served(&INSIDE, others, 80, &[], &["c"]);
    let said = |of: &str| site.keelway(&["services", of])["services"][0]["problems"].to_string();
    assert!(said("early").contains("default/late's") && said("late") == "[]", "{} {}", said("early"), said("late"));
    // Whose it was goes: the other has it.
    site.s.remove_file("service-late").unwrap();
    site.served(&INSIDE, others, 80, &[], &["b"]);
    site.silent(&ALL, EXTERNAL, 80);
    wait_for("all to be well", SOON, || {
        let said = said("early");
        anyhow::ensure!(said == "[]", "{said}");
        Ok(())
    })
    .unwrap();
}

/// Once a Service is gone, what is sent to its address leads nowhere, and out of the node least of all.
#[test]
fn an_address_of_the_services_range_is_nobody_elses() {
    let Some(site) = Site::new(1) else { return };
    let s = &site.s;
    let spec = json!({"clusterIP": VIPS[0], "clusterIPs": VIPS, "ports": [{"port": 80, "targetPort": 8080}]});
    s.put_service("web", &spec, &json!({}), &[Backend::pod(s, &site.a)]).unwrap();
    let range = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16", "fd00:10:96::/112"]}});
    s.put_objects("range", &[range]).unwrap();
    site.served(&INSIDE, VIPS, 80, &[], &["a"]);
    s.remove_file("service-web").unwrap();
    let dropped = || {
        let drops = s.status(1).unwrap()["drops"].as_array().unwrap().clone();
        let of = |drop: &&Value| drop["reason"] == "no-endpoint" && drop["hook"] == "pod-ingress";
        drops.iter().filter(of).filter_map(|drop| drop["packets"].as_u64()).sum::<u64>()
    };
    for vip in VIPS {
        let target = SocketAddr::new(vip.parse().unwrap(), 80);
        wait_for("nobody is there", SOON, || {
            let before = dropped();
            let asked = site.ask(From::Pod, target, &["--timeout", "500"]);
            anyhow::ensure!(asked.answered() == 0 && dropped() > before, "{asked:?}, {before} before");
            Ok(())
        })
        .unwrap();
    }
}
