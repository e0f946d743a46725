//! The objects that decide who may talk to whom, as this crate needs them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

/// Label keys and values.
pub type Labels = BTreeMap<String, String>;

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace.
    pub namespace: String,
    /// The name within it.
    pub name: String,
}

impl ObjectName {
    /// `namespace/name`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl std::fmt::Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A transport protocol that a policy can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// IANA protocol number 6.
    Tcp,
    /// IANA protocol number 17.
    Udp,
    /// IANA protocol number 132.
    Sctp,
}

impl Protocol {
    /// The IANA protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// A Namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
}

/// A named container port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// `ports[].name`.
    pub name: String,
    /// The protocol.
    pub protocol: Protocol,
    /// `ports[].containerPort`.
    pub port: u16,
}

/// A Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Which one.
    pub name: ObjectName,
    /// `metadata.uid`.
    pub uid: String,
    /// Its labels.
    pub labels: Labels,
    /// `status.podIPs`; empty until known. Terminated pods (phase Succeeded or Failed) are given none.
    pub addresses: Vec<IpAddr>,
    /// `spec.hostNetwork`: such a pod counts as its node.
    pub host_network: bool,
    /// `spec.nodeName`; empty until scheduled.
    pub node_name: String,
    /// Named ports of all its containers, sorted.
    pub named_ports: Vec<NamedPort>,
}

/// `matchLabels` and `matchExpressions`; all must hold, and an empty selector matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    /// Requirements, `matchLabels` turned into `In` with one value.
    pub requirements: Vec<Requirement>,
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Requirement {
    /// The label's key.
    pub key: String,
    /// What must hold of it.
    pub operator: Operator,
}

/// What a requirement asks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operator {
    /// The label is there with one of these values.
    In(Vec<String>),
    /// The label is absent or has none of these values.
    NotIn(Vec<String>),
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

/// One entry of `from` or `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Pods by label.
    Pods {
        /// `None`: the policy's own namespace.
        namespaces: Option<Selector>,
        /// `None` selects every pod of those namespaces.
        pods: Option<Selector>,
    },
    /// Addresses by prefix, less the exceptions.
    IpBlock {
        /// The prefix.
        cidr: IpNet,
        /// Prefixes within it that do not count.
        except: Vec<IpNet>,
    },
}

/// One entry of `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyPort {
    /// The protocol; Kubernetes' default is TCP.
    pub protocol: Protocol,
    /// Which ports of it.
    pub port: PortMatch,
}

/// The ports of one [`PolicyPort`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortMatch {
    /// All.
    Any,
    /// From the first to the last, both included (`port` and `endPort`).
    Range(u16, u16),
    /// The port of that name on the receiving pod.
    Named(String),
}

/// One entry of `ingress` or `egress`. An empty `peers` or `ports` matches all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Any of these.
    pub peers: Vec<Peer>,
    /// On any of these.
    pub ports: Vec<PolicyPort>,
}

/// A networking.k8s.io/v1 NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Which one.
    pub name: ObjectName,
    /// `spec.podSelector`.
    pub pods: Selector,
    /// `Some` when `policyTypes` (or its default) holds Ingress; an empty list denies all.
    pub ingress: Option<Vec<Rule>>,
    /// `Some` when `policyTypes` (or its default) holds Egress; an empty list denies all.
    pub egress: Option<Vec<Rule>>,
}

/// A node, as far as it decides what an address is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Whether it is the one this agent runs on.
    pub is_local: bool,
    /// All addresses that are the node itself, the one it holds in its pod CIDR included.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`: an address in them that is neither a pod's nor a node's is nobody known.
    pub pod_cidrs: Vec<IpNet>,
}

/// A local endpoint: a pod whose interface this node has made or is about to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The pod.
    pub pod: ObjectName,
    /// Its `metadata.uid`.
    pub uid: String,
    /// The addresses leased to it; they count before the Pod's status names them.
    pub addresses: Vec<IpAddr>,
}
