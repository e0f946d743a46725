//! The model: public types and signatures.
use crate::model::{Endpoint, Namespace, NetworkPolicy, Node, ObjectName, Pod};
use crate::op::{Direction, Dump, Op};

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

/// A kernel map of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Prefix to identity.
    Identities,
    /// Subject, direction, peer, port to rule.
    Rules,
    /// Subject, direction, prefix to CIDR peer.
    Cidrs,
}

/// What could not be had in full.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Entries were left out, so that less is allowed than the policies say. They are tried again at each change.
    #[error("{table:?} is full: {left_out} entries do not fit in {limit}; what they would allow is denied")]
    Full {
        /// Which map.
        table: Table,
        /// Its size.
        limit: usize,
        /// How many are missing.
        left_out: usize,
    },
    /// A persisted line does not read as one.
    #[error("line {line} of the persisted numbers: {text:?} is not `+i|-i|+r|-r <number> <name>`")]
    BadNumberLine {
        /// From 1.
        line: usize,
        /// What it says.
        text: String,
    },
}

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

/// What `take_changes` returns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Lines to append to the persisted numbers, durably, before any op runs.
    pub numbers: Vec<String>,
    /// Writes, in their order.
    pub ops: Vec<Op>,
    /// What did not fit. The same error comes again with each change until it is gone.
    pub errors: Vec<PolicyError>,
}

/// Holds the objects and mirrors the kernel's maps.
pub struct Model {}

#[allow(unused_variables, clippy::unimplemented)]
impl Model {
    /// For empty maps.
    pub fn new(config: Config) -> Self {
        unimplemented!()
    }
    /// For maps that hold `dump`, numbered by `numbers` (all lines persisted so far, oldest first; see [`Changes::numbers`]
    /// and [`Model::numbers`]). The first `take_changes` has to come after the first full lists.
    pub fn restore<'a>(
        config: Config,
        numbers: impl IntoIterator<Item = &'a str>,
        dump: &Dump,
    ) -> Result<Self, PolicyError> {
        unimplemented!()
    }
    /// All numbers as lines, to replace the persisted ones by a shorter list.
    pub fn numbers(&self) -> Vec<String> {
        unimplemented!()
    }
    /// A namespace came or changed.
    pub fn upsert_namespace(&mut self, namespace: Namespace) {
        unimplemented!()
    }
    /// A namespace went.
    pub fn delete_namespace(&mut self, name: &str) {
        unimplemented!()
    }
    /// A pod came or changed.
    pub fn upsert_pod(&mut self, pod: Pod) {
        unimplemented!()
    }
    /// A pod went.
    pub fn delete_pod(&mut self, name: &ObjectName) {
        unimplemented!()
    }
    /// A policy came or changed.
    pub fn upsert_policy(&mut self, policy: NetworkPolicy) {
        unimplemented!()
    }
    /// A policy went.
    pub fn delete_policy(&mut self, name: &ObjectName) {
        unimplemented!()
    }
    /// A node came or changed.
    pub fn upsert_node(&mut self, node: Node) {
        unimplemented!()
    }
    /// A node went.
    pub fn delete_node(&mut self, name: &str) {
        unimplemented!()
    }
    /// A local endpoint is wanted or its addresses changed. One whose pod is not known gets a policy that denies all.
    pub fn upsert_endpoint(&mut self, endpoint: Endpoint) {
        unimplemented!()
    }
    /// A local endpoint is no longer wanted.
    pub fn delete_endpoint(&mut self, uid: &str) {
        unimplemented!()
    }
    /// Whether the pod of this uid and its namespace are known, so that an endpoint for it would be judged by its policies.
    pub fn knows(&self, uid: &str) -> bool {
        unimplemented!()
    }
    /// Works out what changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        unimplemented!()
    }
    /// Which rule a rule id stands for.
    pub fn rule(&self, id: u32) -> Option<&RuleName> {
        unimplemented!()
    }
    /// The namespace, labels and named ports of a pod identity, as a string; or the name of a reserved one.
    pub fn describe_identity(&self, id: u32) -> String {
        unimplemented!()
    }
    /// The policies that isolate this subject in this direction.
    pub fn isolating(&self, subject: u32, direction: Direction) -> Vec<ObjectName> {
        unimplemented!()
    }
}
