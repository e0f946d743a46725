//! Histories in words: node ports, load balancers, external addresses, source ranges, draining, affinity, health checks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use keelway_proxy::model::{
    EndpointPort, EndpointSlice, LoadBalancing, Protocol, Service, ServicePort, ServiceType, SliceEndpoint,
    TrafficPolicy,
};
use keelway_proxy::{
    AFFINITY_GROUP, Backend, FrontendKey, FrontendKind, Limits, Model, NodeInfo, ObjectName, Op, Origin, Packet, Place,
    Simulated, Tables, Verdict, flags, maglev,
};

const LIMITS: Limits =
    Limits { frontends: 1000, slots: 100_000, backends: 1000, source_ranges: 1000, maglev: maglev::SIZES };

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A load balancer of both families with a node port, a balancer's address and an external one.
fn web() -> Service {
    Service {
        name: ObjectName::new("ns", "web"),
        service_type: ServiceType::LoadBalancer,
        cluster_ips: vec![addr("10.96.0.1"), addr("fd00:96::1")],
        load_balancer_ips: vec![addr("198.51.100.1")],
        external_ips: vec![addr("198.51.100.2")],
        ports: vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: 30080 }],
        ..Service::default()
    }
}

fn endpoint(address: &str, node: &str) -> SliceEndpoint {
    SliceEndpoint {
        addresses: vec![addr(address)],
        ready: true,
        serving: true,
        node_name: Some(node.into()),
        ..SliceEndpoint::default()
    }
}

fn slice(endpoints: Vec<SliceEndpoint>) -> EndpointSlice {
    EndpointSlice {
        name: ObjectName::new("ns", "web-1"),
        service: "web".into(),
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: Some(8080) }],
        endpoints,
        problems: Vec::new(),
    }
}

struct Node {
    model: Model,
    tables: Tables,
    kernel: Simulated,
}

impl Node {
    fn new() -> Self {
        let node = NodeInfo {
            name: "n1".into(),
            zone: None,
            ips: vec![addr("192.0.2.1")],
            addresses: vec![(addr("192.0.2.1"), false), (addr("127.0.0.1"), true), (addr("::1"), true)],
        };
        Self { model: Model::new(node), tables: Tables::new(LIMITS), kernel: Simulated::default() }
    }

    fn flush(&mut self) -> Vec<Op> {
        let changes = self.model.take_changes();
        let ops: Vec<Op> = changes.iter().flat_map(|change| self.tables.apply(change).unwrap()).collect();
        ops.iter().for_each(|op| self.kernel.execute(op));
        assert_eq!(self.kernel.check(), Ok(()));
        ops
    }

    fn serve(&mut self, service: &Service, endpoints: &[(&str, &str)]) {
        self.model.upsert_service(service.clone());
        self.model.upsert_slice(slice(endpoints.iter().map(|(address, node)| endpoint(address, node)).collect()));
        self.flush();
    }

    fn dial(&self, place: Place, client: &str, ip: &str, port: u16) -> String {
        let packet = Packet { place, client: addr(client), addr: addr(ip), port, proto: 6 };
        match self.kernel.verdict(&packet).unwrap() {
            Verdict::Forward(forward) => {
                let backends: Vec<String> = forward.backends.iter().map(|b| b.addr.to_string()).collect();
                backends.join(" ") + if forward.keep_source { " keep" } else { "" }
            }
            other => format!("{other:?}"),
        }
    }

    fn outside(&self, ip: &str, port: u16) -> String {
        self.dial(Place::Outside, "203.0.113.1", ip, port)
    }

    fn pod(&self, ip: &str, port: u16) -> String {
        self.dial(Place::Pod, "10.0.0.9", ip, port)
    }

    fn host(&self, ip: &str, port: u16) -> String {
        self.dial(Place::Host, "192.0.2.1", ip, port)
    }
}

#[test]
fn a_node_port_answers_on_the_nodes_addresses_only() {
    let mut node = Node::new();
    node.serve(&web(), &[("10.0.0.1", "n1"), ("10.0.1.1", "n2")]);
    let all = "10.0.0.1 10.0.1.1";
    assert_eq!(node.outside("192.0.2.1", 30080), all);
    assert_eq!(node.pod("192.0.2.1", 30080), all);
    assert_eq!(node.host("127.0.0.1", 30080), all);
    assert_eq!(node.host("0.0.0.0", 30080), all, "which is the dialling host itself");
    assert_eq!(node.pod("127.0.0.1", 30080), "NotAService", "a pod's loopback is its own");
    assert_eq!(node.pod("0.0.0.0", 30080), "NotAService");
    assert_eq!(node.outside("192.0.2.2", 30080), "NotAService", "another node's");
    assert_eq!(node.outside("192.0.2.1", 30081), "NotAService", "other ports are the node's own");
    assert_eq!(node.host("::1", 30080), "Refuse", "the family is served, and has no endpoints");

    // However many addresses: one entry a family and port, one an address.
    let node_ports = node.kernel.frontends.values().filter(|f| f.flags & flags::NODE_PORT != 0).count();
    assert_eq!(node_ports, 2);
    let before = node.kernel.frontends.len();
    let mut info = NodeInfo { name: "n1".into(), ..NodeInfo::default() };
    info.addresses = (1..=5).map(|last| (addr(&format!("192.0.2.{last}")), false)).collect();
    node.model.set_node(info);
    assert_eq!(node.flush().len(), 4 + 2, "four addresses came, two went");
    assert_eq!(node.kernel.frontends.len(), before + 2);
    assert_eq!(node.outside("192.0.2.5", 30080), all);

    // allocateLoadBalancerNodePorts: false leaves the balancer's addresses.
    let mut service = web();
    service.ports[0].node_port = 0;
    node.model.upsert_service(service);
    node.flush();
    assert_eq!(node.outside("192.0.2.1", 30080), "NotAService");
    assert_eq!(node.outside("198.51.100.1", 80), all);
    assert_eq!(node.outside("198.51.100.1", 81), "NotAService", "a balancer's other ports are not ours to refuse");
}

#[test]
fn an_address_of_the_node_can_be_a_services_too() {
    let mut node = Node::new();
    let mut service = web();
    service.load_balancer_ips = vec![addr("192.0.2.1")];
    service.cluster_ips.push(addr("192.0.2.1"));
    node.serve(&service, &[("10.0.0.1", "n1")]);
    assert_eq!(node.outside("192.0.2.1", 80), "10.0.0.1");
    assert_eq!(node.outside("192.0.2.1", 30080), "10.0.0.1");
    assert_eq!(node.outside("192.0.2.1", 22), "NotAService", "the node's ssh is not refused");
    node.model.set_node(NodeInfo { name: "n1".into(), ..NodeInfo::default() });
    node.flush();
    assert_eq!(node.outside("192.0.2.1", 22), "Refuse");
}

#[test]
fn a_local_external_policy_is_for_clients_outside() {
    let mut node = Node::new();
    let mut service = web();
    service.external_traffic_policy = TrafficPolicy::Local;
    node.serve(&service, &[("10.0.0.1", "n1"), ("10.0.1.1", "n2")]);
    for (ip, port) in [("198.51.100.1", 80), ("198.51.100.2", 80), ("192.0.2.1", 30080)] {
        assert_eq!(node.outside(ip, port), "10.0.0.1 keep", "{ip}");
        assert_eq!(node.pod(ip, port), "10.0.0.1 10.0.1.1", "{ip}");
        assert_eq!(node.host(ip, port), "10.0.0.1 10.0.1.1", "{ip}");
    }
    assert_eq!(node.outside("10.96.0.1", 80), "10.0.0.1 10.0.1.1", "cluster IPs follow the internal policy");

    // None here, some elsewhere: dropped for those outside only. None anywhere: refused for all.
    node.model.upsert_slice(slice(vec![endpoint("10.0.1.1", "n2")]));
    node.flush();
    assert_eq!(node.outside("198.51.100.1", 80), "Drop");
    assert_eq!(node.pod("198.51.100.1", 80), "10.0.1.1");
    node.model.upsert_slice(slice(vec![]));
    node.flush();
    assert_eq!(node.outside("198.51.100.1", 80), "Refuse");
    assert_eq!(node.pod("198.51.100.1", 80), "Refuse");

    service.external_traffic_policy = TrafficPolicy::Cluster;
    node.serve(&service, &[("10.0.1.1", "n2")]);
    assert_eq!(node.outside("198.51.100.1", 80), "10.0.1.1");
    assert!(node.kernel.frontends.keys().all(|key| key.from == Origin::Anyone));
}

#[test]
fn a_change_of_policy_and_endpoints_together_is_seen_at_once() {
    let mut node = Node::new();
    let mut service = web();
    node.serve(&service, &[("10.0.0.1", "n1"), ("10.0.1.1", "n2")]);
    for (policy, before, after) in [
        (TrafficPolicy::Local, "10.0.0.1 10.0.1.1", "10.0.0.2 keep"),
        (TrafficPolicy::Cluster, "10.0.0.2 keep", "10.0.0.3 10.0.1.3"),
    ] {
        service.external_traffic_policy = policy;
        node.model.upsert_service(service.clone());
        let ends = match policy {
            TrafficPolicy::Local => vec![endpoint("10.0.0.2", "n1"), endpoint("10.0.1.2", "n2")],
            TrafficPolicy::Cluster => vec![endpoint("10.0.0.3", "n1"), endpoint("10.0.1.3", "n2")],
        };
        node.model.upsert_slice(slice(ends));
        let start = node.kernel.clone();
        let ops = node.flush();
        node.kernel = start;
        for op in &ops {
            assert!([before, after].contains(&&*node.outside("198.51.100.1", 80)), "before {op:?}");
            node.kernel.execute(op);
        }
        assert_eq!(node.outside("198.51.100.1", 80), after);
    }
}

#[test]
fn source_ranges_hold_for_the_balancers_addresses() {
    let mut node = Node::new();
    let mut service = web();
    service.load_balancer_ips.push(addr("2001:db8::1"));
    service.source_ranges = Some(vec!["203.0.113.0/25".parse().unwrap(), "10.0.0.0/24".parse().unwrap()]);
    node.serve(&service, &[("10.0.0.1", "n1")]);
    assert_eq!(node.outside("198.51.100.1", 80), "10.0.0.1");
    assert_eq!(node.dial(Place::Outside, "203.0.113.200", "198.51.100.1", 80), "Forbidden");
    assert_eq!(node.pod("198.51.100.1", 80), "10.0.0.1", "the pod's address is in a range");
    assert_eq!(node.host("198.51.100.1", 80), "Forbidden", "the node's is not");
    for (ip, port) in [("198.51.100.2", 80), ("192.0.2.1", 30080), ("10.96.0.1", 80)] {
        assert_eq!(node.dial(Place::Outside, "203.0.113.200", ip, port), "10.0.0.1", "{ip}: no balancer's");
    }
    let v6 = |node: &Node| node.dial(Place::Outside, "2001:db8:1::1", "2001:db8::1", 80);
    assert_eq!(v6(&node), "Forbidden", "ranges of the other family let nobody in");

    // A restricted frontend is never open while its ranges change, and who may in the end may all along.
    service.source_ranges = Some(vec!["203.0.113.0/24".parse().unwrap()]);
    node.model.upsert_service(service.clone());
    let before = node.kernel.clone();
    let ops = node.flush();
    node.kernel = before;
    for op in &ops {
        node.kernel.execute(op);
        assert_eq!(node.outside("198.51.100.1", 80), "10.0.0.1", "after {op:?}");
        assert_eq!(node.host("198.51.100.1", 80), "Forbidden", "after {op:?}");
    }
    assert_eq!(node.pod("198.51.100.1", 80), "Forbidden");

    // The node's own address in a range: it may dial from the balancer's, when that is on its loopback device.
    service.source_ranges = Some(vec!["192.0.2.0/24".parse().unwrap()]);
    node.model.upsert_service(service.clone());
    node.flush();
    assert_eq!(node.dial(Place::Host, "198.51.100.1", "198.51.100.1", 80), "10.0.0.1");

    service.source_ranges = Some(vec!["0.0.0.0/0".parse().unwrap()]);
    node.model.upsert_service(service);
    node.flush();
    assert_eq!(node.dial(Place::Outside, "203.0.113.200", "198.51.100.1", 80), "10.0.0.1");
    assert_eq!(v6(&node), "Forbidden", "everybody of one family");
    assert_eq!(node.kernel.source_ranges.len(), 0);
}

#[test]
fn a_backend_drains_until_the_slices_forget_it() {
    let mut node = Node::new();
    node.serve(&web(), &[("10.0.0.1", "n1"), ("10.0.0.2", "n1")]);
    let id = |node: &Node, ip: &str| {
        let found = node.kernel.backends.iter().find(|(_, (backend, _))| backend.addr == addr(ip));
        found.map(|(id, (_, draining))| (*id, *draining))
    };
    let first = id(&node, "10.0.0.1").unwrap();
    assert!(!first.1);
    let mut leaving = endpoint("10.0.0.1", "n1");
    (leaving.ready, leaving.terminating) = (false, true);
    node.model.upsert_slice(slice(vec![leaving.clone(), endpoint("10.0.0.2", "n1")]));
    node.flush();
    assert_eq!(node.pod("10.96.0.1", 80), "10.0.0.2");
    assert_eq!(id(&node, "10.0.0.1"), Some((first.0, true)));

    let key = FrontendKey::new(addr("10.96.0.1"), 80, Protocol::Tcp);
    let listed = node.tables.list().find(|listed| listed.key == key).unwrap();
    let states: Vec<(String, bool)> =
        listed.backends.iter().map(|(_, b, draining)| (b.addr.to_string(), *draining)).collect();
    assert_eq!(states, [("10.0.0.2".to_owned(), false), ("10.0.0.1".to_owned(), true)]);
    assert_eq!(listed.owner, Some((&ObjectName::new("ns", "web"), FrontendKind::ClusterIp)));

    // A new agent keeps it, though no slot tells of it.
    let (tables, ops, errors) = Tables::restore(LIMITS, &node.kernel.dump(), &node.model.all());
    assert_eq!((ops, errors), (vec![], vec![]));
    node.tables = tables;
    // It comes back under its number.
    node.serve(&web(), &[("10.0.0.1", "n1"), ("10.0.0.2", "n1")]);
    assert_eq!(id(&node, "10.0.0.1"), Some((first.0, false)));
    leaving.serving = false;
    node.model.upsert_slice(slice(vec![leaving, endpoint("10.0.0.2", "n1")]));
    node.flush();
    assert_eq!(id(&node, "10.0.0.1"), Some((first.0, true)), "whatever its condition");
    node.model.upsert_slice(slice(vec![endpoint("10.0.0.2", "n1")]));
    node.flush();
    assert_eq!(id(&node, "10.0.0.1"), None);

    // An endpoint that never served is not listed at all.
    let mut starting = endpoint("10.0.0.3", "n1");
    (starting.ready, starting.serving) = (false, false);
    node.model.upsert_slice(slice(vec![endpoint("10.0.0.2", "n1"), starting]));
    assert_eq!(node.flush(), vec![]);
}

#[test]
fn datagram_flows_keep_a_backend_while_it_serves() {
    let mut node = Node::new();
    let mut service = web();
    service.ports[0].protocol = Protocol::Udp;
    let udp = |endpoints: Vec<SliceEndpoint>| {
        let mut slice = slice(endpoints);
        slice.ports[0].protocol = Protocol::Udp;
        slice
    };
    let packet = |place| Packet { place, client: addr("203.0.113.1"), addr: addr("198.51.100.1"), port: 80, proto: 17 };
    let keeps = |node: &Node, place, ip: &str| {
        let backend = Backend { addr: addr(ip), port: 8080, proto: 17 };
        node.kernel.keeps(&packet(place), &backend).unwrap()
    };
    node.model.upsert_service(service.clone());
    node.model.upsert_slice(udp(vec![endpoint("10.0.0.1", "n1"), endpoint("10.0.1.1", "n2")]));
    node.flush();
    // Those outside are served here only from now on. What they have elsewhere they keep.
    service.external_traffic_policy = TrafficPolicy::Local;
    node.model.upsert_service(service.clone());
    node.flush();
    assert!(keeps(&node, Place::Outside, "10.0.1.1") && keeps(&node, Place::Pod, "10.0.1.1"));

    // It terminates, and another comes; a new agent finds all that.
    let mut leaving = endpoint("10.0.1.1", "n2");
    (leaving.ready, leaving.terminating) = (false, true);
    node.model.upsert_slice(udp(vec![endpoint("10.0.0.1", "n1"), leaving.clone(), endpoint("10.0.1.2", "n2")]));
    node.flush();
    let (tables, ops, errors) = Tables::restore(LIMITS, &node.kernel.dump(), &node.model.all());
    assert_eq!((ops, errors), (vec![], vec![]));
    node.tables = tables;
    service.external_traffic_policy = TrafficPolicy::Cluster;
    node.model.upsert_service(service.clone());
    node.flush();
    for place in [Place::Outside, Place::Pod] {
        let verdict = node.kernel.verdict(&packet(place)).unwrap();
        let Verdict::Forward(forward) = verdict else { panic!("{verdict:?}") };
        let chosen: Vec<String> = forward.backends.iter().map(|backend| backend.addr.to_string()).collect();
        assert_eq!(chosen, ["10.0.0.1", "10.0.1.2"], "of new flows");
        assert!(keeps(&node, place, "10.0.1.1") && keeps(&node, place, "10.0.0.1"));
    }
    // It serves no longer, while the slices still have it.
    leaving.serving = false;
    node.model.upsert_slice(udp(vec![endpoint("10.0.0.1", "n1"), leaving, endpoint("10.0.1.2", "n2")]));
    let ops = node.flush();
    assert!(!keeps(&node, Place::Outside, "10.0.1.1") && !keeps(&node, Place::Pod, "10.0.1.1"));
    assert!(ops.iter().all(|op| matches!(op, Op::DeleteMember { .. } | Op::DeleteBackend { .. })), "{ops:?}");
}

#[test]
fn affinity_finds_a_backend_wherever_its_slot_moves() {
    let mut node = Node::new();
    let mut service = web();
    service.affinity_seconds = Some(60);
    node.serve(&service, &[("10.0.0.1", "n1"), ("10.0.0.2", "n1"), ("10.0.0.3", "n1")]);
    let third = node.kernel.backends.iter().find(|(_, (b, _))| b.addr == addr("10.0.0.3")).map(|(id, _)| *id).unwrap();
    node.model.upsert_slice(slice(vec![endpoint("10.0.0.2", "n1"), endpoint("10.0.0.3", "n1")]));
    let before = node.kernel.clone();
    let ops = node.flush();
    assert!(ops.iter().any(|op| matches!(op, Op::PutMember { backend, .. } if *backend == third)), "{ops:?}");
    node.kernel = before;
    for op in &ops {
        node.kernel.execute(op);
        for ((frontend, backend), slot) in node.kernel.members.iter().filter(|((_, backend), _)| *backend == third) {
            let key = keelway_proxy::SlotKey { frontend: *frontend, slot: *slot };
            assert_eq!(node.kernel.slots.get(&key), Some(backend), "after {op:?}");
        }
    }
    service.affinity_seconds = None;
    node.model.upsert_service(service);
    node.flush();
    assert!(node.kernel.members.is_empty());
}

#[test]
fn affinity_is_a_service_ports_whichever_address_is_dialled() {
    let mut node = Node::new();
    let mut service = web();
    service.affinity_seconds = Some(60);
    service.ports.push(ServicePort { name: "other".into(), protocol: Protocol::Tcp, port: 81, node_port: 0 });
    node.serve(&service, &[("10.0.0.1", "n1"), ("10.0.1.1", "n2")]);
    let groups = |node: &Node| -> BTreeMap<FrontendKey, u32> {
        let frontends = node.kernel.frontends.iter().filter(|(_, frontend)| frontend.id != 0);
        frontends.map(|(key, frontend)| (*key, node.kernel.members[&(frontend.id, AFFINITY_GROUP)])).collect()
    };
    let of = |groups: &BTreeMap<FrontendKey, u32>, port: &[u16], ipv6: bool| -> BTreeSet<u32> {
        let keys = groups.iter().filter(|(key, _)| port.contains(&key.port) && key.addr.is_ipv6() == ipv6);
        keys.map(|(_, group)| *group).collect()
    };
    let before = groups(&node);
    let all: Vec<BTreeSet<u32>> = [(false, &[80, 30080][..]), (true, &[80, 30080]), (false, &[81]), (true, &[81])]
        .map(|(ipv6, ports)| of(&before, ports, ipv6))
        .into();
    assert!(all.iter().all(|group| group.len() == 1), "{all:?}");
    assert_eq!(all.iter().flatten().collect::<BTreeSet<_>>().len(), 4, "{all:?}");

    // A changed policy makes frontends anew, but not the group; nor does a new agent, which may meet a changed policy.
    for policy in [TrafficPolicy::Local, TrafficPolicy::Cluster] {
        service.external_traffic_policy = policy;
        node.model.upsert_service(service.clone());
        node.flush();
        assert_eq!(of(&groups(&node), &[80, 30080], false), all[0]);
    }
    service.external_traffic_policy = TrafficPolicy::Local;
    node.model.upsert_service(service.clone());
    let (tables, ops, errors) = Tables::restore(LIMITS, &node.kernel.dump(), &node.model.all());
    assert_eq!(errors, vec![]);
    ops.iter().for_each(|op| node.kernel.execute(op));
    assert_eq!(node.kernel.check(), Ok(()));
    node.tables = tables;
    assert_eq!(of(&groups(&node), &[80, 30080], false), all[0]);

    // Only one of the frontends stays.
    service.external_ips.clear();
    service.load_balancer_ips.clear();
    service.ports[0].node_port = 0;
    node.model.upsert_service(service.clone());
    node.flush();
    assert_eq!(of(&groups(&node), &[80], false), all[0]);

    // From tables of before there were groups.
    let mut old = node.kernel.clone();
    old.members.retain(|(_, backend), _| *backend != AFFINITY_GROUP);
    let (_, ops, _) = Tables::restore(LIMITS, &old.dump(), &node.model.all());
    ops.iter().for_each(|op| old.execute(op));
    assert_eq!(old.check(), Ok(()));
    let ids: BTreeSet<u32> = old.frontends.values().map(|frontend| frontend.id).collect();
    for ((_, backend), group) in &old.members {
        assert!(
            *backend != AFFINITY_GROUP || !ids.contains(group),
            "a frontend may have something of its own for a client"
        );
    }

    node.model.delete_service(&service.name);
    node.model.set_node(NodeInfo { name: "n1".into(), ..NodeInfo::default() });
    node.flush();
    assert_eq!(node.kernel, Simulated::default());
}

#[test]
fn health_checks_count_ready_pods_of_this_node_once() {
    let mut node = Node::new();
    let mut service = web();
    service.health_check_node_port = 32000;
    node.serve(&service, &[("10.0.0.1", "n1")]);
    assert_eq!(node.model.health_checks().count(), 0, "only with a Local external policy");

    service.external_traffic_policy = TrafficPolicy::Local;
    let mut leaving = endpoint("10.0.0.3", "n1");
    (leaving.ready, leaving.terminating) = (false, true);
    let mut both =
        slice(vec![endpoint("10.0.0.1", "n1"), endpoint("10.0.0.2", "n1"), endpoint("10.0.1.1", "n2"), leaving]);
    both.ports.push(EndpointPort { name: "more".into(), protocol: Protocol::Tcp, port: Some(8443) });
    node.model.upsert_service(service.clone());
    node.model.upsert_slice(both);
    node.flush();
    let check = node.model.health_checks().next().unwrap();
    assert_eq!((check.port, check.ipv4, check.ipv6), (32000, Some(2), Some(0)));

    node.model.delete_service(&service.name);
    node.flush();
    assert_eq!(node.model.health_checks().count(), 0);
}

#[test]
fn maglev_is_for_what_comes_from_outside() {
    let mut node = Node::new();
    let mut service = web();
    service.load_balancing = LoadBalancing::Maglev;
    node.serve(&service, &[("10.0.0.1", "n1"), ("10.0.0.2", "n1"), ("10.0.0.3", "n2")]);
    let hashed = |node: &Node, key: FrontendKey| {
        let frontend = node.kernel.frontends[&key];
        (frontend.flags & flags::HASHED != 0, frontend.count)
    };
    let balancer = FrontendKey::new(addr("198.51.100.1"), 80, Protocol::Tcp);
    assert_eq!(hashed(&node, balancer), (true, 1021));
    assert_eq!(hashed(&node, FrontendKey::new(addr("10.96.0.1"), 80, Protocol::Tcp)), (false, 3));
    service.external_traffic_policy = TrafficPolicy::Local;
    node.model.upsert_service(service.clone());
    node.flush();
    assert_eq!(hashed(&node, balancer), (false, 3), "the cluster's own clients");
    assert_eq!(hashed(&node, balancer.seen_from(Origin::Outside)), (true, 1021));

    // One more and one less: what is worked out from the table before is what is worked out from nothing.
    service.external_traffic_policy = TrafficPolicy::Cluster;
    for ends in
        [&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"][..], &["10.0.0.2", "10.0.0.4"], &["10.0.0.5", "10.0.0.4"]]
    {
        node.serve(&service, &ends.iter().map(|ip| (*ip, "n1")).collect::<Vec<_>>());
        let id = node.kernel.frontends[&balancer].id;
        let slots = node.kernel.slots.iter().filter(|(key, _)| key.frontend == id);
        let found: Vec<Backend> = slots.map(|(_, backend)| node.kernel.backends[backend].0).collect();
        let mut all: Vec<Backend> = ends.iter().map(|ip| Backend { addr: addr(ip), port: 8080, proto: 6 }).collect();
        all.sort();
        let table = maglev::table(&all, 1021, None);
        assert_eq!(found, table.iter().map(|index| all[*index as usize]).collect::<Vec<_>>());
    }

    // Eleven backends want a larger table: new slots under a new id, then the switch.
    let many: Vec<String> = (1..=11).map(|last| format!("10.0.0.{last}")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|ip| (ip.as_str(), "n1")).collect();
    node.serve(&service, &many);
    assert_eq!(hashed(&node, balancer), (true, 16_381));
    let (_, ops, _) = Tables::restore(LIMITS, &node.kernel.dump(), &node.model.all());
    assert_eq!(ops, vec![]);
    node.model.upsert_slice(slice(vec![]));
    node.flush();
    assert_eq!(node.outside("198.51.100.1", 80), "Refuse");
    assert_eq!(node.kernel.slots.len(), 0);
}

#[test]
fn two_services_want_one_node_port() {
    let mut node = Node::new();
    node.serve(&web(), &[("10.0.0.1", "n1")]);
    let mut other = web();
    other.name = ObjectName::new("ns", "aaa");
    other.cluster_ips = vec![addr("10.96.0.2")];
    other.load_balancer_ips = vec![addr("198.51.100.2")];
    other.external_ips = vec![];
    node.model.upsert_service(other.clone());
    node.flush();
    let conflicts = node.tables.conflicts();
    let found: Vec<(String, &str, &str)> =
        conflicts.iter().map(|c| (c.key.to_string(), &*c.winner.name, &*c.losers[0].0.name)).collect();
    let expected = [
        ("0.0.0.0 port 30080 protocol 6".to_owned(), "aaa", "web"),
        // A balancer's address goes before an external one, whatever the names.
        ("198.51.100.2 port 80 protocol 6".to_owned(), "aaa", "web"),
    ];
    assert_eq!(found, expected);
    assert_eq!(node.outside("192.0.2.1", 30080), "Refuse", "the one that won has no endpoints");
    node.model.delete_service(&other.name);
    node.flush();
    assert_eq!(node.outside("192.0.2.1", 30080), "10.0.0.1");
    assert_eq!(node.tables.conflicts(), []);
}

#[test]
fn addresses_that_mean_the_dialling_host_are_nobodys() {
    let mut node = Node::new();
    let mut service = web();
    service.load_balancer_ips = vec![addr("0.0.0.0"), addr("127.0.0.1"), addr("224.0.0.1")];
    service.external_ips = vec![addr("2001:db8::1")];
    service.cluster_ips = vec![addr("10.96.0.1")];
    node.serve(&service, &[("10.0.0.1", "n1")]);
    let keys: BTreeSet<String> = node.kernel.frontends.keys().map(|key| key.addr.to_string()).collect();
    // 0.0.0.0 is the node port, 127.0.0.1 and ::1 the node's; the Service has no IPv6.
    assert_eq!(keys, ["0.0.0.0", "10.96.0.1", "127.0.0.1", "192.0.2.1", "::1"].map(str::to_owned).into());
    assert_eq!(node.host("127.0.0.1", 80), "NotAService");
}
