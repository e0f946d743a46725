//! Typed verbs over rtnetlink: what a node's data plane asks of links, addresses, routes and neighbours.
//!
//! One file a concern: [`link`], [`vxlan`], [`addr`], [`route`], [`neigh`], [`netns`], [`monitor`], [`sysctl`], [`sockets`]. A [`Handle`] is a
//! socket that belongs to one network namespace for good; [`Handle::open`] takes the process's own,
//! [`Handle::open_in`] another's. Whatever has to *be* in another namespace (opening that socket, writing
//! `/proc/sys/net`) runs on a thread of its own that is thrown away afterwards: a tokio worker never changes namespace.
//!
//! Conventions: verbs that remove answer whether there was something to remove, absence is never an error; verbs
//! called `replace_*` and `ensure_*` may be repeated. Hardware addresses are `[u8; 6]` in the order of the wire.

pub mod addr;
mod error;
mod handle;
pub mod link;
pub mod monitor;
pub mod neigh;
pub mod netns;
pub mod route;
pub mod sockets;
pub mod sysctl;
mod unreachable;
pub mod vxlan;

pub use addr::{Address, AddressOptions};
pub use error::{Error, Result};
pub use handle::Handle;
pub use link::{AddrGenMode, Link, Veth};
pub use monitor::AddressMonitor;
pub use neigh::Neighbour;
pub use netns::{Netns, NetnsId};
pub use route::{PROTOCOL_KEELWAY, Route, RouteFilter, RouteScope, TABLE_MAIN};
pub use vxlan::{OnMismatch, Vxlan};
