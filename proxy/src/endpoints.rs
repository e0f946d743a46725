//! Which endpoints of a Service serve a frontend: readiness, termination, traffic policy and topology hints, by
//! kube-proxy's rules (`CategorizeEndpoints` in kubernetes/kubernetes, pkg/proxy/topology.go).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::IpAddr;

use crate::model::{EndpointSlice, Protocol, SliceEndpoint};
use crate::tracker::NodeInfo;

/// An endpoint of one Service port.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Where it listens.
    pub addr: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its conditions and hints.
    pub endpoint: &'a SliceEndpoint,
}

impl Candidate<'_> {
    /// Takes new connections in any case.
    fn ready(&self) -> bool {
        self.endpoint.ready
    }

    /// On its way out but still answering: used when nothing is ready.
    fn last_resort(&self) -> bool {
        !self.endpoint.ready && self.endpoint.serving && self.endpoint.terminating
    }

    fn is_on(&self, node: &NodeInfo) -> bool {
        self.endpoint.node_name.as_deref() == Some(node.name.as_str())
    }
}

/// The endpoints that a Service port has in all of its slices, by address and port; `ipv6` picks the family.
///
/// One address can be told of twice: by two slices, while an endpoint moves from one to the other, or of two pods, the one of which has
/// the address of another that terminates. What terminates takes no record's place, what does not takes it, in the order of the slices'
/// names (kube-proxy's `addEndpoints` in pkg/proxy/endpointslicecache.go, where slices come in any order).
pub fn candidates<'a>(
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    port_name: &str,
    protocol: Protocol,
    ipv6: bool,
) -> Vec<Candidate<'a>> {
    let mut found: BTreeMap<(IpAddr, u16), Candidate<'a>> = BTreeMap::new();
    for slice in slices {
        let ports = slice.ports.iter().filter(|p| p.name == port_name && p.protocol == protocol);
        for port in ports.filter_map(|p| p.port).filter(|port| *port != 0) {
            for endpoint in &slice.endpoints {
                let Some(addr) = endpoint.addresses.first().map(IpAddr::to_canonical) else { continue };
                if addr.is_ipv6() != ipv6 {
                    continue;
                }
                let candidate = Candidate { addr, port, endpoint };
                match found.entry((addr, port)) {
                    Entry::Occupied(_) if endpoint.terminating => {}
                    place => _ = place.insert_entry(candidate),
                }
            }
        }
    }
    found.into_values().collect()
}

/// The sets that a Service port's frontends choose from.
#[derive(Clone, Debug, Default)]
pub struct Categories<'a> {
    /// For the Cluster traffic policy.
    pub cluster: Vec<Candidate<'a>>,
    /// For the Local traffic policy.
    pub local: Vec<Candidate<'a>>,
    /// Whether any node has an endpoint that could serve: with none here, Local drops instead of refusing.
    pub any: bool,
}

/// Sorts endpoints into [`Categories`].
pub fn categorise<'a>(candidates: &[Candidate<'a>], node: &NodeInfo) -> Categories<'a> {
    let pick = |want: &dyn Fn(&Candidate<'a>) -> bool| -> Vec<Candidate<'a>> {
        candidates.iter().copied().filter(|c| want(c)).collect()
    };
    let topology = topology(candidates, node);
    let mut cluster = pick(&|c| c.ready() && topology.admits(c, node));
    if cluster.is_empty() {
        cluster = pick(&Candidate::last_resort);
    }
    let mut local = pick(&|c| c.ready() && c.is_on(node));
    if local.is_empty() {
        local = pick(&|c| c.last_resort() && c.is_on(node));
    }
    Categories { cluster, local, any: candidates.iter().any(|c| c.ready() || c.last_resort()) }
}

/// How far hints narrow the Cluster policy down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Everywhere,
    SameNode,
    SameZone,
}

impl Topology {
    fn admits(self, candidate: &Candidate<'_>, node: &NodeInfo) -> bool {
        match self {
            Self::Everywhere => true,
            Self::SameNode => candidate.endpoint.node_hints.contains(&node.name),
            Self::SameZone => node.zone.as_ref().is_some_and(|zone| candidate.endpoint.zone_hints.contains(zone)),
        }
    }
}

/// Hints count only when every ready endpoint has one and one of them is for this node (or zone), so that a half-written
/// set of hints or a node without endpoints never loses a Service.
fn topology(candidates: &[Candidate<'_>], node: &NodeInfo) -> Topology {
    let ready = || candidates.iter().filter(|c| c.ready());
    let usable = |topology: Topology, hinted: &dyn Fn(&SliceEndpoint) -> bool| {
        ready().all(|c| hinted(c.endpoint)) && ready().any(|c| topology.admits(c, node))
    };
    if usable(Topology::SameNode, &|e| !e.node_hints.is_empty()) {
        Topology::SameNode
    } else if usable(Topology::SameZone, &|e| !e.zone_hints.is_empty()) {
        Topology::SameZone
    } else {
        Topology::Everywhere
    }
}
