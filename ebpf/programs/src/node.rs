//! The two hooks on the node's network devices.

use aya_ebpf::bindings::TC_ACT_OK;
use keelway_layout::{Endpoint, NodeConfig, Reason, identity, node_flags, scope};

use crate::count::Account;
use crate::ct::{self, Way};
use crate::kernel::{Skb, now};
use crate::lb::Client;
use crate::maps::NODE;
use crate::parse::{Kind, Packet, SCTP, TCP, UDP};
use crate::pod::endpoint;
use crate::policy::identity_of;
use crate::service::{self, node_addr};
use crate::{deliver, nat};

const OK: i32 = TC_ACT_OK as i32;

/// A packet from the network.
#[inline(always)]
pub fn ingress(skb: Skb, packet: &mut Packet, account: &mut Account) -> Result<i32, Reason> {
    let Some(node) = NODE.get(0) else { return Ok(OK) };
    let now = now();
    let mut restored = false;
    if packet.tuple.dst == node_addr(node, packet.v6) {
        if packet.tuple.proto == UDP && packet.tuple.dport == node.vxlan_port {
            return Ok(OK);
        }
        restored = nat_inbound(skb, packet, now)?;
        if (restored || may_be_for_host(packet)) && service_answer(skb, packet, now)? {
            return service::onward(skb, packet, node);
        }
    }
    let receiver = endpoint(&packet.tuple.dst);
    if restored && receiver.is_none() {
        return Ok(OK);
    }
    match receiver {
        Some(receiver) => {
            genuine(node, packet)?;
            deliver::admit(skb, packet, receiver, now, account)?;
            deliver::hand_over(skb, receiver)
        }
        None => {
            if packet.kind == Kind::IcmpError {
                return Ok(service::arrive_error(skb, packet, now, account)?.unwrap_or(OK));
            }
            service::arrive(skb, packet, node, Client::Outside, now, account)
        }
    }
}

#[inline(always)]
fn nat_inbound(skb: Skb, packet: &mut Packet, now: u64) -> Result<bool, Reason> {
    match packet.kind {
        Kind::Flow => nat::inbound(skb, packet, now),
        Kind::IcmpError => nat::inbound_error(skb, packet, now),
    }
}

#[inline(always)]
fn service_answer(skb: Skb, packet: &mut Packet, now: u64) -> Result<bool, Reason> {
    match packet.kind {
        Kind::Flow => service::answer(skb, packet, now),
        Kind::IcmpError => service::answer_error(skb, packet, now),
    }
}

/// Whether a packet to the node may answer one that a process of its own sent to a Service, past the socket hooks.
#[inline(always)]
fn may_be_for_host(packet: &Packet) -> bool {
    packet.tuple.proto == SCTP || packet.kind == Kind::IcmpError
}

/// What comes by the tunnel to the node itself: answers to what it sent for Services' clients, and pods that dial it.
#[inline(always)]
pub fn from_tunnel(
    skb: Skb,
    packet: &mut Packet,
    node: &NodeConfig,
    now: u64,
    account: &mut Account,
) -> Result<i32, Reason> {
    if (nat_inbound(skb, packet, now)? || may_be_for_host(packet)) && service_answer(skb, packet, now)? {
        return service::onward(skb, packet, node);
    }
    if packet.kind == Kind::IcmpError {
        return Ok(OK);
    }
    // Who dials a node picked it: to that node's policy a pod of another one comes from outside.
    service::arrive(skb, packet, node, Client::Outside, now, account)
}

/// A packet from the network does not come from this node (whom no rule holds off), nor from one of its pods, nor, where there is a
/// tunnel, from any.
#[inline(always)]
pub fn genuine(node: &NodeConfig, packet: &Packet) -> Result<(), Reason> {
    if endpoint(&packet.tuple.src).is_some() {
        return Err(Reason::SpoofedSource);
    }
    let who = identity_of(&packet.tuple.src);
    if who == identity::HOST {
        return Err(Reason::SpoofedSource);
    }
    if node.flags & node_flags::VXLAN != 0 && (who == identity::UNKNOWN_POD || who >= identity::FIRST_POD) {
        return Err(Reason::UntunnelledPod);
    }
    Ok(())
}

/// A packet to the network.
#[inline(always)]
pub fn egress(skb: Skb, packet: &mut Packet, account: &mut Account) -> Result<i32, Reason> {
    let Some(node) = NODE.get(0) else { return Ok(OK) };
    let Some(sender) = endpoint(&packet.tuple.src) else { return own(skb, packet, node, account) };
    account.endpoint = sender.id;
    let Some(addr) = nat::source_for(node, packet) else { return Ok(OK) };
    let now = now();
    if answers(packet, sender, now) {
        return Ok(OK);
    }
    match packet.kind {
        Kind::Flow => nat::outbound(skb, packet, node, addr, now)?,
        Kind::IcmpError => nat::outbound_error(skb, packet, addr, now)?,
    }
    Ok(OK)
}

/// A packet of the host's own, to the network: an answer, or one by which it dials a Service itself. Sockets of TCP and UDP have
/// their own hooks for that, others have none.
#[inline(always)]
fn own(skb: Skb, packet: &mut Packet, node: &NodeConfig, account: &mut Account) -> Result<i32, Reason> {
    if !own_answer(skb, packet, node)?
        && packet.kind == Kind::Flow
        && !matches!(packet.tuple.proto, TCP | UDP)
        && packet.tuple.src == node_addr(node, packet.v6)
    {
        return service::depart(skb, packet, node, now(), account);
    }
    Ok(OK)
}

/// A packet of the host's own: if it answers a Service's client, or is an error about what that sent, it leaves under the address that was dialled.
#[inline(always)]
pub fn own_answer(skb: Skb, packet: &mut Packet, node: &NodeConfig) -> Result<bool, Reason> {
    let own = packet.tuple.src == node_addr(node, packet.v6) || service::is_hosts(&packet.tuple.src);
    let tunnelled = packet.tuple.proto == UDP && packet.tuple.dport == node.vxlan_port;
    if own && !tunnelled { service_answer(skb, packet, now()) } else { Ok(false) }
}

/// Whether the packet belongs to a flow that was opened to the pod under its own address.
#[inline(always)]
fn answers(packet: &Packet, sender: &Endpoint, now: u64) -> bool {
    ct::find_for(&packet.tuple, scope::IN, Way::Reverse, sender, now).is_some()
}
