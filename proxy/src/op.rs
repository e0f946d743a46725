//! What the kernel's Service tables hold, and the single writes that change them.

use std::fmt;
use std::net::IpAddr;

use crate::model::Protocol;

/// Key of a frontend: an address and port that clients connect to.
///
/// `proto` 0 with `port` 0 stands for every port of `addr` that no other frontend names: the datapath looks it up second,
/// and refuses (see [`flags::ANY_PORT`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The Service's address, never IPv4-mapped.
    pub addr: IpAddr,
    /// The port, host byte order.
    pub port: u16,
    /// IANA protocol number.
    pub proto: u8,
}

impl FrontendKey {
    /// A frontend for one port.
    pub fn new(addr: IpAddr, port: u16, protocol: Protocol) -> Self {
        Self { addr: addr.to_canonical(), port, proto: protocol.number() }
    }

    /// The entry for all other ports of an address.
    pub fn any_port(addr: IpAddr) -> Self {
        Self { addr: addr.to_canonical(), port: 0, proto: 0 }
    }

    /// Whether this is an [`any_port`](Self::any_port) key.
    pub fn is_any_port(&self) -> bool {
        self.proto == 0
    }
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {} protocol {}", self.addr, self.port, self.proto)
    }
}

/// Bits of [`Frontend::flags`].
pub mod flags {
    /// Stands for every port that the address does not serve; has no slots, no reverse entry and id 0.
    pub const ANY_PORT: u32 = 1;
    /// With no backend, drop instead of refusing: a Local traffic policy with endpoints on other nodes only.
    pub const DROP_WHEN_EMPTY: u32 = 2;
}

/// Value of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Names its slots and its reverse entry; from 1 (0 only with [`flags::ANY_PORT`]).
    pub id: u32,
    /// Slots 0 to `count - 1` are valid; 0 means refuse (or drop, see [`flags::DROP_WHEN_EMPTY`]).
    pub count: u32,
    /// Seconds of ClientIP affinity; 0 for none.
    pub affinity_seconds: u32,
    /// See [`flags`].
    pub flags: u32,
}

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
    /// BACKENDS\[id\] = backend. Ids start at 1; an existing id is never given another backend.
    PutBackend {
        /// Backend id.
        id: u32,
        /// Value.
        backend: Backend,
    },
    /// SLOTS\[key\] = backend id.
    PutSlot {
        /// Key.
        key: SlotKey,
        /// Backend id.
        backend: u32,
    },
    /// REVNAT\[frontend id\] = the frontend's address and port.
    PutRevNat {
        /// Frontend id.
        frontend: u32,
        /// What replies are to come from.
        key: FrontendKey,
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
    /// Removes a reverse entry.
    DeleteRevNat {
        /// Frontend id.
        frontend: u32,
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
    /// BACKENDS.
    pub backends: Vec<(u32, Backend)>,
    /// REVNAT.
    pub revnat: Vec<(u32, FrontendKey)>,
}
