//! The model: its parts, and how events of namespaces, pods, nodes and endpoints change them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use ipnet::IpNet;

use crate::claims::{Claimant, Claims};
use crate::index::{IdentityKey, Index};
use crate::kernel::Kernel;
use crate::model::{Endpoint, Labels, Namespace, NetworkPolicy, Node, ObjectName, Pod};
use crate::numbering::Numbering;
use crate::op::{Direction, EndpointPolicy, host_prefix, identity};
use crate::policies::{Entry, RuleName};

/// How many entries each kernel map can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// IDENTITIES.
    pub identities: usize,
    /// RULES.
    pub rules: usize,
    /// CIDRS.
    pub cidrs: usize,
}

/// What the model needs to know beside the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Sizes of the kernel's maps.
    pub limits: Limits,
    /// A namespace without an object counts as one with just its `kubernetes.io/metadata.name` label (`--manifests`).
    /// Otherwise its pods are unknown until the Namespace arrives, and match no rule.
    pub implied_namespaces: bool,
}

/// A pod and what follows from it.
#[derive(Clone, Debug)]
struct PodEntry {
    pod: Pod,
    /// While it has an address or an endpoint, and its namespace is known.
    identity: Option<u32>,
    claimed: BTreeSet<IpNet>,
}

#[derive(Clone, Debug)]
struct EndpointEntry {
    endpoint: Endpoint,
    subject: Option<u32>,
}

/// An identity with endpoints here.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subject {
    pub endpoints: BTreeSet<String>,
    pub isolated_by: BTreeSet<ObjectName>,
}

/// What the next writes have to look at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dirty {
    pub subjects: BTreeSet<u32>,
    /// Subject and peer.
    pub peers: BTreeSet<(u32, u32)>,
    pub endpoints: BTreeSet<String>,
}

/// Holds the objects and mirrors the kernel's maps.
#[derive(Clone, Debug)]
pub struct Model {
    pub(crate) config: Config,
    namespaces: BTreeMap<String, Labels>,
    pods: BTreeMap<ObjectName, PodEntry>,
    nodes: BTreeMap<String, Node>,
    service_cidrs: BTreeMap<String, BTreeSet<IpNet>>,
    endpoints: BTreeMap<String, EndpointEntry>,
    endpoints_by_pod: BTreeMap<ObjectName, BTreeSet<String>>,
    pub(crate) policies: BTreeMap<ObjectName, Entry>,
    pub(crate) subjects: BTreeMap<u32, Subject>,
    pub(crate) identities: Numbering,
    pub(crate) rules: Numbering,
    pub(crate) rule_names: BTreeMap<u32, RuleName>,
    pub(crate) index: Index,
    pub(crate) claims: Claims,
    pub(crate) dirty: Dirty,
    pub(crate) kernel: Kernel,
}

impl Model {
    /// For empty maps.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            namespaces: BTreeMap::new(),
            pods: BTreeMap::new(),
            nodes: BTreeMap::new(),
            service_cidrs: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            endpoints_by_pod: BTreeMap::new(),
            policies: BTreeMap::new(),
            subjects: BTreeMap::new(),
            identities: Numbering::new('i', identity::FIRST_POD, identity::CIDR_BIT - 1),
            rules: Numbering::new('r', 1, u32::MAX),
            rule_names: BTreeMap::new(),
            index: Index::default(),
            claims: Claims::default(),
            dirty: Dirty::default(),
            kernel: Kernel::default(),
        }
    }

    /// A namespace came or changed. Its pods may get other identities.
    pub fn upsert_namespace(&mut self, namespace: Namespace) {
        if self.namespaces.get(&namespace.name) != Some(&namespace.labels) {
            self.namespaces.insert(namespace.name.clone(), namespace.labels);
            self.refresh_namespace(&namespace.name);
        }
    }

    /// A namespace went.
    pub fn delete_namespace(&mut self, name: &str) {
        if self.namespaces.remove(name).is_some() {
            self.refresh_namespace(name);
        }
    }

    /// A pod came or changed.
    pub fn upsert_pod(&mut self, pod: Pod) {
        let name = pod.name.clone();
        match self.pods.get_mut(&name) {
            Some(entry) if entry.pod == pod => return,
            Some(entry) => {
                entry.pod = pod;
            }
            None => {
                self.pods.insert(name.clone(), PodEntry { pod, identity: None, claimed: BTreeSet::new() });
            }
        }
        self.refresh_pod(&name);
    }

    /// A pod went.
    pub fn delete_pod(&mut self, name: &ObjectName) {
        let Some(entry) = self.pods.remove(name) else { return };
        for prefix in &entry.claimed {
            self.claims.remove(*prefix, &Claimant::Pod(name.clone()));
        }
        self.refresh_endpoints_of(name);
        entry.identity.into_iter().for_each(|id| self.identities.unref(id));
    }

    /// A node came or changed.
    pub fn upsert_node(&mut self, node: Node) {
        if self.nodes.get(&node.name) == Some(&node) {
            return;
        }
        let new: BTreeMap<(IpNet, Claimant), u32> = node_claims(&node).into_iter().collect();
        let old = self.nodes.insert(node.name.clone(), node);
        for ((prefix, claimant), _) in old.iter().flat_map(node_claims).filter(|(claim, _)| !new.contains_key(claim)) {
            self.claims.remove(prefix, &claimant);
        }
        for ((prefix, claimant), id) in new {
            self.claims.set(prefix, claimant, id);
        }
    }

    /// A node went.
    pub fn delete_node(&mut self, name: &str) {
        for ((prefix, claimant), _) in self.nodes.remove(name).iter().flat_map(node_claims) {
            self.claims.remove(prefix, &claimant);
        }
    }

    /// The ranges of Services' addresses of that name are these, and no others.
    pub fn set_service_cidrs(&mut self, name: &str, cidrs: &[IpNet]) {
        let claimant = Claimant::ServiceCidr(name.to_owned());
        let new: BTreeSet<IpNet> = cidrs.iter().map(IpNet::trunc).collect();
        let old = self.service_cidrs.insert(name.to_owned(), new.clone()).unwrap_or_default();
        old.difference(&new).for_each(|cidr| self.claims.remove(*cidr, &claimant));
        new.difference(&old).for_each(|cidr| self.claims.set(*cidr, claimant.clone(), identity::SERVICES));
        if new.is_empty() {
            self.service_cidrs.remove(name);
        }
    }

    /// A local endpoint is wanted or its addresses changed. One whose pod is not known gets a policy that denies all.
    pub fn upsert_endpoint(&mut self, endpoint: Endpoint) {
        let uid = endpoint.uid.clone();
        if let Some(entry) = self.endpoints.get(&uid) {
            if entry.endpoint == endpoint {
                return;
            }
            self.drop_endpoint_claims(&uid);
            if entry_pod(&self.endpoints, &uid) != Some(&endpoint.pod) {
                self.delete_endpoint(&uid);
            }
        }
        let pod = endpoint.pod.clone();
        self.endpoints_by_pod.entry(pod.clone()).or_default().insert(uid.clone());
        let subject = self.endpoints.get(&uid).and_then(|entry| entry.subject);
        self.endpoints.insert(uid.clone(), EndpointEntry { endpoint, subject });
        self.dirty.endpoints.insert(uid.clone());
        if self.pods.contains_key(&pod) {
            self.refresh_pod(&pod);
        } else {
            self.refresh_endpoint(&uid);
        }
    }

    /// A local endpoint is no longer wanted.
    pub fn delete_endpoint(&mut self, uid: &str) {
        self.drop_endpoint_claims(uid);
        let Some(entry) = self.endpoints.remove(uid) else { return };
        let pod = entry.endpoint.pod;
        if let Some(uids) = self.endpoints_by_pod.get_mut(&pod) {
            uids.remove(uid);
            if uids.is_empty() {
                self.endpoints_by_pod.remove(&pod);
            }
        }
        self.dirty.endpoints.insert(uid.to_owned());
        if let Some(subject) = entry.subject {
            self.leave_subject(subject, uid);
        }
        self.refresh_pod(&pod);
    }

    /// Whether the pod of this name has this uid and its namespace is known, so that an endpoint for it would be judged by its
    /// policies.
    pub fn knows(&self, pod: &ObjectName, uid: &str) -> bool {
        let known = self.pods.get(pod).is_some_and(|entry| entry.pod.uid == uid);
        known && self.namespace_labels(&pod.namespace).is_some()
    }

    /// A policy came or changed.
    pub fn upsert_policy(&mut self, policy: NetworkPolicy) {
        if self.policies.get(&policy.name).is_some_and(|entry| entry.policy == policy) {
            return;
        }
        // The new rules are compiled before the old ones are released, so that what they share stays.
        let mut entry = Entry::new(policy);
        let name = entry.policy.name.clone();
        let selected = |(id, key): (u32, &IdentityKey)| {
            (self.subjects.contains_key(&id) && entry.policy.pods.matches(&key.labels)).then_some(id)
        };
        let subjects: BTreeSet<u32> = self.index.identities_in(&name.namespace).filter_map(selected).collect();
        if !subjects.is_empty() {
            entry.compile(&mut self.index, &mut self.rules, &mut self.rule_names);
        }
        entry.subjects = subjects.clone();
        self.delete_policy(&name);
        self.policies.insert(name.clone(), entry);
        for id in subjects {
            if let Some(subject) = self.subjects.get_mut(&id) {
                subject.isolated_by.insert(name.clone());
            }
            self.touch_subject(id);
        }
    }

    /// A policy went.
    pub fn delete_policy(&mut self, name: &ObjectName) {
        let Some(mut entry) = self.policies.remove(name) else { return };
        entry.release(&mut self.index, &mut self.rules);
        for id in entry.subjects {
            if let Some(subject) = self.subjects.get_mut(&id) {
                subject.isolated_by.remove(name);
            }
            self.touch_subject(id);
        }
    }

    /// How many namespaces, pods, policies, nodes, endpoints and pod identities are held, in this order.
    pub fn counts(&self) -> [usize; 6] {
        let Self { namespaces, pods, policies, nodes, endpoints, identities, .. } = self;
        [namespaces.len(), pods.len(), policies.len(), nodes.len(), endpoints.len(), identities.len()]
    }

    /// What the endpoint's policy is to be.
    pub(crate) fn endpoint_policy(&self, uid: &str) -> Option<EndpointPolicy> {
        let EndpointEntry { endpoint, subject } = self.endpoints.get(uid)?;
        let isolated = |direction| subject.is_none_or(|id| !self.isolating(id, direction).is_empty());
        Some(EndpointPolicy {
            pod: endpoint.pod.clone(),
            uid: uid.to_owned(),
            subject: subject.unwrap_or(identity::UNKNOWN_POD),
            enforce_ingress: isolated(Direction::Ingress),
            enforce_egress: isolated(Direction::Egress),
        })
    }

    fn namespace_labels(&self, name: &str) -> Option<Labels> {
        let implied = || Labels::from([("kubernetes.io/metadata.name".to_owned(), name.to_owned())]);
        self.namespaces.get(name).cloned().or_else(|| self.config.implied_namespaces.then(implied))
    }

    fn refresh_namespace(&mut self, name: &str) {
        let from = Bound::Included(ObjectName::new(name, ""));
        let pods = self.pods.range((from, Bound::Unbounded)).map(|(pod, _)| pod);
        let pods: Vec<ObjectName> = pods.take_while(|pod| pod.namespace == name).cloned().collect();
        pods.iter().for_each(|pod| self.refresh_pod(pod));
    }

    /// Works out a pod's identity again, then what follows for its addresses and endpoints.
    fn refresh_pod(&mut self, name: &ObjectName) {
        let Some(entry) = self.pods.get(name) else { return };
        let pod = &entry.pod;
        let prefixes: BTreeSet<IpNet> =
            if pod.host_network { BTreeSet::new() } else { pod.addresses.iter().map(|a| host_prefix(*a)).collect() };
        let has_endpoint = self.endpoints_by_pod.get(name).is_some_and(|uids| uids.contains(&pod.uid));
        let needed = !pod.host_network && (!prefixes.is_empty() || has_endpoint);
        let key =
            needed.then(|| self.namespace_labels(&name.namespace)).flatten().map(|namespace_labels| IdentityKey {
                namespace: name.namespace.clone(),
                namespace_labels,
                labels: pod.labels.clone(),
                named_ports: pod.named_ports.clone(),
            });
        let id = key.map(|key| self.acquire_identity(key));
        let Some(entry) = self.pods.get_mut(name) else { return };
        let old = std::mem::replace(&mut entry.identity, id);
        let claimed = std::mem::replace(&mut entry.claimed, prefixes.clone());
        for prefix in claimed.difference(&prefixes) {
            self.claims.remove(*prefix, &Claimant::Pod(name.clone()));
        }
        for prefix in prefixes {
            self.claims.set(prefix, Claimant::Pod(name.clone()), id.unwrap_or(identity::UNKNOWN_POD));
        }
        self.refresh_endpoints_of(name);
        old.into_iter().for_each(|id| self.identities.unref(id));
    }

    fn acquire_identity(&mut self, key: IdentityKey) -> u32 {
        let id = self.identities.acquire(&key.name());
        if !self.index.is_active(id) {
            self.index.add_identity(id, key);
            self.touch_peer(id);
        }
        id
    }

    fn refresh_endpoints_of(&mut self, pod: &ObjectName) {
        let uids: Vec<String> = self.endpoints_by_pod.get(pod).into_iter().flatten().cloned().collect();
        uids.iter().for_each(|uid| self.refresh_endpoint(uid));
    }

    /// Gives an endpoint its subject: the identity of the pod of its name, if that is the one of its uid.
    fn refresh_endpoint(&mut self, uid: &str) {
        let Some(EndpointEntry { endpoint, subject: old }) = self.endpoints.get(uid) else { return };
        let old = *old;
        let pod = self.pods.get(&endpoint.pod).filter(|entry| entry.pod.uid == uid);
        let subject = pod.and_then(|entry| entry.identity);
        for prefix in endpoint.addresses.iter().map(|addr| host_prefix(*addr)) {
            let id = subject.unwrap_or(identity::UNKNOWN_POD);
            self.claims.set(prefix, Claimant::Endpoint(uid.to_owned()), id);
        }
        if subject == old {
            return;
        }
        self.dirty.endpoints.insert(uid.to_owned());
        if let Some(entry) = self.endpoints.get_mut(uid) {
            entry.subject = subject;
        }
        if let Some(id) = subject {
            self.join_subject(id, uid);
        }
        if let Some(id) = old {
            self.leave_subject(id, uid);
        }
    }

    fn drop_endpoint_claims(&mut self, uid: &str) {
        let addresses = self.endpoints.get(uid).map(|entry| entry.endpoint.addresses.clone()).unwrap_or_default();
        for addr in addresses {
            self.claims.remove(host_prefix(addr), &Claimant::Endpoint(uid.to_owned()));
        }
    }

    fn join_subject(&mut self, id: u32, uid: &str) {
        if let Some(subject) = self.subjects.get_mut(&id) {
            subject.endpoints.insert(uid.to_owned());
            return;
        }
        let Some(key) = self.index.identity(id).cloned() else { return };
        let mut subject = Subject { endpoints: BTreeSet::from([uid.to_owned()]), isolated_by: BTreeSet::new() };
        let from = Bound::Included(ObjectName::new(key.namespace.clone(), ""));
        let policies = self.policies.range_mut((from, Bound::Unbounded));
        for (name, entry) in policies.take_while(|(name, _)| name.namespace == key.namespace) {
            if !entry.policy.pods.matches(&key.labels) {
                continue;
            }
            if entry.subjects.is_empty() {
                entry.compile(&mut self.index, &mut self.rules, &mut self.rule_names);
            }
            entry.subjects.insert(id);
            subject.isolated_by.insert(name.clone());
        }
        self.subjects.insert(id, subject);
        self.touch_subject(id);
    }

    fn leave_subject(&mut self, id: u32, uid: &str) {
        let Some(subject) = self.subjects.get_mut(&id) else { return };
        subject.endpoints.remove(uid);
        if !subject.endpoints.is_empty() {
            return;
        }
        for name in self.subjects.remove(&id).into_iter().flat_map(|subject| subject.isolated_by) {
            if let Some(entry) = self.policies.get_mut(&name) {
                entry.subjects.remove(&id);
                if entry.subjects.is_empty() {
                    entry.release(&mut self.index, &mut self.rules);
                }
            }
        }
        self.touch_subject(id);
    }

    /// The subject's rules and the enforcement of its endpoints are to be worked out again.
    fn touch_subject(&mut self, id: u32) {
        self.dirty.subjects.insert(id);
        let endpoints = self.subjects.get(&id).into_iter().flat_map(|subject| &subject.endpoints);
        self.dirty.endpoints.extend(endpoints.cloned());
    }

    /// Rules that name this peer are to be worked out again, in the subjects whose policies select it.
    pub(crate) fn touch_peer(&mut self, id: u32) {
        for name in self.index.policies_naming(id) {
            let subjects = self.policies.get(&name).into_iter().flat_map(|entry| &entry.subjects);
            self.dirty.peers.extend(subjects.map(|subject| (*subject, id)));
        }
    }
}

fn entry_pod<'a>(endpoints: &'a BTreeMap<String, EndpointEntry>, uid: &str) -> Option<&'a ObjectName> {
    endpoints.get(uid).map(|entry| &entry.endpoint.pod)
}

/// What a node says of its addresses and pod CIDRs.
fn node_claims(node: &Node) -> Vec<((IpNet, Claimant), u32)> {
    let (claimant, id) = match node.is_local {
        true => (Claimant::LocalNode(node.name.clone()), identity::HOST),
        false => (Claimant::RemoteNode(node.name.clone()), identity::REMOTE_NODE),
    };
    let addresses = node.addresses.iter().map(|addr| ((host_prefix(*addr), claimant.clone()), id));
    let cidrs = node.pod_cidrs.iter();
    let cidrs = cidrs.map(|cidr| ((cidr.trunc(), Claimant::PodCidr(node.name.clone())), identity::UNKNOWN_POD));
    addresses.chain(cidrs).collect()
}
