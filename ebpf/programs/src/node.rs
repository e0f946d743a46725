//! The two hooks on the node's network devices.

use aya_ebpf::bindings::TC_ACT_OK;
use keelway_layout::{Endpoint, NodeConfig, PrefixKey, Reason, node_flags, scope};

use crate::count::Account;
use crate::ct::{self, Way};
use crate::kernel::{Skb, lpm_get, now};
use crate::maps::{NODE, TUNNELS};
use crate::parse::{Kind, Packet};
use crate::pod::endpoint;
use crate::{deliver, nat};

const OK: i32 = TC_ACT_OK as i32;

#[inline(always)]
fn is_node(node: &NodeConfig, packet: &Packet) -> bool {
    packet.tuple.dst == if packet.v6 { node.node_v6 } else { node.node_v4 }
}

/// A packet from the network.
#[inline(always)]
pub fn ingress(skb: Skb, packet: &mut Packet, account: &mut Account) -> Result<i32, Reason> {
    let Some(node) = NODE.get(0) else { return Ok(OK) };
    let now = now();
    if is_node(node, packet) {
        let masqueraded = match packet.kind {
            Kind::Flow => nat::inbound(skb, packet, now)?,
            Kind::IcmpError => nat::inbound_error(skb, packet, now)?,
        };
        if !masqueraded {
            return Ok(OK);
        }
    }
    let Some(receiver) = endpoint(&packet.tuple.dst) else { return Ok(OK) };
    if endpoint(&packet.tuple.src).is_some() {
        return Err(Reason::SpoofedSource);
    }
    if node.flags & node_flags::VXLAN != 0
        && lpm_get(&TUNNELS, &PrefixKey::host(packet.tuple.src)).is_some_and(|tunnel| tunnel.remote != packet.tuple.src)
    {
        return Err(Reason::UntunnelledPod);
    }
    deliver::admit(skb, packet, receiver, now, account)?;
    deliver::hand_over(skb, receiver)
}

/// A packet to the network.
#[inline(always)]
pub fn egress(skb: Skb, packet: &mut Packet, account: &mut Account) -> Result<i32, Reason> {
    let Some(node) = NODE.get(0) else { return Ok(OK) };
    let Some(sender) = endpoint(&packet.tuple.src) else { return Ok(OK) };
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

/// Whether the packet belongs to a flow that was opened to the pod under its own address.
#[inline(always)]
fn answers(packet: &Packet, sender: &Endpoint, now: u64) -> bool {
    ct::find_for(&packet.tuple, scope::IN, Way::Reverse, sender, now).is_some()
}
