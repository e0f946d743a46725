//! Policies, and the rules of those that isolate a local pod in the form that tables are built from.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::index::Index;
use crate::model::{NetworkPolicy, ObjectName, Peer, PolicyPort, PortMatch, Rule};
use crate::numbering::{Numbering, escape};
use crate::op::Direction;
use crate::selector::{Namespaces, PeerSelector};

/// Which rule of which policy a rule id stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleName {
    /// The policy.
    pub policy: ObjectName,
    /// Its `ingress` or `egress` list.
    pub direction: Direction,
    /// Position in that list, from 0.
    pub index: u32,
}

impl RuleName {
    /// One word, for the persisted lines.
    fn word(&self) -> String {
        let ObjectName { namespace, name } = &self.policy;
        format!("{};{};{};{}", escape(namespace), escape(name), self.direction, self.index)
    }
}

impl std::fmt::Display for RuleName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}[{}]", self.policy, self.direction, self.index)
    }
}

/// A rule with its peers sorted by how they are found.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    /// Its rule id.
    pub id: u32,
    pub ports: Vec<PolicyPort>,
    /// No peers named: all are meant.
    pub any_peer: bool,
    pub selectors: Vec<u32>,
    pub blocks: Vec<(IpNet, Vec<IpNet>)>,
    /// Of an egress rule for any peer with named ports: all pods, since each may give the name another port.
    pub every_pod: Option<u32>,
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub policy: NetworkPolicy,
    /// The subjects it isolates.
    pub subjects: BTreeSet<u32>,
    /// Its rules per direction, while it has subjects.
    pub ingress: Vec<Compiled>,
    pub egress: Vec<Compiled>,
}

impl Entry {
    pub fn new(policy: NetworkPolicy) -> Self {
        Self { policy, subjects: BTreeSet::new(), ingress: Vec::new(), egress: Vec::new() }
    }

    pub fn isolates(&self, direction: Direction) -> bool {
        match direction {
            Direction::Ingress => self.policy.ingress.is_some(),
            Direction::Egress => self.policy.egress.is_some(),
        }
    }

    pub fn rules(&self, direction: Direction) -> &[Compiled] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    pub fn compile(&mut self, index: &mut Index, numbers: &mut Numbering, names: &mut BTreeMap<u32, RuleName>) {
        let policy = &self.policy;
        let mut all = |direction, rules: &Option<Vec<Rule>>| -> Vec<Compiled> {
            let rules = rules.iter().flatten().zip(0..);
            rules.map(|(rule, at)| compile(&policy.name, direction, at, rule, index, numbers, names)).collect()
        };
        let ingress = all(Direction::Ingress, &policy.ingress);
        let egress = all(Direction::Egress, &policy.egress);
        (self.ingress, self.egress) = (ingress, egress);
    }

    pub fn release(&mut self, index: &mut Index, numbers: &mut Numbering) {
        for rule in self.ingress.drain(..).chain(self.egress.drain(..)) {
            rule.selectors.iter().chain(&rule.every_pod).for_each(|s| index.release(*s, &self.policy.name));
            numbers.unref(rule.id);
        }
    }
}

fn compile(
    policy: &ObjectName,
    direction: Direction,
    at: u32,
    rule: &Rule,
    index: &mut Index,
    numbers: &mut Numbering,
    names: &mut BTreeMap<u32, RuleName>,
) -> Compiled {
    let name = RuleName { policy: policy.clone(), direction, index: at };
    let id = numbers.acquire(&name.word());
    names.insert(id, name);
    let mut selectors = Vec::new();
    let mut blocks = Vec::new();
    for peer in &rule.peers {
        match peer {
            Peer::Pods { namespaces, pods } => {
                let namespaces = match namespaces {
                    Some(selector) => Namespaces::Labelled(selector.clone()),
                    None => Namespaces::Named(policy.namespace.clone()),
                };
                let pods = pods.clone().unwrap_or_default();
                selectors.push(index.acquire(PeerSelector { namespaces, pods }, policy));
            }
            Peer::IpBlock { cidr, except } => blocks.push((*cidr, except.clone())),
        }
    }
    let any_peer = rule.peers.is_empty();
    let by_name = rule.ports.iter().any(|port| matches!(port.port, PortMatch::Named(_)));
    let wants_every_pod = any_peer && by_name && direction == Direction::Egress;
    let every_pod = wants_every_pod.then(|| index.acquire(PeerSelector::all(), policy));
    Compiled { id, ports: rule.ports.clone(), any_peer, selectors, blocks, every_pod }
}
