//! The host side of the maps and programs: from an object file and a bpffs to typed tables and attached hooks.
//!
//! [`Datapath::open`] checks what is pinned against the layout, loads the programs beside those that run, and attaches
//! nothing; [`Datapath::switch`] changes one word after which every hook of the node runs the new ones. [`Table`] is the one
//! way in which the rest of the agent reads and writes: the kernel's ([`KernelTable`]), a fake, or a faulty one.

mod attach;
mod clsact;
mod connections;
mod error;
pub mod fake;
mod features;
mod loader;
mod object;
mod pins;
mod raw;
mod sockets;
mod sweep;
mod sys;
mod table;
mod tables;
mod xdp;

pub use attach::{HookState, Mechanism};
pub use clsact::detach as detach_clsact;
pub use connections::{Connections, Peer};
pub use error::{Error, TableError};
pub use loader::{Datapath, Run, cleanup};
pub use sockets::SocketTables;
pub use sweep::{Sweep, Swept};
pub use table::{CounterTable, KernelTable, Table};
pub use tables::{Fill, Tables};
pub use xdp::XdpMode;
