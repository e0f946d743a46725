//! Histories in words: what is written, in which order, when one thing changes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use keelway_proxy::model::{EndpointPort, EndpointSlice, Protocol, Service, ServicePort, SliceEndpoint, TrafficPolicy};
use keelway_proxy::{
    Backend, FrontendKey, Limits, Model, NodeInfo, ObjectName, Op, Packet, Place, Simulated, Table, Tables, Verdict,
    maglev,
};

const LIMITS: Limits = Limits { frontends: 4, slots: 5, backends: 4, source_ranges: 2, maglev: maglev::SIZES };

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn service(namespace: &str, name: &str, ip: &str) -> Service {
    Service {
        name: ObjectName::new(namespace, name),
        cluster_ips: vec![addr(ip)],
        ports: vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 }],
        ..Service::default()
    }
}

fn endpoint(address: &str) -> SliceEndpoint {
    SliceEndpoint {
        addresses: vec![addr(address)],
        ready: true,
        serving: true,
        terminating: false,
        node_name: Some("n1".into()),
        zone: None,
        zone_hints: Vec::new(),
        node_hints: Vec::new(),
    }
}

fn slice(namespace: &str, service: &str, addresses: &[&str]) -> EndpointSlice {
    EndpointSlice {
        name: ObjectName::new(namespace, format!("{service}-1")),
        service: service.into(),
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: Some(8080) }],
        endpoints: addresses.iter().map(|address| endpoint(address)).collect(),
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
        let node = NodeInfo { name: "n1".into(), ..NodeInfo::default() };
        Self { model: Model::new(node), tables: Tables::new(LIMITS), kernel: Simulated::default() }
    }

    /// Applies what changed and returns the kinds of writes, in their order.
    fn flush(&mut self) -> Vec<&'static str> {
        let changes = self.model.take_changes();
        let ops: Vec<Op> = changes.iter().flat_map(|change| self.tables.apply(change).unwrap()).collect();
        ops.iter().for_each(|op| self.kernel.execute(op));
        ops.iter().map(kind).collect()
    }

    /// What a pod meets that dials a TCP port.
    fn verdict(&self, ip: &str, port: u16) -> Verdict {
        let packet = Packet { place: Place::Pod, client: addr("10.0.9.9"), addr: addr(ip), port, proto: 6 };
        self.kernel.verdict(&packet).unwrap()
    }

    fn backends(&self, ip: &str) -> BTreeSet<String> {
        match self.verdict(ip, 80) {
            Verdict::Forward(forward) => forward.backends.iter().map(|b: &Backend| b.addr.to_string()).collect(),
            other => BTreeSet::from([format!("{other:?}")]),
        }
    }
}

fn kind(op: &Op) -> &'static str {
    match op {
        Op::PutBackend { draining: false, .. } => "backend",
        Op::PutBackend { draining: true, .. } => "draining",
        Op::PutSlot { .. } => "slot",
        Op::PutMember { .. } => "member",
        Op::PutSourceRange { .. } => "range",
        Op::PutFrontend { key, .. } if key.is_any_port() => "any port",
        Op::PutFrontend { .. } => "frontend",
        Op::DeleteFrontend { key } if key.is_any_port() => "-any port",
        Op::DeleteFrontend { .. } => "-frontend",
        Op::DeleteMember { .. } => "-member",
        Op::DeleteSourceRange { .. } => "-range",
        Op::DeleteSlot { .. } => "-slot",
        Op::DeleteBackend { .. } => "-backend",
    }
}

fn set(items: &[&str]) -> BTreeSet<String> {
    items.iter().map(|s| (*s).to_owned()).collect()
}

#[test]
fn writes_come_in_the_order_that_keeps_packets_right() {
    let mut node = Node::new();
    node.model.upsert_service(service("ns", "web", "10.96.0.1"));
    assert_eq!(node.flush(), ["frontend", "any port"]);
    assert_eq!(node.verdict("10.96.0.1", 80), Verdict::Refuse);
    assert_eq!(node.verdict("10.96.0.1", 81), Verdict::Refuse);
    assert_eq!(node.verdict("10.96.0.2", 80), Verdict::NotAService);

    node.model.upsert_slice(slice("ns", "web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"]));
    assert_eq!(node.flush(), ["backend", "backend", "backend", "slot", "slot", "slot", "frontend"]);

    // One goes: the last takes its slot, the count falls, the last slot goes, then the backend.
    node.model.upsert_slice(slice("ns", "web", &["10.0.0.2", "10.0.0.3"]));
    assert_eq!(node.flush(), ["slot", "frontend", "-slot", "-backend"]);
    assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.2", "10.0.0.3"]));

    // One is replaced by another: its slot is overwritten, the frontend stays.
    node.model.upsert_slice(slice("ns", "web", &["10.0.0.2", "10.0.0.4"]));
    assert_eq!(node.flush(), ["backend", "slot", "-backend"]);
    assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.2", "10.0.0.4"]));

    // Several events of one Service that end where they began write nothing.
    node.model.delete_slice(&ObjectName::new("ns", "web-1"));
    node.model.upsert_slice(slice("ns", "web", &["10.0.0.4", "10.0.0.2"]));
    assert!(node.flush().is_empty());

    node.model.delete_service(&ObjectName::new("ns", "web"));
    let removal = ["-any port", "-frontend", "-slot", "-slot", "-backend", "-backend"];
    assert_eq!(node.flush(), removal);
}

#[test]
fn numbers_are_not_reused_soon() {
    let mut node = Node::new();
    node.model.upsert_service(service("ns", "web", "10.96.0.1"));
    for address in ["10.0.0.1", "10.0.0.2", "10.0.0.3"] {
        node.model.upsert_slice(slice("ns", "web", &[address]));
        node.flush();
    }
    assert_eq!(node.kernel.backends.keys().copied().collect::<Vec<_>>(), [3]);
}

#[test]
fn the_api_server_keeps_its_last_backends() {
    let mut node = Node::new();
    node.model.upsert_service(service("default", "kubernetes", "10.96.0.1"));
    node.model.upsert_slice(slice("default", "kubernetes", &["192.0.2.1", "192.0.2.2"]));
    node.flush();
    node.model.upsert_slice(slice("default", "kubernetes", &["192.0.2.1"]));
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["192.0.2.1"]), "it may shrink");
    node.model.upsert_slice(slice("default", "kubernetes", &[]));
    assert!(node.flush().is_empty());

    // Over a restart too, which knows the old set from the kernel only.
    let (tables, ops, errors) = Tables::restore(LIMITS, &node.kernel.dump(), &node.model.all());
    assert_eq!((ops, errors), (vec![], vec![]));
    node.tables = tables;
    node.model.upsert_slice(slice("default", "kubernetes", &["192.0.2.3"]));
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["192.0.2.3"]));

    node.model.upsert_service(service("ns", "kubernetes", "10.96.0.2"));
    node.model.upsert_slice(slice("ns", "kubernetes", &["192.0.2.1"]));
    node.flush();
    node.model.upsert_slice(slice("ns", "kubernetes", &[]));
    node.flush();
    assert_eq!(node.backends("10.96.0.2"), set(&["Refuse"]), "only that one Service");
}

#[test]
fn what_does_not_fit_is_refused_whole_and_named() {
    let mut node = Node::new();
    node.model.upsert_service(service("ns", "web", "10.96.0.1"));
    node.model.upsert_slice(slice("ns", "web", &["10.0.0.1", "10.0.0.2"]));
    node.flush();
    let before = node.kernel.clone();

    let mut refused = |namespace: &str, addresses: &[&str]| {
        node.model.upsert_service(service(namespace, "big", "10.96.0.2"));
        node.model.upsert_slice(slice(namespace, "big", addresses));
        let changes = node.model.take_changes();
        let error = node.tables.apply(&changes[0]).unwrap_err();
        node.model.delete_service(&ObjectName::new(namespace, "big"));
        for change in node.model.take_changes() {
            assert_eq!(node.tables.apply(&change), Ok(vec![]), "nothing of it was applied");
        }
        error
    };
    let error = refused("a", &["10.0.1.1", "10.0.1.2", "10.0.1.3"]);
    assert_eq!((error.table, error.needed, error.limit), (Table::Backends, 5, 4));
    assert_eq!(error.service, ObjectName::new("a", "big"));
    let error = refused("b", &["10.0.0.1", "10.0.0.2", "10.0.1.1", "10.0.1.2"]);
    assert_eq!((error.table, error.needed), (Table::Slots, 6));

    node.model.upsert_service(service("ns", "two", "10.96.0.3"));
    node.flush();
    node.model.upsert_service(service("ns", "three", "10.96.0.4"));
    let error = node.tables.apply(&node.model.take_changes()[0]).unwrap_err();
    assert_eq!((error.table, error.needed), (Table::Frontends, 6));
    node.model.delete_service(&ObjectName::new("ns", "two"));
    node.flush();
    assert_eq!(node.kernel, before);
}

#[test]
fn restored_numbers_stay_and_strangers_go() {
    let mut node = Node::new();
    node.model.upsert_service(service("ns", "old", "10.96.0.1"));
    node.model.upsert_service(service("ns", "web", "10.96.0.2"));
    node.model.upsert_slice(slice("ns", "web", &["10.0.0.1", "10.0.0.2"]));
    node.flush();
    let key = FrontendKey::new(addr("10.96.0.2"), 80, Protocol::Tcp);
    let before = node.kernel.frontends[&key];

    node.model.delete_service(&ObjectName::new("ns", "old"));
    let (_, ops, errors) = Tables::restore(LIMITS, &node.kernel.dump(), &node.model.all());
    assert!(errors.is_empty());
    assert_eq!(ops.iter().map(kind).collect::<Vec<_>>(), ["-any port", "-frontend"]);
    ops.iter().for_each(|op| node.kernel.execute(op));
    assert_eq!(node.kernel.frontends[&key], before);
}

#[test]
fn two_services_with_one_address_are_decided_by_name() {
    let mut node = Node::new();
    node.model.upsert_service(service("ns", "b", "10.96.0.1"));
    node.model.upsert_slice(slice("ns", "b", &["10.0.0.2"]));
    node.flush();
    node.model.upsert_service(service("ns", "a", "10.96.0.1"));
    node.model.upsert_slice(slice("ns", "a", &["10.0.0.1"]));
    // It passes to the other at once: under a new id, never with backends of both.
    assert_eq!(node.flush(), ["backend", "slot", "frontend", "-slot", "-backend"]);
    assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.1"]));
    let conflicts = node.tables.conflicts();
    assert_eq!(conflicts.len(), 1);
    assert_eq!((conflicts[0].winner.name.as_str(), conflicts[0].losers[0].0.name.as_str()), ("a", "b"));
    let key = FrontendKey::new(addr("10.96.0.1"), 80, Protocol::Tcp);
    assert_eq!(node.tables.owner(&key), Some(&ObjectName::new("ns", "a")));
    node.model.delete_service(&ObjectName::new("ns", "a"));
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.2"]));
    assert_eq!(node.tables.conflicts(), []);
}

#[test]
fn termination_traffic_policy_and_hints_choose() {
    let mut node = Node::new();
    let mut web = service("ns", "web", "10.96.0.1");
    let mut ends = slice("ns", "web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    for (end, name) in ends.endpoints.iter_mut().zip(["n1", "n2", "n3"]) {
        end.node_name = Some(name.into());
        end.node_hints = vec![name.into()];
    }
    node.model.upsert_service(web.clone());
    node.model.upsert_slice(ends.clone());
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.1"]), "every endpoint is hinted and one is for us");

    ends.endpoints[1].node_hints.clear();
    node.model.upsert_slice(ends.clone());
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]), "one without a hint");

    web.internal_traffic_policy = TrafficPolicy::Local;
    node.model.upsert_service(web);
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.1"]));

    ends.endpoints[0].ready = false;
    ends.endpoints[0].terminating = true;
    node.model.upsert_slice(ends.clone());
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.1"]), "terminating but serving is the last resort");

    ends.endpoints[0].serving = false;
    node.model.upsert_slice(ends);
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["Drop"]), "others have some");
}

#[test]
fn of_two_records_of_one_address_what_does_not_terminate_counts() {
    let mut node = Node::new();
    node.model.upsert_service(service("ns", "web", "10.96.0.1"));
    let record = |name: &str, ready: bool, terminating: bool| {
        let mut slice = slice("ns", "web", &["10.0.0.1"]);
        slice.name.name = name.into();
        let end = &mut slice.endpoints[0];
        (end.ready, end.serving, end.terminating) = (ready, true, terminating);
        slice
    };
    // The address of a pod on its way out is another's already, which is not ready yet; in either order.
    for [old, new] in [["web-1", "web-2"], ["web-2", "web-1"]] {
        node.model.upsert_slice(record(old, false, true));
        node.model.upsert_slice(record(new, false, false));
        node.flush();
        assert_eq!(node.backends("10.96.0.1"), set(&["Refuse"]), "{old} {new}");
        node.model.upsert_slice(record(new, true, false));
        node.flush();
        assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.1"]), "{old} {new}");
    }
    // Of two that stay the last one counts, of two that leave the first.
    node.model.upsert_slice(record("web-1", true, false));
    node.model.upsert_slice(record("web-2", false, false));
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["Refuse"]));
    node.model.upsert_slice(record("web-2", false, true));
    node.flush();
    assert_eq!(node.backends("10.96.0.1"), set(&["10.0.0.1"]));
}
