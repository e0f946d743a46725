use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Addr;

macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident, $count:ident { $($(#[$doc:meta])* $variant:ident = $number:literal, $text:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$doc])* $variant = $number,)* }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As shown and as used in metric labels.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// From its number.
            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }
        }

        /// How many numbers the counters have room for.
        pub const $count: u32 = 64;
    };
}

numbered! {
    /// Where a packet was seen.
    Hook, HOOKS {
        /// From a pod.
        PodIngress = 0, "pod-ingress";
        /// From the host's stack to a pod.
        PodEgress = 1, "pod-egress";
        /// From a network device of the node.
        NodeIngress = 2, "node-ingress";
        /// To a network device of the node.
        NodeEgress = 3, "node-egress";
        /// From the tunnel.
        VxlanIngress = 4, "vxlan-ingress";
        /// Into the tunnel.
        VxlanEgress = 5, "vxlan-egress";
        /// connect(2), IPv4 socket.
        Connect4 = 6, "connect4";
        /// connect(2), IPv6 socket.
        Connect6 = 7, "connect6";
        /// sendmsg(2), IPv4 socket.
        Sendmsg4 = 8, "sendmsg4";
        /// sendmsg(2), IPv6 socket.
        Sendmsg6 = 9, "sendmsg6";
        /// recvmsg(2), IPv4 socket.
        Recvmsg4 = 10, "recvmsg4";
        /// recvmsg(2), IPv6 socket.
        Recvmsg6 = 11, "recvmsg6";
        /// getpeername(2), IPv4 socket.
        Getpeername4 = 12, "getpeername4";
        /// getpeername(2), IPv6 socket.
        Getpeername6 = 13, "getpeername6";
        /// bind(2), IPv4 socket.
        Bind4 = 14, "bind4";
        /// bind(2), IPv6 socket.
        Bind6 = 15, "bind6";
        /// From a network device of the node, before the kernel's stack sees it.
        NodeXdp = 16, "node-xdp";
    }
}

numbered! {
    /// What became of a packet.
    Reason, REASONS {
        /// Passed on.
        Forwarded = 0, "forwarded";
        /// The source address is not the sender's.
        SpoofedSource = 1, "spoofed-source";
        /// No rule of an isolated pod's ingress allows it.
        PolicyIngress = 2, "policy-ingress";
        /// No rule of an isolated pod's egress allows it.
        PolicyEgress = 3, "policy-egress";
        /// Headers are cut short or contradict themselves.
        Malformed = 4, "malformed";
        /// Not IPv4 or IPv6.
        NotIp = 5, "not-ip";
        /// Link-local or multicast traffic of a pod, which goes nowhere.
        LinkScoped = 6, "link-scoped";
        /// The inner source does not belong to the node that sent the tunnelled packet.
        TunnelSource = 7, "tunnel-source";
        /// A tunnelled packet for nobody here.
        TunnelUnknown = 8, "tunnel-unknown-destination";
        /// A pod's packet to the tunnel's port.
        TunnelFromPod = 9, "tunnel-from-pod";
        /// No port for masquerading was found within the tries.
        NatExhausted = 10, "nat-exhausted";
        /// A table of flows refused an entry.
        FlowTableFull = 11, "flow-table-full";
        /// A Service without endpoints; answered with an error.
        NoBackend = 12, "no-backend";
        /// A later fragment whose first was not seen.
        FragmentUnknown = 13, "fragment-unknown";
        /// A pod address arrived outside of the tunnel.
        UntunnelledPod = 14, "untunnelled-pod-source";
        /// A helper of the kernel refused.
        Helper = 15, "helper-failed";
        /// An ICMP error about no flow that is known.
        IcmpUnrelated = 16, "icmp-unrelated";
        /// A pod address of this node of which no pod is known.
        NoEndpoint = 17, "no-endpoint";
        /// The programs of this generation are missing.
        NoProgram = 18, "no-program";
        /// Translated from a Service's address to a backend's.
        Translated = 19, "translated";
        /// A pod's Service connection to itself, for which nothing is left to tell it by.
        Hairpin = 20, "hairpin";
        /// The client is in none of the Service's source ranges.
        SourceRange = 21, "source-range";
        /// The port is a Service's node port.
        NodePortTaken = 22, "node-port-taken";
        /// No route to where the packet is to go.
        NoRoute = 23, "no-route";
        /// Sent as it came to the node of a Service's backend.
        ToBackendsNode = 24, "to-backends-node";
    }
}

impl Reason {
    /// Whether the packet went on.
    pub const fn is_passage(self) -> bool {
        matches!(self, Self::Forwarded | Self::Translated | Self::ToBackendsNode)
    }
}

/// Packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Counter {
    /// Packets (socket hooks: calls).
    pub packets: u64,
    /// Bytes as the hook sees them.
    pub bytes: u64,
}

/// Index of the per-CPU counters.
pub struct CounterKey;

impl CounterKey {
    /// Of a hook and a reason. A hook has half of the room that it was given at first: the other half of the first sixteen is for
    /// sixteen more, so that what is counted survives a build that knows them.
    #[inline(always)]
    pub const fn index(hook: Hook, reason: Reason) -> u32 {
        let hook = hook as u32;
        hook % 16 * REASONS + hook / 16 * (REASONS / 2) + reason as u32
    }
}

const _: () = {
    let mut at = 0;
    while at < Reason::ALL.len() {
        assert!((Reason::ALL[at] as u32) < REASONS / 2);
        at += 1;
    }
    let mut at = 0;
    while at < Hook::ALL.len() {
        assert!((Hook::ALL[at] as u32) < 32);
        at += 1;
    }
};

/// Drops by endpoint.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct EndpointDropKey {
    /// [`crate::Endpoint::id`].
    pub endpoint: u32,
    /// [`Reason`].
    pub reason: u8,
    /// [`Hook`].
    pub hook: u8,
    /// Zero.
    pub reserved: u16,
}

/// A sample of a dropped packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DropEvent {
    /// Nanoseconds of the monotonic clock.
    pub time: u64,
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub sport: crate::Port,
    /// Destination port.
    pub dport: crate::Port,
    /// IANA protocol number.
    pub proto: u8,
    /// [`Reason`].
    pub reason: u8,
    /// [`Hook`].
    pub hook: u8,
    /// Zero.
    pub reserved: u8,
    /// [`crate::Endpoint::id`], 0 when unknown.
    pub endpoint: u32,
    /// Identity of the peer, 0 when not looked up.
    pub peer: u32,
    /// Device that the hook is on.
    pub ifindex: u32,
    /// Bytes as the hook sees them.
    pub len: u32,
}
