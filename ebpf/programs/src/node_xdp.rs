//! The hook on the node's devices before the kernel has made anything of a packet (XDP): flows between the outside and Services'
//! backends elsewhere, which only turn round here.
//!
//! The choice, the tables and the rewriting are those of tc. All else, and what cannot be done here whole, goes on to tc as it
//! came: nothing of a packet is changed or counted before it is certain to leave. What the look-ups until then left in the
//! tables, tc finds, so that a flow may go by either.

use aya_ebpf::bindings::xdp_action::{XDP_PASS, XDP_TX};
use keelway_layout::{Addr, CtKey, NodeConfig, PrefixKey, Reason, node_flags, scope};

use crate::count::{Account, count};
use crate::ct::{self, Way};
use crate::frame::Frame;
use crate::kernel::{lpm_get, now};
use crate::lb::{self, Asked, Client, Outcome};
use crate::maps::{NODE, TUNNELS};
use crate::parse::{self, ETH_LEN, Kind, Packet, SCTP, TCP, UDP};
use crate::pod::endpoint;
use crate::rewrite::{self, Side};
use crate::service::{self, goes_by_tunnel};
use crate::vxlan::TUNNEL_ID;
use crate::xdp::{Macs, Xdp, way_back};
use crate::{dsr, encap, nat, node};

/// What is found out of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// It answers nobody that this node speaks for.
    New,
    /// It is for tc.
    Tc,
    /// It has its new destination, and turns round.
    Back,
    /// As above, for the tunnel, whose headers are ready.
    Through,
    /// It is as it came but for its MACs, which name the backend to the node that has it. The tunnel's headers are ready.
    HandedOn,
}

/// A packet from the network. Each step is called from here, where the stack has the room.
#[inline(always)]
pub fn ingress(frame: Xdp, packet: &mut Packet, account: &mut Account) -> Result<u32, Reason> {
    let Some(node) = NODE.get(0) else { return Ok(XDP_PASS) };
    let own = if packet.v6 { &node.node_v6 } else { &node.node_v4 };
    if own.is_unspecified() || !is_plain(frame, packet) {
        return Ok(XDP_PASS);
    }
    let mut macs = Macs::default();
    let mut found = Found::New;
    if packet.tuple.dst == *own {
        macs[0] = frame.load(0)?;
        if packet.tuple.proto == UDP && packet.tuple.dport == node.vxlan_port {
            let outside = open(frame, packet, node)?;
            if outside == 0 {
                return Ok(XDP_PASS);
            }
            found = answer(frame, packet, node, &mut macs)?;
            if found != Found::Back {
                frame.grow(outside)?;
                return Ok(XDP_PASS);
            }
        } else {
            found = answer(frame, packet, node, &mut macs)?;
        }
    }
    if found == Found::New {
        if endpoint(&packet.tuple.dst).is_some() {
            return Ok(XDP_PASS);
        }
        found = dialled(frame, packet, account, &mut macs)?;
        if matches!(found, Found::Back | Found::Through) {
            // From this node, so that the answer comes back to it.
            nat::outbound(frame, packet, node, *own, now())?;
        }
    }
    match found {
        Found::New | Found::Tc => return Ok(XDP_PASS),
        Found::Back => frame.store(0, &macs)?,
        Found::Through | Found::HandedOn => encap::wrap(frame)?,
    }
    Ok(XDP_TX)
}

/// Takes the tunnel's headers off a packet that may be a backend's answer to the node itself, and parses what is inside; the number
/// of their bytes. Of others they stay, or are put back: 0.
#[inline(never)]
fn open(frame: Xdp, packet: &mut Packet, node: &NodeConfig) -> Result<u32, Reason> {
    let bytes = encap::before_inner(frame, packet);
    let sender = packet.tuple.src;
    // Whether the frame may begin again where it does.
    if bytes == 0 || node.flags & node_flags::VXLAN == 0 || frame.grow(0).is_err() || frame.cut(bytes).is_err() {
        return Ok(0);
    }
    if parse::packet(frame, packet).is_ok() && is_sent_by(packet, &sender) && is_plain(frame, packet) {
        return Ok(bytes);
    }
    frame.grow(bytes).map(|()| 0)
}

/// Whether a packet's source is behind the node that sent it, as the tunnel's own hook wants it.
#[inline(always)]
fn is_sent_by(packet: &Packet, sender: &Addr) -> bool {
    lpm_get(&TUNNELS, &PrefixKey::host(packet.tuple.src)).is_some_and(|from| from.remote == *sender)
}

/// A packet that may be for a Service, to a backend elsewhere.
#[inline(never)]
fn dialled(frame: Xdp, packet: &mut Packet, account: &mut Account, macs: &mut Macs) -> Result<Found, Reason> {
    let node = NODE.get(0).ok_or(Reason::Helper)?;
    let mut asked = Asked::by(Client::Outside, 0);
    // Whom a Service refuses or drops is for tc to say.
    if lb::for_packet(packet, &mut asked, now()) != Ok(Outcome::Translated) {
        return Ok(Found::Tc);
    }
    let own = if packet.v6 { &node.node_v6 } else { &node.node_v4 };
    let (addr, port) = &asked.backend;
    let tunnels = packet.tuple.proto == UDP && *port == node.vxlan_port;
    if addr == own || tunnels || endpoint(addr).is_some() || node::genuine(node, packet).is_err() {
        return Ok(Found::Tc);
    }
    account.dialled = (packet.tuple.dst, packet.tuple.dport);
    if asked.dsr {
        if !encap::prepare(frame, packet, node, addr, dsr::id_of(*port)) {
            return Ok(Found::Tc);
        }
        service::hand_on(packet, &asked.backend, now(), account)?;
        count(account.hook, Reason::ToBackendsNode, frame.len());
        frame.store(0, &dsr::rest_of(&asked.backend.0))?;
        return Ok(Found::HandedOn);
    }
    let found = if goes_by_tunnel(node, addr) { Found::Through } else { Found::Back };
    let leaves = match found {
        Found::Through => encap::prepare(frame, packet, node, addr, TUNNEL_ID),
        _ => {
            macs[0] = frame.load(0)?;
            way_back(frame, packet, own, addr, macs)
        }
    };
    if !leaves {
        return Ok(Found::Tc);
    }
    service::exchange(frame, packet, &asked.backend, now(), account)?;
    Ok(found)
}

/// A backend's packet to the node, whose client is known: it leaves under the address that was dialled.
#[inline(never)]
fn answer(frame: Xdp, packet: &mut Packet, node: &NodeConfig, macs: &mut Macs) -> Result<Found, Reason> {
    let now = now();
    let Some(client) = nat::behind(packet, now) else { return Ok(Found::New) };
    let draft = ct::draft(&packet.tuple, scope::LB)?;
    draft.key = CtKey { dst: client.0, dport: client.1, ..packet.tuple }.reversed(scope::LB);
    // Without, it answers a pod that was masqueraded.
    let Some(flow) = ct::find_drafted(draft, 0, now) else { return Ok(Found::Tc) };
    let Some((addr, port)) = flow.dialled() else { return Ok(Found::Tc) };
    if goes_by_tunnel(node, &client.0) || !way_back(frame, packet, &addr, &client.0, macs) {
        return Ok(Found::Tc);
    }
    flow.touch(packet, Way::Reverse, now);
    rewrite::packet(frame, packet, Side::Destination, client.0, client.1)?;
    rewrite::packet(frame, packet, Side::Source, addr, port)?;
    Ok(Found::Back)
}

/// Whether it is a whole packet of a flow, without anything between its headers.
#[inline(never)]
fn is_plain(frame: Xdp, packet: &Packet) -> bool {
    const FRAGMENT: u16 = 0x3fff_u16.to_be();
    if packet.kind != Kind::Flow || !packet.has_l4 || !matches!(packet.tuple.proto, TCP | UDP | SCTP) {
        return false;
    }
    let (header, length_at) = if packet.v6 { (40, 4) } else { (20, 2) };
    let Ok(length) = frame.load::<u16>(ETH_LEN + length_at) else { return false };
    if packet.l4 != ETH_LEN + header {
        return false;
    }
    let length = u32::from(u16::from_be(length));
    if packet.v6 {
        return is_complete(frame, packet, length);
    }
    let Ok(fragment) = frame.load::<u16>(ETH_LEN + 6) else { return false };
    fragment & FRAGMENT == 0 && is_complete(frame, packet, length.wrapping_sub(header))
}

/// Whether the transport's checksum is whole. A sender on this machine leaves it to a device that the packet may never meet: the
/// field then holds the sum of the pseudo header (`CHECKSUM_PARTIAL`, include/linux/skbuff.h), SCTP's holds nothing, and only
/// the kernel's own packets say so. Of whole ones one in 65,536 looks the same.
#[inline(always)]
fn is_complete(frame: Xdp, packet: &Packet, length: u32) -> bool {
    let at = match packet.tuple.proto {
        TCP => 16,
        UDP => 6,
        _ => return frame.load::<u32>(packet.l4 + 8).is_ok_and(|checksum| checksum != 0),
    };
    let Ok(checksum) = frame.load::<u16>(packet.l4 + at) else { return false };
    let (src, dst) = (packet.tuple.src.as_words(), packet.tuple.dst.as_words());
    // What an IPv4 address has in front adds 0xffff, ones' complement's other zero.
    let mut sum = u64::from(length.to_be()) + u64::from(u32::from(packet.tuple.proto).to_be());
    let mut i = 0;
    while i < 4 {
        sum += u64::from(src[i]) + u64::from(dst[i]);
        i += 1;
    }
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    checksum != sum as u16
}
