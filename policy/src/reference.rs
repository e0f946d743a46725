//! The executable specification: whether the policies of the cluster let a new flow pass, straight from the objects.
//!
//! It shares nothing with the code that builds tables (but for label selectors), and prefers plain words to speed.

use std::net::IpAddr;

use crate::model::{
    Labels, NamedPort, Namespace, NetworkPolicy, Node, Peer, Pod, PolicyPort, PortMatch, Rule, Selector,
};
use crate::op::Direction;
use crate::policies::RuleName;

/// Everything that exists.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Namespaces.
    pub namespaces: Vec<Namespace>,
    /// Pods.
    pub pods: Vec<Pod>,
    /// Policies.
    pub policies: Vec<NetworkPolicy>,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// As [`crate::Config::implied_namespaces`].
    pub implied_namespaces: bool,
}

/// A new flow: its addresses, protocol and destination port (0 for protocols without).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source address, as the destination sees it.
    pub src: IpAddr,
    /// Destination address, after Service translation.
    pub dst: IpAddr,
    /// IANA protocol number.
    pub proto: u8,
    /// Destination port.
    pub port: u16,
}

/// What the policies say, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes.
    Allow(Reason),
    /// It does not.
    Deny(Reason),
}

impl Verdict {
    /// Whether the flow passes.
    pub fn passes(&self) -> bool {
        matches!(self, Self::Allow(_))
    }
}

/// The reason of a [`Verdict`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A pod reaches itself whatever the policies say.
    Itself,
    /// The pod's own node reaches it whatever the policies say.
    FromOwnNode,
    /// No policy isolates the pod in that direction, or there is no pod at that end.
    NotIsolated,
    /// All rules that match.
    Rules(Vec<RuleName>),
    /// The pod is isolated in this direction and no rule matches.
    NoRule(Direction),
    /// The pod's namespace is not known, so neither are its policies.
    UnknownNamespace,
}

/// Whether a flow passes both the egress policies of the pod that sends it and the ingress policies of the pod that
/// receives it. The reason is that of the first direction which denies, else of the last one which was judged.
pub fn allows(objects: &Objects, flow: &Flow) -> Verdict {
    if flow.src == flow.dst {
        return Verdict::Allow(Reason::Itself);
    }
    let mut verdict = Verdict::Allow(Reason::NotIsolated);
    for (addr, direction) in [(flow.src, Direction::Egress), (flow.dst, Direction::Ingress)] {
        if let [pod] = pods_at(objects, addr)[..] {
            verdict = decide(objects, pod, direction, flow);
        }
        if !verdict.passes() {
            break;
        }
    }
    verdict
}

/// Whether the policies of one pod, which is at one end of the flow, let it pass in one direction.
pub fn decide(objects: &Objects, pod: &Pod, direction: Direction, flow: &Flow) -> Verdict {
    let peer_addr = match direction {
        Direction::Ingress => flow.src,
        Direction::Egress => flow.dst,
    };
    if namespace_labels(objects, &pod.name.namespace).is_none() {
        return Verdict::Deny(Reason::UnknownNamespace);
    }
    let isolating: Vec<(&NetworkPolicy, &Vec<Rule>)> = objects
        .policies
        .iter()
        .filter(|policy| policy.name.namespace == pod.name.namespace && policy.pods.matches(&pod.labels))
        .filter_map(|policy| {
            let rules = match direction {
                Direction::Ingress => policy.ingress.as_ref(),
                Direction::Egress => policy.egress.as_ref(),
            };
            Some((policy, rules?))
        })
        .collect();
    if isolating.is_empty() {
        return Verdict::Allow(Reason::NotIsolated);
    }
    let own_node = objects.nodes.iter().find(|node| node.name == pod.node_name);
    if direction == Direction::Ingress && own_node.is_some_and(|node| node.addresses.contains(&peer_addr)) {
        return Verdict::Allow(Reason::FromOwnNode);
    }
    let mut names = Vec::new();
    for (policy, rules) in isolating {
        for (rule, index) in rules.iter().zip(0..) {
            if rule_matches(objects, policy, rule, pod, peer_addr, direction, flow) {
                names.push(RuleName { policy: policy.name.clone(), direction, index });
            }
        }
    }
    match names.is_empty() {
        true => Verdict::Deny(Reason::NoRule(direction)),
        false => Verdict::Allow(Reason::Rules(names)),
    }
}

fn rule_matches(
    objects: &Objects,
    policy: &NetworkPolicy,
    rule: &Rule,
    pod: &Pod,
    peer_addr: IpAddr,
    direction: Direction,
    flow: &Flow,
) -> bool {
    let peer_pod = pod_at(objects, peer_addr);
    // A named port is one of the pod that receives. As the destination of egress it has to be a known pod that the rule
    // names by label, or by naming no peers at all; a destination that just lies in an ipBlock has no port names.
    let receiver = |by_block: bool| match direction {
        Direction::Ingress => Some(pod),
        Direction::Egress if by_block => None,
        Direction::Egress => peer_pod,
    };
    let ports = |receiver: Option<&Pod>| {
        let names: &[NamedPort] = receiver.map(|pod| pod.named_ports.as_slice()).unwrap_or_default();
        rule.ports.is_empty() || rule.ports.iter().any(|port| port_matches(port, names, flow))
    };
    if rule.peers.is_empty() {
        return ports(receiver(false));
    }
    rule.peers.iter().any(|peer| match peer {
        Peer::Pods { namespaces, pods } => {
            let found = peer_pod.is_some_and(|p| is_selected(objects, policy, namespaces.as_ref(), pods.as_ref(), p));
            found && ports(receiver(false))
        }
        Peer::IpBlock { cidr, except } => {
            let inside = cidr.contains(&peer_addr) && !except.iter().any(|except| except.contains(&peer_addr));
            inside && ports(receiver(true))
        }
    })
}

fn port_matches(port: &PolicyPort, names: &[NamedPort], flow: &Flow) -> bool {
    port.protocol.number() == flow.proto
        && match &port.port {
            PortMatch::Any => true,
            PortMatch::Range(first, last) => (*first..=*last).contains(&flow.port),
            PortMatch::Named(name) => {
                names.iter().any(|n| n.name == *name && n.protocol == port.protocol && n.port == flow.port)
            }
        }
}

fn is_selected(
    objects: &Objects,
    policy: &NetworkPolicy,
    namespaces: Option<&Selector>,
    pods: Option<&Selector>,
    pod: &Pod,
) -> bool {
    let namespace = match namespaces {
        None => pod.name.namespace == policy.name.namespace,
        Some(selector) => {
            namespace_labels(objects, &pod.name.namespace).is_some_and(|labels| selector.matches(&labels))
        }
    };
    namespace && pods.is_none_or(|selector| selector.matches(&pod.labels))
}

fn namespace_labels(objects: &Objects, name: &str) -> Option<Labels> {
    let known = objects.namespaces.iter().find(|namespace| namespace.name == name);
    let implied = Labels::from([("kubernetes.io/metadata.name".to_owned(), name.to_owned())]);
    known.map(|namespace| namespace.labels.clone()).or_else(|| objects.implied_namespaces.then_some(implied))
}

fn pods_at(objects: &Objects, addr: IpAddr) -> Vec<&Pod> {
    objects.pods.iter().filter(|pod| !pod.host_network && pod.addresses.contains(&addr)).collect()
}

/// The pod that an address belongs to, if all who claim it are alike; a node's own address is the node.
fn pod_at(objects: &Objects, addr: IpAddr) -> Option<&Pod> {
    if objects.nodes.iter().any(|node| node.addresses.contains(&addr)) {
        return None;
    }
    let pods = pods_at(objects, addr);
    let known = |pod: &&&Pod| namespace_labels(objects, &pod.name.namespace).is_some();
    let alike = |a: &Pod, b: &Pod| {
        (&a.name.namespace, &a.labels, &a.named_ports) == (&b.name.namespace, &b.labels, &b.named_ports)
    };
    let first = pods.first().filter(known)?;
    pods.iter().all(|pod| alike(first, pod)).then_some(*first)
}
