//! The engine's list of Services as the API's messages, with the connections of each backend.

use std::collections::{BTreeMap, HashMap};

use keelway_api::v1::{Backend, Frontend, ServiceState};
use keelway_layout::Port;
use keelway_maps::{Connections, Peer, TableError};
use keelway_proxy::model::TrafficPolicy;
use keelway_proxy::{self as proxy, FrontendKind, ObjectName, Origin, flags};

use crate::engine::{ListedFrontend, ListedService};

fn peer(backend: &proxy::Backend) -> Peer {
    (backend.addr.into(), Port::new(backend.port), backend.proto)
}

/// One message a Service. Reads the table of flows once.
pub fn messages(
    listing: &BTreeMap<ObjectName, ListedService>,
    connections: &Connections,
) -> Result<Vec<ServiceState>, TableError> {
    let frontends = listing.values().flat_map(|service| &service.frontends);
    let backends = frontends.flat_map(|frontend| &frontend.backends);
    let mut counts: HashMap<Peer, u64> = backends.map(|(backend, ..)| (peer(backend), 0)).collect();
    if !counts.is_empty() {
        connections.count(&mut counts)?;
    }
    let message = |(name, service): (&ObjectName, &ListedService)| ServiceState {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        frontends: service.frontends.iter().map(|frontend| message(frontend, &counts)).collect(),
        problems: service.problems.clone(),
    };
    Ok(listing.iter().map(message).collect())
}

fn message(frontend: &ListedFrontend, counts: &HashMap<Peer, u64>) -> Frontend {
    let ListedFrontend { kind, key, policy, entry, source_ranges, backends } = frontend;
    let named =
        [(flags::HASHED, "maglev"), (flags::KEEP_SOURCE, "keeps-source"), (flags::DROP_WHEN_EMPTY, "drops-when-empty")];
    Frontend {
        kind: match kind {
            FrontendKind::NodeAddress => "NodeAddress",
            FrontendKind::ClusterIp => "ClusterIP",
            FrontendKind::LoadBalancer => "LoadBalancer",
            FrontendKind::ExternalIp => "ExternalIP",
            FrontendKind::NodePort => "NodePort",
        }
        .into(),
        address: key.addr.to_string(),
        port: key.port.into(),
        protocol: match key.proto {
            6 => "TCP".into(),
            17 => "UDP".into(),
            132 => "SCTP".into(),
            other => other.to_string(),
        },
        outside: key.from == Origin::Outside,
        policy: if *policy == TrafficPolicy::Local { "Local" } else { "Cluster" }.into(),
        affinity_seconds: entry.affinity_seconds,
        flags: named.iter().filter(|(bit, _)| entry.flags & bit != 0).map(|(_, name)| (*name).to_owned()).collect(),
        restricted: entry.flags & flags::SOURCE_RANGES != 0,
        source_ranges: source_ranges.iter().map(ToString::to_string).collect(),
        backends: backends
            .iter()
            .map(|(backend, draining, local)| Backend {
                address: backend.addr.to_string(),
                port: backend.port.into(),
                draining: *draining,
                local: *local,
                connections: counts.get(&peer(backend)).copied().unwrap_or(0),
            })
            .collect(),
    }
}
