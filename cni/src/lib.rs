//! The CNI plugin's library: what a runtime says becomes what the agent is asked, and what the agent does to the kernel.
//!
//! | module | turns | into | I/O |
//! |---|---|---|---|
//! | [`spec`] | environment, stdin | typed requests; results and errors into JSON of each CNI version | none |
//! | [`lease`], [`ipam`] | pod CIDRs, requests | leases; [`ipam::journal`] keeps them on disk | journal only |
//! | [`plan`] | a lease | names, addresses, and the ordered steps of an attachment, with their undo | none |
//! | `apply` (feature) | a plan | kernel state, through `keelway-netlink`; used by the agent alone | kernel |
//! | [`command`] | a request | a call to the agent, or the answer that holds while it is away | socket, disk |
//! | [`loopback`] | a request of a runtime that has no `lo` of its own | `lo` up, by this same binary under another name | kernel |
//! | [`pending`] | DELs that came while the agent was away | a queue on disk that the agent drains | disk |
//! | [`install`] | paths | the binary, the conflist and `loopback`, placed atomically | disk |
//!
//! `keelway-cni` itself is `spec -> command -> spec` and touches nothing of the kernel's network state but, as `loopback`, a
//! pod's `lo`.
#![forbid(unsafe_code)]

#[cfg(feature = "apply")]
pub mod apply;
pub mod command;
pub mod install;
pub mod ipam;
pub mod lease;
pub mod loopback;
pub mod pending;
pub mod plan;
pub mod spec;

pub use lease::{Lease, LeaseKey, PodRef};
