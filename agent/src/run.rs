//! The agent as a process: what is made, in which order, and who talks to whom.
//!
//! ```text
//! source task --events--> engine thread --node--> host task --devices--> engine thread
//!                                       --routes-> host task --network-> attachments (gRPC)
//! ```
//!
//! Stopping stops nothing of the network: programs, maps, links, devices and routes stay.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelway_api::v1::attachments_server::AttachmentsServer;
use keelway_api::v1::inspect_server::InspectServer;
use keelway_cni::command::SEEN_FILE;
use keelway_cni::ipam::Book;
use keelway_cni::ipam::journal::Journal;
use keelway_layout::LAYOUT_VERSION;
use keelway_maps::Datapath;
use keelway_netlink::{AddressMonitor, Handle as Netlink};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::attachments::{AttachmentService, leases_path};
use crate::config::{Config, SourceConfig, Xdp};
use crate::engine::{Command, Devices, Engine, Handle, HostRoutes, Settings, Wiring, adopt};
use crate::events::{self, Recorder};
use crate::gate::Gate;
use crate::health_checks::HealthChecks;
use crate::host::{self, HostNetwork};
use crate::http::{self, Health, Metrics};
use crate::inspect::InspectService;
use crate::neighbours;
use crate::sockets;
use crate::source::kube::{Kubernetes, PolicyLister};
use crate::source::manifests::Manifests;
use crate::source::{CHANNEL_CAPACITY, Event, Node, Source, Status};
use crate::sweep::{self, Flows};

/// How often the host's state is compared with what it should be, and the agent's sign of life renewed.
const HOST_PERIOD: Duration = Duration::from_secs(30);
const NODE_WAIT: Duration = Duration::from_secs(10);
const HOST_RETRY: Duration = Duration::from_secs(2);
/// Addresses that change together are taken together.
const SETTLE: Duration = Duration::from_millis(50);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps the agent from starting, in words that name it.
pub async fn run(config: Config) -> anyhow::Result<()> {
    crate::proc_sys::make_writable();
    for dir in [&config.state_dir, &config.run_dir] {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let _lock = lock(&config)?;
    // Before anything is touched: a port that is taken is how a kube-proxy shows that still runs.
    let listeners = Listeners::bind(&config).await?;
    let cidrs = host::remembered_cidrs(&config.state_dir)?;
    // Without CIDRs from an earlier run there is nothing that could have been leased.
    let book = match cidrs.is_empty() {
        true => None,
        false => Some(Book::open(Journal::open(leases_path(&config.state_dir))?, &cidrs)?),
    };
    let leases = book.iter().flat_map(|book| book.pool().leases().cloned()).collect();
    let status = Status::default();
    let (events_tx, mut events) = mpsc::channel(CHANNEL_CAPACITY);
    let source = start_source(&config, events_tx, status.clone()).await?;
    let (datapath, early) = open_datapath(&config, &mut events).await?;
    let was_synced = datapath.tables.state()?.generation > 0;

    let health = Health::default();
    if was_synced {
        health.set_served();
    }
    let names = if config.kube_proxy_metrics { Metrics::with_kube_proxy_names } else { Metrics::new };
    let metrics = names(env!("CARGO_PKG_VERSION"), LAYOUT_VERSION);
    let (lister, recorder) = match source {
        Some((lister, client)) => (Some(lister), Recorder::start(client, config.node_name.clone())),
        None => (None, Recorder::none()),
    };

    let (node_tx, node) = watch::channel(None);
    let (devices_tx, devices) = watch::channel(None);
    let (routes_tx, routes) = watch::channel(None);
    let settings = Settings {
        node_name: config.node_name.clone(),
        state_dir: config.state_dir.clone(),
        cgroup_root: config.cgroup_root.clone(),
        implied_namespaces: lister.is_none(),
    };
    let flows = Flows::default();
    let node_port_devices = devices.clone();
    let (health_checks_tx, wanted) = watch::channel(Vec::new());
    let (complaints_tx, complaints) = watch::channel(BTreeSet::new());
    let (backends_tx, backends) = mpsc::unbounded_channel();
    let wiring = Wiring {
        early,
        events,
        devices,
        node: node_tx,
        host_routes: routes_tx,
        source: status.clone(),
        flows: flows.clone(),
        health_checks: health_checks_tx,
        complaints: complaints_tx,
        backends: backends_tx,
        health: health.clone(),
        metrics: metrics.clone(),
    };
    let sweep = datapath.sweep()?;
    let connections = Arc::new(datapath.connections()?);
    tokio::spawn(sockets::run(backends, datapath.socket_tables()?));
    let engine = Engine::start(settings, datapath, leases, wiring)?;
    tokio::spawn(sweep::run(sweep, engine.clone(), flows.clone()));

    let netlink = Netlink::open()?;
    let (network_tx, network) = watch::channel(None);
    let (problem_tx, host_problem) = watch::channel(String::new());
    let warm_until = was_synced.then(|| Instant::now() + config.status_grace);
    let gate = Gate::new(engine.clone(), lister, metrics.clone());
    let attachments = AttachmentService::new(
        gate,
        engine.clone(),
        netlink.clone(),
        network.clone(),
        book,
        &config.state_dir,
        warm_until,
    );
    let host_task = HostTask {
        config: config.clone(),
        netlink,
        node,
        routes,
        devices: devices_tx,
        network: network_tx,
        problem: problem_tx,
        attachments: attachments.clone(),
    };
    tokio::spawn(host_task.run());
    let (problems, health_check_problems) = watch::channel(Vec::new());
    tokio::spawn(events::follow(complaints, recorder.clone()));
    let health_checks = HealthChecks {
        wanted,
        node_ports: config.nodeport_addresses.clone(),
        devices: node_port_devices,
        health: health.clone(),
        problems,
        events: recorder,
    };
    tokio::spawn(health_checks.run());
    serve_http(listeners, health, metrics, &engine, &status, flows);
    let (neighbours_tx, neighbours) = watch::channel(Vec::new());
    tokio::spawn(neighbours::watch(neighbours_tx));
    tokio::spawn(adopt::watch());
    let inspect = InspectService {
        engine: engine.clone(),
        source: status,
        config: config.clone(),
        network,
        host_problem,
        neighbours,
        connections,
        health_checks: health_check_problems,
    };
    serve_api(&config, attachments.clone(), inspect)?;
    tokio::spawn(show_signs_of_life(config.run_dir.clone(), config.status_grace));
    tokio::spawn(drain_when_synced(engine, attachments));
    tracing::info!(node = %config.node_name, routing = config.routing.as_str(), "running");

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; the network stays as it is");
    Ok(())
}

/// Loads the programs. The kernel takes about a second to check them, in which the source may already speak: what it says by then is
/// answered too.
async fn open_datapath(
    config: &Config,
    events: &mut mpsc::Receiver<Event>,
) -> anyhow::Result<(Datapath, Vec<Vec<Event>>)> {
    let (bpffs, xdp) = (config.bpffs.clone(), config.xdp != Xdp::Off);
    let mut opening = tokio::task::spawn_blocking(move || Datapath::open_for(&bpffs, xdp));
    // In pieces, each of which is given back once it is taken.
    let mut early = Vec::new();
    loop {
        let mut piece = Vec::new();
        tokio::select! {
            opened = &mut opening => return Ok((opened??, early)),
            1.. = events.recv_many(&mut piece, CHANNEL_CAPACITY) => {
                piece.shrink_to_fit();
                early.push(piece);
            }
        }
    }
}

/// Keeps a second agent from this node's state.
///
/// # Errors
/// That one runs, or that the lock cannot be made.
pub fn lock(config: &Config) -> anyhow::Result<Flock<std::fs::File>> {
    let path = config.state_dir.join("agent.lock");
    let file = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => anyhow::anyhow!("{}: another keelway-agent runs on this node", path.display()),
        errno => anyhow::anyhow!("{}: {errno}", path.display()),
    })
}

/// Starts the source's task; where there is an API, answers whom to ask for policies there, and a client.
async fn start_source(
    config: &Config,
    events: mpsc::Sender<Event>,
    status: Status,
) -> anyhow::Result<Option<(PolicyLister, kube::Client)>> {
    fn spawn(source: impl Source, events: mpsc::Sender<Event>, status: Status) {
        status.describe(source.describe());
        tokio::spawn(source.run(events, status));
    }
    let source = match &config.source {
        SourceConfig::InCluster { api_servers } => Kubernetes::in_cluster(api_servers, &config.state_dir)?,
        SourceConfig::Kubeconfig { path, api_servers } => Kubernetes::kubeconfig(path, api_servers).await?,
        SourceConfig::Manifests { dir } => {
            spawn(Manifests::open(dir)?, events, status);
            return Ok(None);
        }
    };
    let beside = (source.policy_lister(), source.client());
    spawn(source, events, status);
    Ok(Some(beside))
}

/// Where `/healthz`, `/livez` and `/metrics` are served, as far as they are.
struct Listeners {
    health: Option<TcpListener>,
    metrics: Option<TcpListener>,
}

impl Listeners {
    async fn bind(config: &Config) -> anyhow::Result<Self> {
        let mut listeners = Self { health: None, metrics: None };
        if let Some(listen) = config.healthz_addr {
            let bound = http::bind("healthz-addr", listen).await;
            listeners.health = Some(bound.with_context(port_taken)?);
        }
        if let Some(listen) = config.metrics_addr {
            listeners.metrics = Some(http::bind("metrics-addr", listen).await?);
        }
        Ok(listeners)
    }
}

/// Whose the port of `--healthz-addr` may be.
fn port_taken() -> String {
    let seen = neighbours::kube_proxy().unwrap_or_else(|| "no rules of a kube-proxy are there".to_owned());
    format!(
        "kube-proxy serves its health there too and has to go before keelway-agent takes its place ({seen}); if the port is \
         someone else's, --healthz-addr is where to serve instead"
    )
}

fn serve_http(listeners: Listeners, health: Health, metrics: Metrics, engine: &Handle, status: &Status, flows: Flows) {
    if let Some(listener) = listeners.health {
        tokio::spawn(http::serve(listener, http::health_routes(health, metrics.clone())));
    }
    if let Some(listener) = listeners.metrics {
        let (engine, status) = (engine.clone(), status.clone());
        let runtime = tokio::runtime::Handle::current();
        let refresh: http::Refresh = Arc::new(move |metrics: &Metrics| {
            metrics.set_source(&status);
            for table in flows.found() {
                metrics.set_flows(table.name, table.live, table.expired, table.removed);
            }
            let snapshot = runtime.block_on(engine.ask(|reply| Command::Status { reply }));
            if let Some(snapshot) = &snapshot {
                metrics.set_left_out(snapshot.services_left_out);
            }
            for fill in snapshot.iter().flat_map(|snapshot| &snapshot.fill) {
                metrics.set_map(fill.name, fill.entries, fill.capacity.into());
            }
            for (hook, reason, counter) in snapshot.iter().flat_map(|snapshot| &snapshot.counters) {
                if !reason.is_passage() {
                    metrics.set_drops(reason.name(), hook.name(), counter.packets, counter.bytes);
                }
            }
        });
        tokio::spawn(http::serve(listener, http::metrics_routes(metrics, refresh)));
    }
}

/// Binds the socket in place of a dead one. A living one is kept from us by [`lock`].
fn serve_api(config: &Config, attachments: AttachmentService, inspect: InspectService) -> anyhow::Result<()> {
    let path = config.socket();
    // Bound under another name and moved over, so that there is never a moment without a socket, nor one with wide permissions.
    let fresh = path.with_extension("sock.new");
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).with_context(|| fresh.display().to_string())?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, &path).with_context(|| path.display().to_string())?;
    let server = tonic::transport::Server::builder()
        .add_service(AttachmentsServer::new(attachments))
        .add_service(InspectServer::new(inspect))
        .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener));
    tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the local API ended");
        }
    });
    Ok(())
}

/// keelway-cni's STATUS reads from this file when an agent was last there.
async fn show_signs_of_life(run_dir: std::path::PathBuf, grace: Duration) {
    let path = run_dir.join(SEEN_FILE);
    // Twice within the grace, so that an agent that is there never seems away.
    let period = HOST_PERIOD.min(grace / 2).max(Duration::from_millis(100));
    loop {
        if let Err(error) = touch(&path) {
            tracing::warn!(path = %path.display(), %error, "the sign of life cannot be renewed");
        }
        tokio::time::sleep(period).await;
    }
}

fn touch(path: &Path) -> std::io::Result<()> {
    std::fs::write(path, [])?;
    std::fs::File::open(path)?.set_modified(std::time::SystemTime::now())
}

async fn drain_when_synced(engine: Handle, attachments: AttachmentService) {
    while !engine.is_synced() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    loop {
        attachments.drain_pending().await;
        tokio::time::sleep(HOST_PERIOD).await;
    }
}

/// Keeps the host's side as this node's object and the other nodes want it.
struct HostTask {
    config: Config,
    netlink: Netlink,
    node: watch::Receiver<Option<Node>>,
    routes: watch::Receiver<Option<HostRoutes>>,
    devices: watch::Sender<Option<Devices>>,
    network: watch::Sender<Option<HostNetwork>>,
    problem: watch::Sender<String>,
    attachments: AttachmentService,
}

impl HostTask {
    async fn run(mut self) {
        // The objects are just being read: to know of no Node yet is nothing to warn of.
        let _ = tokio::time::timeout(NODE_WAIT, self.node.wait_for(Option::is_some)).await;
        let mut monitor = None;
        loop {
            if monitor.is_none() {
                let opened = AddressMonitor::open();
                monitor = opened.inspect_err(|error| tracing::warn!(%error, "new addresses are seen late")).ok();
            }
            let seen = host::own_addresses(&self.netlink).await.ok();
            let again = match self.once().await {
                Ok(()) => {
                    self.problem.send_replace(String::new());
                    HOST_PERIOD
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if *self.problem.borrow() != error {
                        tracing::warn!(%error, "the node's network is not as it should be");
                    }
                    self.problem.send_replace(error);
                    HOST_RETRY
                }
            };
            tokio::select! {
                changed = self.node.changed() => if changed.is_err() { return },
                changed = self.routes.changed() => if changed.is_err() { return },
                () = moved(&mut monitor, &self.netlink, &seen) => {}
                () = tokio::time::sleep(again) => {}
            }
        }
    }

    async fn once(&mut self) -> anyhow::Result<()> {
        let Some(node) = self.node.borrow_and_update().clone() else {
            anyhow::bail!("there is no Node {:?} yet; is --node-name right?", self.config.node_name);
        };
        let network = host::prepare(&self.config, &node, &self.netlink).await?;
        let known = self.network.borrow().as_ref().map(|network| network.pod_cidrs.clone());
        if known.as_ref() != Some(&network.pod_cidrs) {
            self.attachments.reopen_book(&network.pod_cidrs)?;
        }
        let devices = Some(network.devices.clone());
        let routes = self.routes.borrow_and_update().clone();
        self.network.send_replace(Some(network.clone()));
        self.devices.send_if_modified(|now| {
            let changed = *now != devices;
            *now = devices;
            changed
        });
        // Until the nodes are known the routes of the agent before stay: traffic is on them.
        if let Some(routes) = routes {
            host::sync_routes(&network, &routes, &self.netlink).await?;
        }
        Ok(())
    }
}

/// Waits until the host has other addresses than it was `seen` to have.
async fn moved(monitor: &mut Option<AddressMonitor>, netlink: &Netlink, seen: &Option<Vec<IpAddr>>) {
    while let Some(open) = monitor {
        if !open.changed(|address| !host::is_link_local(address)).await {
            *monitor = None;
            break;
        }
        tokio::time::sleep(SETTLE).await;
        // What is refreshed only, by the agent's own hand too, is no change.
        if host::own_addresses(netlink).await.ok() != *seen {
            return;
        }
    }
    std::future::pending().await
}
