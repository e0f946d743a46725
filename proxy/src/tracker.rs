//! The change tracker: objects in, the Services whose frontends may have changed out.

use std::collections::{BTreeMap, BTreeSet};

use crate::frontends::{Wanted, frontends};
use crate::model::{EndpointSlice, ObjectName, Service};
use crate::op::FrontendKey;

/// This node, as far as topology asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
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
#[derive(Clone, Debug, Default)]
pub struct Model {
    node: NodeInfo,
    services: BTreeMap<ObjectName, Service>,
    /// Slices by the Service they belong to, whether or not that is known yet.
    slices: BTreeMap<ObjectName, BTreeMap<ObjectName, EndpointSlice>>,
    /// The Service that each slice was last filed under.
    filed: BTreeMap<ObjectName, ObjectName>,
    changed: BTreeSet<ObjectName>,
}

impl Model {
    /// An empty model of this node.
    pub fn new(node: NodeInfo) -> Self {
        Self { node, ..Self::default() }
    }

    /// The node's zone changed: every Service is worked out again.
    pub fn set_node(&mut self, node: NodeInfo) {
        if self.node != node {
            self.node = node;
            self.changed.extend(self.services.keys().cloned());
        }
    }

    /// A Service came or changed.
    pub fn upsert_service(&mut self, service: Service) {
        if self.services.get(&service.name) != Some(&service) {
            self.changed.insert(service.name.clone());
            self.services.insert(service.name.clone(), service);
        }
    }

    /// A Service went.
    pub fn delete_service(&mut self, name: &ObjectName) {
        if self.services.remove(name).is_some() {
            self.changed.insert(name.clone());
        }
    }

    /// A slice came or changed (it may also have moved to another Service).
    pub fn upsert_slice(&mut self, slice: EndpointSlice) {
        let service = ObjectName::new(slice.name.namespace.clone(), slice.service.clone());
        if self.filed.get(&slice.name).is_some_and(|filed| *filed != service) {
            self.delete_slice(&slice.name.clone());
        }
        let slices = self.slices.entry(service.clone()).or_default();
        if slices.get(&slice.name) != Some(&slice) {
            self.filed.insert(slice.name.clone(), service.clone());
            slices.insert(slice.name.clone(), slice);
            self.changed.insert(service);
        }
    }

    /// A slice went.
    pub fn delete_slice(&mut self, name: &ObjectName) {
        let Some(service) = self.filed.remove(name) else { return };
        if let Some(slices) = self.slices.get_mut(&service) {
            slices.remove(name);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
        self.changed.insert(service);
    }

    /// Has a Service worked out again although nothing of it changed: one that did not fit, when there is room.
    pub fn touch(&mut self, service: &ObjectName) {
        self.changed.insert(service.clone());
    }

    /// The Services that changed since the last call, each once. A Service that has gone comes with no frontends, and
    /// before those that came, so that its addresses and room are free again.
    pub fn take_changes(&mut self) -> Vec<Change> {
        let changed = std::mem::take(&mut self.changed);
        let mut changes: Vec<Change> = changed.into_iter().map(|name| self.change(name)).collect();
        changes.sort_by_key(|change| !change.frontends.is_empty());
        changes
    }

    /// Every Service, for a resync; forgets pending changes.
    pub fn all(&mut self) -> Vec<Change> {
        self.changed.clear();
        self.services.keys().map(|name| self.change(name.clone())).collect()
    }

    /// How many Services and slices are held.
    pub fn len(&self) -> (usize, usize) {
        (self.services.len(), self.filed.len())
    }

    /// Whether no Service is held.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    fn change(&self, service: ObjectName) -> Change {
        let none = BTreeMap::new();
        let slices = self.slices.get(&service).unwrap_or(&none);
        let frontends = self.services.get(&service).map(|s| frontends(s, slices, &self.node)).unwrap_or_default();
        Change { service, frontends }
    }
}
