//! The kernel's policy tables in memory, with the datapath's look-ups.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::flatten::longest_match;
use crate::op::{CidrKey, Direction, EndpointPolicy, Op, RuleKey, identity};
use crate::ports::{Ports, lookup};

/// What the datapath decides of a new flow in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// No policy isolates the endpoint in this direction.
    NotIsolated,
    /// It comes from the pod's own node.
    FromHost,
    /// A rule allows it, by its id.
    Allowed(u32),
    /// No rule does.
    Denied,
}

impl Decision {
    /// Whether the flow passes.
    pub fn passes(self) -> bool {
        self != Self::Denied
    }
}

/// The maps. Prefix tries are plain maps here, searched as tries are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Simulated {
    /// RULES.
    pub rules: BTreeMap<RuleKey, u32>,
    /// CIDRS.
    pub cidrs: BTreeMap<CidrKey, u32>,
    /// IDENTITIES.
    pub identities: BTreeMap<IpNet, u32>,
    /// Endpoints by uid.
    pub endpoints: BTreeMap<String, EndpointPolicy>,
}

impl Simulated {
    /// Executes one write.
    pub fn execute(&mut self, op: &Op) {
        match op.clone() {
            Op::PutRule { key, rule } => {
                self.rules.insert(key, rule);
            }
            Op::PutCidr { key, peer } => {
                self.cidrs.insert(key, peer);
            }
            Op::PutIdentity { prefix, identity } => {
                self.identities.insert(prefix, identity);
            }
            Op::PutEndpoint(policy) => {
                self.endpoints.insert(policy.uid.clone(), policy);
            }
            Op::DeleteEndpoint { uid } => {
                self.endpoints.remove(&uid);
            }
            Op::DeleteIdentity { prefix } => {
                self.identities.remove(&prefix);
            }
            Op::DeleteCidr { key } => {
                self.cidrs.remove(&key);
            }
            Op::DeleteRule { key } => {
                self.rules.remove(&key);
            }
            Op::Bump(_) => {}
        }
    }

    /// All entries.
    pub fn dump(&self) -> crate::Dump {
        crate::Dump {
            identities: self.identities.iter().map(|(k, v)| (*k, *v)).collect(),
            rules: self.rules.iter().map(|(k, v)| (*k, *v)).collect(),
            cidrs: self.cidrs.iter().map(|(k, v)| (*k, *v)).collect(),
            endpoints: self.endpoints.values().cloned().collect(),
        }
    }

    /// What an address is.
    pub fn identity(&self, addr: IpAddr) -> u32 {
        longest_match(&self.identities, addr).map_or(identity::WORLD, |(_, id)| *id)
    }

    /// Judges a new flow between an endpoint and a peer; `port` is the flow's destination port, 0 for protocols without.
    /// `None`: no such endpoint.
    pub fn decide(&self, uid: &str, direction: Direction, peer: IpAddr, proto: u8, port: u16) -> Option<Decision> {
        let endpoint = self.endpoints.get(uid)?;
        let enforced = match direction {
            Direction::Ingress => endpoint.enforce_ingress,
            Direction::Egress => endpoint.enforce_egress,
        };
        if !enforced {
            return Some(Decision::NotIsolated);
        }
        let rules = |peer| {
            let keys = self
                .rules
                .iter()
                .filter(|(k, _)| (k.subject, k.direction, k.peer) == (endpoint.subject, direction, peer));
            keys.map(|(key, rule)| (key.port, *rule)).collect::<Ports>()
        };
        let cidrs: BTreeMap<IpNet, u32> = {
            let keys = self.cidrs.iter().filter(|(k, _)| (k.subject, k.direction) == (endpoint.subject, direction));
            keys.map(|(key, peer)| (key.prefix, *peer)).collect()
        };
        let id = self.identity(peer);
        let cidr = longest_match(&cidrs, peer).map_or(0, |(_, peer)| *peer);
        Some(judge(rules, direction, id, cidr, proto, port))
    }
}

/// The order of look-ups for an endpoint that enforces this direction.
pub(crate) fn judge(
    rules: impl Fn(u32) -> Ports,
    direction: Direction,
    id: u32,
    cidr: u32,
    proto: u8,
    port: u16,
) -> Decision {
    if direction == Direction::Ingress && id == identity::HOST {
        return Decision::FromHost;
    }
    let found = |peer| lookup(&rules(peer), proto, port);
    let rule = found(id).or_else(|| found(identity::ANY));
    let rule = rule.or_else(|| if cidr == 0 { None } else { found(cidr) });
    rule.map_or(Decision::Denied, Decision::Allowed)
}
