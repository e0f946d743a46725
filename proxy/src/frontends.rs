//! One Service and its slices turned into the frontends it is to have.

use std::collections::BTreeMap;

use crate::endpoints::{candidates, categorise};
use crate::model::{EndpointSlice, Service, ServicePort, TrafficPolicy};
use crate::op::{Backend, FrontendKey, flags};
use crate::tracker::NodeInfo;

/// Which address of a Service a frontend serves; when two Services claim the same one, the earlier kind wins, then the
/// earlier name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `spec.ports[].nodePort` on this node's addresses.
    NodePort,
}

/// What a frontend is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Where it comes from.
    pub kind: FrontendKind,
    /// Sorted, without duplicates.
    pub backends: Vec<Backend>,
    /// 0: none.
    pub affinity_seconds: u32,
    /// [`crate::flags`].
    pub flags: u32,
    /// Keep the backends that it has, in the kernel too, when `backends` is empty.
    pub keep_last: bool,
}

/// The frontends of a Service: none when no proxy of ours serves it.
///
/// For now those of its cluster IPs. The other [`FrontendKind`]s differ in the addresses and in the traffic policy that
/// picks from the same [`crate::endpoints::Categories`].
pub fn frontends(
    service: &Service,
    slices: &BTreeMap<crate::ObjectName, EndpointSlice>,
    node: &NodeInfo,
) -> BTreeMap<FrontendKey, Wanted> {
    let mut frontends = BTreeMap::new();
    if !service.is_served() {
        return frontends;
    }
    for addr in service.cluster_ips.iter().map(|addr| addr.to_canonical()) {
        for port in service.ports.iter().filter(|port| port.port != 0) {
            let wanted = cluster_ip(service, port, addr.is_ipv6(), slices, node);
            frontends.insert(FrontendKey::new(addr, port.port, port.protocol), wanted);
        }
        let any_port = Wanted {
            kind: FrontendKind::ClusterIp,
            backends: Vec::new(),
            affinity_seconds: 0,
            flags: flags::ANY_PORT,
            keep_last: false,
        };
        frontends.insert(FrontendKey::any_port(addr), any_port);
    }
    frontends
}

fn cluster_ip(
    service: &Service,
    port: &ServicePort,
    ipv6: bool,
    slices: &BTreeMap<crate::ObjectName, EndpointSlice>,
    node: &NodeInfo,
) -> Wanted {
    let candidates = candidates(slices.values(), &port.name, port.protocol, ipv6);
    let categories = categorise(&candidates, node);
    let chosen = match service.internal_traffic_policy {
        TrafficPolicy::Cluster => categories.cluster,
        TrafficPolicy::Local => categories.local,
    };
    let drop = chosen.is_empty() && categories.any;
    let proto = port.protocol.number();
    Wanted {
        kind: FrontendKind::ClusterIp,
        backends: chosen.iter().map(|c| Backend { addr: c.addr, port: c.port, proto }).collect(),
        affinity_seconds: service.affinity_seconds.unwrap_or(0),
        flags: if drop { flags::DROP_WHEN_EMPTY } else { 0 },
        keep_last: is_api_server(service),
    }
}

/// The Service through which pods and this agent reach the API server. Were it to lose its last backend while the API is
/// away, nothing could tell us of the next one.
fn is_api_server(service: &Service) -> bool {
    service.name.namespace == "default" && service.name.name == "kubernetes"
}
