//! "Port unreachable", sent back to a pod in place of the packet that has nowhere to go.

use keelway_layout::{Endpoint, Reason};

use crate::frame::Frame as _;
use crate::kernel::{Skb, csum_diff};
use crate::parse::{ETH_LEN, ICMP4, ICMP6, Ipv4, Ipv6, Packet, TCP};

/// Folds a 32-bit sum into the checksum field's form.
#[inline(always)]
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Turns the packet into an ICMP error and returns it to the pod that sent it.
#[inline(always)]
pub fn port_unreachable(skb: Skb, packet: &Packet, endpoint: &Endpoint) -> Result<i32, Reason> {
    answer(skb, packet)?;
    skb.store(0, &[endpoint.mac, endpoint.host_mac])?;
    Ok(skb.redirect_peer(endpoint.ifindex))
}

/// Turns the packet into an ICMP error and returns it the way that it came.
#[inline(never)]
pub fn port_unreachable_back(skb: Skb, packet: &Packet) -> Result<i32, Reason> {
    turn_round(skb, packet)?;
    Ok(skb.redirect(skb.ifindex()))
}

/// Turns a packet of the host's own into an ICMP error, and gives it to the host as if it came by the device.
#[inline(never)]
pub fn port_unreachable_here(skb: Skb, packet: &Packet) -> Result<i32, Reason> {
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
