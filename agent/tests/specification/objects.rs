//! Random Services and EndpointSlices as the API has them, and packets that may meet them.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use crate::kernel::{Dsr, NODE, PODS, ip, pod};
use crate::scenario::{Case, From, Scenario, Step};

/// splitmix64 (Steele, Lea, Flood 2014): the same cases on every machine.
pub struct Random(u64);

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    /// A number below that.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
    fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }
    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
    fn some<T: Clone>(&mut self, of: &[T], chance: usize) -> Vec<T> {
        of.iter().filter(|_| self.percent(chance)).cloned().collect()
    }
}

const PORTS: [u16; 3] = [53, 80, 443];
const NODE_PORTS: [u16; 3] = [30_053, 30_080, 30_443];
const EXTERNAL: [&str; 4] = ["198.51.100.10", "192.0.2.1", "2001:db8:e::10", "198.51.100.20"];
const BALANCERS: [&str; 4] = ["198.51.100.20", "198.51.100.21", "2001:db8:e::20", "192.0.2.1"];
const RANGES: [&str; 6] =
    ["203.0.113.0/25", "203.0.113.128/25", "10.244.0.0/16", "2001:db8:1::/48", "fd00:10:244::/48", "192.0.2.0/24"];
const SERVICES: [&str; 3] = ["a", "b", "c"];
const BOTH: &str = "PreferDualStack";

fn conditions(random: &mut Random) -> Value {
    let any = |random: &mut Random, chance| match random.below(4) {
        0 => Value::Null,
        _ => random.percent(chance).into(),
    };
    json!({"ready": any(random, 75), "serving": any(random, 75), "terminating": any(random, 40)})
}

fn endpoint(random: &mut Random, v6: bool) -> Value {
    let last = random.pick(&PODS.collect::<Vec<_>>());
    let beyond = if v6 { format!("2001:db8:ffff::{last}") } else { format!("198.18.0.{last}") };
    let (address, node) = match random.below(10) {
        0..=4 => (pod(1, last, v6), Some("n1")),
        5..=7 => (pod(2, last, v6), Some("n2")),
        8 => (ip(NODE[usize::from(v6)]), Some("n1")),
        _ => (ip(&beyond), None),
    };
    let names = |names: &[&str]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
    let hints = match random.below(6) {
        0 => json!({"forZones": names(&random.some(&["z1", "z2"], 60))}),
        1 => json!({"forNodes": names(&random.some(&["n1", "n2"], 60)), "forZones": names(&["z1"])}),
        _ => Value::Null,
    };
    json!({"addresses": [address], "nodeName": node, "conditions": conditions(random), "hints": hints})
}

fn service(random: &mut Random, at: usize, maglev: bool) -> Value {
    let vips = [format!("10.96.0.{}", at + 1), format!("fd00:10:96::{}", at + 1)];
    let cluster_ips = match random.below(12) {
        0 => vec!["None".to_owned()],
        1 | 2 => vips[..1].to_vec(),
        3 => vips[1..].to_vec(),
        _ => vips.to_vec(),
    };
    let count = 1 + random.below(3);
    let ports: Vec<Value> = (0..count)
        .map(|number| {
            let protocol = random.pick(&["TCP", "TCP", "UDP", "SCTP"]);
            let node_port = if random.percent(70) { random.pick(&NODE_PORTS) } else { 0 };
            json!({"name": format!("p{number}"), "protocol": protocol, "port": random.pick(&PORTS), "nodePort": node_port})
        })
        .collect();
    let affinity = random.percent(25) && !maglev;
    let balancers = random.some(&BALANCERS, 40);
    let ingress: Vec<Value> =
        balancers.iter().map(|ip| json!({"ip": ip, "ipMode": random.pick(&["VIP", "VIP", "VIP", "Proxy"])})).collect();
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "ns", "name": SERVICES[at], "annotations": {}, "labels": {}},
        "spec": {
            "type": random.pick(&["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]),
            "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips, "ipFamilyPolicy": BOTH,
            "externalIPs": random.some(&EXTERNAL, 30), "ports": ports,
            "internalTrafficPolicy": random.pick(&["Cluster", "Cluster", "Local"]),
            "externalTrafficPolicy": random.pick(&["Cluster", "Local"]),
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    });
    if affinity {
        object["spec"]["sessionAffinity"] = "ClientIP".into();
        object["spec"]["sessionAffinityConfig"] =
            json!({"clientIP": {"timeoutSeconds": random.pick(&[10, 600, 10_800])}});
    }
    if random.percent(30) {
        object["spec"]["loadBalancerSourceRanges"] = random.some(&RANGES, 35).into();
    }
    if maglev {
        object["metadata"]["annotations"]["keelway.dev/load-balancing"] = "maglev".into();
    }
    if random.percent(3) {
        object["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"] = "another".into();
    }
    object
}

/// A slice of a Service; its Service's number and the port's name say which port, so that a backend is one Service's.
fn slice(random: &mut Random, service: &Value, at: usize, number: usize) -> Value {
    let v6 = random.percent(45);
    let shared = random.percent(30);
    let ports = service["spec"]["ports"].as_array().cloned().unwrap_or_default();
    let ports: Vec<Value> = ports
        .iter()
        .enumerate()
        .filter_map(|(place, port)| {
            let offset = if shared { 0 } else { 10 * place };
            let listed = json!({"name": port["name"], "protocol": port["protocol"], "port": 8080 + at + offset});
            random.percent(92).then_some(listed)
        })
        .collect();
    let count = random.below(6);
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "ns", "name": format!("{}-{number}", SERVICES[at]),
            "labels": {"kubernetes.io/service-name": SERVICES[at]},
        },
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": (0..count).map(|_| endpoint(random, v6)).collect::<Vec<_>>(),
    })
}

fn addresses(value: &Value) -> Vec<IpAddr> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let ingress = list(&value["status"]["loadBalancer"]["ingress"]).into_iter().map(|entry| entry["ip"].clone());
    let all = [list(&value["spec"]["clusterIPs"]), list(&value["spec"]["externalIPs"]), ingress.collect()].concat();
    all.iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect()
}

fn client(random: &mut Random, from: From, v6: bool) -> IpAddr {
    let last = random.pick(&PODS.collect::<Vec<_>>());
    match from {
        From::Pod => pod(1, last, v6),
        From::RemotePod => pod(2, last, v6),
        From::Host => ip(NODE[usize::from(v6)]),
        From::Outside if v6 => ip(&format!("2001:db8:{}::{last}", 1 + random.below(2))),
        From::Outside => ip(random.pick(&["203.0.113.1", "203.0.113.200", "198.51.100.21", "198.18.7.7"])),
    }
}

fn packet(random: &mut Random, services: &[Value], routed: bool) -> Case {
    let service = random.pick(services);
    let port = random.pick(service["spec"]["ports"].as_array().expect("ports"));
    let number = |value: &Value| value.as_u64().unwrap_or(0) as u16;
    let mut to = addresses(&service);
    to.push(ip("10.96.0.99"));
    let node: Vec<IpAddr> = NODE.iter().map(|addr| ip(addr)).collect();
    let (addr, at) = match number(&port["nodePort"]) {
        node_port if node_port != 0 && random.percent(30) => (random.pick(&node), node_port),
        _ => (random.pick(&to), number(&port["port"])),
    };
    let at = if random.percent(8) { random.pick(&[9, 53, 80, 443, 30_080]) } else { at };
    let protocol =
        if random.percent(8) { "TCP".into() } else { port["protocol"].as_str().expect("a protocol").to_owned() };
    let from = match random.below(10) {
        0..=4 => From::Outside,
        5 | 6 if routed => From::RemotePod,
        // To its own addresses a host sends by its loopback device.
        7 | 8 if protocol == "SCTP" && !node.contains(&addr) => From::Host,
        _ => From::Pod,
    };
    let client = client(random, from, addr.is_ipv6());
    Case { from, client, to: SocketAddr::from((addr, at)), protocol, verdict: None }
}

/// Of what there is: conditions change, one or the other slice loses its endpoints, one or the other Service its policies or type.
/// Ports stay.
fn change(random: &mut Random, objects: &[Value]) -> Vec<Value> {
    let mut changed = objects.to_vec();
    for object in &mut changed {
        if object["kind"] == "Service" {
            if random.percent(30) {
                object["spec"]["internalTrafficPolicy"] = random.pick(&["Cluster", "Local"]).into();
                object["spec"]["externalTrafficPolicy"] = random.pick(&["Cluster", "Local"]).into();
            }
            if random.percent(8) {
                object["spec"]["type"] = random.pick(&["ClusterIP", "NodePort", "LoadBalancer"]).into();
            }
            continue;
        }
        for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
            if random.percent(40) {
                endpoint["conditions"] = conditions(random);
            }
        }
        if random.percent(15) {
            object["endpoints"] = json!([]);
        }
    }
    changed
}

/// Objects, packets, and then the objects change, two times. The agent may start anew between.
pub fn scenario(random: &mut Random) -> Scenario {
    let routed = random.percent(50);
    // Where all are hashed, the very backend is known.
    let maglev = random.percent(20);
    let services: Vec<Value> = (0..SERVICES.len()).map(|at| service(random, at, maglev)).collect();
    let slices = |random: &mut Random| -> Vec<Value> {
        services.iter().enumerate().flat_map(|(at, of)| [1, 2, 3].map(|number| slice(random, of, at, number))).collect()
    };
    let packets = |random: &mut Random| (0..30).map(|_| packet(random, &services, routed)).collect();
    let mut objects: Vec<Value> = services.iter().cloned().chain(slices(random)).collect();
    let mut steps = vec![Step { put: objects.clone(), packets: packets(random), ..Step::default() }];
    for _ in 0..2 {
        objects = change(random, &objects);
        let restart = random.percent(30);
        let gone = random.some(&SERVICES, 8).into_iter().map(|name| format!("Service/ns/{name}")).collect();
        steps.push(Step { put: objects.clone(), delete: gone, restart, packets: packets(random) });
    }
    Scenario {
        about: "random".into(),
        zone: random.pick(&[None, Some("z1".to_owned()), Some("z2".to_owned())]),
        routed,
        dsr: random.pick(&[Dsr::None, Dsr::None, Dsr::Tcp, Dsr::All]),
        steps,
    }
}
