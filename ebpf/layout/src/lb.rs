use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Addr, Port};

/// Where a dialled packet comes from, as far as Services care.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum From {
    /// Anywhere; the node itself and its pods where [`frontend_flags::OUTSIDE_DIFFERS`].
    #[default]
    Anyone = 0,
    /// Outside of the node: other nodes, and their pods, too.
    Outside = 1,
}

/// An address and port that clients dial.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FrontendKey {
    addr: Addr,
    port: Port,
    proto: u8,
    from: u8,
}

impl FrontendKey {
    /// `proto` is the IANA number. Port 0 and protocol 0 stand for "any other port of this address"; the unspecified address of
    /// a family for every address of the node (a node port).
    #[inline(always)]
    pub const fn new(addr: Addr, port: Port, proto: u8) -> Self {
        Self { addr, port, proto, from: From::Anyone as u8 }
    }
    /// The same as seen from elsewhere.
    #[inline(always)]
    pub const fn seen_from(self, from: From) -> Self {
        Self { from: from as u8, ..self }
    }
    /// Whether it is the entry for packets from outside.
    #[inline(always)]
    pub const fn is_outside(&self) -> bool {
        self.from == From::Outside as u8
    }
    /// The address.
    #[inline(always)]
    pub const fn addr(&self) -> Addr {
        self.addr
    }
    /// The port.
    #[inline(always)]
    pub const fn port(&self) -> Port {
        self.port
    }
    /// The IANA protocol number.
    #[inline(always)]
    pub const fn proto(&self) -> u8 {
        self.proto
    }
}

/// Bits of [`Frontend::flags`].
pub mod frontend_flags {
    /// No port of this address but the listed ones is served: refuse.
    pub const REFUSE: u32 = 1;
    /// Without backends, drop instead of refusing: others have some.
    pub const DROP_WHEN_EMPTY: u32 = 2;
    /// An address of this node: the node ports are looked up next.
    pub const NODE_ADDRESS: u32 = 4;
    /// With [`NODE_ADDRESS`]: for processes of the host's own network namespace only.
    pub const HOST_ONLY: u32 = 8;
    /// Packets from outside of the node have an entry of their own.
    pub const OUTSIDE_DIFFERS: u32 = 16;
    /// Only clients of the frontend's ranges are served.
    pub const SOURCE_RANGES: u32 = 32;
    /// A node port: no process of the host may bind it.
    pub const NODE_PORT: u32 = 64;
    /// The slot is picked by the flow's hash.
    pub const HASHED: u32 = 128;
    /// The client's address is never replaced.
    pub const KEEP_SOURCE: u32 = 256;
    /// Index entries tell which backends are the frontend's (see [`MEMBER_BIT`](super::MEMBER_BIT)).
    pub const INDEXED: u32 = 512;
}

/// Bits of [`Backend::flags`].
pub mod backend_flags {
    /// In no slot any more; known flows go on, new ones do not come. Of UDP, of which none says that it is new, index entries tell
    /// ([`MEMBER_BIT`](super::MEMBER_BIT)).
    pub const DRAINING: u8 = 1;
}

/// Bit of [`SlotKey::frontend`] for the index entries of frontends with affinity or of UDP: the slot is then a backend's id, and the value
/// the slot that holds it, or [`NO_SLOT`].
pub const MEMBER_BIT: u32 = 0x8000_0000;

/// In place of a backend's id in an index entry: the value is the number of the frontend's affinity group, which frontends of one
/// Service port share. Without such an entry a frontend with affinity is a group of its own, with its id.
pub const AFFINITY_GROUP: u32 = 0;

/// No slot's number. A UDP frontend's backend with it keeps the flows that it has and gets no new ones.
pub const NO_SLOT: u32 = u32::MAX;

/// What is behind a [`FrontendKey`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Frontend {
    /// Names the frontend in [`SlotKey`].
    pub id: u32,
    /// Slots 0..count hold backends; 0 refuses connections.
    pub count: u32,
    /// Seconds of ClientIP affinity; 0 without.
    pub affinity_seconds: u32,
    /// See [`frontend_flags`].
    pub flags: u32,
    /// Zero.
    pub reserved: [u32; 2],
}

/// One slot of a frontend; the value is a backend id (`u32`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SlotKey {
    /// [`Frontend::id`].
    pub frontend: u32,
    /// From 0.
    pub slot: u32,
}

/// Where a frontend's connections go; the key is a backend id (`u32`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Backend {
    /// The address.
    pub addr: Addr,
    /// The port.
    pub port: Port,
    /// The IANA protocol number.
    pub proto: u8,
    /// See [`backend_flags`].
    pub flags: u8,
    /// Zero.
    pub reserved: u32,
}

/// A socket and an address that it talks to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SockKey {
    /// The kernel's socket cookie.
    pub cookie: u64,
    /// The backend's address (reverse table) or the frontend's (forward table).
    pub addr: Addr,
    /// Its port.
    pub port: Port,
    /// The IANA protocol number.
    pub proto: u8,
    /// Zero.
    pub reserved: [u8; 5],
}

/// The frontend that a socket dialled, by the backend that it was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SockFrontend {
    /// The frontend's address.
    pub addr: Addr,
    /// The frontend's port.
    pub port: Port,
    /// Zero.
    pub reserved: [u8; 6],
}

/// The backend that an unconnected socket keeps for a frontend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SockBackend {
    /// The backend's id.
    pub backend: u32,
    /// The slot that held it, which older programs want to see unchanged.
    pub slot: u32,
}

/// A client that a frontend serves, by prefix; the value (`u32`) is 1.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SourceRangeKey {
    prefix_len: u32,
    frontend: u32,
    addr: Addr,
}

impl SourceRangeKey {
    /// `bits` counts those of the address, of 128; an IPv4 prefix is 96 longer than written.
    #[inline(always)]
    pub const fn new(frontend: u32, addr: Addr, bits: u32) -> Self {
        Self { prefix_len: 32 + bits, frontend, addr }
    }
    /// [`Frontend::id`].
    pub const fn frontend(&self) -> u32 {
        self.frontend
    }
    /// The prefix's address.
    pub const fn addr(&self) -> Addr {
        self.addr
    }
    /// Bits of the address that count, of 128.
    pub const fn bits(&self) -> u32 {
        self.prefix_len - 32
    }
    /// Bits of the whole key that count.
    pub const fn prefix_len(&self) -> u32 {
        self.prefix_len
    }
}

/// A client of frontends with ClientIP affinity.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AffinityKey {
    /// The client's address.
    pub client: Addr,
    /// The number of the frontend's group, see [`AFFINITY_GROUP`]; or [`Frontend::id`], where the group's backend is not this
    /// frontend's to choose.
    pub group: u32,
    /// Zero.
    pub reserved: u32,
}

/// The backend that a client stays with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Affinity {
    /// Nanoseconds of the monotonic clock at which the client was last seen.
    pub seen: u64,
    /// The backend's id.
    pub backend: u32,
    /// Zero.
    pub reserved: u32,
}

/// Who a network namespace is; the key is its cookie (`u64`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetnsPod {
    /// The pod's IPv4 address; unspecified without.
    pub v4: Addr,
    /// The pod's IPv6 address; unspecified without.
    pub v6: Addr,
    /// [`crate::Endpoint::id`].
    pub endpoint: u32,
    /// Zero.
    pub reserved: u32,
}
