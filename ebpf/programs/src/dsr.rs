//! Direct server return: the node that a client outside dialled sends its packets to the backend's node as they came, and that node
//! answers the client itself, under the address that was dialled. The backend sees the client's own address.
//!
//! What was dialled is the packet's destination. The backend is said by the tunnel, in what a frame between two programs has no use
//! for: the port by the network id, the address but for its first word by the MACs. So packets do not grow, each of them says all
//! there is to know, and the receiver needs no table of Services. An IPv4 address has no other first word; IPv6 pods of which the
//! first word differs from node to node are served without.

use keelway_layout::{Addr, CtKey, NodeConfig, Port, PrefixKey, Reason, identity, node_flags, scope, tunnel_flags};

use crate::count::{Account, count};
use crate::ct;
use crate::frame::Frame as _;
use crate::kernel::{Skb, Underlay, lpm_get, now};
use crate::maps::{NODE, TUNNELS};
use crate::parse::{self, Kind, Packet, TCP};
use crate::pod::endpoint;
use crate::policy::identity_of;
use crate::rewrite::{self, Side};
use crate::{deliver, service};

/// The bit of network ids that says that 16 bits of port follow.
const MARK: u32 = 1 << 16;

/// The word of pods' addresses that a frame does not carry.
#[inline(always)]
fn first_word(node: &NodeConfig, v4: bool) -> u32 {
    if v4 { 0 } else { node.pods_v6_word() }
}

/// Whether the flow of a client, new to a Service, is for the backend's node to answer.
#[inline(never)]
pub fn applies(tuple: &CtKey, backend: &Addr) -> bool {
    let Some(node) = NODE.get(0) else { return false };
    let flag = if tuple.proto == TCP { node_flags::DSR_TCP } else { node_flags::DSR_DATAGRAMS };
    if node.flags & flag == 0 || first_word(node, backend.is_v4()) != backend.as_words()[0] {
        return false;
    }
    // Pods' and nodes' answers have ways of their own, on which an address that is not the sender's is a lie.
    if identity_of(&tuple.src) != identity::WORLD {
        return false;
    }
    let who = identity_of(backend);
    (who == identity::UNKNOWN_POD || who >= identity::FIRST_POD) && is_taken_by_node_of(backend)
}

/// Whether packets can be handed on to the node that has this pod.
#[inline(never)]
pub fn is_taken_by_node_of(backend: &Addr) -> bool {
    NODE.get(0).is_some_and(|node| node.vxlan_ifindex != 0)
        && lpm_get(&TUNNELS, &PrefixKey::host(*backend)).is_some_and(|to| to.flags & tunnel_flags::DSR != 0)
}

/// What stands in place of the MACs.
#[inline(always)]
pub fn rest_of(backend: &Addr) -> [u32; 3] {
    let [_, rest @ ..] = backend.words();
    rest
}

/// The network id.
#[inline(always)]
pub fn id_of(port: Port) -> u32 {
    MARK | u32::from(port.get())
}

/// Sends a packet as it is to the node that has the backend.
#[inline(never)]
pub fn send(skb: Skb, node: &NodeConfig, backend: &Addr, port: Port) -> Result<i32, Reason> {
    let to = lpm_get(&TUNNELS, &PrefixKey::host(*backend)).ok_or(Reason::NoRoute)?;
    if node.vxlan_ifindex == 0 {
        return Err(Reason::NoRoute);
    }
    skb.store(0, &rest_of(backend))?;
    skb.set_tunnel(&to.remote, id_of(port))?;
    Ok(skb.redirect(node.vxlan_ifindex))
}

/// Whether a packet that is about to enter the tunnel was sent by [`send`]. Of what pods and the host send none has a tunnel yet.
#[inline(never)]
pub fn is_on_its_way(skb: Skb) -> bool {
    underlay(skb).id & MARK != 0
}

/// The outside of a tunnelled packet; without a tunnel an id that is nobody's. All of it has a value on every path: the compiler
/// else looks at what is there before it asks whether there is anything, which the verifier refuses.
#[inline(always)]
fn underlay(skb: Skb) -> Underlay {
    for v6 in [false, true] {
        if let Ok(found) = skb.tunnel(v6) {
            return found;
        }
    }
    Underlay { remote: Addr::UNSPECIFIED, id: 0 }
}

/// Takes what [`send`] sent, and nothing else: a packet out of the tunnel whose source is behind no node.
#[inline(never)]
pub fn arrive(skb: Skb, packet: &mut Packet, node: &NodeConfig, account: &mut Account) -> Result<i32, Reason> {
    let backend = backend(skb, node, packet)?;
    skb.set_for_this_host()?;
    let receiver = endpoint(&backend.0).ok_or(Reason::TunnelUnknown)?;
    account.endpoint = receiver.id;
    account.dialled = (packet.tuple.dst, packet.tuple.dport);
    if packet.kind == Kind::IcmpError {
        error(skb, packet, &backend, receiver.incarnation)?;
    }
    rewrite::packet(skb, packet, Side::Destination, backend.0, backend.1)?;
    count(account.hook, Reason::Translated, skb.len());
    if packet.kind == Kind::IcmpError {
        return deliver::hand_over(skb, receiver);
    }
    service::receive(skb, packet, receiver, now(), account)
}

/// The backend that the sender chose, which is to be a node; and the client has to be somebody outside.
#[inline(never)]
fn backend(skb: Skb, node: &NodeConfig, packet: &Packet) -> Result<(Addr, Port), Reason> {
    let tunnel = underlay(skb);
    let sender = lpm_get(&TUNNELS, &PrefixKey::host(tunnel.remote)).ok_or(Reason::TunnelSource)?;
    let client = &packet.tuple.src;
    if tunnel.id & MARK == 0 || sender.remote != tunnel.remote || identity_of(client) != identity::WORLD {
        return Err(Reason::TunnelSource);
    }
    if client.is_link_scoped() {
        return Err(Reason::LinkScoped);
    }
    let rest: [u32; 3] = skb.load(0)?;
    let addr = Addr::from_words([first_word(node, !packet.v6), rest[0], rest[1], rest[2]]);
    if addr.is_v4() == packet.v6 {
        return Err(Reason::Malformed);
    }
    Ok((addr, Port::new(tunnel.id as u16)))
}

/// An ICMP error about an answer of the backend's: what it carries is put into the backend's words, if that is an answer of its.
#[inline(never)]
fn error(skb: Skb, packet: &Packet, backend: &(Addr, Port), incarnation: u32) -> Result<(), Reason> {
    let carried = parse::inner(skb, packet)?;
    let answered = ct::draft(&carried.tuple, scope::IN)?;
    answered.key = CtKey { dst: backend.0, dport: backend.1, ..carried.tuple.reversed(scope::IN) };
    let flow = ct::find_drafted(answered, incarnation, now()).ok_or(Reason::IcmpUnrelated)?;
    if flow.dialled() != Some((carried.tuple.src, carried.tuple.sport)) {
        return Err(Reason::IcmpUnrelated);
    }
    rewrite::inner(skb, packet, carried, Side::Source, backend.0, backend.1)
}
