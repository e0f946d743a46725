//! Pods, namespaces and policies turned into node-local identities, rules and the ordered writes that bring the kernel's
//! tables from one state to the next.
//!
//! ```text
//! Namespace, Pod, Node   --> identity per distinct (namespace, its labels, pod labels, named ports)  --> IDENTITIES
//! NetworkPolicy x local Endpoints --> rules per subject, direction and peer                          --> RULES, CIDRS
//! all of it --> Model --take_changes--> Changes { ops in order, numbers to persist first, errors }
//! ```
//!
//! - [`Model`] holds the objects and a mirror of the kernel's maps. An event marks what it touches; `take_changes` works out
//!   just that and returns the difference.
//! - [`mod@reference`] is the executable specification: packet and objects in, a verdict with its reason out.
//! - [`Simulated`] is the maps in memory with the datapath's look-ups, for tests and for `why`.
//!
//! The datapath judges a new flow of subject S in direction d with peer address a, protocol and destination port, if the
//! endpoint enforces d (and the packet is not between a pod and itself):
//!
//! 1. i = longest match of a in IDENTITIES, WORLD without one; ingress from HOST is allowed;
//! 2. allowed if RULES has (S, d, i, proto, port) or (S, d, ANY, proto, port);
//! 3. c = longest match of (S, d, a) in CIDRS; allowed if there is one, it is not 0, and RULES has (S, d, c, proto, port);
//! 4. else denied.
//!
//! Start: `Model::restore` with the persisted number lines and a dump of the maps, feed the first full lists and the
//! endpoints, then `take_changes`. Numbers are made durable before the ops that use them run, so that a restart goes on
//! with the same ones. When a write fails the mirror no longer holds: dump, [`Model::resync`], `take_changes`.
#![forbid(unsafe_code)]

mod claims;
mod explain;
mod flatten;
mod flush;
mod index;
mod kernel;
pub mod model;
mod numbering;
mod op;
mod policies;
mod ports;
pub mod reference;
mod resync;
mod selector;
mod simulated;
mod state;
mod wanted;

pub use explain::Explanation;
pub use flush::{Changes, PolicyError, Table};
pub use op::{CidrKey, Direction, Dump, EndpointPolicy, Op, PortPrefix, RuleKey, Scope, host_prefix, identity};
pub use policies::RuleName;
pub use simulated::{Decision, Simulated};
pub use state::{Config, Limits, Model};
