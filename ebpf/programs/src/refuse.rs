//! "Port unreachable", sent back to a pod in place of the packet that has nowhere to go.

use keelway_layout::{Endpoint, Reason};

use crate::kernel::{Skb, csum_diff};
use crate::parse::{ETH_LEN, ICMP4, ICMP6, Ipv4, Ipv6, Packet};

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
    if packet.v6 {
        v6(skb)?
    } else {
        v4(skb, packet)?
    };
    skb.store(0, &endpoint.mac)?;
    skb.store(6, &endpoint.host_mac)?;
    Ok(skb.redirect_peer(endpoint.ifindex))
}

/// RFC 792: the header and the first eight bytes come back.
#[inline(never)]
fn v4(skb: Skb, packet: &Packet) -> Result<(), Reason> {
    const QUOTED: u32 = 28;
    const HEADERS: u32 = 28;
    if packet.l4 != ETH_LEN + 20 {
        return Err(Reason::NoBackend);
    }
    let quoted: [u32; 7] = skb.load(ETH_LEN)?;
    let ip: Ipv4 = skb.load(ETH_LEN)?;
    skb.set_len(ETH_LEN + QUOTED)?;
    skb.insert_l3(HEADERS as i32)?;
    let mut header = Ipv4 {
        version_ihl: 0x45,
        tos: 0,
        total_len: ((HEADERS + QUOTED) as u16).to_be(),
        id: 0,
        fragment: 0,
        ttl: 64,
        proto: ICMP4,
        csum: 0,
        src: ip.dst,
        dst: ip.src,
    };
    let mut words: [u32; 5] = zerocopy::transmute!(header);
    header.csum = fold(csum_diff(&mut [], &mut words)?);
    // Destination unreachable, port unreachable.
    let mut icmp: [u32; 9] = [0; 9];
    icmp[0] = u32::from_ne_bytes([3, 3, 0, 0]);
    let mut i = 0;
    while i < 7 {
        icmp[2 + i] = quoted[i];
        i += 1;
    }
    let csum = fold(csum_diff(&mut [], &mut icmp)?);
    skb.store(ETH_LEN, &header)?;
    skb.store(ETH_LEN + 20, &[3u8, 3])?;
    skb.store(ETH_LEN + 22, &csum)?;
    skb.store(ETH_LEN + 24, &0u32)?;
    Ok(())
}

/// RFC 4443: as much as fits would be welcome; the header and eight bytes are what stacks read.
#[inline(never)]
fn v6(skb: Skb) -> Result<(), Reason> {
    const QUOTED: u32 = 48;
    const HEADERS: u32 = 48;
    let quoted: [u32; 12] = skb.load(ETH_LEN)?;
    let ip: Ipv6 = skb.load(ETH_LEN)?;
    skb.set_len(ETH_LEN + QUOTED)?;
    skb.insert_l3(HEADERS as i32)?;
    let header = Ipv6 {
        version_class_label: 0x6000_0000_u32.to_be(),
        payload_len: (8 + QUOTED as u16).to_be(),
        next: ICMP6,
        hop_limit: 64,
        src: ip.dst,
        dst: ip.src,
    };
    // Pseudo header (RFC 8200 section 8.1), then type 1 code 4, then what is quoted.
    let mut sum: [u32; 24] = [0; 24];
    let mut i = 0;
    while i < 4 {
        sum[i] = header.src[i];
        sum[4 + i] = header.dst[i];
        i += 1;
    }
    sum[8] = (8 + QUOTED).to_be();
    sum[9] = u32::from(ICMP6).to_be();
    sum[10] = u32::from_ne_bytes([1, 4, 0, 0]);
    let mut i = 0;
    while i < 12 {
        sum[12 + i] = quoted[i];
        i += 1;
    }
    let csum = fold(csum_diff(&mut [], &mut sum)?);
    skb.store(ETH_LEN, &header)?;
    skb.store(ETH_LEN + 40, &[1u8, 4])?;
    skb.store(ETH_LEN + 42, &csum)?;
    skb.store(ETH_LEN + 44, &0u32)
}
