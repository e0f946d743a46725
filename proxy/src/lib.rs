//! Services and EndpointSlices turned into frontends, backends and the ordered writes that bring the kernel's tables from
//! one state to the next.
//!
//! ```text
//! Service, EndpointSlice --> Model (tracker) --take_changes--> Change (a Service's wanted frontends)
//!        Change --> Tables (ids, slots) --apply--> Vec<Op>, in order
//!        Dump of the kernel's maps + all Changes --Tables::restore--> Tables, Vec<Op>
//! ```
//!
//! - [`Model`] holds the objects, remembers which Services changed, and works out each one's frontends once, however many
//!   events it had.
//! - [`endpoints`] says which endpoints serve: kube-proxy's rules on readiness, termination, traffic policy and hints.
//! - [`Tables`] mirrors the kernel's maps. It numbers frontends and backends, and turns a [`Change`] into [`Op`]s such that
//!   a packet between any two of them sees a valid table.
//! - [`HealthCheck`]s come from [`Model::health_checks`], addresses that two Services want from [`Tables::conflicts`],
//!   what is programmed from [`Tables::list`].
//! - [`mod@reference`] is the executable specification: packet and objects in, the set of allowed backends out.
//! - [`Simulated`] is the maps in memory, for tests and for `why`.
//!
//! Start: feed the first full lists to `Model`, read the maps into a [`Dump`], `Tables::restore(limits, &dump,
//! &model.take_changes())`, execute the ops. Then, per batch of events: `for change in model.take_changes() {
//! tables.apply(&change) }`, and execute. When a write fails the mirror no longer holds: dump, restore with
//! [`Model::all`], execute.
#![forbid(unsafe_code)]

pub mod endpoints;
mod frontends;
mod health;
mod ids;
pub mod maglev;
pub mod model;
mod op;
mod put;
pub mod reference;
mod restore;
mod simulated;
mod slots;
mod tables;
mod tracker;

pub use frontends::{AffinityGroup, Backends, Choice, FrontendKind, Wanted};
pub use health::{HealthCheck, NoLocal};
pub use model::ObjectName;
pub use op::{AFFINITY_GROUP, Backend, Dump, Frontend, FrontendKey, NO_SLOT, Op, Origin, SlotKey, flags};
pub use simulated::{Forward, Packet, Place, Simulated, Verdict};
pub use tables::{Conflict, Limits, Listed, Table, TableFull, Tables};
pub use tracker::{Change, Model, NodeInfo};
