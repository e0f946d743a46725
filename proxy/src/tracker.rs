//! The change tracker.
use crate::model::{EndpointSlice, ObjectName, Service};
use crate::op::{Backend, FrontendKey};
use std::collections::BTreeMap;

/// This node, as far as topology asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
}

/// Which address of a Service a frontend serves; when two Services claim the same one, the earlier kind wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `spec.ports[].nodePort` on this node's addresses.
    NodePort,
}

/// What a frontend is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Where it comes from.
    pub kind: FrontendKind,
    /// Sorted, without duplicates.
    pub backends: Vec<Backend>,
    /// 0: none.
    pub affinity_seconds: u32,
    /// [`crate::flags`].
    pub flags: u32,
    /// Keep the backends it has when `backends` is empty.
    pub keep_last: bool,
}

/// A Service's frontends after a change; none when it is gone or not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which Service.
    pub service: ObjectName,
    /// All its frontends.
    pub frontends: BTreeMap<FrontendKey, Wanted>,
}

/// Holds the objects and remembers which Services changed.
pub struct Model {}

#[allow(unused_variables, clippy::unimplemented)]
impl Model {
    /// An empty model of this node.
    pub fn new(node: NodeInfo) -> Self {
        unimplemented!()
    }
    /// The node's zone changed: every Service is worked out again.
    pub fn set_node(&mut self, node: NodeInfo) {
        unimplemented!()
    }
    /// A Service came or changed.
    pub fn upsert_service(&mut self, service: Service) {
        unimplemented!()
    }
    /// A Service went.
    pub fn delete_service(&mut self, name: &ObjectName) {
        unimplemented!()
    }
    /// A slice came or changed (it may also have moved to another Service).
    pub fn upsert_slice(&mut self, slice: EndpointSlice) {
        unimplemented!()
    }
    /// A slice went.
    pub fn delete_slice(&mut self, name: &ObjectName) {
        unimplemented!()
    }
    /// The Services that changed since the last call, each once. A Service that has gone comes with no frontends.
    pub fn take_changes(&mut self) -> Vec<Change> {
        unimplemented!()
    }
    /// Every Service that is served, for a resync; forgets pending changes.
    pub fn all(&mut self) -> Vec<Change> {
        unimplemented!()
    }
}
