use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Addr, Port};

/// Reserved identities.
pub mod identity {
    /// In a rule: every peer. Of an address: none known.
    pub const ANY: u32 = 0;
    /// This node.
    pub const HOST: u32 = 1;
    /// Another node of the cluster.
    pub const REMOTE_NODE: u32 = 2;
    /// Outside of the cluster.
    pub const WORLD: u32 = 3;
    /// Inside a pod CIDR, of no pod that is known here.
    pub const UNKNOWN_POD: u32 = 4;
    /// In a range of Services' addresses.
    pub const SERVICES: u32 = 5;
    /// The first number given to a set of labels.
    pub const FIRST_POD: u32 = 256;
    /// Set in the numbers that stand for a set of `ipBlock` rules.
    pub const CIDR_BIT: u32 = 0x8000_0000;
}

/// Seen from the pod that the rules belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Direction {
    /// To the pod.
    Ingress = 0,
    /// From the pod.
    Egress = 1,
}

/// A rule: the value (`u32`) names what allowed it. Matched by longest prefix; subject, peer and direction are always whole.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RuleKey {
    prefix_len: u32,
    subject: u32,
    peer: u32,
    direction: u8,
    proto: u8,
    port: Port,
}

impl RuleKey {
    const FIXED_BITS: u32 = 72;

    /// The key that looks a packet up.
    #[inline(always)]
    pub const fn exact(subject: u32, peer: u32, direction: Direction, proto: u8, port: Port) -> Self {
        Self { prefix_len: 96, subject, peer, direction: direction as u8, proto, port }
    }
    /// A rule for the packets whose protocol (8 bits) and destination port (16 bits) begin as these do, for `bits` of the 24.
    pub const fn new(subject: u32, peer: u32, direction: Direction, proto: u8, port: Port, bits: u32) -> Self {
        Self { prefix_len: Self::FIXED_BITS + bits, subject, peer, direction: direction as u8, proto, port }
    }
    /// Whose rule it is.
    pub const fn subject(&self) -> u32 {
        self.subject
    }
    /// Whom it lets in or out to.
    pub const fn peer(&self) -> u32 {
        self.peer
    }
    /// [`Direction`], as stored.
    pub const fn direction(&self) -> u8 {
        self.direction
    }
    /// The IANA protocol number; 0 where no bit of it counts.
    pub const fn proto(&self) -> u8 {
        self.proto
    }
    /// The port, bits past the prefix zero.
    pub const fn port(&self) -> Port {
        self.port
    }
    /// How many of the 24 bits count; `None` when the prefix is shorter than any of ours.
    pub const fn port_bits(&self) -> Option<u32> {
        self.prefix_len.checked_sub(Self::FIXED_BITS)
    }
}

/// An address as a subject's `ipBlock` rules see it; the value (`u32`) is a peer of [`RuleKey`], or 0 where none matches.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CidrKey {
    prefix_len: u32,
    subject: u32,
    direction: u32,
    addr: Addr,
}

impl CidrKey {
    const FIXED_BITS: u32 = 64;

    /// `addr_bits` counts bits of the 128.
    #[inline(always)]
    pub const fn new(subject: u32, direction: Direction, addr: Addr, addr_bits: u32) -> Self {
        Self { prefix_len: Self::FIXED_BITS + addr_bits, subject, direction: direction as u32, addr }
    }
    /// Whose rules they are.
    pub const fn subject(&self) -> u32 {
        self.subject
    }
    /// [`Direction`], as stored.
    pub const fn direction(&self) -> u32 {
        self.direction
    }
    /// The prefix's address.
    pub const fn addr(&self) -> Addr {
        self.addr
    }
    /// Bits of the 128 that count; `None` when the prefix is shorter than any of ours.
    pub const fn addr_bits(&self) -> Option<u32> {
        self.prefix_len.checked_sub(Self::FIXED_BITS)
    }
}
