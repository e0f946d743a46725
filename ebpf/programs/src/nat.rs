//! Masquerading: pods' connections to the outside take the node's address.

use keelway_layout::{Addr, CtKey, NatEntry, NodeConfig, Port, Reason, ct_flags, identity, node_flags, scope};

use crate::claim;
use crate::ct::lifetime;
use crate::frame::Frame;
use crate::kernel::{Skb, random};
use crate::maps::NAT;
use crate::parse::{self, FIN, ICMP4, ICMP6, Packet, RST, SCTP, TCP, UDP};
use crate::policy::identity_of;
use crate::rewrite::{self, Side};

const TRIES: u32 = 32;
const SECOND: u64 = 1_000_000_000;

/// The node's address that a pod's packet takes, if it is one to masquerade.
#[inline(always)]
pub fn source_for(node: &NodeConfig, packet: &Packet) -> Option<Addr> {
    let (flag, addr) =
        if packet.v6 { (node_flags::MASQUERADE_V6, node.node_v6) } else { (node_flags::MASQUERADE_V4, node.node_v4) };
    (node.flags & flag != 0
        && !addr.is_unspecified()
        && identity_of(&packet.tuple.dst) == identity::WORLD
        && matches!(packet.tuple.proto, TCP | UDP | SCTP | ICMP4 | ICMP6))
    .then_some(addr)
}

#[inline(always)]
fn get(key: &CtKey, now: u64) -> Option<*mut NatEntry> {
    let entry = NAT.get_ptr_mut(key)?;
    // SAFETY: found by this lookup.
    if unsafe { (*entry).expires } <= now { None } else { Some(entry) }
}

#[inline(always)]
fn touch(entry: *mut NatEntry, packet: &Packet, replied: bool, now: u64) {
    // SAFETY: found by a lookup of this run; single words.
    unsafe {
        let mut flags = (*entry).flags;
        if replied {
            flags |= ct_flags::REPLIED;
        }
        if packet.flags & (RST | FIN) != 0 {
            // Half-closed connections stay known by the pod's own entry; here the port is wanted back soon.
            flags |= if packet.flags & RST != 0 {
                ct_flags::RESET
            } else if replied {
                ct_flags::FIN_REVERSE
            } else {
                ct_flags::FIN_FORWARD
            };
        }
        let expires = now + lifetime(packet.tuple.proto, flags);
        if flags != (*entry).flags || expires > (*entry).expires + SECOND {
            (*entry).flags = flags;
            (*entry).expires = expires;
        }
    }
}

/// Masquerades a pod's packet on its way out of the node.
#[inline(never)]
pub fn outbound(frame: impl Frame, packet: &mut Packet, node: &NodeConfig, addr: Addr, now: u64) -> Result<(), Reason> {
    let mut key = packet.tuple;
    key.scope = scope::NAT_OUT;
    let port = match get(&key, now) {
        Some(entry) => {
            // SAFETY: found by this lookup.
            let port = unsafe { (*entry).port };
            touch(entry, packet, false, now);
            // The way back must live as long as the way out.
            if let Some(back) = get(&answer(&key, addr, port), now) {
                touch(back, packet, false, now);
                port
            } else {
                claim(&key, packet, node, addr, now)?
            }
        }
        None => claim(&key, packet, node, addr, now)?,
    };
    // An echo request is told by its source side, the reply by its destination.
    rewrite::packet(frame, packet, Side::Source, addr, port)
}

/// The key of the packet that answers a masqueraded one.
#[inline(always)]
fn answer(key: &CtKey, addr: Addr, port: Port) -> CtKey {
    CtKey {
        src: key.dst,
        dst: addr,
        sport: key.dport,
        dport: port,
        proto: key.proto,
        scope: scope::NAT_IN,
        reserved: 0,
    }
}

/// Writes an entry: a new one, or in place of one that is past its time at `now`; at the end of all time, of any.
#[inline(never)]
fn insert(key: &CtKey, entry: &NatEntry, now: u64) -> bool {
    const BPF_NOEXIST: u64 = 1;
    if NAT.insert(key, entry, BPF_NOEXIST).is_ok() {
        return true;
    }
    // Two CPUs may want one port, and the sweep may be about to remove what was there. There are other ports.
    if !claim::try_take(key) {
        return false;
    }
    let done = get(key, now).is_none() && NAT.insert(key, entry, 0).is_ok();
    claim::release(key);
    done
}

/// Finds a free port and takes it, for both directions.
#[inline(never)]
fn claim(key: &CtKey, packet: &Packet, node: &NodeConfig, addr: Addr, now: u64) -> Result<Port, Reason> {
    let first = u32::from(node.snat_first.get());
    let span = (u32::from(node.snat_last.get())).wrapping_sub(first).wrapping_add(1).max(1);
    let expires = now + lifetime(packet.tuple.proto, 0);
    let start = random();
    for attempt in 0..TRIES {
        let port = Port::new((first + start.wrapping_add(attempt) % span) as u16);
        let back = answer(key, addr, port);
        if get(&back, now).is_some() {
            continue;
        }
        let mut entry = NatEntry { expires, addr: key.src, port: key.sport, reserved16: 0, flags: 0 };
        if !insert(&back, &entry, now) {
            continue;
        }
        entry.addr = addr;
        entry.port = port;
        return if insert(key, &entry, u64::MAX) { Ok(port) } else { Err(Reason::FlowTableFull) };
    }
    Err(Reason::NatExhausted)
}

/// Puts the pod back as destination of a packet from the outside; false when it is for nobody that we masqueraded.
#[inline(never)]
pub fn inbound(skb: Skb, packet: &mut Packet, now: u64) -> Result<bool, Reason> {
    let Some((addr, port)) = behind(packet, now) else { return Ok(false) };
    rewrite::packet(skb, packet, Side::Destination, addr, port)?;
    Ok(true)
}

/// For whom a packet to the node really is, if it answers one that we masqueraded.
#[inline(never)]
pub fn behind(packet: &Packet, now: u64) -> Option<(Addr, Port)> {
    let mut key = packet.tuple;
    key.scope = scope::NAT_IN;
    let entry = get(&key, now)?;
    // SAFETY: found by this lookup; copied out.
    let (addr, port) = unsafe { ((*entry).addr, (*entry).port) };
    touch(entry, packet, true, now);
    let out = CtKey {
        src: addr,
        dst: key.src,
        sport: port,
        dport: key.sport,
        proto: key.proto,
        scope: scope::NAT_OUT,
        reserved: 0,
    };
    if let Some(out) = get(&out, now) {
        touch(out, packet, true, now);
    }
    Some((addr, port))
}

/// An error about a masqueraded packet goes to the pod, with its own packet inside.
#[inline(never)]
pub fn inbound_error(skb: Skb, packet: &mut Packet, now: u64) -> Result<bool, Reason> {
    let carried = parse::inner(skb, packet)?;
    let key = carried.tuple.reversed(scope::NAT_IN);
    let Some(entry) = get(&key, now) else { return Ok(false) };
    // SAFETY: found by this lookup; copied out.
    let (addr, port) = unsafe { ((*entry).addr, (*entry).port) };
    rewrite::inner(skb, packet, carried, Side::Source, addr, port)?;
    rewrite::packet(skb, packet, Side::Destination, addr, Port::NONE)?;
    Ok(true)
}

/// A pod's error about a packet that it got over a masqueraded flow leaves as the node's.
#[inline(never)]
pub fn outbound_error(skb: Skb, packet: &mut Packet, addr: Addr, now: u64) -> Result<(), Reason> {
    let carried = parse::inner(skb, packet)?;
    let key = carried.tuple.reversed(scope::NAT_OUT);
    let Some(entry) = get(&key, now) else { return Err(Reason::IcmpUnrelated) };
    // SAFETY: found by this lookup; copied out.
    let port = unsafe { (*entry).port };
    rewrite::inner(skb, packet, carried, Side::Destination, addr, port)?;
    rewrite::packet(skb, packet, Side::Source, addr, Port::NONE)
}
