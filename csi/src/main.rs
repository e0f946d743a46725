//! `keelway-csi`: flags, and the order in which things start and stop.
#![forbid(unsafe_code)]

mod labels;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use keelway_csi::LOCAL_DRIVER;
use keelway_csi::backend::LvmPlace;
use keelway_csi::csi::controller_server::ControllerServer;
use keelway_csi::csi::group_controller_server::GroupControllerServer;
use keelway_csi::csi::identity_server::IdentityServer;
use keelway_csi::csi::node_server::NodeServer;
use keelway_csi::csi::snapshot_metadata_server::SnapshotMetadataServer;
use keelway_csi::model::BackendKind;
use keelway_csi::ops::{Places, Volumes};
use keelway_csi::registration::registration_server::RegistrationServer;
use keelway_csi::server::{Socket, socket_path};
use keelway_csi::service::{
    ControllerService, GroupService, IdentityService, MetadataService, NodeService, RegistrationService, Shared, Slots,
};
use keelway_csi::sys::freeze;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tonic::transport::Server;

/// Keelway's CSI driver: volumes of the node's own disk for pods.
#[derive(Debug, Parser)]
#[command(version, after_help = "`keelway-csi label-snapshots --help`: what runs beside csi-snapshotter.")]
struct Flags {
    /// Which services to serve
    #[arg(long, value_enum, default_value = "all")]
    mode: Mode,
    /// Which driver to be
    #[arg(long, value_enum, default_value = "local")]
    driver: Driver,
    /// Where to serve CSI; the kubelet must see the socket at the same path
    #[arg(long, default_value = "unix:///var/lib/kubelet/plugins/local.csi.keelway.dev/csi.sock")]
    endpoint: String,
    /// Journal and records
    #[arg(long, default_value = "/var/lib/keelway/csi")]
    state_dir: PathBuf,
    /// Images of volumes
    #[arg(long, default_value = "/var/lib/keelway/pool")]
    pool_dir: PathBuf,
    /// The kubelet's directory: volumes are mounted below it only
    #[arg(long, default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// This node's name; the host's name when absent
    #[arg(long, env = "NODE_NAME")]
    node_name: Option<String>,
    /// Backends that StorageClasses may name
    #[arg(long, value_delimiter = ',', default_value = "image")]
    backends: Vec<BackendKind>,
    /// Whole devices for the raw backend, by a path that stays, as in /dev/disk/by-id
    #[arg(long, value_delimiter = ',')]
    raw_devices: Vec<PathBuf>,
    /// The volume group of the lvm and lvm-thin backends
    #[arg(long, value_name = "NAME")]
    lvm_volume_group: Option<String>,
    /// The thin pool of the lvm-thin backend, in that group
    #[arg(long, value_name = "NAME")]
    lvm_thin_pool: Option<String>,
    /// The devices of that group, where LVM is to look at no others; else it looks at all but loop devices
    #[arg(long, value_delimiter = ',', value_name = "PATH")]
    lvm_devices: Vec<PathBuf>,
    /// How much of a thin pool may be promised, in percent of what it has
    #[arg(long, default_value_t = 100, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    lvm_overcommit: u32,
    /// How full a thin pool's data or metadata may be before nothing new is made in it
    #[arg(long, default_value_t = 90, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    lvm_watermark: u32,
    /// How many mkfs and copies may run at a time in each of pool, raw devices, volume group and thin pool
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    format_slots: u32,
    /// The most volumes that pods of this node may use; 0 for no limit
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..=100_000))]
    max_volumes: i64,
    /// Leave expansion to the node service, and do not offer changes of parameters: where one csi-resizer asks one node's
    /// driver for the volumes of all nodes
    #[arg(long)]
    expand_on_node: bool,
    /// Do not register with the kubelet (for use without one)
    #[arg(long)]
    no_registration: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Controller,
    Node,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Driver {
    Local,
}

/// Blocking operations at a time; more wait their turn. Each volume has one at most.
const BLOCKING_THREADS: usize = 256;
/// How long operations may take to end after SIGTERM, in seconds. The kubelet kills after 30.
const STOP_WITHIN: Duration = Duration::from_secs(25);

fn main() -> anyhow::Result<()> {
    if std::env::args_os().nth(1).is_some_and(|first| first == freeze::HELPER) {
        std::process::exit(freeze::helper());
    }
    // Sockets are for root alone from the moment they are bound.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "keelway_csi=info,warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let label = std::env::args_os().nth(1).is_some_and(|first| first == labels::COMMAND);
    let flags = (!label).then(Flags::parse);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .context("start the runtime")?;
    match flags {
        Some(flags) => runtime.block_on(run(flags)),
        None => runtime.block_on(labels::run()),
    }
}

async fn run(flags: Flags) -> anyhow::Result<()> {
    let Driver::Local = flags.driver;
    let node = match flags.node_name {
        Some(name) if !name.is_empty() => name,
        _ => rustix::system::uname().nodename().to_str().context("the host's name is no UTF-8")?.to_owned(),
    };
    let endpoint = socket_path(&flags.endpoint)?;
    for (flag, path) in
        [("--state-dir", &flags.state_dir), ("--pool-dir", &flags.pool_dir), ("--kubelet-dir", &flags.kubelet_dir)]
    {
        anyhow::ensure!(path.is_absolute(), "{flag}: {} is not an absolute path", path.display());
    }

    // State first, sockets last: nobody can ask for anything before recovery is over.
    let places = Places {
        state_dir: flags.state_dir,
        pool_dir: flags.pool_dir,
        kubelet_dir: flags.kubelet_dir.clone(),
        backends: flags.backends,
        devices: flags.raw_devices,
        lvm: LvmPlace {
            group: flags.lvm_volume_group,
            pool: flags.lvm_thin_pool,
            devices: flags.lvm_devices,
            overcommit: flags.lvm_overcommit,
            watermark: flags.lvm_watermark,
        },
    };
    let (volumes, open) = Volumes::open(&places)?;
    let report = volumes.recover(open)?;
    report.healed.iter().for_each(|what| tracing::info!("recovered: {what}"));
    report.left.iter().for_each(|what| tracing::warn!("found: {what}"));

    let shared = Shared {
        volumes: Arc::new(volumes),
        node: node.as_str().into(),
        kubelet_dir: flags.kubelet_dir.as_path().into(),
        long_slots: Slots::new(flags.format_slots as usize),
        max_volumes: flags.max_volumes,
        expand_on_node: flags.expand_on_node,
    };
    let features = shared.volumes.features();
    let (stop, stopping) = watch::channel(false);
    let stopped = |mut stopping: watch::Receiver<bool>| async move {
        // An error means that the sender is gone, which is a stop as well.
        let _ = stopping.wait_for(|&stop| stop).await;
    };
    let serves = |mode| flags.mode == mode || flags.mode == Mode::All;
    // Before anybody can see that the driver is there, and so think of stopping it.
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut socket = Socket::listen(&endpoint)?;
    let server = Server::builder()
        .add_service(IdentityServer::new(IdentityService { controller: serves(Mode::Controller), features }))
        .add_optional_service(
            serves(Mode::Controller).then(|| ControllerServer::new(ControllerService(shared.clone()))),
        )
        .add_optional_service(
            (serves(Mode::Controller) && features.snapshots)
                .then(|| GroupControllerServer::new(GroupService(shared.clone()))),
        )
        .add_optional_service(
            (serves(Mode::Controller) && features.tracking)
                .then(|| SnapshotMetadataServer::new(MetadataService(shared.clone()))),
        )
        .add_optional_service(serves(Mode::Node).then(|| NodeServer::new(NodeService(shared.clone()))))
        .serve_with_incoming_shutdown(socket.incoming(), stopped(stopping.clone()));
    let mut server = tokio::spawn(server);
    tracing::info!(driver = LOCAL_DRIVER, node, endpoint = %endpoint.display(), mode = ?flags.mode, "serving");

    let registration = if serves(Mode::Node) && !flags.no_registration {
        let path = flags.kubelet_dir.join("plugins_registry").join(format!("{LOCAL_DRIVER}-reg.sock"));
        let mut socket = Socket::listen(&path)?;
        let service = RegistrationService { endpoint: endpoint.to_str().context("--endpoint is no UTF-8")?.to_owned() };
        let server = Server::builder()
            .add_service(RegistrationServer::new(service))
            .serve_with_incoming_shutdown(socket.incoming(), stopped(stopping.clone()));
        tokio::spawn(server);
        Some(socket)
    } else {
        None
    };

    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
        ended = &mut server => {
            ended??;
            anyhow::bail!("the server ended by itself");
        }
    }
    // First the registration, so that the kubelet sends nobody any more; then what is under way may end.
    drop(registration);
    let _ = stop.send(true);
    let deadline = tokio::time::Instant::now() + STOP_WITHIN;
    while shared.volumes.under_way() > 0 && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let left = shared.volumes.under_way();
    if left > 0 {
        tracing::warn!(left, "stopping with operations under way; the next start recovers them");
    }
    drop(socket);
    // A caller's open connection is no reason to stay.
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    tracing::info!("stopped");
    std::process::exit(0)
}
