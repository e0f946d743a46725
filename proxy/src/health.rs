//! Who answers a load balancer's health checks: Services with `healthCheckNodePort`, counted as kube-proxy counts
//! (`LocalReadyEndpoints` in kubernetes/kubernetes, pkg/proxy/endpointschangetracker.go).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

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
pub fn health_check(
    service: &Service,
    slices: &BTreeMap<ObjectName, EndpointSlice>,
    node: &NodeInfo,
) -> Option<HealthCheck> {
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
fn local_ready(slices: &BTreeMap<ObjectName, EndpointSlice>, node: &NodeInfo, ipv6: bool) -> usize {
    let mut found: BTreeSet<IpAddr> = BTreeSet::new();
    for slice in slices.values().filter(|slice| slice.ports.iter().any(|port| port.port.is_some_and(|p| p != 0))) {
        let here = slice.endpoints.iter().filter(|e| e.ready && e.node_name.as_ref() == Some(&node.name));
        let addrs = here.filter_map(|e| e.addresses.first()).map(IpAddr::to_canonical);
        found.extend(addrs.filter(|addr| addr.is_ipv6() == ipv6));
    }
    found.len()
}
