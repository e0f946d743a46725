//! Services at random.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use crate::court::{Client, Place, Question};

/// Steele, Lea and Flood's SplitMix64.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[(self.next() % choices.len() as u64) as usize]
    }

    /// In so many of a hundred cases.
    fn percent(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

/// The pods that serve; `l` on the node that is asked, `r` on the other.
pub const SERVERS: [&str; 4] = ["l1", "l2", "r1", "r2"];

/// Where each of them listens.
pub const PORTS: [u16; 2] = [8080, 8081];

/// A Service and its endpoints.
#[derive(Clone, Debug)]
pub struct Wish {
    number: u16,
    kind: &'static str,
    protocol: &'static str,
    internal: &'static str,
    external: &'static str,
    pub affinity: bool,
    ranges: Option<[&'static str; 2]>,
    ip_mode: &'static str,
    /// It has a second port: of the same servers, under another number in the second slice than in the first.
    two_ports: bool,
    endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug)]
struct Endpoint {
    server: &'static str,
    /// `ready`, `serving`, `terminating`; some are left out.
    conditions: [Option<bool>; 3],
    zone_hint: Option<&'static str>,
    node_hint: Option<&'static str>,
    /// In which of the two slices of a family it is; it may be in both.
    slices: [bool; 2],
}

/// The zone of a server, and the name of its node.
pub fn whereabouts(server: &str) -> (&'static str, &'static str) {
    if server.starts_with('l') { ("zone-a", "near") } else { ("zone-b", "far") }
}

impl Wish {
    pub fn new(number: u16, random: &mut Random) -> Self {
        let mut wish = Self {
            number,
            kind: "ClusterIP",
            // A Service's protocol stays: of a port that changes it, kube-proxy and we agree on nothing but the API.
            protocol: if number % 3 == 2 { "UDP" } else { "TCP" },
            internal: "Cluster",
            external: "Cluster",
            affinity: false,
            ranges: None,
            ip_mode: "VIP",
            two_ports: false,
            endpoints: Vec::new(),
        };
        wish.change(random);
        wish
    }

    /// Changes in place whatever may change of a Service.
    pub fn change(&mut self, random: &mut Random) {
        self.kind = random.of(&["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]);
        self.internal = random.of(&["Cluster", "Cluster", "Local"]);
        self.external = random.of(&["Cluster", "Local"]);
        self.affinity = random.percent(20);
        self.ranges = random.of(&[
            None,
            None,
            Some(["192.168.77.0/24", "fd00:77::/64"]),
            Some(["192.0.2.0/24", "2001:db8:9::/64"]),
        ]);
        self.ip_mode = random.of(&["VIP", "VIP", "Proxy"]);
        self.two_ports = random.percent(40);
        let (zones, nodes, whole) = (random.percent(25), random.percent(20), random.percent(80));
        self.endpoints = SERVERS
            .into_iter()
            .filter(|_| random.percent(60))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|server| {
                let (zone, node) = whereabouts(server);
                let hinted = whole || random.percent(70);
                let conditions = random.of(&[
                    [true, true, false],
                    [true, true, false],
                    [false, true, true],
                    [false, false, true],
                    [false, false, false],
                ]);
                Endpoint {
                    server,
                    conditions: conditions.map(|condition| (!random.percent(20)).then_some(condition)),
                    zone_hint: (zones && hinted).then_some(zone),
                    node_hint: (nodes && hinted).then_some(node),
                    slices: random.of(&[[true, false], [true, false], [false, true], [true, true]]),
                }
            })
            .collect();
    }

    /// IPv4 and IPv6, of the Service, of its load balancer, and external.
    fn addresses(&self, which: u8) -> [IpAddr; 2] {
        let host = self.number as u8 + 1;
        match which {
            0 => [
                Ipv4Addr::new(10, 96, 7, host).into(),
                Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 7, host.into()).into(),
            ],
            _ => [
                Ipv4Addr::new(198, 51, 100, host + 100 * (which - 1)).into(),
                Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, which.into(), host.into()).into(),
            ],
        }
    }

    fn node_port(&self) -> u16 {
        30_100 + self.number
    }

    fn second_node_port(&self) -> u16 {
        30_200 + self.number
    }

    /// The Service and two slices a family, where the servers are at `address`.
    pub fn objects(&self, address: impl Fn(&str, bool) -> IpAddr) -> Vec<Value> {
        let name = format!("s{}", self.number);
        let mut ports = vec![json!({"name": "p", "protocol": self.protocol, "port": 80, "targetPort": 8080})];
        if self.two_ports {
            ports.push(json!({"name": "q", "protocol": self.protocol, "port": 81, "targetPort": "q"}));
        }
        let mut spec = json!({
            "type": self.kind, "clusterIP": self.addresses(0)[0], "clusterIPs": self.addresses(0),
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack", "internalTrafficPolicy": self.internal,
            "sessionAffinity": "None", "externalIPs": self.addresses(1),
        });
        // As the API server has it: an external policy with whatever can be dialled from outside.
        spec["externalTrafficPolicy"] = json!(if self.kind == "ClusterIP" { "Cluster" } else { self.external });
        if self.affinity {
            spec["sessionAffinity"] = json!("ClientIP");
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 10_800}});
        }
        let mut status = json!({"loadBalancer": {}});
        if self.kind != "ClusterIP" {
            for (port, number) in ports.iter_mut().zip([self.node_port(), self.second_node_port()]) {
                port["nodePort"] = json!(number);
            }
        }
        if self.kind == "LoadBalancer" {
            let ingress = self.addresses(2).map(|ip| json!({"ip": ip, "ipMode": self.ip_mode}));
            status = json!({"loadBalancer": {"ingress": ingress}});
            if let Some(ranges) = self.ranges {
                spec["loadBalancerSourceRanges"] = json!(ranges);
            }
            if self.external == "Local" {
                spec["healthCheckNodePort"] = json!(31_100 + self.number);
            }
        }
        spec["ports"] = json!(ports);
        let mut all = vec![
            json!({"kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": spec, "status": status}),
        ];
        for (v6, number) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
            let family = if v6 { "IPv6" } else { "IPv4" };
            let endpoints = self.endpoints.iter().filter(|endpoint| endpoint.slices[number]);
            let endpoints: Vec<Value> =
                endpoints.map(|endpoint| endpoint.object(address(endpoint.server, v6))).collect();
            let mut ports = vec![json!({"name": "p", "protocol": self.protocol, "port": PORTS[0]})];
            if self.two_ports {
                ports.push(json!({"name": "q", "protocol": self.protocol, "port": PORTS[number]}));
            }
            all.push(json!({"kind": "EndpointSlice", "addressType": family,
                "metadata": {"name": format!("{name}-{number}-{family}").to_lowercase(), "namespace": "default",
                    "labels": {"kubernetes.io/service-name": name}},
                "ports": ports, "endpoints": endpoints}));
        }
        all
    }

    /// Everything that can be dialled of it, by everybody.
    pub fn questions(&self) -> Vec<Question> {
        let mut all = Vec::new();
        for client in [Client::Pod, Client::Host, Client::Outside] {
            for v6 in [false, true] {
                let mut ask = |place| all.push(Question { client, place, v6, udp: self.protocol == "UDP" });
                if client != Client::Outside {
                    ask(Place::At(self.addresses(0)[usize::from(v6)], 80));
                    if self.two_ports {
                        ask(Place::At(self.addresses(0)[usize::from(v6)], 81));
                    }
                }
                ask(Place::At(self.addresses(1)[usize::from(v6)], 80));
                if self.kind != "ClusterIP" {
                    ask(Place::NodePort(self.node_port()));
                    if self.two_ports && client == Client::Outside {
                        ask(Place::NodePort(self.second_node_port()));
                    }
                }
                // What a load balancer is to see itself is not ours to take.
                if self.kind == "LoadBalancer" && self.ip_mode == "VIP" {
                    ask(Place::At(self.addresses(2)[usize::from(v6)], 80));
                }
            }
        }
        all
    }
}

impl Endpoint {
    fn object(&self, address: IpAddr) -> Value {
        let (zone, node) = whereabouts(self.server);
        let mut object = json!({"addresses": [address], "nodeName": node, "zone": zone, "conditions": {}});
        for (name, condition) in ["ready", "serving", "terminating"].into_iter().zip(self.conditions) {
            if let Some(condition) = condition {
                object["conditions"][name] = condition.into();
            }
        }
        if let Some(zone) = self.zone_hint {
            object["hints"]["forZones"] = json!([{"name": zone}]);
        }
        if let Some(node) = self.node_hint {
            object["hints"]["forNodes"] = json!([{"name": node}]);
        }
        object
    }
}
