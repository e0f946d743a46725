//! What the kernel programs and user space agree on: map names and sizes, keys, values, flags and drop reasons.
//!
//! Every type is `repr(C)` without padding (the zerocopy derives refuse it), keeps addresses and ports in network byte
//! order and everything else in the host's. IPv4 addresses are kept IPv4-mapped (`::ffff:a.b.c.d`), so that one table and
//! one program path serve both families; `docs/architecture.md` says why.
//!
//! A change to any type or map here is a change of [`LAYOUT_VERSION`], unless it only gives meaning to reserved bytes.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod addr;
mod count;
pub mod crc32c;
mod ct;
mod endpoint;
mod lb;
mod lpm;
pub mod maps;
mod node;
mod policy;

pub use addr::{Addr, Port};
pub use count::{Counter, CounterKey, DropEvent, EndpointDropKey, HOOKS, Hook, REASONS, Reason};
pub use ct::{CtEntry, CtKey, FragKey, FragPorts, NatEntry, SWEEP_GRACE, SWEEP_HEADER, SWEEP_KEYS, ct_flags, scope};
pub use endpoint::{Endpoint, endpoint_flags};
pub use lb::{
    AFFINITY_GROUP, Affinity, AffinityKey, Backend, From, Frontend, FrontendKey, MEMBER_BIT, NO_SLOT, NetnsPod,
    SlotKey, SockBackend, SockFrontend, SockKey, SourceRangeKey, backend_flags, frontend_flags,
};
pub use lpm::{Identity, PrefixKey, Tunnel, tunnel_flags};
pub use node::{NodeConfig, NodeState, node_flags};
pub use policy::{CidrKey, Direction, RuleKey, identity};

/// The version of everything in this crate; pins live below a directory that carries it.
pub const LAYOUT_VERSION: u32 = 1;
