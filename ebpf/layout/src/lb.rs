use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Addr, Port};

/// An address and port that clients dial.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FrontendKey {
    addr: Addr,
    port: Port,
    proto: u8,
    reserved: u8,
}

impl FrontendKey {
    /// `proto` is the IANA number. Port 0 and protocol 0 stand for "any other port of a Service's address".
    #[inline(always)]
    pub const fn new(addr: Addr, port: Port, proto: u8) -> Self {
        Self { addr, port, proto, reserved: 0 }
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
}

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
    /// Zero.
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
    /// The slot that held it; the choice is good while it still does.
    pub slot: u32,
}
