//! The two hooks on the host's side of a pod's veth pair.

use aya_ebpf::bindings::TC_ACT_OK;
use keelway_layout::{Addr, Endpoint, NodeConfig, Port, PrefixKey, Reason, identity, node_flags, scope};

use crate::count::{Account, count};
use crate::ct::{self, Flow, Way};
use crate::frame::Frame as _;
use crate::kernel::{Skb, lpm_get, now};
use crate::lb::{self, Asked, Client, Outcome};
use crate::maps::{ENDPOINTS, NODE, TUNNELS};
use crate::parse::{self, FIN, Kind, Packet, RST, SCTP, TCP, UDP};
use crate::policy::{admit_known, admit_new, identity_of};
use crate::rewrite::{self, Side};
use crate::{deliver, refuse, service};

/// The local pod with this address.
#[inline(always)]
pub fn endpoint(addr: &Addr) -> Option<&'static Endpoint> {
    // SAFETY: an entry that is replaced meanwhile is read as the old or the new one, word by word.
    unsafe { ENDPOINTS.get(addr) }
}

/// A packet from a pod.
#[inline(always)]
pub fn ingress(skb: Skb, packet: &mut Packet, account: &mut Account) -> Result<i32, Reason> {
    let sender = endpoint(&packet.tuple.src).filter(|sender| sender.ifindex == skb.ifindex());
    let Some(sender) = sender else {
        let scoped = packet.tuple.src.is_link_scoped() || packet.tuple.src.is_unspecified();
        return Err(if scoped { Reason::LinkScoped } else { Reason::SpoofedSource });
    };
    account.endpoint = sender.id;
    let now = now();
    if packet.tuple.dst == itself(packet.v6) && packet.kind == Kind::Flow {
        return back_to_itself(skb, packet, sender, now);
    }
    if packet.tuple.dst.is_link_scoped() {
        return Err(Reason::LinkScoped);
    }
    let node = NODE.get(0).ok_or(Reason::Helper)?;
    let own = packet.tuple.src;
    if packet.kind == Kind::IcmpError && related(skb, packet, sender, now)? {
        if packet.tuple.src != own {
            return service::onward(skb, packet, node);
        }
    } else {
        let known = ct::find_for(&packet.tuple, scope::OUT, Way::Forward, sender, now);
        if let Some(flow) = known
            && !supersedes(packet, flow, now)?
        {
            admit_known(flow, scope::OUT, Way::Forward, sender, packet, now, account)?;
        } else if let Some(flow) = ct::find_for(&packet.tuple, scope::IN, Way::Reverse, sender, now) {
            admit_known(flow, scope::IN, Way::Reverse, sender, packet, now, account)?;
            if let Some((addr, port)) = flow.dialled() {
                if packet.flags & (FIN | RST) != 0 {
                    service::backend_ended(packet, now);
                }
                rewrite::packet(skb, packet, Side::Source, addr, port)?;
                return service::onward(skb, packet, node);
            }
        } else if let Some(verdict) = open(skb, packet, sender, node, now, account)? {
            return Ok(verdict);
        }
    }
    forward(skb, packet, node, now, account)
}

/// Whether a packet to a backend's own address begins a flow in place of one that a Service led there from the same port. Its answers
/// are to come from whom it dials; with two connections under way they could not be told apart.
#[inline(always)]
fn supersedes(packet: &Packet, flow: Flow, now: u64) -> Result<bool, Reason> {
    if flow.dialled().is_none() {
        return Ok(false);
    }
    match packet.tuple.proto {
        UDP => Ok(true),
        TCP | SCTP if !packet.opens() => Ok(false),
        proto if flow.is_over(proto, now) => Ok(true),
        TCP | SCTP => Err(Reason::NatExhausted),
        _ => Ok(false),
    }
}

/// The first packet of a flow, or one of a flow to a Service; a verdict when it ends here.
#[inline(always)]
fn open(
    skb: Skb,
    packet: &mut Packet,
    sender: &Endpoint,
    node: &NodeConfig,
    now: u64,
    account: &mut Account,
) -> Result<Option<i32>, Reason> {
    let mut dialled = (Addr::UNSPECIFIED, Port::NONE);
    let mut asked = Asked::by(Client::Pod, sender.incarnation);
    match lb::for_packet(packet, &mut asked, now)? {
        // Where a Service is not any more, or never was: the way out of the node would only lead back.
        Outcome::Other if service::is_nobodys(packet, Client::Pod) => return Err(Reason::NoEndpoint),
        Outcome::Other => {}
        Outcome::Refused => {
            count(account.hook, Reason::NoBackend, skb.len());
            return refuse::to_sender(skb, packet, sender).map(Some);
        }
        Outcome::Translated => {
            let backend = asked.backend;
            if backend.0 == packet.tuple.src {
                count(account.hook, Reason::Translated, skb.len());
                return to_itself(skb, packet, sender, &backend, now).map(Some);
            }
            dialled = (packet.tuple.dst, packet.tuple.dport);
            rewrite::packet(skb, packet, Side::Destination, backend.0, backend.1)?;
            count(account.hook, Reason::Translated, skb.len());
        }
    }
    if service::is_for_a_tunnel(packet, node) {
        return Err(Reason::TunnelFromPod);
    }
    match ct::find_for(&packet.tuple, scope::OUT, Way::Forward, sender, now) {
        Some(flow) if flow.dialled().unwrap_or_default() == dialled => {
            admit_known(flow, scope::OUT, Way::Forward, sender, packet, now, account)?;
        }
        // Nobody's, or one that is over and was dialled otherwise.
        _ => admit_new(scope::OUT, sender, packet, dialled, now, account)?,
    }
    Ok(None)
}

/// Whether an ICMP error that a pod sends is about a packet that it was sent; if that came by a Service from elsewhere, the error
/// is put into the words of who dialled it.
#[inline(never)]
fn related(skb: Skb, packet: &mut Packet, sender: &Endpoint, now: u64) -> Result<bool, Reason> {
    let received = parse::inner(skb, packet)?;
    // It goes to who sent that packet: no rule is asked about it, so that it may go to nobody else.
    if received.tuple.src != packet.tuple.dst {
        return Ok(false);
    }
    if let Some(flow) = ct::find_for(&received.tuple, scope::IN, Way::Forward, sender, now) {
        if let Some((addr, port)) = flow.dialled() {
            rewrite::inner(skb, packet, received, Side::Destination, addr, port)?;
            rewrite::packet(skb, packet, Side::Source, addr, Port::NONE)?;
        }
        return Ok(true);
    }
    Ok(ct::find_for(&received.tuple, scope::OUT, Way::Reverse, sender, now).is_some())
}

/// The address under which a pod meets itself.
#[inline(always)]
pub fn itself(v6: bool) -> Addr {
    if v6 { Addr::ITSELF_V6 } else { Addr::ITSELF_V4 }
}

/// A pod's Service flow for which it is the backend itself. Under its own address as source its stack would not take it.
#[inline(never)]
fn to_itself(
    skb: Skb,
    packet: &mut Packet,
    sender: &Endpoint,
    backend: &(Addr, Port),
    now: u64,
) -> Result<i32, Reason> {
    let dialled = (packet.tuple.dst, packet.tuple.dport);
    rewrite::packet(skb, packet, Side::Destination, backend.0, backend.1)?;
    let client = packet.tuple.sport;
    rewrite::packet(skb, packet, Side::Source, itself(packet.v6), client)?;
    match ct::find_for(&packet.tuple, scope::HAIRPIN, Way::Forward, sender, now) {
        Some(flow) if flow.dialled() == Some(dialled) => flow.touch(packet, Way::Forward, now),
        Some(flow) if packet.tuple.proto != UDP && !flow.is_over(packet.tuple.proto, now) => {
            return Err(Reason::Hairpin);
        }
        _ => ct::open_dialled(packet, scope::HAIRPIN, sender.incarnation, &dialled, now)?,
    }
    deliver::hand_over(skb, sender)
}

/// The answer to [`to_itself`].
#[inline(never)]
fn back_to_itself(skb: Skb, packet: &mut Packet, sender: &Endpoint, now: u64) -> Result<i32, Reason> {
    let flow = ct::find_for(&packet.tuple, scope::HAIRPIN, Way::Reverse, sender, now).ok_or(Reason::LinkScoped)?;
    let (addr, port) = flow.dialled().ok_or(Reason::Hairpin)?;
    flow.touch(packet, Way::Reverse, now);
    let (pod, client) = (packet.tuple.src, packet.tuple.dport);
    rewrite::packet(skb, packet, Side::Source, addr, port)?;
    rewrite::packet(skb, packet, Side::Destination, pod, client)?;
    deliver::hand_over(skb, sender)
}

/// On from a pod: to a pod here, into the tunnel, or to the host's stack.
#[inline(always)]
fn forward(skb: Skb, packet: &mut Packet, node: &NodeConfig, now: u64, account: &mut Account) -> Result<i32, Reason> {
    if let Some(receiver) = endpoint(&packet.tuple.dst) {
        deliver::admit(skb, packet, receiver, now, account)?;
        return deliver::hand_over(skb, receiver);
    }
    if node.flags & node_flags::VXLAN != 0 && lpm_get(&TUNNELS, &PrefixKey::host(packet.tuple.dst)).is_some() {
        // The tunnel device's own hook says which node: the host's packets need it too.
        return Ok(skb.redirect(node.vxlan_ifindex));
    }
    if node.flags & node_flags::VXLAN != 0 {
        // All other nodes' pods are behind the tunnel: what is left of the pod addresses is nobody's.
        let who = identity_of(&packet.tuple.dst);
        if who == identity::UNKNOWN_POD || who >= identity::FIRST_POD {
            return Err(Reason::NoEndpoint);
        }
    }
    Ok(TC_ACT_OK as i32)
}

/// A packet from the host's stack to a pod.
#[inline(always)]
pub fn egress(skb: Skb, packet: &mut Packet, account: &mut Account) -> Result<i32, Reason> {
    if packet.tuple.dst.is_link_scoped() {
        return Err(Reason::LinkScoped);
    }
    let receiver = endpoint(&packet.tuple.dst).filter(|receiver| receiver.ifindex == skb.ifindex());
    let receiver = receiver.ok_or(Reason::NoEndpoint)?;
    let now = now();
    if packet.tuple.proto == SCTP {
        account.dialled = service::dialled_by_host(packet, now);
    }
    deliver::admit(skb, packet, receiver, now, account)?;
    Ok(TC_ACT_OK as i32)
}
