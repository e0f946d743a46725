//! Random histories of objects, every packet that matters, and the kernel's tables beside the reference.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use keelway_proxy::model::{
    EndpointPort, EndpointSlice, LoadBalancing, Protocol, Service, ServicePort, ServiceType, SliceEndpoint,
    TrafficPolicy,
};
use keelway_proxy::{
    Backend, Forward, FrontendKey, Limits, Model, NodeInfo, ObjectName, Op, Origin, Packet, Place, Simulated, SlotKey,
    Tables, Verdict, flags, reference,
};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

/// Small Maglev tables, so that every packet can be tried between any two writes.
pub const LIMITS: Limits =
    Limits { frontends: 1000, slots: 10_000, backends: 1000, source_ranges: 1000, maglev: &[7, 31] };
const CLUSTER_IPS: [&str; 4] = ["10.96.0.1", "10.96.0.2", "fd00:96::1", "fd00:96::2"];
/// The node's own, balancers', external: one of each kind is also of another.
const OTHER_IPS: [&str; 6] = ["192.0.2.1", "192.0.2.2", "198.51.100.1", "10.96.0.2", "2001:db8::1", "2001:db8::2"];
const NODE_IPS: [&str; 5] = ["192.0.2.1", "192.0.2.9", "2001:db8::1", "2001:db8::9", "10.96.0.1"];
const PORTS: [u16; 3] = [53, 80, 81];
const NODE_PORTS: [u16; 3] = [0, 30053, 30080];
const RANGES: [&str; 5] = ["203.0.113.0/24", "203.0.113.128/25", "192.0.2.0/24", "2001:db8:1::/48", "0.0.0.0/0"];

#[derive(Clone, Debug)]
pub enum Event {
    Service(Service),
    DeleteService(ObjectName),
    Slice(EndpointSlice),
    DeleteSlice(ObjectName),
    Zone(Option<String>),
    Addresses(Vec<(IpAddr, bool)>),
    /// The changes so far are taken and written.
    Flush,
}

pub fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn service_name() -> impl Strategy<Value = ObjectName> {
    select(vec!["a", "b"]).prop_map(|name| ObjectName::new("ns", name))
}

fn protocol() -> impl Strategy<Value = Protocol> {
    select(vec![Protocol::Tcp, Protocol::Tcp, Protocol::Tcp, Protocol::Udp])
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local])
}

fn service() -> impl Strategy<Value = Service> {
    let port = (select(vec!["http", ""]), protocol(), select(PORTS.to_vec()), select(NODE_PORTS.to_vec()))
        .prop_map(|(name, protocol, port, node_port)| ServicePort { name: name.into(), protocol, port, node_port });
    let usual = ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: 30080 };
    // Histories in which much stays as it was meet more than those in which nothing does.
    let datagrams = ServicePort { name: "http".into(), protocol: Protocol::Udp, port: 53, node_port: 30053 };
    let ports = prop_oneof![2 => Just(vec![usual.clone()]), 1 => Just(vec![usual, datagrams]), 1 => prop::collection::vec(port, 1..3)];
    let kinds = select(vec![
        ServiceType::ClusterIp,
        ServiceType::LoadBalancer,
        ServiceType::LoadBalancer,
        ServiceType::NodePort,
        ServiceType::ExternalName,
    ]);
    let any = (
        subsequence(CLUSTER_IPS.to_vec(), 0..4),
        subsequence(OTHER_IPS.to_vec(), 0..3),
        subsequence(OTHER_IPS.to_vec(), 0..3),
    );
    let ips = prop_oneof![3 => Just((vec!["10.96.0.1", "fd00:96::1"], vec!["198.51.100.1"], vec!["192.0.2.2", "2001:db8::2"])), 1 => any];
    let ranges = prop_oneof![2 => Just(None), 1 => subsequence(RANGES.to_vec(), 0..3).prop_map(Some)];
    let affinity = prop::option::of(select(vec![5, 9]));
    let balancing = select(vec![LoadBalancing::Random, LoadBalancing::Random, LoadBalancing::Maglev]);
    let rest = (policy(), policy(), affinity, ranges, balancing, prop::bool::weighted(0.05));
    (service_name(), kinds, ips, ports, rest).prop_map(|(name, service_type, ips, ports, rest)| {
        let all = |ips: Vec<&str>| ips.into_iter().map(addr).collect::<Vec<_>>();
        let (internal, external, affinity_seconds, ranges, load_balancing, other_proxy) = rest;
        Service {
            name,
            service_type,
            cluster_ips: all(ips.0),
            external_ips: all(ips.1),
            load_balancer_ips: all(ips.2),
            ports,
            affinity_seconds,
            internal_traffic_policy: internal,
            external_traffic_policy: external,
            source_ranges: ranges.map(|ranges| ranges.iter().map(|range| range.parse().unwrap()).collect()),
            load_balancing,
            other_proxy,
            ..Service::default()
        }
    })
}

fn slice_name() -> impl Strategy<Value = ObjectName> {
    select(vec!["s1", "s2", "s3", "s4"]).prop_map(|name| ObjectName::new("ns", name))
}

fn slice() -> impl Strategy<Value = EndpointSlice> {
    let port = (select(vec!["http", ""]), protocol(), select(vec![Some(8080), Some(8081), None]))
        .prop_map(|(name, protocol, port)| EndpointPort { name: name.into(), protocol, port });
    let usual = |protocol| EndpointPort { name: "http".into(), protocol, port: Some(8080) };
    let usual = vec![usual(Protocol::Tcp), usual(Protocol::Udp)];
    let addresses = select(vec!["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "fd00::1", "fd00::2", "fd00::3"]);
    let hints = |values: [&'static str; 2]| {
        prop_oneof![
            3 => Just(Vec::new()),
            1 => subsequence(values.to_vec(), 1..=2),
            1 => Just(values.to_vec())
        ]
    };
    let conditions = (prop::bool::weighted(0.7), prop::bool::weighted(0.7), any::<bool>());
    let endpoint =
        (addresses, conditions, select(vec![None, Some("n1"), Some("n2")]), hints(["z1", "z2"]), hints(["n1", "n2"]))
            .prop_map(|(address, (ready, serving, terminating), node, zones, nodes)| SliceEndpoint {
                addresses: vec![addr(address)],
                ready,
                serving,
                terminating,
                node_name: node.map(str::to_owned),
                zone: None,
                zone_hints: zones.into_iter().map(str::to_owned).collect(),
                node_hints: nodes.into_iter().map(str::to_owned).collect(),
            });
    let ports = prop_oneof![3 => Just(usual), 1 => prop::collection::vec(port, 1..3)];
    (slice_name(), service_name(), ports, prop::collection::vec(endpoint, 0..8)).prop_map(
        |(name, service, ports, endpoints)| EndpointSlice {
            name,
            service: service.name,
            ports,
            endpoints,
            problems: Vec::new(),
        },
    )
}

pub fn event() -> impl Strategy<Value = Event> {
    let addresses = subsequence(NODE_IPS.to_vec(), 0..4).prop_map(|ips| {
        let loopback = [("127.0.0.1", true), ("::1", true)];
        let all = ips.into_iter().map(|ip| (ip, false)).chain(loopback);
        all.map(|(ip, host_only)| (addr(ip), host_only)).collect()
    });
    prop_oneof![
        6 => service().prop_map(Event::Service),
        2 => service_name().prop_map(Event::DeleteService),
        9 => slice().prop_map(Event::Slice),
        3 => slice_name().prop_map(Event::DeleteSlice),
        1 => select(vec![None, Some("z1".to_owned())]).prop_map(Event::Zone),
        2 => addresses.prop_map(Event::Addresses),
        8 => Just(Event::Flush),
    ]
}

/// The objects as a plain list, for the reference.
#[derive(Clone, Default)]
pub struct World {
    pub node: NodeInfo,
    pub services: BTreeMap<ObjectName, Service>,
    pub slices: BTreeMap<ObjectName, EndpointSlice>,
}

impl World {
    pub fn new() -> Self {
        let ips = vec![addr("192.0.2.9"), addr("2001:db8::1")];
        let node = NodeInfo { name: "n1".into(), zone: None, ips, addresses: vec![(addr("192.0.2.1"), false)] };
        Self { node, ..Self::default() }
    }

    pub fn feed(&mut self, model: &mut Model, event: &Event) {
        match event.clone() {
            Event::Service(service) => {
                self.services.insert(service.name.clone(), service.clone());
                model.upsert_service(service);
            }
            Event::DeleteService(name) => {
                self.services.remove(&name);
                model.delete_service(&name);
            }
            Event::Slice(slice) => {
                self.slices.insert(slice.name.clone(), slice.clone());
                model.upsert_slice(slice);
            }
            Event::DeleteSlice(name) => {
                self.slices.remove(&name);
                model.delete_slice(&name);
            }
            Event::Zone(zone) => {
                self.node.zone = zone;
                model.set_node(self.node.clone());
            }
            Event::Addresses(addresses) => {
                self.node.addresses = addresses;
                model.set_node(self.node.clone());
            }
            Event::Flush => {}
        }
    }

    pub fn verdicts(&self) -> Vec<Verdict> {
        let services: Vec<Service> = self.services.values().cloned().collect();
        let slices: Vec<EndpointSlice> = self.slices.values().cloned().collect();
        packets().iter().map(|packet| reference::verdict(&self.node, &services, &slices, packet)).collect()
    }

    /// Whether a datagram flow stays with its backend, and whose it is.
    pub fn keeps(&self, packet: &Packet, backend: &Backend) -> bool {
        let services: Vec<Service> = self.services.values().cloned().collect();
        let slices: Vec<EndpointSlice> = self.slices.values().cloned().collect();
        reference::keeps(&self.node, &services, &slices, packet, backend)
    }

    /// Which Service port a packet dials.
    pub fn service_port(&self, packet: &Packet) -> Option<(ObjectName, String)> {
        let services: Vec<Service> = self.services.values().cloned().collect();
        reference::service_port(&self.node, &services, packet)
    }

    /// Everything goes: nothing may be left.
    pub fn clear(&self, model: &mut Model) {
        for service in self.services.keys() {
            model.delete_service(service);
        }
        model.set_node(NodeInfo { addresses: Vec::new(), ..self.node.clone() });
    }
}

/// Every destination that matters, and a port and an address that nothing has, from every kind of client.
pub fn packets() -> Vec<Packet> {
    let v4 = [
        (Place::Host, "192.0.2.1"),
        (Place::Pod, "10.0.0.1"),
        (Place::Outside, "203.0.113.1"),
        (Place::Outside, "203.0.113.200"),
        (Place::Outside, "198.51.100.1"),
    ];
    let v6 = [
        (Place::Host, "2001:db8::1"),
        (Place::Pod, "fd00::1"),
        (Place::Outside, "2001:db8:1::1"),
        (Place::Outside, "2001:db8:2::1"),
    ];
    let known: BTreeSet<&str> = CLUSTER_IPS.into_iter().chain(OTHER_IPS).chain(NODE_IPS).collect();
    let strange = ["10.96.0.9", "127.0.0.1", "::1", "0.0.0.0", "::"];
    let mut packets = Vec::new();
    for addr in known.into_iter().chain(strange).map(addr) {
        let clients = if addr.is_ipv6() { &v6[..] } else { &v4[..] };
        for (place, client) in clients {
            let client = client.parse().unwrap();
            for port in PORTS.into_iter().chain(NODE_PORTS).filter(|port| *port != 0).chain([9]) {
                let packet = |proto| Packet { place: *place, client, addr, port, proto };
                packets.push(packet(6));
                packets.extend([53, 30053].contains(&port).then(|| packet(17)));
            }
        }
    }
    packets
}

/// The backends that datagram flows may have: a packet's dialled, as whose.
pub type Flows = Vec<(Packet, Option<(ObjectName, String)>, BTreeSet<Backend>)>;

/// Of all that any packet dials.
pub fn datagram_flows(world: &World, kernel: &Simulated, packets: &[Packet]) -> Result<Flows, TestCaseError> {
    let of = |packet: &Packet| {
        let chosen = kernel.verdict(packet).map_err(TestCaseError::fail)?;
        let chosen = if let Verdict::Forward(forward) = chosen { forward.backends } else { BTreeSet::new() };
        let mut backends = BTreeSet::new();
        for (backend, _) in kernel.backends.values() {
            if chosen.contains(backend) || kernel.keeps(packet, backend).map_err(TestCaseError::fail)? {
                backends.insert(*backend);
            }
        }
        Ok((*packet, world.service_port(packet), backends))
    };
    packets.iter().filter(|packet| packet.proto == 17).map(of).collect()
}

/// Flows that went on while their Service port was the same one's keep the backend while that serves, and all others leave it.
pub fn check_datagram_flows(world: &World, kernel: &Simulated, before: &Flows) -> Result<(), TestCaseError> {
    for (packet, was, backends) in before {
        for backend in backends {
            let (keeps, should) =
                (kernel.keeps(packet, backend).map_err(TestCaseError::fail)?, world.keeps(packet, backend));
            prop_assert!(should || !keeps, "{packet:?} stays with {backend}");
            let same = was.is_some() && *was == world.service_port(packet);
            prop_assert!(keeps || !should || !same, "{packet:?} of {was:?} leaves {backend}");
        }
    }
    Ok(())
}

pub fn verdicts(kernel: &Simulated, packets: &[Packet]) -> Result<Vec<Verdict>, TestCaseError> {
    packets.iter().map(|packet| kernel.verdict(packet).map_err(TestCaseError::fail)).collect()
}

/// As if no frontend were restricted.
fn unrestricted(kernel: &Simulated) -> Simulated {
    let mut kernel = kernel.clone();
    kernel.frontends.values_mut().for_each(|frontend| frontend.flags &= !flags::SOURCE_RANGES);
    kernel
}

/// What a packet meets, source ranges apart, and whether they let it.
struct Seen {
    choices: Vec<Verdict>,
    admitted: Vec<bool>,
}

impl Seen {
    fn of(kernel: &Simulated, packets: &[Packet]) -> Result<Self, TestCaseError> {
        let choices = verdicts(kernel, packets)?;
        let admitted: Vec<bool> = choices.iter().map(|verdict| *verdict != Verdict::Forbidden).collect();
        let choices = if admitted.contains(&false) { verdicts(&unrestricted(kernel), packets)? } else { choices };
        Ok(Self { choices, admitted })
    }
}

/// Whether a packet in the middle of a change may meet `now`.
fn is_between(before: &Verdict, now: &Verdict, after: &Verdict, hashed: bool) -> bool {
    if now == before || now == after {
        return true;
    }
    match (before, now, after) {
        (Verdict::Forward(before), Verdict::Forward(now), Verdict::Forward(after)) => {
            let sane = |forward: &Forward| {
                forward.affinity_seconds == now.affinity_seconds && forward.keep_source == now.keep_source
            };
            (sane(before) || sane(after))
                && !now.backends.is_empty()
                && before.backends != after.backends
                && now.backends.iter().all(|b| before.backends.contains(b) || after.backends.contains(b))
                // A table of seven slots may lose sight of a backend for a moment, one of a thousand does not.
                && (hashed || before.backends.intersection(&after.backends).all(|b| now.backends.contains(b)))
        }
        _ => false,
    }
}

/// Backends of frontends with affinity that the index finds, by frontend id.
fn affine(kernel: &Simulated) -> BTreeSet<(u32, u32)> {
    let right = |((frontend, backend), slot): (&(u32, u32), &u32)| {
        let key = SlotKey { frontend: *frontend, slot: *slot };
        (kernel.slots.get(&key) == Some(backend)).then_some((*frontend, *backend))
    };
    kernel.members.iter().filter_map(right).collect()
}

/// In a frontend's slots.
fn backends(kernel: &Simulated, key: &FrontendKey) -> BTreeSet<Backend> {
    let Some(frontend) = kernel.frontends.get(key) else { return BTreeSet::new() };
    let slot = |slot| kernel.slots.get(&SlotKey { frontend: frontend.id, slot }).and_then(|id| kernel.backends.get(id));
    (0..frontend.count).filter_map(slot).map(|(backend, _)| *backend).collect()
}

/// Executes a change write by write, looking at every packet after each, and returns the state after each write.
pub fn execute(kernel: &mut Simulated, ops: &[Op], packets: &[Packet]) -> Result<Vec<Simulated>, TestCaseError> {
    let before = Seen::of(kernel, packets)?;
    let mut end = kernel.clone();
    ops.iter().for_each(|op| end.execute(op));
    let after = Seen::of(&end, packets)?;
    let hashed = |kernel: &Simulated| kernel.frontends.values().any(|f| f.flags & flags::HASHED != 0);
    let hashed = hashed(kernel) || hashed(&end);
    let stay: BTreeSet<(u32, u32)> = affine(kernel).intersection(&affine(&end)).copied().collect();
    let mut states = Vec::new();
    for op in ops {
        kernel.execute(op);
        let now = Seen::of(kernel, packets)?;
        for (at, packet) in packets.iter().enumerate() {
            let (old, mid, new) = (&before.choices[at], &now.choices[at], &after.choices[at]);
            prop_assert!(is_between(old, mid, new, hashed), "{packet:?} after {op:?}: {old:?}, {mid:?}, {new:?}");
            let (old, mid, new) = (before.admitted[at], now.admitted[at], after.admitted[at]);
            prop_assert!(mid == old || mid == new, "{packet:?} after {op:?}: admitted {old}, {mid}, {new}");
        }
        prop_assert!(hashed || affine(kernel).is_superset(&stay), "a client loses its backend after {op:?}");
        states.push(kernel.clone());
    }
    Ok(states)
}

pub fn flush(
    model: &mut Model,
    tables: &mut Tables,
    kernel: &mut Simulated,
    packets: &[Packet],
) -> Result<Vec<Simulated>, TestCaseError> {
    let mut states = Vec::new();
    for change in model.take_changes() {
        let before = kernel.clone();
        let owned: BTreeSet<FrontendKey> =
            change.frontends.keys().filter(|key| tables.owner(key) == Some(&change.service)).copied().collect();
        let ops = tables.apply(&change).map_err(|error| TestCaseError::fail(error.to_string()))?;
        states.extend(execute(kernel, &ops, packets)?);
        for (key, wanted) in
            change.frontends.iter().filter(|(key, _)| owned.contains(key) && tables.owner(key) == Some(&change.service))
        {
            for key in [*key, key.seen_from(Origin::Outside)].iter().filter(|key| kernel.frontends.contains_key(key)) {
                let left = backends(&before, key).into_iter().filter(|backend| wanted.known.contains(backend));
                for backend in left {
                    let there = kernel.backends.values().any(|(there, _)| *there == backend);
                    prop_assert!(there, "{backend} left {key} and is known, but is gone");
                }
            }
        }
    }
    let wanted = model.all().into_iter().flat_map(|change| change.frontends.into_values());
    let known: BTreeSet<Backend> = wanted
        .flat_map(|wanted| {
            let choices = [Some(wanted.anyone), wanted.outside].into_iter().flatten().map(|choice| choice.backends);
            choices.chain([wanted.known]).flat_map(|backends| backends.to_vec()).collect::<Vec<_>>()
        })
        .collect();
    for (backend, _) in kernel.backends.values() {
        prop_assert!(known.contains(backend), "{backend} is there and nobody knows it");
    }
    kernel.check().map_err(TestCaseError::fail)?;
    Ok(states)
}
