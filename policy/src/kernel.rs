//! The mirror of the kernel's maps, grouped the way that changes come.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::op::{CidrKey, Direction, Dump, EndpointPolicy, Op, RuleKey, identity};
use crate::ports::Ports;

/// What the maps hold once every write handed out so far has been executed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kernel {
    pub rules: BTreeMap<u32, BTreeMap<(Direction, u32), Ports>>,
    pub rule_count: usize,
    pub cidrs: BTreeMap<(u32, Direction), BTreeMap<IpNet, u32>>,
    pub cidr_count: usize,
    pub identities: BTreeMap<IpNet, u32>,
    pub endpoints: BTreeMap<String, EndpointPolicy>,
    /// The CIDR peer number given last, without [`identity::CIDR_BIT`].
    pub last_cidr: u32,
}

impl Kernel {
    pub fn load(dump: &Dump) -> Self {
        let mut kernel = Self::default();
        for (key, rule) in &dump.rules {
            kernel.put_rule(*key, *rule);
            kernel.saw_peer(key.peer);
        }
        for (key, peer) in &dump.cidrs {
            kernel.put_cidr(*key, *peer);
            kernel.saw_peer(*peer);
        }
        kernel.identities = dump.identities.iter().copied().collect();
        kernel.endpoints = dump.endpoints.iter().map(|e| (e.uid.clone(), e.clone())).collect();
        kernel
    }

    fn saw_peer(&mut self, peer: u32) {
        if peer & identity::CIDR_BIT != 0 {
            self.last_cidr = self.last_cidr.max(peer & !identity::CIDR_BIT);
        }
    }

    pub fn put_rule(&mut self, key: RuleKey, rule: u32) {
        let peers = self.rules.entry(key.subject).or_default();
        let old = peers.entry((key.direction, key.peer)).or_default().insert(key.port, rule);
        self.rule_count += usize::from(old.is_none());
    }

    pub fn delete_rule(&mut self, key: &RuleKey) {
        let Some(peers) = self.rules.get_mut(&key.subject) else { return };
        let group = (key.direction, key.peer);
        let Some(ports) = peers.get_mut(&group) else { return };
        self.rule_count -= usize::from(ports.remove(&key.port).is_some());
        if ports.is_empty() {
            peers.remove(&group);
        }
        if peers.is_empty() {
            self.rules.remove(&key.subject);
        }
    }

    pub fn ports(&self, subject: u32, direction: Direction, peer: u32) -> Option<&Ports> {
        self.rules.get(&subject)?.get(&(direction, peer))
    }

    /// The peers with rules, CIDR peers included.
    pub fn peers(&self, subject: u32, direction: Direction) -> BTreeSet<u32> {
        let peers = self.rules.get(&subject).into_iter().flat_map(BTreeMap::keys);
        peers.filter(|(found, _)| *found == direction).map(|(_, peer)| *peer).collect()
    }

    pub fn put_cidr(&mut self, key: CidrKey, peer: u32) {
        let old = self.cidrs.entry((key.subject, key.direction)).or_default().insert(key.prefix, peer);
        self.cidr_count += usize::from(old.is_none());
    }

    pub fn delete_cidr(&mut self, key: &CidrKey) {
        let group = (key.subject, key.direction);
        let Some(prefixes) = self.cidrs.get_mut(&group) else { return };
        self.cidr_count -= usize::from(prefixes.remove(&key.prefix).is_some());
        if prefixes.is_empty() {
            self.cidrs.remove(&group);
        }
    }

    /// A CIDR peer number that this subject and direction does not use, nor did of late.
    pub fn next_cidr_peer(&mut self, subject: u32, direction: Direction) -> u32 {
        loop {
            self.last_cidr = if self.last_cidr >= identity::CIDR_BIT - 1 { 1 } else { self.last_cidr + 1 };
            let peer = identity::CIDR_BIT | self.last_cidr;
            let named =
                self.cidrs.get(&(subject, direction)).is_some_and(|prefixes| prefixes.values().any(|p| *p == peer));
            if !named && self.ports(subject, direction, peer).is_none() {
                return peer;
            }
        }
    }
}

/// Writes by kind; [`Batch::ops`] puts them into the order in which a packet is always judged by a whole state.
#[derive(Clone, Debug, Default)]
pub(crate) struct Batch {
    pub put_rules: Vec<(RuleKey, u32)>,
    pub put_cidrs: Vec<(CidrKey, u32)>,
    pub put_identities: Vec<(IpNet, u32)>,
    /// Endpoints with another subject, enforced for now where they were and will be.
    pub moved_endpoints: Vec<EndpointPolicy>,
    pub put_endpoints: Vec<EndpointPolicy>,
    pub delete_endpoints: Vec<String>,
    pub delete_identities: Vec<IpNet>,
    pub delete_cidrs: Vec<CidrKey>,
    pub delete_rules: Vec<RuleKey>,
}

impl Batch {
    /// An endpoint gets another subject: it moves before addresses change, and what is new to it is enforced after.
    pub fn move_endpoint(&mut self, old: &EndpointPolicy, new: EndpointPolicy) {
        let moved = EndpointPolicy {
            enforce_ingress: old.enforce_ingress && new.enforce_ingress,
            enforce_egress: old.enforce_egress && new.enforce_egress,
            ..new.clone()
        };
        if moved != new {
            self.put_endpoints.push(new);
        }
        self.moved_endpoints.push(moved);
    }

    /// - Rules come before what makes a look-up reach them: a new identity's and a new CIDR peer's are complete before any
    ///   address leads there, and a subject's before its endpoint is enforced. So a pod whose labels change is judged by
    ///   its old identity or by its new one, never by one without rules.
    /// - Endpoints that were enforced get their new subject before addresses change, since its rules know the old
    ///   identities too; those that were not are enforced after, when every peer is known.
    /// - Prefixes are written from the longest to the shortest and deleted from the shortest to the longest. Then an
    ///   address meets its old longest match or its new one in between, never a third that one of them was hiding.
    /// - What nothing leads to any more goes last.
    pub fn ops(mut self) -> Vec<Op> {
        self.put_cidrs.sort_by_key(|(key, _)| (std::cmp::Reverse(kernel_length(&key.prefix)), *key));
        self.put_identities.sort_by_key(|(prefix, _)| (std::cmp::Reverse(kernel_length(prefix)), *prefix));
        self.delete_cidrs.sort_by_key(|key| (kernel_length(&key.prefix), *key));
        self.delete_identities.sort_by_key(|prefix| (kernel_length(prefix), *prefix));
        let mut ops = Vec::new();
        ops.extend(self.put_rules.into_iter().map(|(key, rule)| Op::PutRule { key, rule }));
        ops.extend(self.put_cidrs.into_iter().map(|(key, peer)| Op::PutCidr { key, peer }));
        ops.extend(self.moved_endpoints.into_iter().map(Op::PutEndpoint));
        ops.extend(self.put_identities.into_iter().map(|(prefix, identity)| Op::PutIdentity { prefix, identity }));
        ops.extend(self.put_endpoints.into_iter().map(Op::PutEndpoint));
        ops.extend(self.delete_endpoints.into_iter().map(|uid| Op::DeleteEndpoint { uid }));
        ops.extend(self.delete_identities.into_iter().map(|prefix| Op::DeleteIdentity { prefix }));
        ops.extend(self.delete_cidrs.into_iter().map(|key| Op::DeleteCidr { key }));
        ops.extend(self.delete_rules.into_iter().map(|key| Op::DeleteRule { key }));
        ops
    }
}

/// The length of a prefix among the kernel's 128 bits, where IPv4 is `::ffff:0:0/96`.
fn kernel_length(prefix: &IpNet) -> u8 {
    match prefix {
        IpNet::V4(net) => 96 + net.prefix_len(),
        IpNet::V6(net) => net.prefix_len(),
    }
}
