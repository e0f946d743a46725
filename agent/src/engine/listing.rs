//! What Services are programmed as, for people to look at.

use std::collections::BTreeMap;
use std::net::IpAddr;

use keelway_maps::Table as _;
use keelway_proxy as proxy;
use keelway_proxy::model::{ObjectName, TrafficPolicy};

use super::Engine;
use super::services::Services;

/// A frontend of a Service.
#[derive(Clone, Debug)]
pub struct ListedFrontend {
    /// What it is of the Service; unknown for what did not fit after a restart.
    pub kind: proxy::FrontendKind,
    /// Which address and port, and for whom.
    pub key: proxy::FrontendKey,
    /// The Service's policy for this kind of address.
    pub policy: TrafficPolicy,
    /// As the kernel has it.
    pub entry: proxy::Frontend,
    /// Who may, where not everybody.
    pub source_ranges: Vec<ipnet::IpNet>,
    /// The backends: whether each is draining, and whether it is on this node.
    pub backends: Vec<(proxy::Backend, bool, bool)>,
}

/// A Service.
#[derive(Clone, Debug, Default)]
pub struct ListedService {
    /// Its frontends, by address and port.
    pub frontends: Vec<ListedFrontend>,
    /// What of it is not in force.
    pub problems: Vec<String>,
}

/// Which Services are asked for; an empty word stands for all.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl Selection {
    fn has(&self, name: &ObjectName) -> bool {
        (self.namespace.is_empty() || self.namespace == name.namespace)
            && (self.name.is_empty() || self.name == name.name)
    }
}

impl Services {
    /// What is programmed of the Services that are asked for, and what is wrong with them.
    pub(super) fn listing(
        &self,
        which: &Selection,
        is_local: impl Fn(IpAddr) -> bool,
    ) -> BTreeMap<ObjectName, ListedService> {
        let mut listing: BTreeMap<ObjectName, ListedService> = BTreeMap::new();
        for listed in self.mirror().into_iter().flat_map(proxy::Tables::list) {
            let Some((owner, kind)) = listed.owner else { continue };
            if listed.key.is_any_port() || !which.has(owner) {
                continue;
            }
            let policy = self.model.service(owner).map(|service| match kind {
                proxy::FrontendKind::ClusterIp => service.internal_traffic_policy,
                _ => service.external_traffic_policy,
            });
            let backends =
                listed.backends.iter().map(|(_, backend, draining)| (*backend, *draining, is_local(backend.addr)));
            listing.entry(owner.clone()).or_default().frontends.push(ListedFrontend {
                kind,
                key: listed.key,
                policy: policy.unwrap_or_default(),
                entry: listed.frontend,
                source_ranges: listed.source_ranges.to_vec(),
                backends: backends.collect(),
            });
        }
        for (name, _, problem) in self.complaints() {
            if which.has(&name) {
                listing.entry(name).or_default().problems.push(problem);
            }
        }
        listing
    }
}

impl Engine {
    pub(super) fn listing(&self, which: &Selection) -> BTreeMap<ObjectName, ListedService> {
        let endpoints = &self.datapath.tables.endpoints;
        let is_local = |addr: IpAddr| self.own.contains(&addr) || matches!(endpoints.get(&addr.into()), Ok(Some(_)));
        self.services.listing(which, is_local)
    }
}
