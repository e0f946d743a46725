//! The executable specification: what a packet to some address should meet, straight from the objects.
//!
//! It shares nothing with the code that builds tables, and prefers plain words to speed.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::{EndpointSlice, Service, ServicePort, SliceEndpoint, TrafficPolicy};
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

/// What a packet should meet on this node. `keep_last` has no place here: it depends on the past.
pub fn verdict(node: &NodeInfo, services: &[Service], slices: &[EndpointSlice], packet: &Packet) -> Verdict {
    // Dialling the unspecified address is dialling oneself.
    let addr = match packet.addr.to_canonical() {
        IpAddr::V4(addr) if addr.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(addr) if addr.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        addr => addr,
    };
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
                return restricted(node, service, port, slices, packet, dialled, ipv6);
            }
        }
    }

    let own: Vec<bool> = node.addresses.iter().filter(|(own, _)| *own == addr).map(|(_, only)| *only).collect();
    if !own.is_empty() {
        if own.iter().all(|host_only| *host_only) && packet.place != Place::Host {
            return Verdict::NotAService;
        }
        let is_port =
            |p: &&ServicePort| p.node_port == packet.port && p.node_port != 0 && p.protocol.number() == packet.proto;
        for service in &owners {
            if let Some(port) = service.ports.iter().rev().find(is_port) {
                return restricted(node, service, port, slices, packet, Dialled::NodePort, ipv6);
            }
        }
        return Verdict::NotAService;
    }
    let refuse = takeable && owners.iter().any(|s| s.cluster_ips.contains(&addr));
    if refuse { Verdict::Refuse } else { Verdict::NotAService }
}

/// Source ranges, before anything else.
fn restricted(
    node: &NodeInfo,
    service: &Service,
    port: &ServicePort,
    slices: &[EndpointSlice],
    packet: &Packet,
    dialled: Dialled,
    ipv6: bool,
) -> Verdict {
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
    let local = match dialled {
        Dialled::ClusterIp => service.internal_traffic_policy == TrafficPolicy::Local,
        _ => service.external_traffic_policy == TrafficPolicy::Local && packet.place == Place::Outside,
    };
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

/// The endpoints that serve, and whether any node has some that could.
fn choose(
    node: &NodeInfo,
    service: &Service,
    port: &ServicePort,
    slices: &[EndpointSlice],
    local: bool,
    ipv6: bool,
) -> (Option<BTreeSet<Backend>>, bool) {
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
    // The same backend told of twice: the record that says ready counts, then one that says terminating but serving,
    // else the first.
    let leaving = |e: &SliceEndpoint| !e.ready && e.serving && e.terminating;
    let backends: BTreeSet<Backend> = all.iter().map(|(backend, _)| *backend).collect();
    let known: Vec<(Backend, &SliceEndpoint)> = backends
        .into_iter()
        .filter_map(|backend| {
            let records: Vec<&SliceEndpoint> = all.iter().filter(|(b, _)| *b == backend).map(|(_, e)| *e).collect();
            let best = records.iter().find(|e| e.ready).or_else(|| records.iter().find(|e| leaving(e)));
            Some((backend, *best.or(records.first())?))
        })
        .collect();

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
