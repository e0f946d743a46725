//! Into a local pod. Whoever delivers runs the pod's ingress rules: `redirect_peer` skips the hook of the receiver.

use keelway_layout::{Endpoint, Port, Reason, scope};

use crate::count::Account;
use crate::ct::{self, Way};
use crate::frame::Frame as _;
use crate::kernel::Skb;
use crate::parse::{self, Kind, Packet, UDP};
use crate::policy::{admit_known, admit_new};
use crate::rewrite::{self, Side};

/// Admits a packet to a pod and puts back the frontend that the pod dialled, if it answers such a connection.
#[inline(always)]
pub fn admit(
    skb: Skb,
    packet: &mut Packet,
    endpoint: &Endpoint,
    now: u64,
    account: &mut Account,
) -> Result<(), Reason> {
    if packet.kind == Kind::IcmpError && related(skb, packet, endpoint, now)? {
        return Ok(());
    }
    admit_flow(skb, packet, endpoint, now, account)
}

/// As [`admit`], of a packet that is no ICMP error.
#[inline(always)]
pub fn admit_flow(
    skb: Skb,
    packet: &mut Packet,
    endpoint: &Endpoint,
    now: u64,
    account: &mut Account,
) -> Result<(), Reason> {
    if let Some(flow) = ct::find_for(&packet.tuple, scope::OUT, Way::Reverse, endpoint, now) {
        admit_known(flow, scope::OUT, Way::Reverse, endpoint, packet, now, account)?;
        if let Some((addr, port)) = flow.dialled() {
            rewrite::packet(skb, packet, Side::Source, addr, port)?;
        }
        return Ok(());
    }
    match ct::find_for(&packet.tuple, scope::IN, Way::Forward, endpoint, now) {
        Some(flow) if flow.dialled().unwrap_or_default() == account.dialled => {
            admit_known(flow, scope::IN, Way::Forward, endpoint, packet, now, account)
        }
        // One client port, one pod, dialled in two ways: answers could not be told apart. Of datagrams the later flow is the one.
        Some(flow) if packet.tuple.proto != UDP && !flow.is_over(packet.tuple.proto, now) => Err(Reason::NatExhausted),
        _ => admit_new(scope::IN, endpoint, packet, account.dialled, now, account),
    }
}

/// Whether an ICMP error is about a packet that the pod sent; then the pod's own view is put back into it.
#[inline(never)]
fn related(skb: Skb, packet: &mut Packet, endpoint: &Endpoint, now: u64) -> Result<bool, Reason> {
    let carried = parse::inner(skb, packet)?;
    if let Some(flow) = ct::find_for(&carried.tuple, scope::OUT, Way::Forward, endpoint, now) {
        if let Some((addr, port)) = flow.dialled() {
            rewrite::inner(skb, packet, carried, Side::Destination, addr, port)?;
            // An error from the backend itself comes from whom the pod thinks it talks to.
            if packet.tuple.src == carried.tuple.dst {
                rewrite::packet(skb, packet, Side::Source, addr, Port::NONE)?;
            }
        }
        return Ok(true);
    }
    Ok(ct::find_for(&carried.tuple, scope::IN, Way::Reverse, endpoint, now).is_some())
}

/// Addresses the frame to the pod and hands it over, past the host's stack.
#[inline(always)]
pub fn hand_over(skb: Skb, endpoint: &Endpoint) -> Result<i32, Reason> {
    skb.store(0, &[endpoint.mac, endpoint.host_mac])?;
    Ok(skb.redirect_peer(endpoint.ifindex))
}
