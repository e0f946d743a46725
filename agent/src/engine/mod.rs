//! The one writer of the kernel's tables. It runs on a thread of its own: events from the source and commands from the local
//! API in, ordered writes out.
//!
//! ```text
//! Event --> proxy::Model, policy::Model, nodes --(all kinds synced)--> restore against the maps, attach, switch
//!                                              --(then, per batch)--> changes --> ops --> maps
//! Command::{Admit, Attach, Detach, Status} --> endpoints, answers
//! ```
//!
//! Events are taken in batches, so that a burst about one object costs one change. A write that fails leaves the mirror
//! behind: the engine then restores it from the maps, with a delay that doubles.

pub mod adopt;
mod command;
mod convert;
mod endpoints;
mod fill;
mod gate;
mod listing;
mod nodes;
mod policies;
mod services;
mod status;
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use keelway_cni::{Lease, PodRef};
use keelway_layout::NodeConfig;
use keelway_maps::{Datapath, XdpMode};
use keelway_policy::model::ObjectName;
use keelway_proxy::HealthCheck;
use tokio::sync::{mpsc, oneshot, watch};

use crate::events::Complaint;
use crate::http::{Health, Metrics};
use crate::sockets::Gone;
use crate::source::{Event, Kind, Node, Object, Status};
use crate::sweep::Flows;

pub use command::{Command, EngineError, Handle};
pub use endpoints::Attached;
pub use gate::{Known, Progress, Versions, progress};
pub use listing::{ListedFrontend, ListedService, Selection};
pub use nodes::HostRoutes;
pub use services::{ServiceTables, Services};
pub use status::EngineStatus;

/// Events taken before the tables are brought up to date.
const BATCH: usize = 512;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// What the engine needs to know of its node before the source says anything.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name of this node's Node object.
    pub node_name: String,
    /// Where the numbers of identities and rules are kept.
    pub state_dir: PathBuf,
    /// Where socket hooks attach.
    pub cgroup_root: PathBuf,
    /// Namespaces without objects are taken as given (`--manifests`).
    pub implied_namespaces: bool,
}

/// The node's devices, once they exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    /// Names of the devices that carry traffic in and out of the node.
    pub node: Vec<String>,
    /// In which modes each of them is to run the hook before the kernel's stack, the best first; in none: not.
    pub xdp: BTreeMap<String, Vec<XdpMode>>,
    /// The tunnel's; `None` in routed mode, unless Services' clients go through it.
    pub vxlan: Option<String>,
    /// What the programs are told of all this.
    pub config: NodeConfig,
    /// What the host sends from to pods, one a family.
    pub host_addresses: Vec<IpAddr>,
    /// All addresses of the host, sorted, but for link-local ones.
    pub own: Vec<IpAddr>,
    /// On which node ports answer; `true`: only to the host's own processes.
    pub node_ports: Vec<(IpAddr, bool)>,
}

/// The engine and what flows into and out of it.
pub struct Engine {
    settings: Settings,
    datapath: Datapath,
    devices: watch::Receiver<Option<Devices>>,
    host_routes: watch::Sender<Option<HostRoutes>>,
    synced_tx: watch::Sender<bool>,
    node_tx: watch::Sender<Option<Node>>,
    source: Status,
    flows: Flows,
    health_checks: watch::Sender<Vec<HealthCheck>>,
    complaints: watch::Sender<BTreeSet<Complaint>>,
    health: Health,
    metrics: Metrics,

    kinds: BTreeSet<Kind>,
    nodes: BTreeMap<String, Node>,
    /// This host's addresses, but for loopback and link-local ones.
    own: Vec<IpAddr>,
    services: services::Services,
    policies: policies::Policies,
    endpoints: endpoints::Endpoints,
    pod_uids: BTreeMap<ObjectName, String>,
    waiting: Vec<(PodRef, oneshot::Sender<String>)>,
    gate: gate::Gate,
    counted: fill::Counted,
    /// Entries of the tunnel table, once it was written.
    tunnels: Option<usize>,
    problems: BTreeMap<&'static str, String>,
    retry_at: Option<(Instant, Duration)>,
    /// When the changes of endpoints that wait to be written were read.
    decoded: Vec<Instant>,
    started: Instant,
}

/// The channels that the engine is made with.
pub struct Wiring {
    /// What the source said before the engine could be made.
    pub early: Vec<Vec<Event>>,
    /// Desired state.
    pub events: mpsc::Receiver<Event>,
    /// The devices, when the host's side is ready.
    pub devices: watch::Receiver<Option<Devices>>,
    /// Receives this node's object.
    pub node: watch::Sender<Option<Node>>,
    /// Receives the routes that the host should have, once all nodes are known.
    pub host_routes: watch::Sender<Option<HostRoutes>>,
    /// The source's own state.
    pub source: Status,
    /// What the sweep of flows counts.
    pub flows: Flows,
    /// Receives what load balancers' health checks are to be told.
    pub health_checks: watch::Sender<Vec<HealthCheck>>,
    /// Receives what is wrong with Services.
    pub complaints: watch::Sender<BTreeSet<Complaint>>,
    /// Receives the backends that take nothing new, or again.
    pub backends: mpsc::UnboundedSender<Gone>,
    /// For `/healthz`.
    pub health: Health,
    /// For `/metrics`.
    pub metrics: Metrics,
}

impl Engine {
    /// Starts the engine on its thread. `leases` are the pods that were attached before.
    ///
    /// # Errors
    /// When the thread cannot be started or what was persisted cannot be read.
    pub fn start(settings: Settings, datapath: Datapath, leases: Vec<Lease>, wiring: Wiring) -> anyhow::Result<Handle> {
        let (commands, inbox) = mpsc::channel(256);
        let (synced_tx, synced) = watch::channel(false);
        let Wiring {
            early,
            events,
            mut devices,
            node,
            host_routes,
            source,
            flows,
            health_checks,
            complaints,
            backends,
            health,
            metrics,
        } = wiring;
        // What is known by now is yet to be taken.
        devices.mark_changed();
        let policies = policies::Policies::open(&settings, &datapath.tables)?;
        let endpoints = endpoints::Endpoints::restore(leases, &datapath.tables)?;
        let engine = Self {
            services: services::Services::new(&settings.node_name, backends),
            policies,
            endpoints,
            settings,
            datapath,
            devices,
            host_routes,
            synced_tx,
            node_tx: node,
            source,
            flows,
            health_checks,
            complaints,
            health,
            metrics,
            kinds: BTreeSet::new(),
            nodes: BTreeMap::new(),
            own: Vec::new(),
            pod_uids: BTreeMap::new(),
            waiting: Vec::new(),
            gate: gate::Gate::default(),
            counted: fill::Counted::default(),
            tunnels: None,
            problems: BTreeMap::new(),
            retry_at: None,
            decoded: Vec::new(),
            started: Instant::now(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || runtime.block_on(engine.run(early, events, inbox)))?;
        Ok(Handle { commands, synced })
    }

    async fn run(
        mut self,
        early: Vec<Vec<Event>>,
        mut events: mpsc::Receiver<Event>,
        mut commands: mpsc::Receiver<Command>,
    ) {
        for event in early.into_iter().flatten() {
            self.event(event);
        }
        self.update();
        let mut batch = Vec::with_capacity(BATCH);
        let mut devices = self.devices.clone();
        loop {
            let retry = self.retry_at.map(|(at, _)| at);
            tokio::select! {
                count = events.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        return;
                    }
                    for event in batch.drain(..) {
                        self.event(event);
                    }
                    self.update();
                }
                command = commands.recv() => {
                    let Some(command) = command else { return };
                    self.command(command);
                }
                changed = devices.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.update();
                }
                () = tokio::time::sleep_until(retry.unwrap_or_else(Instant::now).into()), if retry.is_some() => {
                    self.retry();
                }
            }
        }
    }

    fn is_synced(&self) -> bool {
        *self.synced_tx.borrow()
    }

    /// Everything is there that the tables are made of.
    fn has_all(&self) -> bool {
        self.kinds.len() == Kind::ALL.len() && self.devices.borrow().is_some()
    }

    /// Before everything is there, no change waits for us: as for kube-proxy, that is not to hang.
    fn change_queued(&self) {
        if self.has_all() {
            self.health.change_queued();
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Upsert(object) => self.upsert(object),
            Event::Delete(reference) => {
                let name = || ObjectName::new(reference.namespace.clone(), reference.name.clone());
                match reference.kind {
                    Kind::Node => self.node_gone(&reference.name),
                    Kind::ServiceCidr => self.policies.model.set_service_cidrs(&reference.name, &[]),
                    Kind::Namespace => self.policies.model.delete_namespace(&reference.name),
                    Kind::Service => {
                        self.services.service_gone(&reference.namespace, &reference.name);
                        self.metrics.service_changed();
                        self.change_queued();
                    }
                    Kind::EndpointSlice => {
                        self.services.slice_gone(&reference.namespace, &reference.name);
                        self.metrics.endpoints_changed();
                        self.change_queued();
                    }
                    Kind::NetworkPolicy => {
                        self.policies.model.delete_policy(&name());
                        self.gate.policy_gone(&reference.namespace, &reference.name);
                    }
                    Kind::Pod => {
                        self.pod_uids.remove(&name());
                        self.policies.model.delete_pod(&name());
                    }
                }
            }
            Event::Synced(kind) => {
                self.kinds.insert(kind);
            }
        }
    }

    fn upsert(&mut self, object: Object) {
        match object {
            Object::Node(node) => self.node_changed(node),
            Object::ServiceCidr(range) => self.policies.model.set_service_cidrs(&range.name, &range.cidrs),
            Object::Namespace(namespace) => self.policies.model.upsert_namespace(namespace),
            Object::Service(service) => {
                self.services.model.upsert_service(service);
                self.metrics.service_changed();
                self.change_queued();
            }
            Object::EndpointSlice(slice, times) => {
                self.services.slice_changed(slice, times.happened);
                self.decoded.push(times.decoded);
                self.metrics.endpoints_changed();
                self.change_queued();
            }
            Object::NetworkPolicy(policy, version) => {
                self.gate.policy_changed(&policy.name.namespace, &policy.name.name, version);
                self.policies.model.upsert_policy(policy);
            }
            Object::Pod(pod) => {
                self.pod_uids.insert(pod.name.clone(), pod.uid.clone());
                self.policies.model.upsert_pod(pod);
            }
        }
    }

    /// Brings the tables up to date with the models, once everything is there that they need.
    fn update(&mut self) {
        if self.retry_at.is_some() {
            return;
        }
        let changed = self.devices.has_changed().unwrap_or(true);
        let devices = if changed { self.devices.borrow_and_update().clone() } else { None };
        if let Some(devices) = devices {
            self.services.set_addresses(devices.node_ports);
            self.own_changed(devices.own.into_iter().filter(|address| !address.is_loopback()).collect());
        }
        let result = if self.is_synced() { self.apply() } else { self.first_sync() };
        self.settle(result);
        self.health.set_problems(self.problems());
        self.publish();
        self.answer_waiting();
    }

    /// Tells those around the engine what they serve and report.
    fn publish(&self) {
        if !self.is_synced() {
            return;
        }
        fn tell<T: PartialEq>(to: &watch::Sender<T>, next: T) {
            to.send_if_modified(|now| {
                let changed = *now != next;
                *now = next;
                changed
            });
        }
        tell(&self.health_checks, self.services.model.health_checks().cloned().collect());
        tell(&self.complaints, self.services.complaints());
        self.metrics.set_no_local(self.services.model.no_local());
    }

    fn settle(&mut self, result: Result<(), EngineError>) {
        match result {
            Ok(()) => {
                self.retry_at = None;
                self.problems.remove("tables");
            }
            Err(EngineError::NotSynced) => {}
            Err(error) => {
                let delay = self.retry_at.map_or(FIRST_RETRY, |(_, delay)| (delay * 2).min(LAST_RETRY));
                tracing::warn!(%error, ?delay, "the tables are behind; restoring them");
                self.problems.insert("tables", error.to_string());
                self.metrics.sync_failed();
                self.health.sync_failed();
                self.retry_at = Some((Instant::now() + delay, delay));
            }
        }
    }

    /// After a failed write the mirrors may not be what the kernel holds: read it back.
    fn retry(&mut self) {
        let result = if self.is_synced() { self.apply_all() } else { self.first_sync() };
        self.settle(result);
        self.answer_waiting();
    }

    fn first_sync(&mut self) -> Result<(), EngineError> {
        if !self.has_all() {
            return Err(EngineError::NotSynced);
        }
        let devices = self.devices.borrow().clone();
        let devices = devices.ok_or(EngineError::NotSynced)?;
        self.health.change_queued();
        let kernel = |error: &dyn std::fmt::Display| EngineError::Kernel(error.to_string());
        let adoption = self.adoption(&devices.config);
        let config = adoption.as_ref().unwrap_or(&devices.config);
        self.datapath.tables.set_node(config).map_err(|error| kernel(&error))?;
        self.sync_nodes(&devices)?;
        self.apply_all()?;
        if adoption.is_some() {
            self.adopt()?;
        }
        // The tables hold what they should: now the programs may look.
        let generation = self.datapath.switch().map_err(|error| kernel(&error))?;
        self.attach(&devices).map_err(|error| kernel(&error))?;
        if adoption.is_some() {
            self.adopt()?;
            self.datapath.tables.set_node(&devices.config).map_err(|error| kernel(&error))?;
        }
        tracing::info!(generation, "in sync; programs attached");
        self.synced_tx.send_replace(true);
        self.health.set_synced();
        Ok(())
    }

    fn attach(&mut self, devices: &Devices) -> Result<(), keelway_maps::Error> {
        self.datapath.attach_cgroup(&self.settings.cgroup_root)?;
        if let Some(vxlan) = &devices.vxlan {
            self.datapath.attach_vxlan(vxlan)?;
        }
        for device in &devices.node {
            self.datapath.attach_node(device)?;
        }
        self.datapath.attach_xdp(&devices.xdp)?;
        self.reattach_pods()
    }

    /// Brings all tables into step with the models, whatever they held.
    fn apply_all(&mut self) -> Result<(), EngineError> {
        let started = Instant::now();
        self.health.sync_started();
        self.policies.restore(&self.datapath.tables)?;
        self.replay_nodes();
        for endpoint in self.endpoints.wanted() {
            self.policies.model.upsert_endpoint(endpoint);
        }
        self.services.restore(&mut self.datapath.tables)?;
        self.write(started, true)
    }

    /// Writes what changed.
    fn apply(&mut self) -> Result<(), EngineError> {
        self.health.sync_started();
        self.write(Instant::now(), false)
    }

    /// The end of a sync that began at `started`.
    fn write(&mut self, started: Instant, full: bool) -> Result<(), EngineError> {
        let programmed = self.services.apply(&mut self.datapath.tables)?;
        self.policies.apply(&mut self.datapath, &mut self.endpoints)?;
        self.health.sync_succeeded();
        let now = SystemTime::now();
        let unix = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        self.metrics.sync_done(started.elapsed().as_secs_f64(), unix, full);
        let decoded = std::mem::take(&mut self.decoded);
        if !self.is_synced() {
            // How long ago the first objects changed says nothing of us (kube-proxy leaves them out as well).
            return Ok(());
        }
        for (triggered, ipv6) in programmed {
            if let Ok(late) = now.duration_since(triggered) {
                self.metrics.endpoint_programmed(late.as_secs_f64(), ipv6);
            }
        }
        for decoded in decoded {
            self.metrics.change_written(decoded.elapsed().as_secs_f64());
        }
        Ok(())
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Admit { pod, reply } => {
                self.waiting.push((pod, reply));
                self.answer_waiting();
            }
            Command::KnownPolicies { namespace, reply } => {
                let _ = reply.send(self.gate.known(&namespace).clone());
            }
            Command::AwaitPolicies { namespace, before, listed, reply } => {
                self.gate.wait(namespace, before, listed, reply);
                self.answer_waiting();
            }
            Command::Prepare { lease, reply } => {
                let _ = reply.send(self.prepare(lease));
            }
            Command::Attach { attached, reply } => {
                let _ = reply.send(self.attach_endpoint(attached));
            }
            Command::Detach { key, host_ifname, reply } => {
                let _ = reply.send(self.detach_endpoint(&key, &host_ifname));
            }
            Command::Verify { key, reply } => {
                let _ = reply.send(self.verify_endpoint(&key));
            }
            Command::Services { which, reply } => {
                let _ = reply.send(self.listing(&which));
            }
            Command::Status { reply } => {
                let _ = reply.send(self.status());
            }
        }
    }

    fn answer_waiting(&mut self) {
        if !self.is_synced() || self.retry_at.is_some() {
            self.waiting.retain(|(_, reply)| !reply.is_closed());
            self.gate.tidy();
            return;
        }
        self.gate.answer();
        for (pod, reply) in std::mem::take(&mut self.waiting) {
            let name = ObjectName::new(pod.namespace.clone(), pod.name.clone());
            match self.pod_uids.get(&name) {
                Some(uid) if (pod.uid.is_empty() || pod.uid == *uid) && self.policies.model.knows(&name, uid) => {
                    let _ = reply.send(uid.clone());
                }
                _ if reply.is_closed() => {}
                _ => self.waiting.push((pod, reply)),
            }
        }
    }
}
