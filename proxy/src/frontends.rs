//! One Service and its slices turned into the frontends it is to have.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::endpoints::{Candidate, candidates, categorise};
use crate::model::{EndpointSlice, LoadBalancing, ObjectName, Protocol, Service, ServicePort, TrafficPolicy};
use crate::op::{Backend, FrontendKey, flags};
use crate::tracker::NodeInfo;

/// Which address of a Service a frontend serves; when two Services claim the same one, the earlier kind wins, then the
/// earlier name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FrontendKind {
    /// Not a Service's: an address of this node, where node ports answer.
    NodeAddress,
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `spec.ports[].nodePort`.
    NodePort,
}

/// Backends, sorted, without duplicates. Frontends of one Service port share them.
pub type Backends = Arc<[Backend]>;

/// What some of a frontend's clients get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// To choose from.
    pub backends: Backends,
    /// [`crate::flags`].
    pub flags: u32,
}

/// The frontends that lead a client to one backend, by ClientIP affinity: those of a Service port in a family, as in kube-proxy,
/// whichever of its addresses is dialled.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AffinityGroup {
    service: ObjectName,
    port: String,
    protocol: Protocol,
    ipv6: bool,
}

/// What a frontend is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Where it comes from.
    pub kind: FrontendKind,
    /// For every client, or with `outside` for the cluster's own.
    pub anyone: Choice,
    /// For clients outside of the cluster, where they get something else.
    pub outside: Option<Choice>,
    /// Endpoints that keep what they have when they are not chosen any more: all that the slices still have; for datagrams, of which
    /// none says that a flow has ended, those that serve.
    pub known: Backends,
    /// 0: none.
    pub affinity_seconds: u32,
    /// With affinity.
    pub affinity_group: Option<Arc<AffinityGroup>>,
    /// Who may, with [`flags::SOURCE_RANGES`]; sorted.
    pub source_ranges: Arc<[IpNet]>,
    /// Keep the backends that it has, in the kernel too, when there are none.
    pub keep_last: bool,
}

impl Wanted {
    /// An entry of flags only.
    fn bare(kind: FrontendKind, flags: u32) -> Self {
        let none: Backends = Arc::new([]);
        Self {
            kind,
            anyone: Choice { backends: none.clone(), flags },
            outside: None,
            known: none,
            affinity_seconds: 0,
            affinity_group: None,
            source_ranges: Arc::new([]),
            keep_last: false,
        }
    }
}

/// The frontends of a Service, by their keys for [`crate::Origin::Anyone`]: none when no proxy of ours serves it.
pub fn frontends(service: &Service, slices: &[EndpointSlice], node: &NodeInfo) -> BTreeMap<FrontendKey, Wanted> {
    let mut frontends = BTreeMap::new();
    if !service.is_served() {
        return frontends;
    }
    for ipv6 in [false, true].into_iter().filter(|ipv6| service.has_family(*ipv6)) {
        let ports = service.ports.iter().map(|port| Port::new(service, port, ipv6, slices, node));
        let ports: Vec<Port<'_>> = ports.collect();
        let ranges = source_ranges(service, ipv6, node);
        let kinds = [
            (FrontendKind::ClusterIp, &service.cluster_ips),
            (FrontendKind::LoadBalancer, &service.load_balancer_ips),
            (FrontendKind::ExternalIp, &service.external_ips),
        ];
        for (kind, addrs) in kinds {
            // The last of two equal ports counts, the first of two kinds.
            let mut found = BTreeMap::new();
            for addr in of_family(addrs, ipv6) {
                for port in ports.iter().filter(|port| port.port.port != 0) {
                    let key = FrontendKey::new(addr, port.port.port, port.port.protocol);
                    found.insert(key, port.wanted(kind, ranges.as_ref()));
                }
            }
            found.into_iter().for_each(|(key, wanted)| _ = frontends.entry(key).or_insert(wanted));
        }
        for port in ports.iter().filter(|port| port.port.node_port != 0) {
            let key = FrontendKey::node_port(ipv6, port.port.node_port, port.port.protocol);
            frontends.insert(key, port.wanted(FrontendKind::NodePort, None));
        }
        for addr in of_family(&service.cluster_ips, ipv6) {
            let refused = Wanted::bare(FrontendKind::ClusterIp, flags::ANY_PORT);
            frontends.insert(FrontendKey::any_port(addr), refused);
        }
    }
    frontends
}

/// The entries that make node ports answer on this node's addresses.
pub fn node_addresses(node: &NodeInfo) -> BTreeMap<FrontendKey, Wanted> {
    let mut found = BTreeMap::new();
    for (addr, host_only) in &node.addresses {
        let only = if *host_only { flags::HOST_ONLY } else { 0 };
        let entry = Wanted::bare(FrontendKind::NodeAddress, flags::NODE_ADDRESS | only);
        // An address that is given both ways is for all.
        match found.entry(FrontendKey::any_port(*addr)) {
            std::collections::btree_map::Entry::Occupied(_) if *host_only => {}
            place => _ = place.insert_entry(entry),
        }
    }
    found
}

/// Addresses that mean the dialling host itself, or many, are nobody's to take.
fn of_family(addrs: &[IpAddr], ipv6: bool) -> impl Iterator<Item = IpAddr> {
    let addrs = addrs.iter().map(|addr| addr.to_canonical()).filter(move |addr| addr.is_ipv6() == ipv6);
    addrs.filter(|addr| !addr.is_unspecified() && !addr.is_loopback() && !addr.is_multicast())
}

/// Who may use the load balancer's addresses of a family; `None`: everybody. Ranges of the other family only leave nobody.
///
/// When this node's address is in a range, so are the balancer's addresses themselves: with one of them on its loopback
/// device the node dials from it (kube-proxy's rule).
fn source_ranges(service: &Service, ipv6: bool, node: &NodeInfo) -> Option<Arc<[IpNet]>> {
    let given = service.source_ranges.as_ref()?;
    let mut ranges: BTreeSet<IpNet> =
        given.iter().filter(|net| net.addr().is_ipv6() == ipv6).map(IpNet::trunc).collect();
    if ranges.iter().any(|net| net.prefix_len() == 0) {
        return None;
    }
    let own = |net: &IpNet| node.ips.iter().any(|addr| net.contains(addr));
    if ranges.iter().any(own) {
        ranges.extend(of_family(&service.load_balancer_ips, ipv6).map(IpNet::from));
    }
    Some(ranges.into_iter().collect())
}

/// A Service port in one family, and what its frontends choose from.
struct Port<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    cluster: Backends,
    local: Backends,
    known: Backends,
    affinity_group: Option<Arc<AffinityGroup>>,
    /// Some node has an endpoint that could serve.
    any: bool,
}

impl<'a> Port<'a> {
    fn new(service: &'a Service, port: &'a ServicePort, ipv6: bool, slices: &[EndpointSlice], node: &NodeInfo) -> Self {
        let candidates = candidates(slices, &port.name, port.protocol, ipv6);
        let categories = categorise(&candidates, node);
        let backends = |chosen: &[Candidate<'_>]| -> Backends {
            let proto = port.protocol.number();
            chosen.iter().map(|c| Backend { addr: c.addr, port: c.port, proto }).collect()
        };
        let cluster = backends(&categories.cluster);
        let mut known = candidates;
        if port.protocol == Protocol::Udp {
            known.retain(|candidate| candidate.endpoint.serving);
        }
        let known = backends(&known);
        let known = if known == cluster { cluster.clone() } else { known };
        let group =
            || AffinityGroup { service: service.name.clone(), port: port.name.clone(), protocol: port.protocol, ipv6 };
        let affinity_group = service.affinity_seconds.filter(|seconds| *seconds > 0).map(|_| Arc::new(group()));
        let local = backends(&categories.local);
        Self { service, port, cluster, local, known, affinity_group, any: categories.any }
    }

    fn choice(&self, policy: TrafficPolicy) -> Choice {
        let backends = match policy {
            TrafficPolicy::Cluster => &self.cluster,
            TrafficPolicy::Local => &self.local,
        };
        let drop = backends.is_empty() && self.any;
        Choice { backends: backends.clone(), flags: if drop { flags::DROP_WHEN_EMPTY } else { 0 } }
    }

    /// `ranges`: of the load balancer's addresses.
    fn wanted(&self, kind: FrontendKind, ranges: Option<&Arc<[IpNet]>>) -> Wanted {
        let service = self.service;
        let external = kind != FrontendKind::ClusterIp;
        // The cluster's own clients go where a load balancer would have sent them, had they gone out to it.
        let policy = if external { TrafficPolicy::Cluster } else { service.internal_traffic_policy };
        let mut anyone = self.choice(policy);
        let mut outside = None;
        if external && service.external_traffic_policy == TrafficPolicy::Local {
            anyone.flags |= flags::OUTSIDE_DIFFERS;
            let local = self.choice(TrafficPolicy::Local);
            outside = Some(Choice { flags: local.flags | flags::KEEP_SOURCE, ..local });
        }
        let mut both = if kind == FrontendKind::NodePort { flags::NODE_PORT } else { 0 };
        let ranges = ranges.filter(|_| kind == FrontendKind::LoadBalancer);
        if ranges.is_some() {
            both |= flags::SOURCE_RANGES;
        }
        anyone.flags |= both;
        if let Some(outside) = &mut outside {
            outside.flags |= both;
        }
        if external && service.load_balancing == LoadBalancing::Maglev {
            // What other nodes must agree on is where packets from outside go.
            outside.as_mut().unwrap_or(&mut anyone).flags |= flags::HASHED;
        }
        Wanted {
            kind,
            anyone,
            outside,
            known: self.known.clone(),
            affinity_seconds: service.affinity_seconds.unwrap_or(0),
            affinity_group: self.affinity_group.clone(),
            source_ranges: ranges.cloned().unwrap_or_else(|| Arc::new([])),
            keep_last: kind == FrontendKind::ClusterIp && is_api_server(service),
        }
    }
}

/// The Service through which pods and this agent reach the API server. Were it to lose its last backend while the API is
/// away, nothing could tell us of the next one.
fn is_api_server(service: &Service) -> bool {
    service.name.namespace == "default" && service.name.name == "kubernetes"
}
