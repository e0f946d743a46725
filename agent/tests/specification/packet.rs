//! Packets by hand, and what they say once a program has had them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::kernel::{self, NODE, OTHER_NODE};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
const ICMP4: u8 = 1;
const ICMP6: u8 = 58;
const ETH: usize = 14;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// What a packet says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub proto: u8,
    /// Offset of the transport header.
    pub l4: usize,
}

impl Seen {
    pub fn is_icmp(&self) -> bool {
        [ICMP4, ICMP6].contains(&self.proto)
    }
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum()
}

/// RFC 1071; 0 over bytes that hold their own checksum.
fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, len: usize) -> u32 {
    sum(&octets(src)) + sum(&octets(dst)) + u32::from(proto) + len as u32
}

/// RFC 9260, appendix A, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let byte = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    };
    !bytes.iter().fold(u32::MAX, byte)
}

/// The first chunk of an SCTP packet that is to its association what TCP's flags are to a connection (RFC 9260).
fn chunk(flags: u8) -> u8 {
    match flags & (FIN | SYN | RST | ACK) {
        SYN => 1,
        flags if flags & SYN != 0 => 2,
        flags if flags & RST != 0 => 6,
        // SHUTDOWN, and SHUTDOWN ACK.
        FIN => 7,
        flags if flags & FIN != 0 => 8,
        _ => 0,
    }
}

/// A transport's header and payload, checksum included.
fn transport(src: SocketAddr, dst: SocketAddr, proto: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut l4 = [src.port().to_be_bytes(), dst.port().to_be_bytes()].concat();
    let at = match proto {
        TCP => {
            l4.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0x10, 0, 0, 0, 0, 0]);
            16
        }
        UDP => {
            l4.extend((8 + payload.len() as u16).to_be_bytes());
            l4.extend([0, 0]);
            6
        }
        SCTP => {
            l4.extend([0, 0, 0, 7, 0, 0, 0, 0]);
            l4.extend([chunk(flags), 0, 0, 4]);
            8
        }
        other => panic!("no transport: {other}"),
    };
    l4.extend(payload);
    if proto == SCTP {
        let crc = crc32c(&l4).to_le_bytes();
        l4[at..at + 4].copy_from_slice(&crc);
        return l4;
    }
    let csum = folded(pseudo(src.ip(), dst.ip(), proto, l4.len()) + sum(&l4));
    let csum = if csum == 0 && proto == UDP { 0xffff } else { csum };
    l4[at..at + 2].copy_from_slice(&csum.to_be_bytes());
    l4
}

fn ip(src: IpAddr, dst: IpAddr, proto: u8, l4: &[u8]) -> Vec<u8> {
    let mut packet = match src {
        IpAddr::V4(_) => {
            let mut header = vec![0x45, 0, 0, 0, 0, 9, 0x40, 0, 64, proto, 0, 0];
            header[2..4].copy_from_slice(&(20 + l4.len() as u16).to_be_bytes());
            header.extend([octets(src), octets(dst)].concat());
            let csum = folded(sum(&header));
            header[10..12].copy_from_slice(&csum.to_be_bytes());
            header
        }
        IpAddr::V6(_) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, proto, 64];
            header[4..6].copy_from_slice(&(l4.len() as u16).to_be_bytes());
            header.extend([octets(src), octets(dst)].concat());
            header
        }
    };
    packet.extend(l4);
    packet
}

fn ethernet(v6: bool, packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if v6 { [0x86, 0xdd] } else { [8, 0] };
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2], &kind[..], packet].concat()
}

/// A packet from one to the other. `flags` are TCP's, and stand for SCTP's first chunk.
pub fn flow(src: SocketAddr, dst: SocketAddr, proto: u8, flags: u8) -> Vec<u8> {
    // An odd number of bytes, so that a checksum's last word is half.
    let l4 = transport(src, dst, proto, flags, b"a payload of 23 bytes..");
    ethernet(src.is_ipv6(), &ip(src.ip(), dst.ip(), proto, &l4))
}

/// A datagram of that many bytes of IP.
pub fn datagram(src: SocketAddr, dst: SocketAddr, length: usize) -> Vec<u8> {
    let headers = 8 + if src.is_ipv6() { 40 } else { 20 };
    let l4 = transport(src, dst, UDP, 0, &vec![b'.'; length - headers]);
    ethernet(src.is_ipv6(), &ip(src.ip(), dst.ip(), UDP, &l4))
}

/// An echo request.
pub fn echo(src: IpAddr, dst: IpAddr) -> Vec<u8> {
    let (proto, kind) = if src.is_ipv6() { (ICMP6, 128) } else { (ICMP4, 8) };
    let mut l4 = [&[kind, 0, 0, 0, 0, 7, 0, 1][..], b"a payload"].concat();
    let pseudo = if src.is_ipv6() { pseudo(src, dst, proto, l4.len()) } else { 0 };
    let csum = folded(pseudo + sum(&l4));
    l4[2..4].copy_from_slice(&csum.to_be_bytes());
    ethernet(src.is_ipv6(), &ip(src, dst, proto, &l4))
}

/// `src` tells `dst` that the packet (Ethernet header first) could not be delivered.
pub fn unreachable(src: IpAddr, dst: IpAddr, about: &[u8]) -> Vec<u8> {
    let quoted = &about[ETH..];
    let (proto, kind) = if src.is_ipv6() { (ICMP6, [1, 4]) } else { (ICMP4, [3, 3]) };
    let mut l4 = [&kind[..], &[0; 6], quoted].concat();
    let pseudo = if src.is_ipv6() { pseudo(src, dst, proto, l4.len()) } else { 0 };
    let csum = folded(pseudo + sum(&l4));
    l4[2..4].copy_from_slice(&csum.to_be_bytes());
    ethernet(src.is_ipv6(), &ip(src, dst, proto, &l4))
}

fn word(bytes: &[u8], at: usize) -> Result<u16, String> {
    let pair = bytes.get(at..at + 2).ok_or_else(|| format!("cut short at {at} of {}", bytes.len()))?;
    Ok(u16::from_be_bytes([pair[0], pair[1]]))
}

/// Addresses and ports of the IP packet at `l3`, without a look at checksums.
fn headers(bytes: &[u8], l3: usize) -> Result<Seen, String> {
    let v6 = bytes.get(l3).ok_or("no IP header")? >> 4 == 6;
    let (len, at) = if v6 { (40, 8) } else { (20, 12) };
    if bytes.len() < l3 + len {
        return Err(format!("{} bytes hold no IP header at {l3}", bytes.len()));
    }
    let addr = |at: usize| -> IpAddr {
        match v6 {
            true => Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[at..at + 16]).expect("sixteen")).into(),
            false => Ipv4Addr::from(<[u8; 4]>::try_from(&bytes[at..at + 4]).expect("four")).into(),
        }
    };
    let proto = bytes[l3 + if v6 { 6 } else { 9 }];
    let l4 = l3 + len;
    let named = ![ICMP4, ICMP6].contains(&proto);
    let port = |at: usize| if named { word(bytes, at) } else { Ok(0) };
    let src = SocketAddr::from((addr(l3 + at), port(l4)?));
    let dst = SocketAddr::from((addr(l3 + at + if v6 { 16 } else { 4 }), port(l4 + 2)?));
    Ok(Seen { src, dst, proto, l4 })
}

/// Reads a packet; an error when a length or a checksum is wrong.
pub fn read(bytes: &[u8]) -> Result<Seen, String> {
    let seen = headers(bytes, ETH)?;
    let v6 = seen.src.is_ipv6();
    let len = if v6 { 40 + usize::from(word(bytes, ETH + 4)?) } else { usize::from(word(bytes, ETH + 2)?) };
    if ETH + len != bytes.len() {
        return Err(format!("{} bytes, of which the IP header says {len}", bytes.len()));
    }
    if !v6 && folded(sum(&bytes[ETH..seen.l4])) != 0 {
        return Err("the IPv4 checksum is wrong".into());
    }
    let l4 = &bytes[seen.l4..];
    let right = match seen.proto {
        SCTP => {
            let mut zeroed = l4.to_vec();
            zeroed[8..12].fill(0);
            crc32c(&zeroed).to_le_bytes() == l4[8..12]
        }
        ICMP4 => folded(sum(l4)) == 0,
        UDP if l4[6..8] == [0, 0] => false,
        proto => folded(pseudo(seen.src.ip(), seen.dst.ip(), proto, l4.len()) + sum(l4)) == 0,
    };
    if right { Ok(seen) } else { Err(format!("the checksum of protocol {} is wrong", seen.proto)) }
}

/// What is inside of a packet that goes through the tunnel, from this node to the other, and its network id; `None` of another
/// packet. All that the tunnel's device would write is checked.
pub fn tunnelled(bytes: &[u8]) -> Option<(Vec<u8>, u32)> {
    let v6 = bytes[12..14] == [0x86, 0xdd];
    let outer = headers(bytes, ETH).expect("an IP header");
    if (outer.proto, outer.dst.port()) != (UDP, 8472) {
        return None;
    }
    let ends = [NODE, OTHER_NODE].map(|of| kernel::ip(of[usize::from(v6)]));
    assert_eq!([outer.src.ip(), outer.dst.ip()], ends);
    assert!((32_768..61_000).contains(&outer.src.port()), "{outer:?}");
    let inside = bytes[outer.l4 + 16..].to_vec();
    let length = |at: usize| usize::from(word(bytes, at).expect("a length"));
    assert_eq!((length(outer.l4 + 4), length(outer.l4 + 6)), (bytes.len() - outer.l4, 0), "UDP's length and checksum");
    if v6 {
        assert_eq!(bytes[ETH..ETH + 4], [0x60, 0, 0, 0]);
        assert_eq!((length(ETH + 4), bytes[ETH + 7]), (bytes.len() - outer.l4, 64));
    } else {
        assert_eq!(bytes[ETH..ETH + 2], [0x45, 0]);
        assert_eq!((length(ETH + 2), bytes[ETH + 8]), (bytes.len() - ETH, 64));
        assert_eq!(bytes[ETH + 6..ETH + 8], [0, 0], "it may be fragmented");
        assert_eq!(folded(sum(&bytes[ETH..outer.l4])), 0, "the IPv4 checksum");
    }
    let vxlan = &bytes[outer.l4 + 8..outer.l4 + 16];
    assert_eq!((&vxlan[..4], vxlan[7]), (&[8, 0, 0, 0][..], 0));
    Some((inside, u32::from_be_bytes([0, vxlan[4], vxlan[5], vxlan[6]])))
}

/// What the other node sends through the tunnel: a frame, in a datagram from an address under a network id. `class` is the traffic
/// class of the header outside, `checksum` its datagram's.
pub fn through(inside: &[u8], from: IpAddr, id: u32, class: u8, checksum: u16) -> Vec<u8> {
    let to = kernel::ip(NODE[usize::from(from.is_ipv6())]);
    let mut l4 = [50_000_u16, 8472, 16 + inside.len() as u16, checksum].map(u16::to_be_bytes).concat();
    l4.extend([&[8, 0, 0, 0][..], &(id << 8).to_be_bytes(), inside].concat());
    let mut packet = ip(from, to, UDP, &l4);
    if from.is_ipv6() {
        packet[1] |= class << 4;
    } else {
        packet[1] = class;
        packet[10..12].fill(0);
        let csum = folded(sum(&packet[..20]));
        packet[10..12].copy_from_slice(&csum.to_be_bytes());
    }
    ethernet(from.is_ipv6(), &packet)
}

/// Reads the reset that answers a packet which opens a TCP connection (RFC 9293 section 3.10.7.1).
pub fn reset(bytes: &[u8], opener: &[u8]) -> Result<Seen, String> {
    let (seen, of) = (read(bytes)?, read(opener)?);
    let dword = |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four"));
    let data = opener.len() - of.l4 - usize::from(opener[of.l4 + 12] >> 4) * 4;
    let wanted = dword(opener, of.l4 + 4).wrapping_add(1 + data as u32);
    let is_reset =
        seen.proto == TCP && bytes.len() == seen.l4 + 20 && bytes[seen.l4 + 12..seen.l4 + 14] == [0x50, RST | ACK];
    if !is_reset || dword(bytes, seen.l4 + 4) != 0 || dword(bytes, seen.l4 + 8) != wanted {
        return Err(format!("no reset of {wanted}: {:?}", &bytes[seen.l4..]));
    }
    Ok(seen)
}

/// The packet that an ICMP error carries.
pub fn carried(bytes: &[u8]) -> Result<Seen, String> {
    let outer = read(bytes)?;
    let (kind, code) = (bytes[outer.l4], bytes[outer.l4 + 1]);
    let unreachable = if outer.src.is_ipv6() { (1, 4) } else { (3, 3) };
    if !outer.is_icmp() || (kind, code) != unreachable {
        return Err(format!("no port unreachable: protocol {}, type {kind}, code {code}", outer.proto));
    }
    let inner = headers(bytes, outer.l4 + 8)?;
    if !outer.src.is_ipv6() && folded(sum(&bytes[outer.l4 + 8..inner.l4])) != 0 {
        return Err("the carried IPv4 checksum is wrong".into());
    }
    Ok(inner)
}
