use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An IPv6 or IPv4-mapped address as four words in network byte order.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Addr {
    words: [u32; 4],
}

/// The third word of an IPv4-mapped address.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// `::`
    pub const UNSPECIFIED: Self = Self { words: [0; 4] };

    /// 127.0.0.1
    pub const LOOPBACK_V4: Self = Self::from_v4_word(u32::from_ne_bytes([127, 0, 0, 1]));
    /// ::1
    pub const LOOPBACK_V6: Self = Self { words: [0, 0, 0, 1_u32.to_be()] };
    /// Stands for a pod that talks to itself through a Service: 169.254.1.1, the gateway of every pod.
    pub const ITSELF_V4: Self = Self::from_v4_word(u32::from_ne_bytes([169, 254, 1, 1]));
    /// The same: 100::1, of the prefix that nobody routes (RFC 6666). With a link-local one, a datagram server that is bound to the
    /// wildcard address would answer from its own link-local address.
    pub const ITSELF_V6: Self = Self { words: [0x0100_0000_u32.to_be(), 0, 0, 1_u32.to_be()] };

    /// From four words in network byte order.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// From an IPv4 address as one word in network byte order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// The four words, network byte order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// The four words where they are, network byte order.
    #[inline(always)]
    pub const fn as_words(&self) -> &[u32; 4] {
        &self.words
    }

    /// The IPv4 address as one word in network byte order; meaningful if [`Self::is_v4`].
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words[3]
    }

    /// Whether this is an IPv4-mapped address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// Whether all bits are zero.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        (self.words[0] | self.words[1] | self.words[2] | self.words[3]) == 0
    }

    /// Whether this is IPv6 link-local (`fe80::/10`) or multicast (`ff00::/8`), or IPv4 multicast or broadcast.
    #[inline(always)]
    pub const fn is_link_scoped(&self) -> bool {
        if self.is_v4() {
            let first = u32::from_be(self.words[3]) >> 24;
            first >= 224
        } else {
            let first = u32::from_be(self.words[0]);
            first >> 22 == 0xfe80_0000 >> 22 || first >> 24 == 0xff
        }
    }

    /// The sixteen bytes, network byte order.
    pub fn octets(&self) -> [u8; 16] {
        let mut out = [0; 16];
        for (chunk, word) in out.chunks_exact_mut(4).zip(self.words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        out
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        let octets = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        Self { words }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        IpAddr::V4(ip).into()
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        IpAddr::V6(ip).into()
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        Ipv6Addr::from(addr.octets()).to_canonical()
    }
}

/// A port (or ICMP identifier) in network byte order.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Port(u16);

impl Port {
    /// Port 0: none.
    pub const NONE: Self = Self(0);

    /// From a number in host byte order.
    #[inline(always)]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be())
    }

    /// From a number in network byte order.
    #[inline(always)]
    pub const fn from_be(port: u16) -> Self {
        Self(port)
    }

    /// The number in network byte order.
    #[inline(always)]
    pub const fn be(self) -> u16 {
        self.0
    }

    /// The number in host byte order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}
