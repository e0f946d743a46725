//! Services for those who are no pod of this node: node ports, load balancer and external addresses, dialled from the network or
//! from another node's pod.
//!
//! A flow is `client -> frontend` when it comes (scope SERVICE, the backend), `client -> backend` after translation (scope LB, the
//! frontend), and `node -> backend` where the backend is elsewhere (`nat`). Each step keeps its own entry, and answers undo them one
//! by one. A backend on this node sees the client's own address.

use aya_ebpf::bindings::TC_ACT_OK;
use keelway_layout::{Addr, CtKey, Endpoint, Hook, NodeConfig, Port, Reason, ct_flags, identity, node_flags, scope};

use crate::count::{Account, count};
use crate::ct::{self, Flow, Way};
use crate::frame::Frame;
use crate::kernel::{Skb, lpm_get};
use crate::lb::{self, Asked, Client, Outcome};
use crate::maps::{NODE, TUNNELS};
use crate::parse::{self, FIN, Packet, UDP};
use crate::pod::endpoint;
use crate::policy::identity_of;
use crate::rewrite::{self, Side};
use crate::{deliver, dsr, nat, refuse};

const OK: i32 = TC_ACT_OK as i32;

/// The node's address of the packet's family; unspecified without.
#[inline(always)]
pub fn node_addr(node: &NodeConfig, v6: bool) -> Addr {
    if v6 { node.node_v6 } else { node.node_v4 }
}

/// Translates a packet that may be for a Service. What is to be done next is for the hook to call, whose stack has the room.
#[inline(never)]
fn translate(skb: Skb, packet: &mut Packet, now: u64, account: &mut Account) -> Result<Outcome, Reason> {
    let mut asked = Asked::by(account.client, 0);
    let outcome = lb::for_packet(packet, &mut asked, now)?;
    if outcome == Outcome::Translated {
        account.dialled = (packet.tuple.dst, packet.tuple.dport);
        account.dsr = asked.dsr;
        if asked.dsr {
            hand_on(packet, &asked.backend, now, account)?;
            return Ok(outcome);
        }
        exchange(skb, packet, &asked.backend, now, account)?;
    }
    Ok(outcome)
}

/// Remembers a packet that is for the backend's node to translate. It stays as it is but for what is known of it here: its
/// destination tells that node what was dialled.
#[inline(always)]
pub fn hand_on(packet: &mut Packet, backend: &(Addr, Port), now: u64, account: &Account) -> Result<(), Reason> {
    packet.tuple.dst = backend.0;
    packet.tuple.dport = backend.1;
    remember(packet, account.dialled, now)?;
    if packet.flags & FIN != 0 {
        // The backend's is not to be seen here. Whether the ports are free for another connection its node knows.
        client_ended(packet, now);
    }
    Ok(())
}

/// Puts the backend in place of what was dialled, and remembers that for the answers.
#[inline(always)]
pub fn exchange(
    frame: impl Frame,
    packet: &mut Packet,
    backend: &(Addr, Port),
    now: u64,
    account: &Account,
) -> Result<(), Reason> {
    rewrite::packet(frame, packet, Side::Destination, backend.0, backend.1)?;
    count(account.hook, Reason::Translated, frame.len());
    remember(packet, account.dialled, now)
}

/// A pod, or a client of a Service, that could write to a tunnel's port in a node's name could speak for any pod. Not every address
/// of a node is known as one, and what goes to the outside takes this node's: only other pods may be written to at that port.
#[inline(always)]
pub fn is_for_a_tunnel(packet: &Packet, node: &NodeConfig) -> bool {
    packet.tuple.proto == UDP
        && node.vxlan_port == packet.tuple.dport
        && node.vxlan_ifindex != 0
        && is_no_pod(&packet.tuple.dst)
}

#[inline(never)]
fn is_no_pod(addr: &Addr) -> bool {
    let who = identity_of(addr);
    who != identity::UNKNOWN_POD && who < identity::FIRST_POD
}

/// Whether a packet is for an address that could only be a Service's, and is none's.
#[inline(never)]
pub fn is_nobodys(packet: &Packet, client: Client) -> bool {
    let to = &packet.tuple;
    identity_of(&to.dst) == identity::SERVICES && lb::dial(&to.dst, to.dport, to.proto, client).is_none()
}

/// Whether an address is any of the host's own.
#[inline(never)]
pub fn is_hosts(addr: &Addr) -> bool {
    identity_of(addr) == identity::HOST
}

/// A packet that may be for a Service, to its backend: a pod here, the host itself, or elsewhere.
#[inline(always)]
pub fn arrive(
    skb: Skb,
    packet: &mut Packet,
    node: &NodeConfig,
    client: Client,
    now: u64,
    account: &mut Account,
) -> Result<i32, Reason> {
    account.client = client;
    match translate(skb, packet, now, account)? {
        Outcome::Other => {
            let for_us = packet.tuple.dst == node_addr(node, packet.v6);
            return if !for_us && is_nobodys(packet, client) { Err(Reason::NoEndpoint) } else { Ok(OK) };
        }
        Outcome::Refused => {
            count(account.hook, Reason::NoBackend, skb.len());
            return refuse::back(skb, packet);
        }
        Outcome::Translated => {}
    }
    if account.hook == Hook::NodeIngress {
        crate::node::genuine(node, packet)?;
    }
    if account.dsr {
        count(account.hook, Reason::ToBackendsNode, skb.len());
        return dsr::send(skb, node, &packet.tuple.dst, packet.tuple.dport);
    }
    if let Some(receiver) = endpoint(&packet.tuple.dst) {
        return receive(skb, packet, receiver, now, account);
    }
    if is_for_a_tunnel(packet, node) {
        return Err(Reason::TunnelFromPod);
    }
    let own = node_addr(node, packet.v6);
    if packet.tuple.dst == own || is_hosts(&packet.tuple.dst) {
        // A backend in the host's own network: its answers are met on their way out.
        return Ok(OK);
    }
    // From this node, so that the answer comes back to it.
    nat::outbound(skb, packet, node, own, now)?;
    onward(skb, packet, node)
}

/// A packet of the host's own that may be for a Service, to its backend. To a pod here it goes by that pod's own hook, which admits
/// it; what was dialled that finds by [`dialled_by_host`].
#[inline(always)]
pub fn depart(
    skb: Skb,
    packet: &mut Packet,
    node: &NodeConfig,
    now: u64,
    account: &mut Account,
) -> Result<i32, Reason> {
    account.client = Client::Host;
    match translate(skb, packet, now, account)? {
        Outcome::Other => return Ok(OK),
        Outcome::Refused => {
            count(account.hook, Reason::NoBackend, skb.len());
            return refuse::here(skb, packet);
        }
        Outcome::Translated => {}
    }
    if is_hosts(&packet.tuple.dst) {
        // The stack takes nothing from the network that has its own address as source.
        return Err(Reason::Hairpin);
    }
    match endpoint(&packet.tuple.dst) {
        Some(receiver) => {
            skb.store(0, &[receiver.mac, receiver.host_mac])?;
            Ok(skb.redirect(receiver.ifindex))
        }
        None => onward(skb, packet, node),
    }
}

/// What the host dialled when it sent this packet to a pod; nothing in particular if that was the pod.
#[inline(never)]
pub fn dialled_by_host(packet: &Packet, now: u64) -> (Addr, Port) {
    ct::find_of(&packet.tuple, scope::LB, Way::Forward, 0, now).and_then(Flow::dialled).unwrap_or_default()
}

/// Into a pod that is the backend, by its rules.
#[inline(never)]
pub fn receive(
    skb: Skb,
    packet: &mut Packet,
    receiver: &Endpoint,
    now: u64,
    account: &mut Account,
) -> Result<i32, Reason> {
    deliver::admit_flow(skb, packet, receiver, now, account)?;
    deliver::hand_over(skb, receiver)
}

/// The entry of the translated flow: what was dialled, for the answers.
#[inline(never)]
fn remember(packet: &Packet, dialled: (Addr, Port), now: u64) -> Result<(), Reason> {
    if let Some(flow) = ct::find_of(&packet.tuple, scope::LB, Way::Forward, 0, now)
        && flow.dialled() == Some(dialled)
    {
        flow.touch(packet, Way::Forward, now);
        return Ok(());
    }
    ct::open_dialled(packet, scope::LB, 0, &dialled, now)
}

/// Takes both ends of a flow as ended.
#[inline(never)]
fn client_ended(packet: &Packet, now: u64) {
    if let Some(flow) = ct::find_of(&packet.tuple, scope::LB, Way::Forward, 0, now) {
        flow.touch(packet, Way::Reverse, now);
    }
}

/// Notes the end that a pod of this node, sets to its part of a flow: the client's port is
/// free for another then.
#[inline(never)]
pub fn backend_ended(packet: &Packet, now: u64) {
    if let Some(flow) = answered(&packet.tuple, now) {
        flow.touch(packet, Way::Reverse, now);
    }
}

/// The flow that a backend's packet answers, if that came by a Service.
#[inline(always)]
pub fn answered(tuple: &CtKey, now: u64) -> Option<Flow> {
    ct::find_of(tuple, scope::LB, Way::Reverse, 0, now)
}

/// A backend's answer, once it has its client back as destination: it leaves under the address that was dialled.
#[inline(never)]
pub fn answer(skb: Skb, packet: &mut Packet, now: u64) -> Result<bool, Reason> {
    let Some(flow) = answered(&packet.tuple, now) else { return Ok(false) };
    let Some((addr, port)) = flow.dialled() else { return Ok(false) };
    flow.touch(packet, Way::Reverse, now);
    rewrite::packet(skb, packet, Side::Source, addr, port)?;
    Ok(true)
}

/// An ICMP error about what a Service's client was sent, or sent: both are put into the words of the one who gets it.
///
/// `carried` is as this node sees the flow after `nat`.
#[inline(never)]
pub fn answer_error(skb: Skb, packet: &mut Packet, now: u64) -> Result<bool, Reason> {
    let carried = parse::inner(skb, packet)?;
    let Some(flow) = ct::find_of(&carried.tuple, scope::LB, Way::Forward, 0, now) else { return Ok(false) };
    let Some((addr, port)) = flow.dialled() else { return Ok(false) };
    rewrite::inner(skb, packet, carried, Side::Destination, addr, port)?;
    if packet.tuple.src == carried.tuple.dst {
        rewrite::packet(skb, packet, Side::Source, addr, Port::NONE)?;
    }
    Ok(true)
}

/// An ICMP error from the network about an answer of a Service: the backend is told.
#[inline(never)]
pub fn arrive_error(skb: Skb, packet: &mut Packet, now: u64, account: &mut Account) -> Result<Option<i32>, Reason> {
    let carried = parse::inner(skb, packet)?;
    let Some(flow) = ct::find_of(&carried.tuple, scope::SERVICE, Way::Reverse, 0, now) else { return Ok(None) };
    let (addr, port) = (flow.entry().nat_addr, flow.entry().nat_port);
    let Some(receiver) = endpoint(&addr) else {
        if flow.entry().flags & ct_flags::DSR == 0 {
            return Ok(None);
        }
        let node = NODE.get(0).ok_or(Reason::Helper)?;
        return dsr::send(skb, node, &addr, port).map(Some);
    };
    account.endpoint = receiver.id;
    rewrite::inner(skb, packet, carried, Side::Source, addr, port)?;
    rewrite::packet(skb, packet, Side::Destination, addr, Port::NONE)?;
    deliver::hand_over(skb, receiver).map(Some)
}

/// To the host by its stack, to a pod through the tunnel, to everybody else by the node's routes.
#[inline(never)]
pub fn onward(skb: Skb, packet: &Packet, node: &NodeConfig) -> Result<i32, Reason> {
    if packet.tuple.dst == node_addr(node, packet.v6) {
        return Ok(OK);
    }
    if goes_by_tunnel(node, &packet.tuple.dst) {
        lpm_get(&TUNNELS, &keelway_layout::PrefixKey::host(packet.tuple.dst)).ok_or(Reason::NoRoute)?;
        return Ok(skb.redirect(node.vxlan_ifindex));
    }
    skb.redirect_by_route(packet)
}

/// Whether what is sent to an address goes through the tunnel.
#[inline(always)]
pub fn goes_by_tunnel(node: &NodeConfig, addr: &Addr) -> bool {
    if node.flags & node_flags::VXLAN == 0 {
        return false;
    }
    let who = identity_of(addr);
    who == identity::UNKNOWN_POD || who >= identity::FIRST_POD
}
