//! The two hooks on the tunnel's device.

use aya_ebpf::bindings::TC_ACT_OK;
use keelway_layout::{PrefixKey, Reason, identity, node_flags};

use crate::count::Account;
use crate::frame::Frame as _;
use crate::kernel::{Skb, lpm_get, now};
use crate::maps::{NODE, TUNNELS};
use crate::parse::Packet;
use crate::pod::endpoint;
use crate::policy::identity_of;
use crate::{deliver, dsr, node};

/// The network id of what goes through the tunnel under its own addresses.
pub const TUNNEL_ID: u32 = 1;

/// A packet out of the tunnel.
#[inline(always)]
pub fn ingress(skb: Skb, packet: &mut Packet, account: &mut Account) -> Result<i32, Reason> {
    let node = NODE.get(0).ok_or(Reason::Helper)?;
    let Some(from) = lpm_get(&TUNNELS, &PrefixKey::host(packet.tuple.src)) else {
        return dsr::arrive(skb, packet, node, account);
    };
    if node.flags & node_flags::VXLAN == 0 || skb.tunnel(!from.remote.is_v4())?.remote != from.remote {
        return Err(Reason::TunnelSource);
    }
    // The inner frame was addressed by a node that knows none of our MACs.
    skb.store(0, &node.vxlan_mac)?;
    skb.set_for_this_host()?;
    match endpoint(&packet.tuple.dst) {
        Some(receiver) => {
            deliver::admit(skb, packet, receiver, now(), account)?;
            deliver::hand_over(skb, receiver)
        }
        None if identity_of(&packet.tuple.dst) == identity::HOST => {
            node::from_tunnel(skb, packet, node, now(), account)
        }
        None => Err(Reason::TunnelUnknown),
    }
}

/// A packet into the tunnel, from a pod or from the host.
#[inline(always)]
pub fn egress(skb: Skb, packet: &mut Packet, _account: &mut Account) -> Result<i32, Reason> {
    if packet.tuple.dst.is_link_scoped() {
        return Err(Reason::LinkScoped);
    }
    if dsr::is_on_its_way(skb) {
        return Ok(TC_ACT_OK as i32);
    }
    let to = lpm_get(&TUNNELS, &PrefixKey::host(packet.tuple.dst)).ok_or(Reason::TunnelUnknown)?;
    if let Some(node) = NODE.get(0) {
        node::own_answer(skb, packet, node)?;
    }
    skb.set_tunnel(&to.remote, TUNNEL_ID)?;
    Ok(TC_ACT_OK as i32)
}
