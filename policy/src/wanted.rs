//! What the rules of a subject are to be.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::flatten::{Block, flatten};
use crate::index::Index;
use crate::model::{NamedPort, ObjectName, PolicyPort, PortMatch};
use crate::op::{Direction, PortPrefix, identity};
use crate::policies::{Compiled, Entry};
use crate::ports::{Ports, prune};

/// The policies that isolate one subject, in the order of their names: where several rules allow the same, the first is
/// the one that is named for it.
pub(crate) struct Wanted<'a> {
    pub index: &'a Index,
    pub policies: &'a BTreeMap<ObjectName, Entry>,
    pub isolated_by: &'a BTreeSet<ObjectName>,
    pub subject: u32,
}

impl Wanted<'_> {
    fn rules(&self, direction: Direction) -> impl Iterator<Item = &Compiled> {
        let entries = self.isolated_by.iter().filter_map(|name| self.policies.get(name));
        entries.flat_map(move |entry| entry.rules(direction))
    }

    /// Every peer that rules of this direction name, ANY included, CIDR peers not.
    pub fn peers(&self, direction: Direction) -> BTreeSet<u32> {
        let mut peers = BTreeSet::from([identity::ANY]);
        for rule in self.rules(direction) {
            for selector in rule.selectors.iter().chain(&rule.every_pod) {
                peers.extend(self.index.matches(*selector));
            }
        }
        peers
    }

    /// The ports of one peer: ANY or a pod's identity.
    pub fn ports(&self, direction: Direction, peer: u32) -> Ports {
        let mut ports = Ports::new();
        for rule in self.rules(direction) {
            if peer == identity::ANY {
                if rule.any_peer {
                    self.add(&mut ports, rule, direction, None);
                }
            } else if rule.selectors.iter().any(|selector| self.index.selects(*selector, peer)) {
                self.add(&mut ports, rule, direction, Some(peer));
            } else if rule.every_pod.is_some() {
                let named = rule.ports.iter().filter(|port| matches!(port.port, PortMatch::Named(_)));
                named.for_each(|port| self.add_port(&mut ports, rule.id, port, direction, Some(peer)));
            }
        }
        prune(&ports)
    }

    /// The ports per prefix; an empty set hides a shorter prefix.
    pub fn cidrs(&self, direction: Direction) -> BTreeMap<IpNet, Ports> {
        let rules: Vec<&Compiled> = self.rules(direction).filter(|rule| !rule.blocks.is_empty()).collect();
        let block =
            |at: usize, (cidr, except): &(IpNet, Vec<IpNet>)| Block { cidr: *cidr, except: except.clone(), rule: at };
        let blocks: Vec<Block> =
            rules.iter().enumerate().flat_map(|(at, rule)| rule.blocks.iter().map(move |b| block(at, b))).collect();
        let ports = |matching: Vec<usize>| {
            let mut ports = Ports::new();
            matching.into_iter().for_each(|at| self.add(&mut ports, rules[at], direction, None));
            prune(&ports)
        };
        flatten(&blocks).into_iter().map(|(prefix, matching)| (prefix, ports(matching))).collect()
    }

    fn add(&self, ports: &mut Ports, rule: &Compiled, direction: Direction, peer: Option<u32>) {
        if rule.ports.is_empty() {
            ports.entry(PortPrefix::EVERYTHING).or_insert(rule.id);
        }
        rule.ports.iter().for_each(|port| self.add_port(ports, rule.id, port, direction, peer));
    }

    fn add_port(&self, ports: &mut Ports, rule: u32, port: &PolicyPort, direction: Direction, peer: Option<u32>) {
        let proto = port.protocol.number();
        match &port.port {
            PortMatch::Any => {
                ports.entry(PortPrefix::protocol(proto)).or_insert(rule);
            }
            PortMatch::Range(first, last) => {
                for prefix in PortPrefix::range(proto, *first, *last) {
                    ports.entry(prefix).or_insert(rule);
                }
            }
            // The name is one of the pod that receives: the subject, or the peer when that is a known pod.
            PortMatch::Named(name) => {
                let receiver = match direction {
                    Direction::Ingress => Some(self.subject),
                    Direction::Egress => peer,
                };
                let key = receiver.and_then(|id| self.index.identity(id));
                let is_it = |p: &&NamedPort| p.name == *name && p.protocol == port.protocol;
                for found in key.into_iter().flat_map(|key| key.named_ports.iter().filter(is_it)) {
                    for prefix in PortPrefix::range(proto, found.port, found.port) {
                        ports.entry(prefix).or_insert(rule);
                    }
                }
            }
        }
    }
}
