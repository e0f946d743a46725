//! keelway: what an operator asks a node's agent. Also runs as `kubectl keelway` when installed as `kubectl-keelway`.
//!
//! Exit status: 0 all is well, 1 the question could not be answered, 2 the command line is wrong, 3 the answer is that
//! something is wrong.
#![forbid(unsafe_code)]

mod json;
mod services;
mod status;
mod table;
mod volumes;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use keelway_api::v1::inspect_client::InspectClient;
use keelway_api::v1::{ListServicesRequest, NodeStatusRequest, ServiceState};

/// For how long the agent may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What went wrong was found by asking; the answer is on standard output.
const UNWELL: u8 = 3;

/// Ask this node's keelway-agent.
#[derive(Parser)]
#[command(name = "keelway", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// The agent's socket.
    #[arg(long, global = true, value_name = "FILE", default_value = keelway_api::DEFAULT_SOCKET)]
    socket: PathBuf,

    /// The CSI driver's socket.
    #[arg(long, global = true, value_name = "FILE", default_value = volumes::DEFAULT_SOCKET)]
    csi_socket: PathBuf,

    /// How to answer.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Subcommand)]
enum Command {
    /// The node: source, programs, tables, what is programmed, its local volumes, what was dropped, what is wrong.
    ///
    /// Exit status 3 when the first sync is not done, a program is not attached or something is wrong.
    Status,

    /// What Services are programmed as on this node: each frontend, its policy, affinity and flags, its backends and connections.
    ///
    /// Exit status 3 when something of a listed Service is not in force.
    Services(Which),

    /// The backends of Services as programmed on this node: state, place, connections.
    ///
    /// Connections are those of this node's pods, and of clients from outside that come by this node, by whichever frontend or
    /// none; sockets of the host itself are not counted.
    Endpoints(Which),

    /// Local volumes of this node: claim, backend, size, use, snapshots, health, pods, mounts; what belongs to none.
    ///
    /// From the driver's socket and records: those answer without the driver, too. Exit status 3 when a volume is not well or
    /// something has no owner.
    Volumes {
        /// The driver's records.
        #[arg(long, value_name = "DIR", default_value = "/var/lib/keelway/csi")]
        state_dir: PathBuf,
        /// The volumes' storage.
        #[arg(long, value_name = "DIR", default_value = "/var/lib/keelway/pool")]
        pool_dir: PathBuf,
        /// The kubelet's directory.
        #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
        kubelet_dir: PathBuf,
        /// The devices of the volume group, where the driver was given them, too.
        #[arg(long, value_delimiter = ',', value_name = "PATH")]
        lvm_devices: Vec<PathBuf>,
    },
}

#[derive(Args)]
struct Which {
    /// Only the Service of this name, or of NAMESPACE/NAME.
    #[arg(value_name = "SERVICE")]
    name: Option<String>,

    /// Only those of this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run(&cli))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(UNWELL),
        Err(error) => {
            eprintln!("keelway: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is well.
async fn run(cli: &Cli) -> anyhow::Result<bool> {
    match &cli.command {
        Command::Services(which) => {
            let services = list(cli, which).await?;
            let text = match cli.output {
                Output::Table => services::frontends(&services),
                Output::Json => format!("{:#}\n", json::services(&services)),
            };
            print(&text)?;
            Ok(services.iter().all(|service| service.problems.is_empty()))
        }
        Command::Endpoints(which) => {
            let services = list(cli, which).await?;
            let text = match cli.output {
                Output::Table => services::endpoints(&services),
                Output::Json => format!("{:#}\n", json::endpoints(&services)),
            };
            print(&text)?;
            Ok(true)
        }
        Command::Volumes { state_dir, pool_dir, kubelet_dir, lvm_devices } => {
            let listed = volumes::list(&cli.csi_socket, TIMEOUT).await;
            anyhow::ensure!(
                state_dir.exists() || !matches!(listed, volumes::Volumes::NoDriver),
                "{}: no such directory, and no driver listens at {}: this node has no local volumes",
                state_dir.display(),
                cli.csi_socket.display()
            );
            let places = volumes::local::Places {
                state: state_dir.clone(),
                pool: pool_dir.clone(),
                kubelet: kubelet_dir.clone(),
                lvm_devices: lvm_devices.clone(),
            };
            let driver = volumes::socket::Driver::dial(&cli.csi_socket, TIMEOUT).await;
            let listing = volumes::local::gather(&places, &driver).await?;
            print(&match cli.output {
                Output::Table => volumes::show::table(&listing, &listed),
                Output::Json => format!("{:#}\n", volumes::show::json(&listing, &listed)),
            })?;
            Ok(volumes::show::is_well(&listing, &listed))
        }
        Command::Status => {
            let mut client = InspectClient::new(connect(cli).await?);
            let answer = tokio::time::timeout(TIMEOUT, client.node_status(NodeStatusRequest {}));
            let answer = answer.await.with_context(|| format!("the agent did not answer within {TIMEOUT:?}"))?;
            let status =
                answer.map_err(|status| anyhow::anyhow!("the agent refused: {}", status.message()))?.into_inner();
            let volumes = volumes::list(&cli.csi_socket, TIMEOUT).await;
            let text = match cli.output {
                Output::Table => status::table(&status, &volumes),
                Output::Json => format!("{:#}\n", json::node_status(&status, &volumes)),
            };
            print(&text)?;
            Ok(status::is_well(&status, &volumes))
        }
    }
}

/// The Services that are asked for; an error when one is asked for by name and there is none.
async fn list(cli: &Cli, which: &Which) -> anyhow::Result<Vec<ServiceState>> {
    let given = which.name.clone().unwrap_or_default();
    let (namespace, name) = match given.split_once('/') {
        Some((namespace, name)) => (namespace.to_owned(), name.to_owned()),
        None => (which.namespace.clone().unwrap_or_default(), given),
    };
    let mut client = InspectClient::new(connect(cli).await?);
    let refused = |status: tonic::Status| anyhow::anyhow!("the agent refused: {}", status.message());
    let request = ListServicesRequest { namespace, name: name.clone() };
    let answer = tokio::time::timeout(TIMEOUT, async {
        let mut stream = client.list_services(request).await.map_err(refused)?.into_inner();
        let mut services = Vec::new();
        while let Some(service) = stream.message().await.map_err(refused)? {
            services.push(service);
        }
        anyhow::Ok(services)
    });
    let services = answer.await.with_context(|| format!("the agent did not answer within {TIMEOUT:?}"))??;
    if services.is_empty() && !name.is_empty() {
        anyhow::bail!("no Service {} is programmed on this node", which.name.as_deref().unwrap_or_default());
    }
    Ok(services)
}

/// A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("standard output"),
        _ => Ok(()),
    }
}

async fn connect(cli: &Cli) -> anyhow::Result<tonic::transport::Channel> {
    let socket = &cli.socket;
    // Asked first for the reason in plain words: the transport's own says less.
    if let Err(error) = tokio::net::UnixStream::connect(socket).await {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                "no keelway-agent is running on this node (or --socket is not its socket)"
            }
            std::io::ErrorKind::PermissionDenied => "only root may ask the agent",
            _ => "the agent cannot be reached",
        };
        anyhow::bail!("{}: {error}: {hint}", socket.display());
    }
    keelway_api::connect(socket, TIMEOUT).await.with_context(|| socket.display().to_string())
}
