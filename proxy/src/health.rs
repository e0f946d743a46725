//! Who answers a load balancer's health checks: Services with `healthCheckNodePort`, counted as kube-proxy counts
//! (`LocalReadyEndpoints` in kubernetes/kubernetes, pkg/proxy/endpointschangetracker.go). And what its metrics count of Services
//! that have nobody here.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::endpoints::{candidates, categorise};
use crate::model::{EndpointSlice, ObjectName, Service, ServiceType, TrafficPolicy};
use crate::tracker::NodeInfo;

/// What a health check port says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// Which Service.
    pub service: ObjectName,
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Ready endpoints on this node, for checks over IPv4; `None` when the Service has no such family.
    pub ipv4: Option<usize>,
    /// The same over IPv6.
    pub ipv6: Option<usize>,
}

/// `None` for a Service without a health check: only load balancers with a Local external policy have one.
pub fn health_check(service: &Service, slices: &[EndpointSlice], node: &NodeInfo) -> Option<HealthCheck> {
    let checked = service.is_served()
        && service.service_type == ServiceType::LoadBalancer
        && service.external_traffic_policy == TrafficPolicy::Local
        && service.health_check_node_port != 0;
    let count = |ipv6| service.has_family(ipv6).then(|| local_ready(slices, node, ipv6));
    checked.then(|| HealthCheck {
        service: service.name.clone(),
        port: service.health_check_node_port,
        ipv4: count(false),
        ipv6: count(true),
    })
}

/// Addresses, not ports: a pod counts once. One that only terminates does not count, though it may serve.
fn local_ready(slices: &[EndpointSlice], node: &NodeInfo, ipv6: bool) -> usize {
    let mut found: BTreeSet<IpAddr> = BTreeSet::new();
    for slice in slices.iter().filter(|slice| slice.ports.iter().any(|port| port.port.is_some_and(|p| p != 0))) {
        let here = slice.endpoints.iter().filter(|e| e.ready && e.node_name.as_ref() == Some(&node.name));
        let addrs = here.filter_map(|e| e.addresses.first()).map(IpAddr::to_canonical);
        found.extend(addrs.filter(|addr| addr.is_ipv6() == ipv6));
    }
    found.len()
}

/// Ports of Services with a Local policy and no endpoint on this node, while other nodes have some: IPv4, then IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocal {
    /// By `internalTrafficPolicy`.
    pub internal: [usize; 2],
    /// By `externalTrafficPolicy`, of Services that can be reached from outside.
    pub external: [usize; 2],
}

impl NoLocal {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        let add = |a: [usize; 2], b: [usize; 2]| [a[0] + b[0], a[1] + b[1]];
        Self { internal: add(self.internal, other.internal), external: add(self.external, other.external) }
    }
}

/// As kube-proxy counts for `sync_proxy_rules_no_local_endpoints_total`.
pub fn no_local(service: &Service, slices: &[EndpointSlice], node: &NodeInfo) -> NoLocal {
    let mut found = NoLocal::default();
    let outside = matches!(service.service_type, ServiceType::NodePort | ServiceType::LoadBalancer)
        || !service.external_ips.is_empty();
    let internal = service.internal_traffic_policy == TrafficPolicy::Local;
    let external = service.external_traffic_policy == TrafficPolicy::Local && outside;
    if !service.is_served() || !(internal || external) {
        return found;
    }
    for ipv6 in [false, true].into_iter().filter(|ipv6| service.has_family(*ipv6)) {
        for port in &service.ports {
            let candidates = candidates(slices, &port.name, port.protocol, ipv6);
            let categories = categorise(&candidates, node);
            let missing = usize::from(categories.any && categories.local.is_empty());
            found.internal[usize::from(ipv6)] += if internal { missing } else { 0 };
            found.external[usize::from(ipv6)] += if external { missing } else { 0 };
        }
    }
    found
}
