//! Random histories of Services and slices: the tables agree with the reference after every change, every packet in
//! between sees the state before or after, and a restart at any write continues from there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use keelway_proxy::model::{
    EndpointPort, EndpointSlice, Protocol, Service, ServicePort, ServiceType, SliceEndpoint, TrafficPolicy,
};
use keelway_proxy::{Limits, Model, NodeInfo, ObjectName, Op, Simulated, Tables, Verdict, reference};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

const LIMITS: Limits = Limits { frontends: 1000, slots: 1000, backends: 1000 };
const CLUSTER_IPS: [&str; 4] = ["10.96.0.1", "10.96.0.2", "fd00:96::1", "fd00:96::2"];
const PORTS: [u16; 3] = [53, 80, 81];

#[derive(Clone, Debug)]
enum Event {
    Service(Service),
    DeleteService(ObjectName),
    Slice(EndpointSlice),
    DeleteSlice(ObjectName),
    Zone(Option<String>),
    /// The changes so far are taken and written.
    Flush,
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn service_name() -> impl Strategy<Value = ObjectName> {
    select(vec!["a", "b"]).prop_map(|name| ObjectName::new("ns", name))
}

fn protocol() -> impl Strategy<Value = Protocol> {
    select(vec![Protocol::Tcp, Protocol::Tcp, Protocol::Tcp, Protocol::Udp])
}

fn service() -> impl Strategy<Value = Service> {
    let port = (select(vec!["http", "http", "http", ""]), protocol(), select(PORTS.to_vec()))
        .prop_map(|(name, protocol, port)| ServicePort { name: name.into(), protocol, port, node_port: 0 });
    let ports = prop::collection::vec(port, 1..3);
    let ips = subsequence(CLUSTER_IPS.to_vec(), 0..4);
    let kinds = select(vec![
        ServiceType::ClusterIp,
        ServiceType::LoadBalancer,
        ServiceType::NodePort,
        ServiceType::ExternalName,
    ]);
    let policy = select(vec![TrafficPolicy::Cluster, TrafficPolicy::Cluster, TrafficPolicy::Local]);
    (service_name(), kinds, ips, ports, policy, prop::option::of(1u32..9), prop::bool::weighted(0.1)).prop_map(
        |(name, service_type, ips, ports, internal_traffic_policy, affinity_seconds, other_proxy)| Service {
            name,
            service_type,
            cluster_ips: ips.into_iter().map(addr).collect(),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ports,
            affinity_seconds,
            internal_traffic_policy,
            external_traffic_policy: TrafficPolicy::Cluster,
            other_proxy,
            headless_label: false,
        },
    )
}

fn slice_name() -> impl Strategy<Value = ObjectName> {
    select(vec!["s1", "s2", "s3", "s4"]).prop_map(|name| ObjectName::new("ns", name))
}

fn slice() -> impl Strategy<Value = EndpointSlice> {
    let port =
        (select(vec!["http", "http", "http", ""]), protocol(), select(vec![Some(8080), Some(8080), Some(8081), None]))
            .prop_map(|(name, protocol, port)| EndpointPort { name: name.into(), protocol, port });
    let addresses = select(vec!["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "fd00::1", "fd00::2", "fd00::3"]);
    let hints = |values: [&'static str; 2]| prop_oneof![3 => Just(Vec::new()), 1 => subsequence(values.to_vec(), 1..=2), 1 => Just(values.to_vec())];
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
    let ports = prop::collection::vec(port, 1..3);
    (slice_name(), service_name(), ports, prop::collection::vec(endpoint, 0..8))
        .prop_map(|(name, service, ports, endpoints)| EndpointSlice { name, service: service.name, ports, endpoints })
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => service().prop_map(Event::Service),
        2 => service_name().prop_map(Event::DeleteService),
        9 => slice().prop_map(Event::Slice),
        3 => slice_name().prop_map(Event::DeleteSlice),
        1 => select(vec![None, Some("z1".to_owned())]).prop_map(Event::Zone),
        8 => Just(Event::Flush),
    ]
}

/// The objects as a plain list, for the reference.
#[derive(Clone, Default)]
struct World {
    node: NodeInfo,
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
}

impl World {
    fn feed(&mut self, model: &mut Model, event: &Event) {
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
            Event::Flush => {}
        }
    }

    fn verdicts(&self) -> Vec<Verdict> {
        let services: Vec<Service> = self.services.values().cloned().collect();
        let slices: Vec<EndpointSlice> = self.slices.values().cloned().collect();
        let verdict = |(addr, port, proto)| reference::verdict(&self.node, &services, &slices, addr, port, proto);
        packets().map(verdict).collect()
    }
}

/// Every destination that matters, and one port and one address that no Service has.
fn packets() -> impl Iterator<Item = (IpAddr, u16, u8)> {
    let addrs = CLUSTER_IPS.iter().copied().chain(["10.96.0.9"]).map(addr);
    addrs.flat_map(|addr| PORTS.into_iter().chain([9]).flat_map(move |port| [(addr, port, 6), (addr, port, 17)]))
}

fn verdicts(kernel: &Simulated) -> Result<Vec<Verdict>, TestCaseError> {
    packets().map(|(addr, port, proto)| kernel.verdict(addr, port, proto).map_err(TestCaseError::fail)).collect()
}

/// Whether a packet in the middle of a change may meet `now`.
fn is_between(before: &Verdict, now: &Verdict, after: &Verdict) -> bool {
    if now == before || now == after {
        return true;
    }
    let empty = BTreeSet::new();
    match (before, now, after) {
        (Verdict::Backends(before), Verdict::Backends(now), Verdict::Backends(after)) => {
            *now != empty
                && before != after
                && now.iter().all(|b| before.contains(b) || after.contains(b))
                && before.intersection(after).all(|b| now.contains(b))
        }
        _ => false,
    }
}

/// Executes a change write by write, looking at every packet after each, and returns the state after each write.
fn execute(kernel: &mut Simulated, ops: &[Op]) -> Result<Vec<Simulated>, TestCaseError> {
    let before = verdicts(kernel)?;
    let mut after = kernel.clone();
    ops.iter().for_each(|op| after.execute(op));
    let after = verdicts(&after)?;
    let mut states = Vec::new();
    for op in ops {
        kernel.execute(op);
        let now = verdicts(kernel)?;
        for (((before, now), after), packet) in before.iter().zip(&now).zip(&after).zip(packets()) {
            prop_assert!(is_between(before, now, after), "{packet:?} after {op:?}: {before:?}, {now:?}, {after:?}");
        }
        states.push(kernel.clone());
    }
    Ok(states)
}

fn flush(model: &mut Model, tables: &mut Tables, kernel: &mut Simulated) -> Result<Vec<Simulated>, TestCaseError> {
    let mut states = Vec::new();
    for change in model.take_changes() {
        let ops = tables.apply(&change).map_err(|error| TestCaseError::fail(error.to_string()))?;
        states.extend(execute(kernel, &ops)?);
    }
    Ok(states)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn tables_follow_the_reference(events in prop::collection::vec(event(), 1..40)) {
        let mut world = World { node: NodeInfo { name: "n1".into(), zone: None }, ..World::default() };
        let mut model = Model::new(world.node.clone());
        let mut tables = Tables::new(LIMITS);
        let mut kernel = Simulated::default();
        for event in events.iter().chain([&Event::Flush]) {
            world.feed(&mut model, event);
            if !matches!(event, Event::Flush) {
                continue;
            }
            flush(&mut model, &mut tables, &mut kernel)?;
            prop_assert_eq!(verdicts(&kernel)?, world.verdicts());

            let (_, ops, errors) = Tables::restore(LIMITS, &kernel.dump(), &model.all());
            prop_assert_eq!((ops, errors), (vec![], vec![]), "a restart has nothing to write");
        }
        let used: Vec<usize> = tables.usage().iter().map(|(_, used, _)| *used).collect();
        prop_assert_eq!(used, vec![kernel.frontends.len(), kernel.slots.len(), kernel.backends.len()]);
        for service in world.services.keys() {
            model.delete_service(service);
        }
        flush(&mut model, &mut tables, &mut kernel)?;
        prop_assert_eq!(&kernel, &Simulated::default(), "nothing is left behind");
    }

    #[test]
    fn a_crash_at_any_write_is_made_good(
        events in prop::collection::vec(event(), 5..30), more in prop::collection::vec(event(), 0..6), at in any::<prop::sample::Index>(),
    ) {
        let mut world = World { node: NodeInfo { name: "n1".into(), zone: None }, ..World::default() };
        let mut model = Model::new(world.node.clone());
        let mut tables = Tables::new(LIMITS);
        let mut kernel = Simulated::default();
        let mut states = vec![kernel.clone()];
        for event in events.iter().chain([&Event::Flush]) {
            world.feed(&mut model, event);
            if matches!(event, Event::Flush) {
                states.extend(flush(&mut model, &mut tables, &mut kernel)?);
            }
        }
        // The agent dies after some write; while it is away the objects go on changing.
        let mut kernel = at.get(&states).clone();
        for event in &more {
            world.feed(&mut model, event);
        }
        let (mut tables, ops, errors) = Tables::restore(LIMITS, &kernel.dump(), &model.all());
        prop_assert_eq!(errors, vec![]);
        for op in &ops {
            kernel.execute(op);
            verdicts(&kernel)?;
        }
        prop_assert_eq!(verdicts(&kernel)?, world.verdicts());
        for service in world.services.keys() {
            model.delete_service(service);
        }
        flush(&mut model, &mut tables, &mut kernel)?;
        prop_assert_eq!(&kernel, &Simulated::default(), "nothing is left behind");
    }

    #[test]
    fn damaged_maps_are_made_good(events in prop::collection::vec(event(), 5..30), damage in prop::collection::vec((0..7u8, 0..6u32, 0..6u32), 1..6)) {
        let mut world = World { node: NodeInfo { name: "n1".into(), zone: None }, ..World::default() };
        let mut model = Model::new(world.node.clone());
        let mut tables = Tables::new(LIMITS);
        let mut kernel = Simulated::default();
        events.iter().for_each(|event| world.feed(&mut model, event));
        flush(&mut model, &mut tables, &mut kernel)?;
        for (what, a, b) in damage {
            let slot = keelway_proxy::SlotKey { frontend: a, slot: b };
            match what {
                0 => { kernel.slots.insert(slot, b); }
                1 => { kernel.slots.remove(&slot); }
                2 => { kernel.backends.remove(&a); }
                3 => { kernel.backends.insert(a, keelway_proxy::Backend { addr: addr("192.0.2.1"), port: 1, proto: 6 }); }
                4 => { kernel.revnat.remove(&a); }
                5 => if let Some(frontend) = kernel.frontends.values_mut().nth(a as usize) { frontend.id = b; },
                _ => if let Some(frontend) = kernel.frontends.values_mut().nth(a as usize) { frontend.count = b; },
            }
        }
        let (_, ops, errors) = Tables::restore(LIMITS, &kernel.dump(), &model.all());
        prop_assert_eq!(errors, vec![]);
        ops.iter().for_each(|op| kernel.execute(op));
        prop_assert_eq!(verdicts(&kernel)?, world.verdicts());
        let (_, ops, _) = Tables::restore(LIMITS, &kernel.dump(), &model.all());
        prop_assert_eq!(ops, vec![]);
    }
}
