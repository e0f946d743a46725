//! Desired state: one stream of [`Event`]s, from the Kubernetes API ([`kube`]) or a directory of YAML files
//! ([`manifests`]), through one conversion ([`convert`]) into the models of the pure crates.
//!
//! Tasks: one a kind for Kubernetes, one for the directory. All send into one bounded channel and wait while it is full;
//! coalescing is the receiver's work. What a source knows about itself is in [`Status`].

pub mod convert;
pub mod kube;
pub mod manifests;
mod status;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Instant, SystemTime};

use ipnet::IpNet;
use keelway_policy::model as policy;
use keelway_proxy::model as proxy;
use tokio::sync::mpsc;

pub use status::{KindStatus, Status};

/// Events that may wait for the receiver.
pub const CHANNEL_CAPACITY: usize = 1024;

/// The kinds of objects that the agent reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// v1 Node.
    Node,
    /// networking.k8s.io/v1 ServiceCIDR.
    ServiceCidr,
    /// v1 Namespace.
    Namespace,
    /// v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// networking.k8s.io/v1 NetworkPolicy.
    NetworkPolicy,
    /// v1 Pod.
    Pod,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Node,
        Self::ServiceCidr,
        Self::Namespace,
        Self::Service,
        Self::EndpointSlice,
        Self::NetworkPolicy,
        Self::Pod,
    ];

    /// As in an object's `kind`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Namespace => "Namespace",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::Pod => "Pod",
        }
    }

    /// As in the API's paths.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Node => "nodes",
            Self::ServiceCidr => "servicecidrs",
            Self::Namespace => "namespaces",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::NetworkPolicy => "networkpolicies",
            Self::Pod => "pods",
        }
    }

    /// Whether its objects live outside of namespaces.
    pub const fn is_cluster_scoped(self) -> bool {
        matches!(self, Self::Node | Self::ServiceCidr | Self::Namespace)
    }

    /// Whether an API server may have no such kind: ServiceCIDR is from Kubernetes 1.33 on.
    pub const fn is_optional(self) -> bool {
        matches!(self, Self::ServiceCidr)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for kinds that have none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl std::fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind.is_cluster_scoped() {
            true => write!(f, "{} {}", self.kind, self.name),
            false => write!(f, "{} {}/{}", self.kind, self.namespace, self.name),
        }
    }
}

/// An object's `resourceVersion`: equal for equal contents, and not to be ordered. Empty for objects from files.
pub type Version = String;

/// A Node, as far as the agent reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// `status.addresses` of type InternalIP, in order.
    pub internal_addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`, in order; `spec.podCIDR` where that is all there is.
    pub pod_cidrs: Vec<IpNet>,
    /// Its labels, for `topology.kubernetes.io/zone` and its like.
    pub labels: BTreeMap<String, String>,
    /// Whether load balancers may send to it: neither being deleted nor tainted for removal by the cluster autoscaler.
    pub eligible: bool,
}

/// A ServiceCIDR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// Its name.
    pub name: String,
    /// `spec.cidrs`.
    pub cidrs: Vec<IpNet>,
}

/// When an object changed, for metrics. It is no part of the object: any two are equal.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// When the change that it reports happened, by its annotation `endpoints.kubernetes.io/last-change-trigger-time`.
    pub happened: Option<SystemTime>,
    /// When it was read here.
    pub decoded: Instant,
}

impl Times {
    /// Of an object that was read just now.
    pub fn now(happened: Option<SystemTime>) -> Self {
        Self { happened, decoded: Instant::now() }
    }
}

impl PartialEq for Times {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Times {}

/// An object in the model of the crate that reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// v1 Node.
    Node(Node),
    /// networking.k8s.io/v1 ServiceCIDR.
    ServiceCidr(ServiceCidr),
    /// v1 Namespace.
    Namespace(policy::Namespace),
    /// v1 Service.
    Service(proxy::Service),
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice(proxy::EndpointSlice, Times),
    /// networking.k8s.io/v1 NetworkPolicy.
    NetworkPolicy(policy::NetworkPolicy, Version),
    /// v1 Pod.
    Pod(policy::Pod),
}

impl Object {
    /// Which object it is.
    pub fn reference(&self) -> ObjectRef {
        let (kind, namespace, name) = match self {
            Self::Node(node) => (Kind::Node, "", &node.name),
            Self::ServiceCidr(range) => (Kind::ServiceCidr, "", &range.name),
            Self::Namespace(namespace) => (Kind::Namespace, "", &namespace.name),
            Self::Service(service) => (Kind::Service, &*service.name.namespace, &service.name.name),
            Self::EndpointSlice(slice, _) => (Kind::EndpointSlice, &*slice.name.namespace, &slice.name.name),
            Self::NetworkPolicy(policy, _) => (Kind::NetworkPolicy, &*policy.name.namespace, &policy.name.name),
            Self::Pod(pod) => (Kind::Pod, &*pod.name.namespace, &pod.name.name),
        };
        ObjectRef { kind, namespace: namespace.to_owned(), name: name.clone() }
    }
}

/// What a source says.
///
/// Per kind: every object of the first full list comes as `Upsert`, then `Synced` once. After an outage, what changed
/// comes as `Upsert` and what vanished as `Delete`, and `Synced` is not repeated. An `Upsert` may equal the previous one.
/// Nothing is said about the order between kinds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The object is so now.
    Upsert(Object),
    /// The object is gone, or is no longer ours to look at.
    Delete(ObjectRef),
    /// The first full list of this kind has been delivered.
    Synced(Kind),
}

/// Where desired state comes from.
pub trait Source: Send + 'static {
    /// For people: `kubernetes https://...` or `manifests DIR`.
    fn describe(&self) -> String;

    /// Delivers events until the receiver is dropped. Failures are retried, and reported in the status.
    fn run(self, events: mpsc::Sender<Event>, status: Status) -> impl Future<Output = ()> + Send;
}
