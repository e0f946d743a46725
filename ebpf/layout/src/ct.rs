use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Addr, Port};

/// Which table a [`CtKey`] is of: one map, since all are bounded together.
pub mod scope {
    /// A flow that a local pod opened.
    pub const OUT: u8 = 0;
    /// A flow that was opened to a local pod.
    pub const IN: u8 = 1;
    /// A flow to a Service's address, before translation.
    pub const SERVICE: u8 = 2;
    /// NAT, keyed by the packet before the node's address is put in.
    pub const NAT_OUT: u8 = 3;
    /// NAT, keyed by the packet that answers.
    pub const NAT_IN: u8 = 4;
    /// A flow to a Service that came from the network or from the host, after translation.
    pub const LB: u8 = 5;
    /// A pod's Service flow to itself, as it is handed back to it.
    pub const HAIRPIN: u8 = 6;
}

/// A flow, in the direction in which it was opened. ICMP echo keeps its identifier as the asking side's port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// IANA protocol number.
    pub proto: u8,
    /// See [`scope`].
    pub scope: u8,
    /// Zero.
    pub reserved: u16,
}

/// Nanoseconds by which an entry is past its time before the sweep removes it. A program that found the entry alive may still
/// prolong it; none runs that long.
pub const SWEEP_GRACE: u64 = 5_000_000_000;
/// Keys in one run of the sweep.
pub const SWEEP_KEYS: u32 = 64;
/// Bytes before the first of them: the kernel wants a frame's header there.
pub const SWEEP_HEADER: u32 = 16;

impl CtKey {
    /// Whether this is a key of the table of masqueraded flows.
    #[inline(always)]
    pub const fn is_nat(&self) -> bool {
        matches!(self.scope, scope::NAT_OUT | scope::NAT_IN)
    }

    /// The same flow seen from the other side, in `scope`.
    #[inline(always)]
    pub const fn reversed(&self, scope: u8) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto: self.proto,
            scope,
            reserved: 0,
        }
    }
}

/// Bits of [`CtEntry::flags`].
pub mod ct_flags {
    /// The other side has answered.
    pub const REPLIED: u32 = 1;
    /// The opener has sent FIN.
    pub const FIN_FORWARD: u32 = 2;
    /// The other side has sent FIN.
    pub const FIN_REVERSE: u32 = 4;
    /// Either side has sent RST.
    pub const RESET: u32 = 8;
    /// `nat_addr` and `nat_port` hold the frontend that the opener dialled.
    pub const TRANSLATED: u32 = 16;
    /// SERVICE: a flow of before our time, which the kernel's own connection tracking translates. Packets are left to it.
    pub const STACK: u32 = 32;
    /// SERVICE: it goes to the backend's node as it came, which answers the client itself.
    pub const DSR: u32 = 64;
}

/// What is remembered of a flow. An entry past `expires` is as good as absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtEntry {
    /// Nanoseconds of the monotonic clock.
    pub expires: u64,
    /// OUT, IN, LB, HAIRPIN: the frontend that the opener dialled. SERVICE: the backend that it was given.
    pub nat_addr: Addr,
    /// Its port.
    pub nat_port: Port,
    /// Zero.
    pub reserved16: u16,
    /// SERVICE: the backend's id.
    pub backend: u32,
    /// See [`ct_flags`].
    pub flags: u32,
    /// [`crate::Endpoint::incarnation`] of the local pod.
    pub incarnation: u32,
    /// [`crate::Endpoint::policy_generation`] under which it was admitted.
    pub policy_generation: u32,
    /// [`crate::NodeState::epoch`] under which it was admitted.
    pub epoch: u32,
    /// The peer's identity then.
    pub peer: u32,
    /// The rule that admitted it; 0 without enforcement.
    pub rule: u32,
    /// Zero.
    pub reserved: [u32; 2],
}

/// One direction of a masqueraded flow; each has the other's rewrite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NatEntry {
    /// Nanoseconds of the monotonic clock.
    pub expires: u64,
    /// NAT_OUT: the source to put in. NAT_IN: the destination to put back.
    pub addr: Addr,
    /// Its port.
    pub port: Port,
    /// Zero.
    pub reserved16: u16,
    /// See [`ct_flags`].
    pub flags: u32,
}

/// A fragmented datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FragKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// The IP identification, network byte order.
    pub id: u32,
    /// IANA protocol number, in host byte order.
    pub proto: u32,
}

/// The ports that its first fragment carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FragPorts {
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
}
