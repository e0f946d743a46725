use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Addr, Port};

/// Bits of [`NodeConfig::flags`].
pub mod node_flags {
    /// Pods of other nodes are reached through the VXLAN device.
    pub const VXLAN: u32 = 1;
    /// Pods' connections to the outside take the node's address (IPv4).
    pub const MASQUERADE_V4: u32 = 2;
    /// The same for IPv6.
    pub const MASQUERADE_V6: u32 = 4;
    /// The flows of a former kube-proxy are being taken over: TCP to a Service that is under way and unknown is the stack's.
    pub const ADOPTING: u32 = 8;
    /// TCP of Services' clients outside goes to pods of other nodes as it came, and is answered from there.
    pub const DSR_TCP: u32 = 16;
    /// The same for UDP and SCTP.
    pub const DSR_DATAGRAMS: u32 = 32;
}

/// What the programs need to know of their node; one entry, written by the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeConfig {
    /// The node's IPv4 address towards the outside; unspecified without.
    pub node_v4: Addr,
    /// The node's IPv6 address towards the outside; unspecified without.
    pub node_v6: Addr,
    /// Index of the VXLAN device; 0 without.
    pub vxlan_ifindex: u32,
    /// See [`node_flags`].
    pub flags: u32,
    /// First port for masqueraded connections.
    pub snat_first: Port,
    /// Last port for masqueraded connections.
    pub snat_last: Port,
    /// UDP port of the tunnel.
    pub vxlan_port: Port,
    /// See [`NodeConfig::pods_v6_word`].
    pub pods_v6_high: u16,
    /// MAC of the VXLAN device.
    pub vxlan_mac: [u8; 6],
    /// See [`NodeConfig::pods_v6_word`].
    pub pods_v6_low: u16,
    /// Cookie of the network namespace that the agent runs in: "the host".
    pub host_netns: u64,
}

impl NodeConfig {
    /// The first word of the addresses of this node's IPv6 pods, network byte order; 0 without. Kept in two halves, where bytes were
    /// free.
    #[inline(always)]
    pub const fn pods_v6_word(&self) -> u32 {
        let [a, b] = self.pods_v6_high.to_ne_bytes();
        let [c, d] = self.pods_v6_low.to_ne_bytes();
        u32::from_ne_bytes([a, b, c, d])
    }
    /// The same with another.
    #[must_use]
    pub const fn with_pods_v6_word(self, word: u32) -> Self {
        let [a, b, c, d] = word.to_ne_bytes();
        Self { pods_v6_high: u16::from_ne_bytes([a, b]), pods_v6_low: u16::from_ne_bytes([c, d]), ..self }
    }
}

/// Words that change while traffic flows; one entry, written by the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeState {
    /// Which of the two slots of every hook runs: the lowest bit. Counts program generations.
    pub generation: u32,
    /// Counts changes of who an address is; flows admitted under another value are evaluated again.
    pub epoch: u32,
}
