//! What `keelway` shows of this node.

use std::sync::Arc;

use keelway_api::v1::inspect_server::Inspect;
use keelway_api::v1::{
    Counts, Drop, Hook, ListServicesRequest, MapFill, NodeStatusRequest, NodeStatusResponse, ServiceState, SourceKind,
};
use keelway_layout::Reason;
use keelway_maps::Connections;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::engine::{Command, EngineStatus, Handle, Selection};
use crate::host::HostNetwork;
use crate::services;
use crate::source::{Kind, Status as SourceStatus};

/// The service.
pub struct InspectService {
    /// The engine.
    pub engine: Handle,
    /// The source's state.
    pub source: SourceStatus,
    /// The configuration.
    pub config: Config,
    /// The node's network, once set up.
    pub network: watch::Receiver<Option<HostNetwork>>,
    /// Why it could not be set up yet; empty when all is well.
    pub host_problem: watch::Receiver<String>,
    /// Who else does this agent's work here, in words.
    pub neighbours: watch::Receiver<Vec<String>>,
    /// Counts connections.
    pub connections: Arc<Connections>,
    /// Health checks that cannot be served, in words.
    pub health_checks: watch::Receiver<Vec<String>>,
}

#[tonic::async_trait]
impl Inspect for InspectService {
    type ListServicesStream = tokio_stream::Iter<std::vec::IntoIter<Result<ServiceState, Status>>>;

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<Self::ListServicesStream>, Status> {
        let ListServicesRequest { namespace, name } = request.into_inner();
        let which = Selection { namespace, name };
        let listing = self.engine.ask(|reply| Command::Services { which, reply }).await;
        let listing = listing.ok_or_else(|| Status::unavailable("the agent is stopping"))?;
        let connections = Arc::clone(&self.connections);
        // Up to a table's worth of reads, beside the engine and not on a thread that others wait for.
        let counted = tokio::task::spawn_blocking(move || services::messages(&listing, &connections)).await;
        let messages = counted.map_err(|error| Status::internal(error.to_string()))?;
        let messages = messages.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(tokio_stream::iter(messages.into_iter().map(Ok).collect::<Vec<_>>())))
    }

    async fn node_status(&self, _: Request<NodeStatusRequest>) -> Result<Response<NodeStatusResponse>, Status> {
        let engine = self.engine.ask(|reply| Command::Status { reply }).await;
        let engine = engine.ok_or_else(|| Status::unavailable("the agent is stopping"))?;
        Ok(Response::new(self.response(engine)))
    }
}

impl InspectService {
    fn response(&self, engine: EngineStatus) -> NodeStatusResponse {
        let network = self.network.borrow().clone();
        let of_map = |name: &str| engine.fill.iter().find(|fill| fill.name == name).map_or(0, |fill| fill.entries);
        let kind = |kind: Kind| self.source.kind(kind);
        let counted = |hook, reason| {
            let found = engine.counters.iter().find(|counter| (counter.0, counter.1) == (hook, reason));
            found.map_or(0, |(_, _, counter)| counter.packets)
        };
        let xdp_packets = counted(keelway_layout::Hook::NodeXdp, Reason::Forwarded);
        let counts = Counts {
            services: engine.services as u64,
            services_left_out: engine.services_left_out as u64,
            frontends: engine.frontends as u64,
            backends: engine.backends as u64,
            endpoints: engine.endpoints as u64,
            identities: of_map(keelway_layout::maps::IDENTITIES),
            policies: kind(Kind::NetworkPolicy).objects,
            policy_rules: of_map(keelway_layout::maps::RULES),
            nodes: engine.nodes as u64,
        };
        let mut problems = engine.problems;
        problems.extend(Some(self.host_problem.borrow().clone()).filter(|problem| !problem.is_empty()));
        problems.extend(self.neighbours.borrow().iter().cloned());
        problems.extend(self.health_checks.borrow().iter().cloned());
        NodeStatusResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            layout_version: engine.layout_version,
            node: self.config.node_name.clone(),
            source: self.source.description(),
            synced: engine.synced,
            kinds: Kind::ALL
                .iter()
                .map(|k| SourceKind { kind: k.as_str().into(), synced: kind(*k).synced, objects: kind(*k).objects })
                .collect(),
            hooks: engine
                .hooks
                .into_iter()
                .map(|hook| Hook {
                    hook: hook.hook.name().into(),
                    device: hook.to,
                    mechanism: hook.mechanism.name().into(),
                    link_id: hook.link_id,
                    program_id: hook.program_id,
                    attached: hook.alive,
                })
                .collect(),
            maps: engine
                .fill
                .into_iter()
                .map(|fill| MapFill {
                    name: fill.name.into(),
                    entries: fill.entries,
                    capacity: fill.capacity.into(),
                    lru: fill.lru,
                })
                .collect(),
            counts: Some(counts),
            drops: engine
                .counters
                .into_iter()
                .filter(|(_, reason, _)| !reason.is_passage())
                .map(|(hook, reason, counter)| Drop {
                    reason: reason.name().into(),
                    hook: hook.name().into(),
                    packets: counter.packets,
                    bytes: counter.bytes,
                })
                .collect(),
            pod_cidrs: network.iter().flat_map(|network| &network.pod_cidrs).map(ToString::to_string).collect(),
            routing: self.config.routing.as_str().into(),
            load_balancer_mode: self.config.load_balancer_mode.as_str().into(),
            xdp: self.config.xdp.as_str().into(),
            xdp_packets,
            mtu: network.map_or(0, |network| network.mtu),
            generation: engine.generation,
            uptime_seconds: engine.uptime_seconds,
            problems,
        }
    }
}
