//! The executable specification: what a packet to some address should meet, straight from the objects.
//!
//! It shares nothing with the code that builds tables, and prefers plain words to speed.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::{EndpointSlice, ObjectName, Service, ServicePort, SliceEndpoint, TrafficPolicy};
use crate::op::Backend;
use crate::simulated::{Forward, Packet, Place, Verdict};
use crate::tracker::NodeInfo;

/// By what kind of address a Service was dialled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dialled {
    ClusterIp,
    LoadBalancerIp,
    ExternalIp,
    NodePort,
}

/// Whose an address and port is.
enum Owner<'a> {
    Port(&'a Service, &'a ServicePort, Dialled),
    /// Another port of a Service's address.
    OtherPort,
    Nobody,
}

/// What a packet should meet on this node. `keep_last` has no place here: it depends on the past.
pub fn verdict(node: &NodeInfo, services: &[Service], slices: &[EndpointSlice], packet: &Packet) -> Verdict {
    match owner(node, services, packet) {
        Owner::Port(service, port, dialled) => restricted(node, service, port, slices, packet, dialled),
        Owner::OtherPort => Verdict::Refuse,
        Owner::Nobody => Verdict::NotAService,
    }
}

/// Whether a datagram flow stays with the backend that it has: while new ones may have it, and while a slice of that very Service
/// port has it serving, whatever policies, hints and source ranges say. (`CleanStaleEntries` in kubernetes/kubernetes,
/// pkg/proxy/conntrack/cleanup.go.)
pub fn keeps(
    node: &NodeInfo,
    services: &[Service],
    slices: &[EndpointSlice],
    packet: &Packet,
    backend: &Backend,
) -> bool {
    let Owner::Port(service, port, dialled) = owner(node, services, packet) else { return false };
    let ipv6 = destination(packet).is_ipv6();
    let known = known(service, port, slices, ipv6);
    let (chosen, _) = choose(node, service, port, slices, is_local(service, packet, dialled), ipv6);
    known.iter().any(|(known, endpoint)| known == backend && endpoint.serving)
        || chosen.is_some_and(|chosen| chosen.contains(backend))
}

/// Whether the traffic policy for such a packet looks at this node only.
fn is_local(service: &Service, packet: &Packet, dialled: Dialled) -> bool {
    match dialled {
        Dialled::ClusterIp => service.internal_traffic_policy == TrafficPolicy::Local,
        _ => service.external_traffic_policy == TrafficPolicy::Local && packet.place == Place::Outside,
    }
}

/// Which Service port a packet dials.
pub fn service_port(node: &NodeInfo, services: &[Service], packet: &Packet) -> Option<(ObjectName, String)> {
    match owner(node, services, packet) {
        Owner::Port(service, port, _) => Some((service.name.clone(), port.name.clone())),
        _ => None,
    }
}

fn owner<'a>(node: &NodeInfo, services: &'a [Service], packet: &Packet) -> Owner<'a> {
    let addr = destination(packet);
    let ipv6 = addr.is_ipv6();
    let in_family = |s: &&Service| s.cluster_ips.iter().any(|ip| ip.is_ipv6() == ipv6);
    let mut owners: Vec<&Service> = services.iter().filter(|s| s.is_served()).filter(in_family).collect();
    owners.sort_by_key(|s| s.name.clone());
    let takeable = !addr.is_loopback() && !addr.is_multicast();

    // Kubernetes allows one entry per port and protocol; the last one counts should there be more.
    let is_port = |p: &&ServicePort| p.port == packet.port && p.port != 0 && p.protocol.number() == packet.proto;
    for dialled in [Dialled::ClusterIp, Dialled::LoadBalancerIp, Dialled::ExternalIp] {
        let has = |s: &&&Service| match dialled {
            Dialled::LoadBalancerIp => s.load_balancer_ips.contains(&addr),
            Dialled::ExternalIp => s.external_ips.contains(&addr),
            _ => s.cluster_ips.contains(&addr),
        };
        for service in owners.iter().filter(|_| takeable).filter(has) {
            if let Some(port) = service.ports.iter().rev().find(is_port) {
                return Owner::Port(service, port, dialled);
            }
        }
    }

    let own: Vec<bool> = node.addresses.iter().filter(|(own, _)| *own == addr).map(|(_, only)| *only).collect();
    if !own.is_empty() {
        if own.iter().all(|host_only| *host_only) && packet.place != Place::Host {
            return Owner::Nobody;
        }
        let is_port =
            |p: &&ServicePort| p.node_port == packet.port && p.node_port != 0 && p.protocol.number() == packet.proto;
        for service in &owners {
            if let Some(port) = service.ports.iter().rev().find(is_port) {
                return Owner::Port(service, port, Dialled::NodePort);
            }
        }
        return Owner::Nobody;
    }
    let refuse = takeable && owners.iter().any(|s| s.cluster_ips.contains(&addr));
    if refuse { Owner::OtherPort } else { Owner::Nobody }
}

/// Dialling the unspecified address is dialling oneself.
fn destination(packet: &Packet) -> IpAddr {
    match packet.addr.to_canonical() {
        IpAddr::V4(addr) if addr.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(addr) if addr.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        addr => addr,
    }
}

/// Source ranges, before anything else.
fn restricted(
    node: &NodeInfo,
    service: &Service,
    port: &ServicePort,
    slices: &[EndpointSlice],
    packet: &Packet,
    dialled: Dialled,
) -> Verdict {
    let ipv6 = destination(packet).is_ipv6();
    if let (Dialled::LoadBalancerIp, Some(ranges)) = (dialled, &service.source_ranges) {
        let listed = ranges.iter().any(|range| range.contains(&packet.client));
        // A node that holds the balancer's address itself dials from it.
        let node_listed =
            node.ips.iter().any(|own| own.is_ipv6() == ipv6 && ranges.iter().any(|range| range.contains(own)));
        let is_balancer = service.load_balancer_ips.contains(&packet.client) && !packet.client.is_loopback();
        let admitted = listed || (node_listed && is_balancer);
        if !admitted {
            return Verdict::Forbidden;
        }
    }
    let local = is_local(service, packet, dialled);
    let (chosen, somewhere) = choose(node, service, port, slices, local, ipv6);
    match chosen {
        Some(backends) => Verdict::Forward(Forward {
            backends,
            affinity_seconds: service.affinity_seconds.unwrap_or(0),
            keep_source: local && dialled != Dialled::ClusterIp,
        }),
        None if somewhere => Verdict::Drop,
        None => Verdict::Refuse,
    }
}

/// The endpoints that slices have for a Service port, in whatever condition.
fn known<'a>(
    service: &Service,
    port: &ServicePort,
    slices: &'a [EndpointSlice],
    ipv6: bool,
) -> Vec<(Backend, &'a SliceEndpoint)> {
    let ours = |s: &&EndpointSlice| s.name.namespace == service.name.namespace && s.service == service.name.name;
    let mut all: Vec<(Backend, &SliceEndpoint)> = Vec::new();
    let mut slices: Vec<&EndpointSlice> = slices.iter().filter(ours).collect();
    slices.sort_by_key(|s| s.name.clone());
    for slice in slices {
        for slice_port in &slice.ports {
            let Some(number) = slice_port.port else { continue };
            if slice_port.name != port.name || slice_port.protocol != port.protocol || number == 0 {
                continue;
            }
            for endpoint in &slice.endpoints {
                if let Some(addr) = endpoint.addresses.first()
                    && addr.is_ipv6() == ipv6
                {
                    all.push((Backend { addr: *addr, port: number, proto: port.protocol.number() }, endpoint));
                }
            }
        }
    }
    // The same backend told of twice: the last record of one that does not terminate counts, else the first.
    let backends: BTreeSet<Backend> = all.iter().map(|(backend, _)| *backend).collect();
    let records = |backend| {
        let records: Vec<&SliceEndpoint> = all.iter().filter(|(b, _)| *b == backend).map(|(_, e)| *e).collect();
        let stays = records.iter().rev().find(|e| !e.terminating);
        Some((backend, *stays.or(records.first())?))
    };
    backends.into_iter().filter_map(records).collect()
}

/// On its way out, and still answering.
fn leaving(endpoint: &SliceEndpoint) -> bool {
    !endpoint.ready && endpoint.serving && endpoint.terminating
}

/// The endpoints that serve, and whether any node has some that could.
fn choose(
    node: &NodeInfo,
    service: &Service,
    port: &ServicePort,
    slices: &[EndpointSlice],
    local: bool,
    ipv6: bool,
) -> (Option<BTreeSet<Backend>>, bool) {
    let known = known(service, port, slices, ipv6);
    let here = |e: &SliceEndpoint| e.node_name.as_ref() == Some(&node.name);
    let for_node = |e: &SliceEndpoint| e.node_hints.contains(&node.name);
    let for_zone = |e: &SliceEndpoint| node.zone.as_ref().is_some_and(|zone| e.zone_hints.contains(zone));
    let pick = |want: &dyn Fn(&SliceEndpoint) -> bool| -> BTreeSet<Backend> {
        known.iter().filter(|(_, e)| want(e)).map(|(b, _)| *b).collect()
    };
    let first_not_empty = |sets: Vec<BTreeSet<Backend>>| sets.into_iter().find(|s| !s.is_empty());
    let chosen = match local {
        true => first_not_empty(vec![pick(&|e| e.ready && here(e)), pick(&|e| leaving(e) && here(e))]),
        false => {
            let ready: Vec<&SliceEndpoint> = known.iter().map(|(_, e)| *e).filter(|e| e.ready).collect();
            let by_node = ready.iter().all(|e| !e.node_hints.is_empty());
            let by_zone = ready.iter().all(|e| !e.zone_hints.is_empty());
            first_not_empty(vec![
                if by_node { pick(&|e| e.ready && for_node(e)) } else { BTreeSet::new() },
                if by_zone { pick(&|e| e.ready && for_zone(e)) } else { BTreeSet::new() },
                pick(&|e| e.ready),
                pick(&leaving),
            ])
        }
    };
    let somewhere = known.iter().any(|(_, e)| e.ready || leaving(e));
    (chosen, somewhere)
}
