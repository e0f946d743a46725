//! The change tracker: objects in, the Services whose frontends may have changed out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::frontends::{Wanted, frontends, node_addresses};
use crate::health::{HealthCheck, NoLocal, health_check, no_local};
use crate::model::{EndpointSlice, ObjectName, Service};
use crate::op::FrontendKey;

/// This node, as far as Services ask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// Its own address of each family, as its Node object has it (kube-proxy's `nodeIP`).
    pub ips: Vec<IpAddr>,
    /// The addresses on which node ports answer. `true`: for processes of the host's network namespace only (loopback).
    pub addresses: Vec<(IpAddr, bool)>,
}

/// A Service's frontends after a change; none when it is gone or not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which Service, or [`ObjectName::this_node`].
    pub service: ObjectName,
    /// All its frontends, by their keys for [`crate::Origin::Anyone`].
    pub frontends: BTreeMap<FrontendKey, Wanted>,
}

/// Holds the objects and remembers which Services changed.
#[derive(Clone, Debug, Default)]
pub struct Model {
    node: NodeInfo,
    services: BTreeMap<ObjectName, Service>,
    /// Slices by the Service they belong to, whether or not that is known yet; sorted by name.
    slices: BTreeMap<ObjectName, Vec<EndpointSlice>>,
    /// The Service that each slice was last filed under.
    filed: BTreeMap<ObjectName, ObjectName>,
    changed: BTreeSet<ObjectName>,
    health_checks: BTreeMap<ObjectName, HealthCheck>,
    /// Services that have nobody here.
    no_local: BTreeMap<ObjectName, NoLocal>,
    /// Services of which, or of whose slices, something is wrong.
    flawed: BTreeSet<ObjectName>,
}

impl Model {
    /// An empty model of this node.
    pub fn new(node: NodeInfo) -> Self {
        Self { node, changed: BTreeSet::from([ObjectName::this_node()]), ..Self::default() }
    }

    /// The node's name or zone changed: every Service is worked out again. Its own address matters to Services with source ranges.
    pub fn set_node(&mut self, node: NodeInfo) {
        let moved = (&self.node.name, &self.node.zone) != (&node.name, &node.zone);
        let renumbered = self.node.ips != node.ips;
        if self.node.addresses != node.addresses {
            self.changed.insert(ObjectName::this_node());
        }
        let concerned =
            self.services.values().filter(|service| moved || (renumbered && service.source_ranges.is_some()));
        self.changed.extend(concerned.map(|service| service.name.clone()));
        self.node = node;
    }

    /// A Service came or changed.
    pub fn upsert_service(&mut self, service: Service) {
        if self.services.get(&service.name) != Some(&service) {
            let name = service.name.clone();
            self.services.insert(name.clone(), service);
            self.note_flaws(&name);
            self.changed.insert(name);
        }
    }

    /// A Service went.
    pub fn delete_service(&mut self, name: &ObjectName) {
        if self.services.remove(name).is_some() {
            self.changed.insert(name.clone());
            self.note_flaws(name);
        }
    }

    /// A slice came or changed (it may also have moved to another Service).
    pub fn upsert_slice(&mut self, slice: EndpointSlice) {
        let service = ObjectName::new(slice.name.namespace.clone(), slice.service.clone());
        if self.filed.get(&slice.name).is_some_and(|filed| *filed != service) {
            self.delete_slice(&slice.name.clone());
        }
        let slices = self.slices.entry(service.clone()).or_default();
        let place = slices.binary_search_by(|other| other.name.cmp(&slice.name));
        match place {
            Ok(at) if slices[at] == slice => return,
            Ok(at) => slices[at] = slice,
            Err(at) => {
                self.filed.insert(slice.name.clone(), service.clone());
                // Most Services have one slice and keep it.
                slices.reserve_exact(1);
                slices.insert(at, slice);
            }
        }
        self.note_flaws(&service);
        self.changed.insert(service);
    }

    /// A slice went.
    pub fn delete_slice(&mut self, name: &ObjectName) {
        let Some(service) = self.filed.remove(name) else { return };
        if let Some(slices) = self.slices.get_mut(&service) {
            slices.retain(|slice| slice.name != *name);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
        self.note_flaws(&service);
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

    /// Every Service and this node, for a resync; forgets pending changes.
    pub fn all(&mut self) -> Vec<Change> {
        self.changed.clear();
        let names = self.services.keys().cloned().chain([ObjectName::this_node()]);
        names.collect::<Vec<_>>().into_iter().map(|name| self.change(name)).collect()
    }

    /// The health checks to answer, as of the last changes taken.
    pub fn health_checks(&self) -> impl Iterator<Item = &HealthCheck> {
        self.health_checks.values()
    }

    /// Ports without an endpoint here where there has to be one, as of the last changes taken.
    pub fn no_local(&self) -> NoLocal {
        self.no_local.values().fold(NoLocal::default(), |sum, one| sum.plus(*one))
    }

    /// The Services of which something is wrong and therefore not in force, with what.
    pub fn problems(&self) -> impl Iterator<Item = (&ObjectName, Vec<String>)> {
        self.flawed.iter().map(|name| {
            let own = self.services.get(name).into_iter().flat_map(|service| service.problems.iter().cloned());
            let of_slice = |slice: &EndpointSlice| {
                let words = |problem: &String| format!("EndpointSlice {}: {problem}", slice.name.name);
                slice.problems.iter().map(words).collect::<Vec<_>>()
            };
            let slices = self.slices.get(name).into_iter().flatten();
            (name, own.chain(slices.flat_map(of_slice)).collect())
        })
    }

    /// Remembers whether there is anything wrong with a Service. Slices without one are nobody's problem.
    fn note_flaws(&mut self, name: &ObjectName) {
        let slices = self.slices.get(name).map(Vec::as_slice).unwrap_or_default();
        let service = self.services.get(name);
        let flawed =
            |service: &Service| !service.problems.is_empty() || slices.iter().any(|slice| !slice.problems.is_empty());
        match service.is_some_and(flawed) {
            true => self.flawed.insert(name.clone()),
            false => self.flawed.remove(name),
        };
    }

    /// A Service as it was last given.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// How many Services and slices are held.
    pub fn len(&self) -> (usize, usize) {
        (self.services.len(), self.filed.len())
    }

    /// Whether no Service is held.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    fn change(&mut self, service: ObjectName) -> Change {
        if service.is_this_node() {
            return Change { service, frontends: node_addresses(&self.node) };
        }
        let slices = self.slices.get(&service).map(Vec::as_slice).unwrap_or_default();
        let object = self.services.get(&service);
        match object.and_then(|object| health_check(object, slices, &self.node)) {
            Some(check) => _ = self.health_checks.insert(service.clone(), check),
            None => _ = self.health_checks.remove(&service),
        }
        match object.map(|object| no_local(object, slices, &self.node)).filter(|counts| *counts != NoLocal::default()) {
            Some(counts) => _ = self.no_local.insert(service.clone(), counts),
            None => _ = self.no_local.remove(&service),
        }
        let frontends = object.map(|object| frontends(object, slices, &self.node)).unwrap_or_default();
        Change { service, frontends }
    }
}
