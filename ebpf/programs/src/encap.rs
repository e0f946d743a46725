//! Into the tunnel without its device: puts around a frame what that would, before the kernel has made anything of it.

use core::mem::size_of;

use keelway_layout::{Addr, NodeConfig, PrefixKey, Reason};
use zerocopy::{Immutable, IntoBytes};

use crate::frame::Frame as _;
use crate::kernel::{lpm_get, random};
use crate::maps::{OUTER, TUNNELS};
use crate::parse::{ETH_LEN, Packet, UDP};
use crate::xdp::{Macs, Xdp, way_through};

const UDP_LEN: u32 = 8;
const VXLAN_LEN: u32 = 8;
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
    let class = class(head, packet.v6);
    if outer.is_v6 {
        outer.v6.link.kind = be(0x86dd);
        ipv6(&mut outer.v6, class, own, &to.remote);
        frame.can_grow(size_of::<V6>() as u32)
    } else {
        outer.v4.link.kind = be(0x0800);
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

/// The two bits that outer headers take over, of which congestion that was met before the tunnel is not one (RFC 3168, section
/// 9.1.1). `head` is how the packet begins.
#[inline(always)]
const fn class(head: [u8; 2], v6: bool) -> u8 {
    const CONGESTED: u8 = 3;
    const CAPABLE: u8 = 2;
    let bits = if v6 { head[1] >> 4 } else { head[1] } & 3;
    if bits == CONGESTED { CAPABLE } else { bits }
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
