//! What the kernel's Service tables hold, and the single writes that change them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::model::Protocol;

/// Which clients an entry is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Origin {
    /// All; with [`flags::OUTSIDE_DIFFERS`], this node's pods and processes.
    #[default]
    Anyone = 0,
    /// Those outside of the node: other nodes, and their pods, too.
    Outside = 1,
}

/// Key of a frontend: an address and port that clients connect to. The datapath looks it up so:
///
/// 1. `addr`, `port`, `proto` for [`Origin::Anyone`]. If there is none, [`any_port`](Self::any_port) of `addr`: with
///    [`flags::NODE_ADDRESS`] the answer is [`node_port`](Self::node_port), with [`flags::ANY_PORT`] to refuse.
/// 2. For a client outside of the cluster and with [`flags::OUTSIDE_DIFFERS`], the same key for [`Origin::Outside`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The Service's address, never IPv4-mapped.
    pub addr: IpAddr,
    /// The port, host byte order.
    pub port: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// For whom.
    pub from: Origin,
}

impl FrontendKey {
    /// A frontend for one port.
    pub fn new(addr: IpAddr, port: u16, protocol: Protocol) -> Self {
        Self { addr: addr.to_canonical(), port, proto: protocol.number(), from: Origin::Anyone }
    }

    /// The entry for all other ports of an address.
    pub fn any_port(addr: IpAddr) -> Self {
        Self { addr: addr.to_canonical(), port: 0, proto: 0, from: Origin::Anyone }
    }

    /// A node port on all of the node's addresses of a family: the family's unspecified address.
    pub fn node_port(ipv6: bool, port: u16, protocol: Protocol) -> Self {
        let addr: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        Self::new(addr, port, protocol)
    }

    /// The same address and port for other clients.
    pub fn seen_from(self, from: Origin) -> Self {
        Self { from, ..self }
    }

    /// Whether this is an [`any_port`](Self::any_port) key.
    pub fn is_any_port(&self) -> bool {
        self.proto == 0
    }
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {} protocol {}", self.addr, self.port, self.proto)?;
        if self.from == Origin::Outside { f.write_str(" from outside") } else { Ok(()) }
    }
}

/// Bits of [`Frontend::flags`].
pub mod flags {
    /// Stands for every port that the address does not serve; has no slots and id 0.
    pub const ANY_PORT: u32 = 1;
    /// With no backend, drop instead of refusing: a Local traffic policy with endpoints on other nodes only.
    pub const DROP_WHEN_EMPTY: u32 = 2;
    /// On an any-port key: an address of this node, where node ports answer. Has no slots and id 0.
    pub const NODE_ADDRESS: u32 = 4;
    /// With `NODE_ADDRESS`: for processes of the host's own network namespace only (loopback).
    pub const HOST_ONLY: u32 = 8;
    /// Clients outside of the cluster have an entry of their own.
    pub const OUTSIDE_DIFFERS: u32 = 16;
    /// Only clients in the frontend's source ranges may; others are dropped.
    pub const SOURCE_RANGES: u32 = 32;
    /// A node port, which no process of the host may bind.
    pub const NODE_PORT: u32 = 64;
    /// Slots hold a Maglev table: the flow's hash picks.
    pub const HASHED: u32 = 128;
    /// The client's address is to reach the backend.
    pub const KEEP_SOURCE: u32 = 256;
    /// Each backend in a slot has a member entry, and of datagrams each that flows may still have.
    pub const INDEXED: u32 = 512;
    /// All of them.
    pub const ALL: u32 = 2 * INDEXED - 1;
}

/// Value of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Names its slots, members and source ranges; from 1 (0 only for any-port keys), below 2³¹.
    pub id: u32,
    /// Slots 0 to `count - 1` are valid; 0 means refuse (or drop, see [`flags::DROP_WHEN_EMPTY`]).
    pub count: u32,
    /// Seconds of ClientIP affinity; 0 for none.
    pub affinity_seconds: u32,
    /// See [`flags`].
    pub flags: u32,
}

/// In place of a backend's id in the member entry that names a frontend's affinity group: its "slot" is a number that all frontends of
/// the group have in common, and no other. Without the entry a frontend is a group of its own, by its id.
pub const AFFINITY_GROUP: u32 = 0;

/// The slot of a backend that is in none.
pub const NO_SLOT: u32 = u32::MAX;

/// Key of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotKey {
    /// [`Frontend::id`].
    pub frontend: u32,
    /// Which one, from 0.
    pub slot: u32,
}

/// A place to send connections to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// Its address, of the frontend's family.
    pub addr: IpAddr,
    /// Its port, host byte order.
    pub port: u16,
    /// IANA protocol number.
    pub proto: u8,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {} protocol {}", self.addr, self.port, self.proto)
    }
}

/// One write to one table. A list of them is to be executed in its order, each once the one before it has succeeded.
///
/// A packet that runs between two of them sees a valid table. One that has read a slot number or a backend id just before
/// it was deleted finds nothing, and should pick again; ids are not reused soon, so it never finds another Service's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// BACKENDS\[id\] = backend. Ids start at 1; an existing id is never given another backend, only its flag changes.
    PutBackend {
        /// Backend id.
        id: u32,
        /// Value.
        backend: Backend,
        /// No slot names it, its Service still knows it: what it has goes on, nothing new comes.
        draining: bool,
    },
    /// SLOTS\[key\] = backend id.
    PutSlot {
        /// Key.
        key: SlotKey,
        /// Backend id.
        backend: u32,
    },
    /// A backend of a frontend with affinity, or of datagrams, and the slot that holds it. A look-up checks that the slot still
    /// names the backend, so the entry may be behind its slot for a moment.
    PutMember {
        /// Frontend id.
        frontend: u32,
        /// Backend id, or [`AFFINITY_GROUP`].
        backend: u32,
        /// Slot number; [`NO_SLOT`] for one that keeps the datagram flows that it has and gets no new ones.
        slot: u32,
    },
    /// Removes that.
    DeleteMember {
        /// Frontend id.
        frontend: u32,
        /// Backend id.
        backend: u32,
    },
    /// Clients of a frontend with [`flags::SOURCE_RANGES`].
    PutSourceRange {
        /// Frontend id.
        frontend: u32,
        /// Who may.
        net: IpNet,
    },
    /// Removes that.
    DeleteSourceRange {
        /// Frontend id.
        frontend: u32,
        /// Who may no longer.
        net: IpNet,
    },
    /// FRONTENDS\[key\] = frontend.
    PutFrontend {
        /// Key.
        key: FrontendKey,
        /// Value.
        frontend: Frontend,
    },
    /// Removes a frontend: its address and port is no longer a Service's.
    DeleteFrontend {
        /// Key.
        key: FrontendKey,
    },
    /// Removes a slot.
    DeleteSlot {
        /// Key.
        key: SlotKey,
    },
    /// Removes a backend that no slot names any more.
    DeleteBackend {
        /// Backend id.
        id: u32,
    },
}

/// Everything the kernel's maps hold, as read back after a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dump {
    /// FRONTENDS.
    pub frontends: Vec<(FrontendKey, Frontend)>,
    /// SLOTS.
    pub slots: Vec<(SlotKey, u32)>,
    /// BACKENDS, with whether each is draining.
    pub backends: Vec<(u32, Backend, bool)>,
    /// Frontend id and backend id to slot.
    pub members: Vec<((u32, u32), u32)>,
    /// Frontend ids and who may.
    pub source_ranges: Vec<(u32, IpNet)>,
}
