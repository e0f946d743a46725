//! A small cluster that changes at random: few names, labels, addresses and prefixes, so that they meet often.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Range;

use keelway_policy::Model;
use keelway_policy::model::{
    Endpoint, Labels, NamedPort, Namespace, NetworkPolicy, Node, ObjectName, Operator, Peer, Pod, PolicyPort,
    PortMatch, Protocol, Requirement, Rule, Selector,
};
use keelway_policy::reference::Objects;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

pub const POD_ADDRS: &[&str] =
    &["10.244.1.2", "10.244.1.3", "10.244.2.2", "10.244.2.3", "fd00:244:1::2", "fd00:244:1::3", "fd00:244:2::2"];
pub const NODE_ADDRS: &[&str] = &["192.168.0.1", "10.244.1.1", "192.168.0.2", "fd00::1"];
const CIDRS: &[&str] = &[
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.244.0.0/16",
    "10.244.1.0/24",
    "10.244.1.2/32",
    "192.0.2.0/24",
    "::/0",
    "fd00:244::/32",
    "2001:db8::/32",
    "2001:db8:1::/48",
];

pub fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[derive(Clone, Debug)]
pub enum Event {
    Namespace(Namespace),
    DeleteNamespace(String),
    Pod(Pod),
    DeletePod(ObjectName),
    Policy(NetworkPolicy),
    DeletePolicy(ObjectName),
    Node(Node),
    DeleteNode(String),
    /// For the pod of this name, which may not be there.
    Endpoint(ObjectName),
    DeleteEndpoint(ObjectName),
    /// The changes so far are taken and written.
    Flush,
}

/// What exists, as plain lists.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub namespaces: BTreeMap<String, Namespace>,
    pub pods: BTreeMap<ObjectName, Pod>,
    pub policies: BTreeMap<ObjectName, NetworkPolicy>,
    pub nodes: BTreeMap<String, Node>,
    pub endpoints: BTreeMap<String, Endpoint>,
    /// Addresses that pods had since the last writes.
    pub former: BTreeMap<ObjectName, Vec<IpAddr>>,
}

impl World {
    pub fn objects(&self) -> Objects {
        Objects {
            namespaces: self.namespaces.values().cloned().collect(),
            pods: self.pods.values().cloned().collect(),
            policies: self.policies.values().cloned().collect(),
            nodes: self.nodes.values().cloned().collect(),
            implied_namespaces: false,
        }
    }

    pub fn feed(&mut self, model: &mut Model, event: &Event) {
        match event.clone() {
            Event::Namespace(namespace) => {
                self.namespaces.insert(namespace.name.clone(), namespace.clone());
                model.upsert_namespace(namespace);
            }
            Event::DeleteNamespace(name) => {
                self.namespaces.remove(&name);
                model.delete_namespace(&name);
            }
            Event::Pod(pod) => {
                let old = self.pods.insert(pod.name.clone(), pod.clone());
                let former = self.former.entry(pod.name.clone()).or_default();
                former.extend(old.into_iter().chain([pod.clone()]).flat_map(|pod| pod.addresses));
                model.upsert_pod(pod);
            }
            Event::DeletePod(name) => {
                let old = self.pods.remove(&name);
                self.former.entry(name.clone()).or_default().extend(old.into_iter().flat_map(|pod| pod.addresses));
                model.delete_pod(&name);
            }
            Event::Policy(policy) => {
                self.policies.insert(policy.name.clone(), policy.clone());
                model.upsert_policy(policy);
            }
            Event::DeletePolicy(name) => {
                self.policies.remove(&name);
                model.delete_policy(&name);
            }
            Event::Node(node) => {
                self.nodes.insert(node.name.clone(), node.clone());
                model.upsert_node(node);
            }
            Event::DeleteNode(name) => {
                self.nodes.remove(&name);
                model.delete_node(&name);
            }
            Event::Endpoint(pod) => {
                let uid = self.pods.get(&pod).map_or_else(|| "gone".to_owned(), |pod| pod.uid.clone());
                // Addresses come from the pods' status here; endpoints that claim their own are in the scenarios.
                let endpoint = Endpoint { pod, uid: uid.clone(), addresses: Vec::new() };
                self.endpoints.insert(uid, endpoint.clone());
                model.upsert_endpoint(endpoint);
            }
            Event::DeleteEndpoint(pod) => {
                let uids: Vec<String> =
                    self.endpoints.values().filter(|e| e.pod == pod).map(|e| e.uid.clone()).collect();
                for uid in uids {
                    self.endpoints.remove(&uid);
                    model.delete_endpoint(&uid);
                }
            }
            Event::Flush => {}
        }
    }

    /// All at once, in an order unlike that of the events.
    pub fn feed_all(&self, model: &mut Model) {
        self.endpoints.values().rev().for_each(|endpoint| model.upsert_endpoint(endpoint.clone()));
        self.policies.values().rev().for_each(|policy| model.upsert_policy(policy.clone()));
        self.pods.values().rev().for_each(|pod| model.upsert_pod(pod.clone()));
        self.nodes.values().rev().for_each(|node| model.upsert_node(node.clone()));
        self.namespaces.values().rev().for_each(|namespace| model.upsert_namespace(namespace.clone()));
    }

    pub fn clear(&mut self, model: &mut Model) {
        let Self { namespaces, pods, policies, nodes, endpoints, former: _ } = std::mem::take(self);
        pods.keys().for_each(|name| model.delete_pod(name));
        namespaces.keys().for_each(|name| model.delete_namespace(name));
        endpoints.keys().for_each(|uid| model.delete_endpoint(uid));
        policies.keys().for_each(|name| model.delete_policy(name));
        nodes.keys().for_each(|name| model.delete_node(name));
    }
}

fn labels() -> impl Strategy<Value = Labels> {
    let pair = (select(vec!["a", "b"]), select(vec!["1", "2"]));
    prop::collection::btree_map(pair.clone().prop_map(|p| p.0.to_owned()), pair.prop_map(|p| p.1.to_owned()), 0..3)
}

fn namespace_name() -> impl Strategy<Value = String> {
    select(vec!["x", "x", "y"]).prop_map(str::to_owned)
}

fn pod_name() -> impl Strategy<Value = ObjectName> {
    (namespace_name(), select(vec!["p1", "p2", "p3"])).prop_map(|(namespace, name)| ObjectName::new(namespace, name))
}

fn protocol() -> impl Strategy<Value = Protocol> {
    select(vec![Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
}

fn pod() -> impl Strategy<Value = Pod> {
    let port = (select(vec!["web", "dns"]), protocol(), select(vec![80u16, 8080, 53]));
    let port = port.prop_map(|(name, protocol, port)| NamedPort { name: name.into(), protocol, port });
    let ports = prop::collection::btree_set(port, 0..3).prop_map(|ports| ports.into_iter().collect::<Vec<_>>());
    let addresses = subsequence(POD_ADDRS.to_vec(), 0..3);
    let host_network = prop::bool::weighted(0.1);
    (pod_name(), select(vec!["", "-new"]), labels(), addresses, host_network, ports).prop_map(
        |(name, incarnation, labels, addresses, host_network, named_ports)| Pod {
            uid: format!("{name}{incarnation}"),
            name,
            labels,
            addresses: addresses.into_iter().map(addr).collect(),
            host_network,
            node_name: "n1".into(),
            named_ports,
        },
    )
}

fn selector() -> impl Strategy<Value = Selector> {
    let values = || prop_oneof![Just(vec!["1".to_owned()]), Just(vec!["1".to_owned(), "2".to_owned()])];
    let operator = prop_oneof![
        4 => values().prop_map(Operator::In),
        1 => values().prop_map(Operator::NotIn),
        1 => Just(Operator::Exists),
        1 => Just(Operator::DoesNotExist),
    ];
    let requirement = (select(vec!["a", "b"]), operator);
    let requirement = requirement.prop_map(|(key, operator)| Requirement { key: key.into(), operator });
    prop::collection::vec(requirement, 0..2).prop_map(|requirements| Selector { requirements })
}

fn rule() -> impl Strategy<Value = Rule> {
    let cidr = || select(CIDRS.to_vec()).prop_map(|cidr| cidr.parse().unwrap());
    let peer = prop_oneof![
        3 => (prop::option::of(selector()), prop::option::of(selector()))
            .prop_map(|(namespaces, pods)| Peer::Pods { namespaces, pods }),
        2 => (cidr(), prop::collection::vec(cidr(), 0..3)).prop_map(|(cidr, except)| Peer::IpBlock { cidr, except }),
    ];
    let ports = prop_oneof![
        Just(PortMatch::Any),
        Just(PortMatch::Range(80, 80)),
        Just(PortMatch::Range(79, 1024)),
        Just(PortMatch::Range(1, 65535)),
        Just(PortMatch::Named("web".into())),
        Just(PortMatch::Named("dns".into())),
    ];
    let port = (protocol(), ports).prop_map(|(protocol, port)| PolicyPort { protocol, port });
    (prop::collection::vec(peer, 0..3), prop::collection::vec(port, 0..3))
        .prop_map(|(peers, ports)| Rule { peers, ports })
}

fn policy_name() -> impl Strategy<Value = ObjectName> {
    (namespace_name(), select(vec!["n1", "n2", "n3"])).prop_map(|(namespace, name)| ObjectName::new(namespace, name))
}

fn policy() -> impl Strategy<Value = NetworkPolicy> {
    let rules = || prop::option::weighted(0.7, prop::collection::vec(rule(), 0..3));
    (policy_name(), selector(), rules(), rules()).prop_map(|(name, pods, ingress, egress)| NetworkPolicy {
        name,
        pods,
        ingress,
        egress,
    })
}

fn node() -> impl Strategy<Value = Node> {
    let local = subsequence(NODE_ADDRS[..2].to_vec(), 0..=2).prop_map(|addresses| Node {
        name: "n1".into(),
        is_local: true,
        addresses: addresses.into_iter().map(addr).collect(),
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap(), "fd00:244:1::/48".parse().unwrap()],
    });
    let remote = subsequence(NODE_ADDRS[2..].to_vec(), 0..=2).prop_map(|addresses| Node {
        name: "n2".into(),
        is_local: false,
        addresses: addresses.into_iter().map(addr).collect(),
        pod_cidrs: vec!["10.244.2.0/24".parse().unwrap()],
    });
    prop_oneof![local, remote]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (namespace_name(), labels()).prop_map(|(name, labels)| Event::Namespace(Namespace { name, labels })),
        1 => namespace_name().prop_map(Event::DeleteNamespace),
        12 => pod().prop_map(Event::Pod),
        2 => pod_name().prop_map(Event::DeletePod),
        12 => policy().prop_map(Event::Policy),
        3 => policy_name().prop_map(Event::DeletePolicy),
        3 => node().prop_map(Event::Node),
        1 => select(vec!["n1", "n2"]).prop_map(|name| Event::DeleteNode(name.into())),
        10 => pod_name().prop_map(Event::Endpoint),
        2 => pod_name().prop_map(Event::DeleteEndpoint),
        18 => Just(Event::Flush),
    ]
}

pub fn events(count: Range<usize>) -> impl Strategy<Value = Vec<Event>> {
    prop::collection::vec(event(), count)
}
