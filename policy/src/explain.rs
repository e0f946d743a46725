//! Numbers back into names, and decisions with their reasons.

use std::net::IpAddr;

use crate::flatten::longest_match;
use crate::model::ObjectName;
use crate::op::{Direction, identity};
use crate::policies::RuleName;
use crate::simulated::{Decision, judge};
use crate::state::Model;

/// Why a flow is let through or not, in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What the peer's address is, as a number.
    pub peer: u32,
    /// The same in words.
    pub peer_name: String,
    /// What the tables say.
    pub decision: Decision,
    /// The rule of [`Decision::Allowed`].
    pub rule: Option<RuleName>,
    /// The policies that isolate the endpoint in this direction; with [`Decision::Denied`], those none of whose rules
    /// match. Empty for an endpoint whose pod is not known.
    pub isolated_by: Vec<ObjectName>,
}

impl Model {
    /// Which rule a rule id stands for.
    pub fn rule(&self, id: u32) -> Option<&RuleName> {
        self.rule_names.get(&id)
    }

    /// The namespace, its labels, the pod's labels and named ports of a pod identity; or the name of a reserved one.
    pub fn describe_identity(&self, id: u32) -> String {
        match id {
            identity::ANY => "any".to_owned(),
            identity::HOST => "host".to_owned(),
            identity::REMOTE_NODE => "remote-node".to_owned(),
            identity::WORLD => "world".to_owned(),
            identity::UNKNOWN_POD => "unknown-pod".to_owned(),
            identity::SERVICES => "services".to_owned(),
            id if id & identity::CIDR_BIT != 0 => format!("cidr {}", id & !identity::CIDR_BIT),
            id => self.identities.name(id).map_or_else(|| format!("unused identity {id}"), str::to_owned),
        }
    }

    /// The policies that isolate this subject in this direction.
    pub fn isolating(&self, subject: u32, direction: Direction) -> Vec<ObjectName> {
        let names = self.subjects.get(&subject).into_iter().flat_map(|subject| &subject.isolated_by);
        let isolates = |name: &&ObjectName| self.policies.get(name).is_some_and(|entry| entry.isolates(direction));
        names.filter(isolates).cloned().collect()
    }

    /// What the tables, as last written, decide of a new flow between a local endpoint (by uid) and a peer, and why;
    /// `port` is the flow's destination port. `None`: no such endpoint.
    pub fn explain(&self, uid: &str, direction: Direction, peer: IpAddr, proto: u8, port: u16) -> Option<Explanation> {
        let endpoint = self.kernel.endpoints.get(uid)?;
        let enforced = match direction {
            Direction::Ingress => endpoint.enforce_ingress,
            Direction::Egress => endpoint.enforce_egress,
        };
        let id = longest_match(&self.kernel.identities, peer).map_or(identity::WORLD, |(_, id)| *id);
        let cidrs = self.kernel.cidrs.get(&(endpoint.subject, direction));
        let cidr = cidrs.and_then(|cidrs| longest_match(cidrs, peer)).map_or(0, |(_, peer)| *peer);
        let rules = |peer| self.kernel.ports(endpoint.subject, direction, peer).cloned().unwrap_or_default();
        let decision = match enforced {
            true => judge(rules, direction, id, cidr, proto, port),
            false => Decision::NotIsolated,
        };
        let rule = match decision {
            Decision::Allowed(rule) => self.rule(rule).cloned(),
            _ => None,
        };
        let isolated_by = self.isolating(endpoint.subject, direction);
        Some(Explanation { peer: id, peer_name: self.describe_identity(id), decision, rule, isolated_by })
    }
}
