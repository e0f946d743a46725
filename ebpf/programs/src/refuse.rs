//! "Port unreachable", sent back to a pod in place of the packet that has nowhere to go.

use keelway_layout::{Endpoint, Reason};

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
    let macs: [[u8; 6]; 2] = skb.load(0)?;
    answer(skb, packet)?;
    skb.store(0, &[macs[1], macs[0]])?;
    Ok(skb.redirect(skb.ifindex()))
}

#[inline(never)]
fn answer(skb: Skb, packet: &Packet) -> Result<(), Reason> {
    // The kernel does not cut a packet shorter than the checksum that is yet to be filled in, which TCP's header ends with.
    match (packet.v6, packet.tuple.proto == TCP) {
        (false, true) => v4::<10, 12>(skb, packet)?,
        (false, false) => v4::<7, 9>(skb, packet)?,
        (true, true) => v6::<15, 27>(skb)?,
        (true, false) => v6::<12, 24>(skb)?,
    }
    Ok(())
}

/// RFC 792: the header and the first eight bytes, or more, come back. `QUOTED` and `ICMP` count words: what is quoted, and that
/// with the ICMP header.
#[inline(never)]
fn v4<const QUOTED: usize, const ICMP: usize>(skb: Skb, packet: &Packet) -> Result<(), Reason> {
    const HEADERS: u32 = 28;
    let quoted_len = QUOTED as u32 * 4;
    if packet.l4 != ETH_LEN + 20 {
        return Err(Reason::NoBackend);
    }
    let quoted: [u32; QUOTED] = skb.load(ETH_LEN)?;
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
    let mut words: [u32; 5] = zerocopy::transmute!(header);
    header.csum = fold(csum_diff(&mut [], &mut words)?);
    // Destination unreachable, port unreachable.
    let mut icmp = [0; ICMP];
    icmp[0] = u32::from_ne_bytes([3, 3, 0, 0]);
    let mut i = 0;
    while i < QUOTED {
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

/// RFC 4443: as much as fits would be welcome; the headers are what stacks read. `SUMMED` counts the words that the checksum covers.
#[inline(never)]
fn v6<const QUOTED: usize, const SUMMED: usize>(skb: Skb) -> Result<(), Reason> {
    const HEADERS: u32 = 48;
    let quoted_len = QUOTED as u32 * 4;
    let quoted: [u32; QUOTED] = skb.load(ETH_LEN)?;
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
    // Pseudo header (RFC 8200 section 8.1), then type 1 code 4, then what is quoted.
    let mut sum = [0; SUMMED];
    let mut i = 0;
    while i < 4 {
        sum[i] = header.src[i];
        sum[4 + i] = header.dst[i];
        i += 1;
    }
    sum[8] = (8 + quoted_len).to_be();
    sum[9] = u32::from(ICMP6).to_be();
    sum[10] = u32::from_ne_bytes([1, 4, 0, 0]);
    let mut i = 0;
    while i < QUOTED {
        sum[12 + i] = quoted[i];
        i += 1;
    }
    let csum = fold(csum_diff(&mut [], &mut sum)?);
    skb.store(ETH_LEN, &header)?;
    skb.store(ETH_LEN + 40, &[1u8, 4])?;
    skb.store(ETH_LEN + 42, &csum)?;
    skb.store(ETH_LEN + 44, &0u32)
}
