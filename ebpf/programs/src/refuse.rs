//! What is sent back in place of a packet that has nowhere to go: a reset for what opens a TCP connection, "port unreachable" for
//! everything else.
//!
//! A connection is refused by either. But a stack drops an ICMP error that comes while the socket is locked, as it is while connect(2)
//! sends: of a client on the same machine, which the answer reaches before the call returns, that is every one. And firewalls on
//! the way drop them. What does not open a connection gets no reset: another node may know it.

use keelway_layout::{Endpoint, Reason};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::frame::Frame as _;
use crate::kernel::{Skb, csum_diff};
use crate::parse::{ACK, ETH_LEN, ICMP4, ICMP6, Ipv4, Ipv6, Packet, RST, TCP};

/// Folds a 32-bit sum into the checksum field's form.
#[inline(always)]
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Turns the packet into a refusal and returns it to the pod that sent it.
#[inline(always)]
pub fn to_sender(skb: Skb, packet: &Packet, endpoint: &Endpoint) -> Result<i32, Reason> {
    answer(skb, packet)?;
    skb.store(0, &[endpoint.mac, endpoint.host_mac])?;
    Ok(skb.redirect_peer(endpoint.ifindex))
}

/// Turns the packet into a refusal and returns it the way that it came.
#[inline(never)]
pub fn back(skb: Skb, packet: &Packet) -> Result<i32, Reason> {
    turn_round(skb, packet)?;
    Ok(skb.redirect(skb.ifindex()))
}

/// Turns a packet of the host's own into a refusal, and gives it to the host as if it came by the device.
#[inline(never)]
pub fn here(skb: Skb, packet: &Packet) -> Result<i32, Reason> {
    turn_round(skb, packet)?;
    Ok(skb.redirect_in(skb.ifindex()))
}

#[inline(always)]
fn turn_round(skb: Skb, packet: &Packet) -> Result<(), Reason> {
    let macs: [[u8; 6]; 2] = skb.load(0)?;
    answer(skb, packet)?;
    skb.store(0, &[macs[1], macs[0]])
}

#[inline(never)]
fn answer(skb: Skb, packet: &Packet) -> Result<(), Reason> {
    if packet.tuple.proto == TCP && packet.opens() && packet.l4 == ETH_LEN + if packet.v6 { 40 } else { 20 } {
        return if packet.v6 { reset_v6(skb) } else { reset_v4(skb) };
    }
    // The kernel does not cut a packet shorter than the checksum that is yet to be filled in, which TCP's header ends with.
    match (packet.v6, packet.tuple.proto == TCP) {
        (false, true) => v4::<10>(skb, packet)?,
        (false, false) => v4::<7>(skb, packet)?,
        (true, true) => v6::<15>(skb)?,
        (true, false) => v6::<12>(skb)?,
    }
    Ok(())
}

/// RFC 792: the header and the first eight bytes, or more, come back. `QUOTED` counts the words that are quoted.
#[inline(never)]
fn v4<const QUOTED: usize>(skb: Skb, packet: &Packet) -> Result<(), Reason> {
    const HEADERS: u32 = 28;
    let quoted_len = QUOTED as u32 * 4;
    if packet.l4 != ETH_LEN + 20 {
        return Err(Reason::NoBackend);
    }
    let quoted: [u32; QUOTED] = skb.load(ETH_LEN)?;
    // Beside what is quoted: type 3, code 3, "port unreachable".
    let csum = fold(csum_diff(&[], &quoted, u32::from(u16::from_ne_bytes([3, 3])))?);
    let ip: Ipv4 = skb.load(ETH_LEN)?;
    skb.set_len(ETH_LEN + quoted_len)?;
    skb.insert_l3(HEADERS as i32)?;
    let mut header = Ipv4 {
        version_ihl: 0x45,
        tos: 0,
        total_len: ((HEADERS + quoted_len) as u16).to_be(),
        id: 0,
        fragment: 0,
        ttl: 64,
        proto: ICMP4,
        csum: 0,
        src: ip.dst,
        dst: ip.src,
    };
    let words: [u32; 5] = zerocopy::transmute!(header);
    header.csum = fold(csum_diff(&[], &words, 0)?);
    skb.store(ETH_LEN, &header)?;
    skb.store(ETH_LEN + 20, &[3u8, 3])?;
    skb.store(ETH_LEN + 22, &csum)?;
    skb.store(ETH_LEN + 24, &0u32)?;
    Ok(())
}

/// RFC 4443: as much as fits would be welcome; the headers are what stacks read. `QUOTED` counts the words that are quoted.
#[inline(never)]
fn v6<const QUOTED: usize>(skb: Skb) -> Result<(), Reason> {
    const HEADERS: u32 = 48;
    let quoted_len = QUOTED as u32 * 4;
    let quoted: [u32; QUOTED] = skb.load(ETH_LEN)?;
    let sum = csum_diff(&[], &quoted, 0)?;
    let ip: Ipv6 = skb.load(ETH_LEN)?;
    skb.set_len(ETH_LEN + quoted_len)?;
    skb.insert_l3(HEADERS as i32)?;
    let header = Ipv6 {
        version_class_label: 0x6000_0000_u32.to_be(),
        payload_len: (8 + quoted_len as u16).to_be(),
        next: ICMP6,
        hop_limit: 64,
        src: ip.dst,
        dst: ip.src,
    };
    // Beside what is quoted: the pseudo header (RFC 8200 section 8.1), and type 1 code 4.
    let sum = csum_diff(&[], &header.src, sum)?;
    let sum = csum_diff(&[], &header.dst, sum)?;
    let rest = [(8 + quoted_len).to_be(), u32::from(ICMP6).to_be(), u32::from_ne_bytes([1, 4, 0, 0])];
    let csum = fold(csum_diff(&[], &rest, sum)?);
    skb.store(ETH_LEN, &header)?;
    skb.store(ETH_LEN + 40, &[1u8, 4])?;
    skb.store(ETH_LEN + 42, &csum)?;
    skb.store(ETH_LEN + 44, &0u32)
}

const TCP_LEN: u32 = 20;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Tcp {
    ports: [u16; 2],
    seq: u32,
    ack: u32,
    offset: u8,
    flags: u8,
    window: u16,
    csum: u16,
    urgent: u16,
}

#[inline(never)]
fn reset_v4(skb: Skb) -> Result<(), Reason> {
    let ip: Ipv4 = skb.load(ETH_LEN)?;
    let opener: Tcp = skb.load(ETH_LEN + 20)?;
    skb.set_len(ETH_LEN + 20 + TCP_LEN)?;
    let mut header = Ipv4 {
        version_ihl: 0x45,
        tos: 0,
        total_len: (20 + TCP_LEN as u16).to_be(),
        id: 0,
        // Don't fragment.
        fragment: 0x4000_u16.to_be(),
        ttl: 64,
        proto: TCP,
        csum: 0,
        src: ip.dst,
        dst: ip.src,
    };
    let words: [u32; 5] = zerocopy::transmute!(header);
    header.csum = fold(csum_diff(&[], &words, 0)?);
    skb.store(ETH_LEN, &header)?;
    let pseudo = csum_diff(&[], &[ip.src, ip.dst, TCP_LEN.to_be(), u32::from(TCP).to_be()], 0)?;
    reset(skb, ETH_LEN + 20, &opener, u32::from(u16::from_be(ip.total_len)).wrapping_sub(20), pseudo)
}

#[inline(never)]
fn reset_v6(skb: Skb) -> Result<(), Reason> {
    let ip: Ipv6 = skb.load(ETH_LEN)?;
    let opener: Tcp = skb.load(ETH_LEN + 40)?;
    skb.set_len(ETH_LEN + 40 + TCP_LEN)?;
    let header = Ipv6 {
        version_class_label: 0x6000_0000_u32.to_be(),
        payload_len: (TCP_LEN as u16).to_be(),
        next: TCP,
        hop_limit: 64,
        src: ip.dst,
        dst: ip.src,
    };
    skb.store(ETH_LEN, &header)?;
    let pseudo = csum_diff(&[], &header.src, 0)?;
    let pseudo = csum_diff(&[], &header.dst, pseudo)?;
    let pseudo = csum_diff(&[], &[TCP_LEN.to_be(), u32::from(TCP).to_be()], pseudo)?;
    reset(skb, ETH_LEN + 40, &opener, u32::from(u16::from_be(ip.payload_len)), pseudo)
}

/// Writes the reset that answers `opener` (RFC 9293 section 3.10.7.1), of whose packet `len` bytes were TCP's.
#[inline(always)]
fn reset(skb: Skb, at: u32, opener: &Tcp, len: u32, pseudo: u32) -> Result<(), Reason> {
    let payload = len.wrapping_sub(u32::from(opener.offset >> 4) * 4);
    let mut answer = Tcp {
        ports: [opener.ports[1], opener.ports[0]],
        seq: 0,
        ack: u32::from_be(opener.seq).wrapping_add(1).wrapping_add(payload).to_be(),
        offset: 5 << 4,
        flags: RST | ACK,
        window: 0,
        csum: 0,
        urgent: 0,
    };
    let words: [u32; 5] = zerocopy::transmute!(answer);
    let whole = csum_diff(&[], &words, pseudo)?;
    // A sender's checksum that is yet to be filled in stays so: the field then holds the sum of the pseudo header, which the helper
    // leaves alone. Of any other packet it makes it the checksum: what it adds is what that lacks, with the pseudo header's twice.
    answer.csum = !fold(pseudo);
    skb.store(at, &answer)?;
    let (sum, carry) = whole.overflowing_add(pseudo);
    skb.fix_l4_csum(at + 16, 0, sum.wrapping_add(carry.into()), 0, false, false)
}
