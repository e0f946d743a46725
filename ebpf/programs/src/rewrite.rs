//! Changing addresses and ports in place, checksums included.

use keelway_layout::{Addr, CtKey, Port, Reason, crc32c};

use crate::frame::Frame;
use crate::kernel::csum_diff;
use crate::parse::{ETH_LEN, ICMP4, ICMP6, Kind, Packet, SCTP, TCP, UDP};

/// Which end of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
}

impl Side {
    #[inline(always)]
    fn addr(self, tuple: &CtKey) -> &Addr {
        match self {
            Self::Source => &tuple.src,
            Self::Destination => &tuple.dst,
        }
    }

    #[inline(always)]
    fn port(self, tuple: &CtKey) -> Port {
        match self {
            Self::Source => tuple.sport,
            Self::Destination => tuple.dport,
        }
    }
}

/// Offset of the checksum in the transport header, and whether zero stands for none, and is never a sum's: over IPv6 few may
/// leave it out (RFC 6935), but none may send it otherwise (RFC 8200 section 8.1).
#[inline(always)]
const fn l4_checksum(proto: u8) -> Option<(u32, bool)> {
    match proto {
        TCP => Some((16, false)),
        UDP => Some((6, true)),
        ICMP6 => Some((2, false)),
        _ => None,
    }
}

/// Puts another address and port at one side of the packet and of its tuple.
#[inline(never)]
pub fn packet(frame: impl Frame, packet: &mut Packet, side: Side, addr: Addr, port: Port) -> Result<(), Reason> {
    let old_port = side.port(&packet.tuple);
    address(frame, packet, side, &addr)?;
    let names_port = packet.kind == Kind::Flow;
    if names_port && old_port != port && packet.has_l4 {
        self::port(frame, packet, side, old_port, port)?;
    }
    match side {
        Side::Source => packet.tuple.src = addr,
        Side::Destination => packet.tuple.dst = addr,
    }
    if names_port {
        match side {
            Side::Source => packet.tuple.sport = port,
            Side::Destination => packet.tuple.dport = port,
        }
    }
    Ok(())
}

#[inline(always)]
fn address(frame: impl Frame, packet: &Packet, side: Side, new: &Addr) -> Result<(), Reason> {
    let checksum = l4_checksum(packet.tuple.proto);
    let old = side.addr(&packet.tuple);
    if packet.v6 {
        if let Some((offset, optional)) = checksum
            && packet.has_l4
        {
            let diff = csum_diff(old.as_words(), new.as_words(), 0)?;
            frame.fix_l4_csum(packet.l4 + offset, 0, diff, 0, true, optional)?;
        }
        frame.store(ETH_LEN + if side == Side::Source { 8 } else { 24 }, &new.words())
    } else {
        if let Some((offset, optional)) = checksum
            && packet.has_l4
        {
            frame.fix_l4_csum(packet.l4 + offset, old.v4_word(), new.v4_word(), 4, true, optional)?;
        }
        frame.fix_ip_csum(ETH_LEN + 10, old.v4_word(), new.v4_word(), 4)?;
        frame.store(ETH_LEN + if side == Side::Source { 12 } else { 16 }, &new.v4_word())
    }
}

#[inline(always)]
fn port(frame: impl Frame, packet: &Packet, side: Side, old: Port, new: Port) -> Result<(), Reason> {
    let proto = packet.tuple.proto;
    if proto == ICMP4 || proto == ICMP6 {
        // The identifier of an echo stands at one place, whoever asked.
        frame.fix_l4_csum(packet.l4 + 2, old.be().into(), new.be().into(), 2, false, false)?;
        return frame.store(packet.l4 + 4, &new.be());
    }
    if proto == SCTP {
        return sctp_port(frame, packet, side, old, new);
    }
    let (offset, optional) = l4_checksum(proto).ok_or(Reason::Helper)?;
    frame.fix_l4_csum(packet.l4 + offset, old.be().into(), new.be().into(), 2, false, optional)?;
    frame.store(packet.l4 + if side == Side::Source { 0 } else { 2 }, &new.be())
}

#[inline(never)]
fn sctp_port(frame: impl Frame, packet: &Packet, side: Side, old: Port, new: Port) -> Result<(), Reason> {
    let checksum: u32 = frame.load(packet.l4 + 8)?;
    frame.store(packet.l4 + if side == Side::Source { 0 } else { 2 }, &new.be())?;
    // The sender leaves it to the device to fill in, which reads the ports then.
    if checksum == 0 {
        return Ok(());
    }
    let end = if packet.v6 {
        let payload: u16 = frame.load(ETH_LEN + 4)?;
        ETH_LEN + 40 + u32::from(u16::from_be(payload))
    } else {
        let total: u16 = frame.load(ETH_LEN + 2)?;
        ETH_LEN + u32::from(u16::from_be(total))
    };
    let shift = if side == Side::Source { 0 } else { 16 };
    let difference = u32::from(u16::from_le(old.be() ^ new.be())) << shift;
    let mended = crc32c::mend(u32::from_le(checksum), difference, end.wrapping_sub(packet.l4) as u16);
    frame.store(packet.l4 + 8, &mended.to_le())
}

/// Puts another address and port into the packet that an ICMP error carries, and mends the error's checksum.
///
/// The carried packet's own transport checksum is left: the error seldom shows all of what it covers.
#[inline(always)]
pub fn inner(
    frame: impl Frame,
    outer: &Packet,
    carried: &Packet,
    side: Side,
    addr: Addr,
    port: Port,
) -> Result<(), Reason> {
    let l3 = outer.l4 + 8;
    let csum = outer.l4 + 2;
    let (old_addr, old_port) = (side.addr(&carried.tuple), side.port(&carried.tuple));
    if outer.v6 {
        let diff = csum_diff(old_addr.as_words(), addr.as_words(), 0)?;
        frame.fix_l4_csum(csum, 0, diff, 0, false, false)?;
        frame.store(l3 + if side == Side::Source { 8 } else { 24 }, &addr.words())?;
    } else {
        // The header's checksum takes up the address's change, so that the error's own checksum needs none for the two.
        frame.fix_ip_csum(l3 + 10, old_addr.v4_word(), addr.v4_word(), 4)?;
        frame.store(l3 + if side == Side::Source { 12 } else { 16 }, &addr.v4_word())?;
    }
    if old_port == port {
        return Ok(());
    }
    let proto = carried.tuple.proto;
    let offset = match (proto, side) {
        (ICMP4 | ICMP6, _) => 4,
        (_, Side::Source) => 0,
        (_, Side::Destination) => 2,
    };
    frame.fix_l4_csum(csum, old_port.be().into(), port.be().into(), 2, false, false)?;
    frame.store(carried.l4 + offset, &port.be())
}
