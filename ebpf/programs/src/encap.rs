//! The tunnel without its device: puts around a frame what that would, and finds what is inside of one, before the kernel has made
//! anything of it.

use core::mem::size_of;

use keelway_layout::{Addr, NodeConfig, PrefixKey, Reason};
use zerocopy::{Immutable, IntoBytes};

use crate::frame::Frame as _;
use crate::kernel::{lpm_get, random};
use crate::maps::{NODE, OUTER, TUNNELS};
use crate::parse::{ETH_LEN, Packet, UDP};
use crate::vxlan::TUNNEL_ID;
use crate::xdp::{Macs, Xdp, way_through};

const UDP_LEN: u32 = 8;
const VXLAN_LEN: u32 = 8;
const IPV4: u16 = be(0x0800);
const IPV6: u16 = be(0x86dd);
/// "Congestion experienced".
const CONGESTED: u8 = 3;
/// As `Skb::set_tunnel` asks for.
const TTL: u8 = 64;
/// Of the outer source ports, that spread flows over paths and queues and are nobody's: the kernel's own range for them
/// (`net.ipv4.ip_local_port_range`) as it comes.
const FIRST_PORT: u32 = 32_768;
const PORTS: u32 = 28_232;

/// Ethernet.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Link {
    macs: Macs,
    kind: u16,
}

/// UDP and VXLAN (RFC 7348, section 5), in network byte order.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Tail {
    sport: u16,
    dport: u16,
    length: u16,
    checksum: u16,
    flags: [u16; 2],
    /// The network id in the upper 24 bits of the two.
    id: [u16; 2],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct V4 {
    link: Link,
    ip: [u16; 10],
    tail: Tail,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct V6 {
    link: Link,
    ip: [u16; 20],
    tail: Tail,
}

/// The headers that a frame is about to get: of the family that `v6` says.
pub struct Outer {
    v4: V4,
    v6: V6,
    is_v6: bool,
}

/// Gets ready what is to be around a frame: the way to the node that has the backend, under a network id. False, with nothing
/// changed, where that is not out of the device that it came by, the frame would not fit, or has no room at its head.
#[inline(never)]
pub fn prepare(frame: Xdp, packet: &Packet, node: &NodeConfig, backend: &Addr, id: u32) -> bool {
    let Some(to) = lpm_get(&TUNNELS, &PrefixKey::host(*backend)) else { return false };
    let Some(outer) = OUTER.get_ptr_mut(0) else { return false };
    // SAFETY: a per-CPU value, and no two programs run on one CPU at a time (softirqs are off around each).
    let outer = unsafe { &mut *outer };
    outer.is_v6 = !to.remote.is_v4();
    let own = if outer.is_v6 { &node.node_v6 } else { &node.node_v4 };
    if node.vxlan_ifindex == 0 || own.is_unspecified() {
        return false;
    }
    let link = if outer.is_v6 { &mut outer.v6.link } else { &mut outer.v4.link };
    let Ok(meant_for) = frame.load(0) else { return false };
    link.macs[0] = meant_for;
    if !way_through(frame, outer_length(frame, outer.is_v6), own, &to.remote, &mut link.macs) {
        return false;
    }
    let tail = if outer.is_v6 { &mut outer.v6.tail } else { &mut outer.v4.tail };
    tail.sport = be(FIRST_PORT + (hash(packet).wrapping_mul(PORTS) >> 16));
    tail.dport = node.vxlan_port.be();
    tail.length = be(UDP_LEN + VXLAN_LEN + frame.len());
    // None, as the device's: the key of a packet says so, for both families.
    tail.checksum = 0;
    tail.flags = [be(0x0800), 0];
    tail.id = [be(id >> 8), be(id << 8)];
    let Ok(head) = frame.load(ETH_LEN) else { return false };
    let class = outer_class(traffic_class(head, packet.v6));
    if outer.is_v6 {
        outer.v6.link.kind = IPV6;
        ipv6(&mut outer.v6, class, own, &to.remote);
        frame.can_grow(size_of::<V6>() as u32)
    } else {
        outer.v4.link.kind = IPV4;
        ipv4(&mut outer.v4, class, own, &to.remote);
        frame.can_grow(size_of::<V4>() as u32)
    }
}

/// Of the IP packet that a frame becomes.
#[inline(always)]
fn outer_length(frame: Xdp, v6: bool) -> u32 {
    UDP_LEN + VXLAN_LEN + frame.len() + if v6 { 40 } else { 20 }
}

/// Puts around the frame what [`prepare`] got ready.
#[inline(always)]
pub fn wrap(frame: Xdp) -> Result<(), Reason> {
    let outer = OUTER.get_ptr_mut(0).ok_or(Reason::Helper)?;
    // SAFETY: as above.
    let outer = unsafe { &*outer };
    if outer.is_v6 {
        frame.grow(size_of::<V6>() as u32)?;
        frame.store(0, &outer.v6)
    } else {
        frame.grow(size_of::<V4>() as u32)?;
        frame.store(0, &outer.v4)
    }
}

/// How many bytes stand before what is inside of a packet out of the tunnel, where that is for the node itself; else, and where the
/// tunnel's device would do more than take off its headers, 0.
#[inline(never)]
pub fn before_inner(frame: Xdp, packet: &Packet) -> u32 {
    let Some(node) = NODE.get(0) else { return 0 };
    const VERSION: u16 = be(0x0800);
    let length = frame.len().wrapping_sub(packet.l4);
    let (length_at, header) = if packet.v6 { (4, 0) } else { (2, 20) };
    let bytes = packet.l4 + UDP_LEN + VXLAN_LEN;
    let (Ok(tail), Ok(whole), Ok(head), Ok(kind)) = (
        frame.load::<[u16; 8]>(packet.l4),
        frame.load::<u16>(ETH_LEN + length_at),
        frame.load::<[u8; 2]>(ETH_LEN),
        frame.load::<u16>(bytes + ETH_LEN - 2),
    ) else {
        return 0;
    };
    // A checksum would be to verify, and congestion on the way to be told inside.
    let plain = tail[3] == 0 && traffic_class(head, packet.v6) != CONGESTED;
    let ours = tail[4] == VERSION && tail[5] == 0 && tail[6] == be(TUNNEL_ID >> 8) && tail[7] == be(TUNNEL_ID << 8);
    if !plain || !ours || tail[2] != be(length) || whole != be(length + header) {
        return 0;
    }
    let inside = bytes + ETH_LEN;
    let for_node = match kind {
        IPV4 => frame.load(inside + 16).is_ok_and(|to| Addr::from_v4_word(to) == node.node_v4),
        IPV6 => frame.load(inside + 24).is_ok_and(|to| Addr::from_words(to) == node.node_v6),
        _ => false,
    };
    if for_node { bytes } else { 0 }
}

/// What of the way's congestion a header tells (RFC 3168, section 5); `head` is how it begins.
#[inline(always)]
const fn traffic_class(head: [u8; 2], v6: bool) -> u8 {
    (if v6 { head[1] >> 4 } else { head[1] }) & 3
}

/// What of it outer headers take over: not congestion that was met before the tunnel (RFC 3168, section 9.1.1).
#[inline(always)]
const fn outer_class(class: u8) -> u8 {
    const CAPABLE: u8 = 2;
    if class == CONGESTED { CAPABLE } else { class }
}

#[inline(always)]
const fn be(value: u32) -> u16 {
    (value as u16).to_be()
}

/// Of its flow, 16 bits.
#[inline(always)]
fn hash(packet: &Packet) -> u32 {
    let tuple = &packet.tuple;
    let (src, dst) = (tuple.src.as_words(), tuple.dst.as_words());
    let mut mixed = u32::from(tuple.sport.be()) << 16 | u32::from(tuple.dport.be());
    let mut i = 0;
    while i < 4 {
        mixed = (mixed ^ src[i]).wrapping_mul(0x9e37_79b1).rotate_left(13);
        mixed = (mixed ^ dst[i]).wrapping_mul(0x9e37_79b1).rotate_left(13);
        i += 1;
    }
    mixed >> 16
}

/// May be fragmented on its way, as what the device sends, and has an id for that.
#[inline(always)]
fn ipv4(outer: &mut V4, class: u8, src: &Addr, dst: &Addr) {
    let ([s0, s1], [d0, d1]) = (halves(src.v4_word()), halves(dst.v4_word()));
    let length = be(u32::from(u16::from_be(outer.tail.length)) + 20);
    let (first, id) = (be(0x4500 | u32::from(class)), random() as u16);
    let ttl = be(u32::from(TTL) << 8 | u32::from(UDP));
    let words = [first, length, id, ttl, s0, s1, d0, d1];
    let mut sum = 0;
    let mut i = 0;
    while i < words.len() {
        sum += u32::from(words[i]);
        i += 1;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    outer.ip = [first, length, id, 0, ttl, !(sum as u16), s0, s1, d0, d1];
}

#[inline(always)]
fn ipv6(outer: &mut V6, class: u8, src: &Addr, dst: &Addr) {
    let ip = &mut outer.ip;
    ip[0] = be(0x6000 | u32::from(class) << 4);
    ip[1] = 0;
    ip[2] = outer.tail.length;
    ip[3] = be(u32::from(UDP) << 8 | u32::from(TTL));
    let (src, dst) = (src.as_words(), dst.as_words());
    let mut i = 0;
    while i < 4 {
        [ip[4 + 2 * i], ip[5 + 2 * i]] = halves(src[i]);
        [ip[12 + 2 * i], ip[13 + 2 * i]] = halves(dst[i]);
        i += 1;
    }
}

/// A word as it lies in memory.
#[inline(always)]
const fn halves(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_ne_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}
