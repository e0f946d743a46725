use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Addr;

/// Key of the tables that match an address by its longest prefix.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PrefixKey {
    prefix_len: u32,
    addr: Addr,
}

impl PrefixKey {
    /// `prefix_len` counts bits of the 128; an IPv4 prefix is 96 longer than written.
    #[inline(always)]
    pub const fn new(addr: Addr, prefix_len: u32) -> Self {
        Self { prefix_len, addr }
    }
    /// The key that looks `addr` up.
    #[inline(always)]
    pub const fn host(addr: Addr) -> Self {
        Self { prefix_len: 128, addr }
    }
    /// The address, host bits included.
    pub const fn addr(&self) -> Addr {
        self.addr
    }
    /// Bits of 128.
    pub const fn prefix_len(&self) -> u32 {
        self.prefix_len
    }
}

/// Who an address is; see [`crate::identity`] for the reserved numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Identity {
    /// The node-local number.
    pub id: u32,
    /// Zero.
    pub flags: u32,
}

/// Bits of [`Tunnel::flags`].
pub mod tunnel_flags {
    /// It takes packets of Services' clients as they came, and answers these itself.
    pub const DSR: u32 = 1;
}

/// The node behind an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Tunnel {
    /// The node's underlay address.
    pub remote: Addr,
    /// See [`tunnel_flags`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}
