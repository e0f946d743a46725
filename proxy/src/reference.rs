//! The executable specification: what a packet to some address should meet, straight from the objects.
//!
//! It shares nothing with the code that builds tables, and prefers plain words to speed.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::model::{EndpointSlice, Service, ServicePort, SliceEndpoint, TrafficPolicy};
use crate::op::Backend;
use crate::simulated::Verdict;
use crate::tracker::NodeInfo;

/// What a packet that starts on this node should meet. `keep_last` has no place here: it depends on the past.
pub fn verdict(
    node: &NodeInfo,
    services: &[Service],
    slices: &[EndpointSlice],
    addr: IpAddr,
    port: u16,
    proto: u8,
) -> Verdict {
    let mut owners: Vec<&Service> =
        services.iter().filter(|s| s.is_served() && s.cluster_ips.contains(&addr)).collect();
    owners.sort_by_key(|s| s.name.clone());
    if owners.is_empty() {
        return Verdict::NotAService;
    }
    for service in owners {
        // Kubernetes allows one port entry per port and protocol; the last one counts should there be more.
        let entry = service.ports.iter().rev().find(|p| p.port == port && p.protocol.number() == proto && port != 0);
        if let Some(entry) = entry {
            return service_port(node, service, entry, slices, addr.is_ipv6());
        }
    }
    Verdict::Refuse
}

fn service_port(
    node: &NodeInfo,
    service: &Service,
    port: &ServicePort,
    slices: &[EndpointSlice],
    ipv6: bool,
) -> Verdict {
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
    let chosen = match service.internal_traffic_policy {
        TrafficPolicy::Local => first_not_empty(vec![pick(&|e| e.ready && here(e)), pick(&|e| leaving(e) && here(e))]),
        TrafficPolicy::Cluster => {
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
    match chosen {
        Some(backends) => Verdict::Backends(backends),
        None if somewhere => Verdict::Drop,
        None => Verdict::Refuse,
    }
}
