//! From bytes to a flow: headers of IPv4, IPv6, TCP, UDP, SCTP and ICMP, fragments included.

use keelway_layout::{Addr, CtKey, FragKey, FragPorts, Port, Reason};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::frame::Frame;
use crate::maps::{FRAGMENTS, SCRATCH};

pub const ETH_LEN: u32 = 14;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP4: u8 = 1;
pub const ICMP6: u8 = 58;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Ipv4 {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_len: u16,
    pub id: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub proto: u8,
    pub csum: u16,
    pub src: u32,
    pub dst: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Ipv6 {
    pub version_class_label: u32,
    pub payload_len: u16,
    pub next: u8,
    pub hop_limit: u8,
    pub src: [u32; 4],
    pub dst: [u32; 4],
}

/// What kind of message, as far as it matters here.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Ports (or an ICMP identifier) name the flow.
    Flow,
    /// An ICMP error about another packet.
    IcmpError,
}

/// A parsed packet. The tuple's scope is for who looks it up to set.
#[derive(Clone, Copy)]
pub struct Packet {
    pub tuple: CtKey,
    /// Offset of the transport header.
    pub l4: u32,
    pub v6: bool,
    /// Whether the transport header is in this packet (not in a later fragment).
    pub has_l4: bool,
    pub kind: Kind,
    /// TCP's flags; of SCTP what comes nearest to its first chunk ([`of_association`]).
    pub flags: u8,
}

impl Packet {
    /// Nothing yet.
    pub const EMPTY: Self = Self {
        tuple: CtKey {
            src: Addr::UNSPECIFIED,
            dst: Addr::UNSPECIFIED,
            sport: Port::NONE,
            dport: Port::NONE,
            proto: 0,
            scope: 0,
            reserved: 0,
        },
        l4: 0,
        v6: false,
        has_l4: true,
        kind: Kind::Flow,
        flags: 0,
    };

    /// Whether it opens a connection or an association.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }
}

/// What a packet with this first chunk does to its association, in TCP's words (RFC 9260, sections 3.3 and 9).
#[inline(always)]
const fn of_association(chunk: u8) -> u8 {
    const INIT: u8 = 1;
    const INIT_ACK: u8 = 2;
    const ABORT: u8 = 6;
    const SHUTDOWN: u8 = 7;
    const SHUTDOWN_ACK: u8 = 8;
    const SHUTDOWN_COMPLETE: u8 = 14;
    match chunk {
        INIT => SYN,
        INIT_ACK => SYN | ACK,
        // Each side sends one of the two when it has nothing more to send or to hear.
        SHUTDOWN | SHUTDOWN_ACK => FIN | ACK,
        ABORT | SHUTDOWN_COMPLETE => RST,
        _ => ACK,
    }
}

/// Parses the packet behind its Ethernet header.
///
/// Not inlined, as all that needs much stack for a short time: 512 bytes are all there is.
#[inline(never)]
pub fn packet(frame: impl Frame, into: &mut Packet) -> Result<(), Reason> {
    *into = match frame.protocol()? {
        ETHERTYPE_IPV4 => ipv4(frame, ETH_LEN)?,
        ETHERTYPE_IPV6 => ipv6(frame, ETH_LEN)?,
        _ => return Err(Reason::NotIp),
    };
    Ok(())
}

/// The packet that an ICMP error carries, as far as the error shows it. There is one place for it on each CPU.
#[inline(always)]
pub fn inner(frame: impl Frame, outer: &Packet) -> Result<&'static Packet, Reason> {
    let packet = SCRATCH.get_ptr_mut(1).ok_or(Reason::Helper)?;
    // SAFETY: a per-CPU value, and no two tc programs run on one CPU at a time (softirqs are off around each).
    let packet = unsafe { &mut *packet };
    carried_by(frame, outer, packet)?;
    Ok(packet)
}

#[inline(never)]
fn carried_by(frame: impl Frame, outer: &Packet, packet: &mut Packet) -> Result<(), Reason> {
    let l3 = outer.l4 + 8;
    *packet = Packet { v6: outer.v6, ..Packet::EMPTY };
    if outer.v6 {
        let ip: Ipv6 = frame.load(l3)?;
        packet.tuple.src = Addr::from_words(ip.src);
        packet.tuple.dst = Addr::from_words(ip.dst);
        packet.tuple.proto = ip.next;
        packet.l4 = l3 + 40;
    } else {
        let ip: Ipv4 = frame.load(l3)?;
        packet.tuple.src = Addr::from_v4_word(ip.src);
        packet.tuple.dst = Addr::from_v4_word(ip.dst);
        packet.tuple.proto = ip.proto;
        packet.l4 = l3 + u32::from(ip.version_ihl & 15) * 4;
    }
    ports(frame, packet)
}

#[inline(always)]
fn ipv4(frame: impl Frame, l3: u32) -> Result<Packet, Reason> {
    let ip: Ipv4 = frame.load(l3)?;
    let header = u32::from(ip.version_ihl & 15) * 4;
    if ip.version_ihl >> 4 != 4 || header < 20 {
        return Err(Reason::Malformed);
    }
    let mut packet = Packet {
        tuple: CtKey {
            src: Addr::from_v4_word(ip.src),
            dst: Addr::from_v4_word(ip.dst),
            proto: ip.proto,
            ..CtKey::default()
        },
        l4: l3 + header,
        ..Packet::EMPTY
    };
    let fragment = u16::from_be(ip.fragment);
    let (offset, more) = (fragment & 0x1fff, fragment & 0x2000 != 0);
    let id = u32::from(ip.id);
    if offset != 0 {
        later_fragment(&mut packet, id)?;
    } else {
        ports(frame, &mut packet)?;
        if more {
            first_fragment(&packet, id);
        }
    }
    Ok(packet)
}

#[inline(always)]
fn ipv6(frame: impl Frame, l3: u32) -> Result<Packet, Reason> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    let ip: Ipv6 = frame.load(l3)?;
    let mut packet = Packet {
        tuple: CtKey { src: Addr::from_words(ip.src), dst: Addr::from_words(ip.dst), ..CtKey::default() },
        l4: l3 + 40,
        v6: true,
        ..Packet::EMPTY
    };
    // On the wire they are nobody's, and here they would pass for addresses of the other family.
    if packet.tuple.src.is_v4() || packet.tuple.dst.is_v4() {
        return Err(Reason::Malformed);
    }
    let mut next = ip.next;
    let (mut offset, mut more, mut id) = (0u16, false, 0u32);
    // RFC 8200 lists four kinds of extension header that may stand before the transport's.
    for _ in 0..4 {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                let [following, len]: [u8; 2] = frame.load(packet.l4)?;
                next = following;
                packet.l4 += (u32::from(len) + 1) * 8;
            }
            FRAGMENT => {
                let header: [u16; 4] = frame.load(packet.l4)?;
                next = header[0].to_ne_bytes()[0];
                let field = u16::from_be(header[1]);
                offset = field & 0xfff8;
                more = field & 1 != 0;
                id = u32::from(header[2]) | u32::from(header[3]) << 16;
                packet.l4 += 8;
            }
            _ => break,
        }
    }
    packet.tuple.proto = next;
    if offset != 0 {
        later_fragment(&mut packet, id)?;
    } else {
        ports(frame, &mut packet)?;
        if more {
            first_fragment(&packet, id);
        }
    }
    Ok(packet)
}

#[inline(always)]
fn fragment_key(packet: &Packet, id: u32) -> FragKey {
    FragKey { src: packet.tuple.src, dst: packet.tuple.dst, id, proto: packet.tuple.proto.into() }
}

#[inline(always)]
fn first_fragment(packet: &Packet, id: u32) {
    let ports = FragPorts { sport: packet.tuple.sport, dport: packet.tuple.dport };
    // A full table evicts its oldest; the later fragments of that datagram are then dropped and counted.
    let _ = FRAGMENTS.insert(fragment_key(packet, id), ports, 0);
}

#[inline(always)]
fn later_fragment(packet: &mut Packet, id: u32) -> Result<(), Reason> {
    packet.has_l4 = false;
    // SAFETY: the value is copied out at once.
    let ports = unsafe { FRAGMENTS.get(fragment_key(packet, id)) }.ok_or(Reason::FragmentUnknown)?;
    packet.tuple.sport = ports.sport;
    packet.tuple.dport = ports.dport;
    Ok(())
}

#[inline(always)]
fn ports(frame: impl Frame, packet: &mut Packet) -> Result<(), Reason> {
    match packet.tuple.proto {
        TCP | SCTP => {
            // Errors show only eight bytes of the header, and nobody asks for the flags there.
            let words: [u16; 7] = match frame.load(packet.l4) {
                Ok(words) => words,
                Err(_) => {
                    let [sport, dport]: [u16; 2] = frame.load(packet.l4)?;
                    [sport, dport, 0, 0, 0, 0, 0]
                }
            };
            packet.tuple.sport = Port::from_be(words[0]);
            packet.tuple.dport = Port::from_be(words[1]);
            let [chunk, flags] = words[6].to_ne_bytes();
            packet.flags = if packet.tuple.proto == TCP { flags } else { of_association(chunk) };
        }
        UDP => {
            let words: [u16; 2] = frame.load(packet.l4)?;
            packet.tuple.sport = Port::from_be(words[0]);
            packet.tuple.dport = Port::from_be(words[1]);
        }
        ICMP4 if !packet.v6 => icmp(frame, packet, 8, 0, |kind| matches!(kind, 3 | 11 | 12))?,
        ICMP6 if packet.v6 => icmp(frame, packet, 128, 129, |kind| kind < 128)?,
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn icmp(
    frame: impl Frame,
    packet: &mut Packet,
    request: u8,
    reply: u8,
    is_error: fn(u8) -> bool,
) -> Result<(), Reason> {
    // Type, code and checksum, then the identifier of an echo.
    let words: [u16; 3] = frame.load(packet.l4)?;
    let kind = words[0].to_ne_bytes()[0];
    if kind == request {
        packet.tuple.sport = Port::from_be(words[2]);
    } else if kind == reply {
        packet.tuple.dport = Port::from_be(words[2]);
    } else if is_error(kind) {
        packet.kind = Kind::IcmpError;
    }
    Ok(())
}
