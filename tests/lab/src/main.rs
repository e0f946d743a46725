//! `keelway-lab`: the lab for people, and the small programs that the lab library runs of itself.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use keelway_lab::cluster::conformance::{self, Fate};
use keelway_lab::cluster::{self, Cluster, balancer, programs, storage};
use keelway_lab::enter::Enter;
use keelway_lab::standalone::{self, Standalone};
use keelway_lab::{Host, Lab, bench, boot, clean, demo, enter, netns};

#[derive(Parser)]
#[command(about = "A lab of nodes on one machine: for tests, for the demos, and to look around in")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring up nodes to look around in; Ctrl-C removes them.
    Lab {
        /// How many nodes.
        #[arg(default_value_t = 2)]
        nodes: u8,
        /// Without a container runtime and an agent on them.
        #[arg(long)]
        bare: bool,
        /// The lab's name, 1 to 7 letters or digits.
        #[arg(long, default_value = "lab")]
        id: String,
    },
    /// Run a program on a machine of a lab: node1, node2, ..., outside, and a cluster's cp.
    #[command(trailing_var_arg = true)]
    Exec {
        /// The lab's name.
        #[arg(long, default_value = "lab")]
        id: String,
        /// The machine.
        host: String,
        /// The program and its arguments.
        #[arg(required = true, allow_hyphen_values = true)]
        argv: Vec<String>,
    },
    /// Keelway on two nodes without Kubernetes: every step and what was seen, in one table.
    Demo,
    /// What Keelway costs, each figure beside its peer's; in one table.
    Bench,
    /// What Services cost, each figure beside kube-proxy's on the same objects; in one table.
    BenchServices(bench::ServicesOptions),
    /// What volumes cost, each figure beside Debian's tools by hand; in one table.
    BenchCsi,
    /// The same story on a real Kubernetes.
    DemoCluster,
    /// A real Kubernetes in the lab.
    Cluster {
        /// The cluster's name: several may be up.
        #[arg(long, default_value = cluster::ID)]
        id: String,
        #[command(subcommand)]
        command: ClusterCommand,
    },
    /// Remove what a crashed run left behind (with --all, running labs too).
    Clean {
        /// Remove every lab, also those in use.
        #[arg(long)]
        all: bool,
    },
    #[command(hide = true)]
    Balance(balancer::Balance),
    #[command(hide = true)]
    BenchCni(bench::Calls),
    #[command(hide = true)]
    BenchFlood(bench::Flood),
    #[command(hide = true)]
    BenchTurns(bench::Turns),
    #[command(hide = true)]
    Guard { id: String },
    #[command(hide = true)]
    NodeInit { spec: PathBuf },
    #[command(hide = true)]
    NodePid1 { spec: PathBuf },
    #[command(hide = true)]
    Enter(Enter),
}

#[derive(Subcommand)]
enum ClusterCommand {
    /// Build the cluster's programs into the cache (with --suite, upstream's end-to-end suite too).
    Build {
        /// Also e2e.test and agnhost.
        #[arg(long)]
        suite: bool,
    },
    /// Bring a cluster up and leave it. Services of type LoadBalancer get addresses from a stand-in for a cloud's balancer.
    Up {
        /// How many nodes.
        #[arg(default_value_t = 2)]
        nodes: u8,
    },
    /// Run kubectl as the administrator.
    #[command(trailing_var_arg = true)]
    Kubectl {
        /// Its arguments.
        #[arg(allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run a program on a machine: node1, node2, ..., cp, outside.
    #[command(trailing_var_arg = true)]
    Exec {
        /// The machine.
        host: String,
        /// The program and its arguments.
        #[arg(required = true, allow_hyphen_values = true)]
        argv: Vec<String>,
    },
    /// Install Keelway, from this workspace's programs and manifests, and CoreDNS.
    Install {
        /// Also all for volumes: a disk for each node's pool, and what snapshots need.
        #[arg(long)]
        storage: bool,
    },
    /// Import an image archive on every node.
    Load {
        /// The archives.
        archives: Vec<PathBuf>,
    },
    /// Run upstream's suite: the network's [Conformance] specs, and those of Services, DNS and proxy that can run here
    /// (tests/cluster/network-specs.txt).
    Conformance {
        /// Only specs that match a regular expression, whatever they are about.
        #[arg(long, value_name = "REGEX", conflicts_with = "only_conformance")]
        focus: Option<String>,
        /// Only the [Conformance] specs of the network.
        #[arg(long)]
        only_conformance: bool,
    },
    /// Run upstream's External.Storage suite against the CSI driver.
    ConformanceStorage {
        /// A regular expression: only specs that match it, too.
        #[arg(long, value_name = "REGEX", default_value = storage::FOCUS)]
        focus: String,
    },
    /// Remove the cluster.
    Down,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(255)),
        Err(error) => {
            eprintln!("keelway-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<i32> {
    match command {
        Command::Lab { nodes, bare, id } => return interactive(Lab::named(&id, nodes)?, bare),
        Command::Exec { id, host, argv } => return exec(&Lab::open(&id)?, &host, &argv),
        Command::Demo => return Ok(i32::from(!demo::run()?)),
        Command::Bench => return Ok(i32::from(!bench::run()?)),
        Command::BenchServices(options) => return Ok(i32::from(!bench::services(&options)?)),
        Command::BenchCsi => return Ok(i32::from(!bench::volumes()?)),
        Command::Balance(balance) => balancer::run(&balance)?,
        Command::BenchCni(calls) => calls.run()?,
        Command::BenchFlood(flood) => flood.run()?,
        Command::BenchTurns(turns) => turns.run()?,
        Command::DemoCluster => return Ok(i32::from(!cluster::demo::run()?)),
        Command::Cluster { id, command } => return cluster(&id, command),
        Command::Clean { all } => {
            for id in clean::leftovers(all)? {
                clean::remove(&id)?;
                println!("removed lab {id}");
            }
        }
        Command::Guard { id } => clean::guard(&id)?,
        Command::NodeInit { spec } => return boot::init(&spec),
        Command::NodePid1 { spec } => boot::pid1(&spec)?,
        Command::Enter(wanted) => return enter::enter(&wanted),
    }
    Ok(0)
}

/// Shows a lab's machines and waits for Ctrl-C; the lab's guard sees this process end and removes the lab.
fn interactive(lab: Lab, bare: bool) -> Result<i32> {
    let id = lab.id.clone();
    for host in lab.nodes().iter().map(|node| -> &Host { node }).chain([&lab.outside]) {
        println!("{:<8} {}  {}   keelway-lab exec --id {id} {} bash", host.name, host.v4, host.v6, host.name);
    }
    let _alive: Box<dyn std::any::Any> = if bare {
        Box::new(lab)
    } else {
        if let Some(reason) = standalone::missing() {
            anyhow::bail!(reason);
        }
        let running = Standalone::on(lab, &[])?;
        println!("agents run on every node; they read {}", running.manifests.display());
        Box::new(running)
    };
    println!("Ctrl-C removes it all");
    loop {
        std::thread::park();
    }
}

fn exec(lab: &Lab, name: &str, argv: &[String]) -> Result<i32> {
    let control_plane = lab.host("cp", netns::CONTROL_PLANE)?;
    let nodes = lab.nodes().iter().map(|node| -> &Host { node });
    let mut all = nodes.chain([&lab.outside, &control_plane]).filter(|host| host.netns().exists());
    let host = all.find(|host| host.name == name).with_context(|| format!("lab {} has no machine `{name}`", lab.id))?;
    Ok(host.command(argv)?.status()?.code().unwrap_or(1))
}

fn cluster(id: &str, command: ClusterCommand) -> Result<i32> {
    match command {
        ClusterCommand::Build { suite } => {
            programs::build(programs::CLUSTER)?;
            programs::build(if suite { programs::SUITE } else { &[] })?;
        }
        ClusterCommand::Up { nodes } => {
            let cluster = Cluster::up(id, nodes)?;
            balancer::start(&cluster)?;
            print!("{}", cluster.kubectl(&["get", "nodes", "-o", "wide"])?);
            cluster.lab.keep()?;
        }
        ClusterCommand::Kubectl { args } => {
            let cluster = Cluster::open(id)?;
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let status = cluster.control_plane.command(&cluster.kubectl_argv(&args))?.status()?;
            return Ok(status.code().unwrap_or(1));
        }
        ClusterCommand::Exec { host, argv } => return exec(&Lab::open(id)?, &host, &argv),
        ClusterCommand::Install { storage } => {
            let cluster = Cluster::open(id)?;
            if storage {
                cluster::install::pools(&cluster)?;
            }
            cluster::install::keelway(&cluster)?;
            cluster::demo::ready(&cluster)?;
            cluster::install::coredns(&cluster)?;
            if storage {
                cluster::install::limit_volumes(&cluster, storage::MAX_VOLUMES)?;
                cluster::install::snapshots(&cluster)?;
            }
        }
        ClusterCommand::Load { archives } => {
            let cluster = Cluster::open(id)?;
            for archive in archives {
                cluster.import(&archive.canonicalize()?)?;
            }
        }
        ClusterCommand::Conformance { focus, only_conformance } => {
            let cluster = Cluster::open(id)?;
            let (outcome, name, flag) = match (focus, only_conformance) {
                (Some(focus), _) => (conformance::run(&cluster, &focus)?, "conformance", format!(" --focus '{focus}'")),
                (None, true) => {
                    let flag = " --only-conformance".to_owned();
                    (conformance::run(&cluster, conformance::NETWORK)?, "conformance", flag)
                }
                (None, false) => (conformance::run_network(&cluster)?, "conformance-network", String::new()),
            };
            let all = conformance::report(name, &format!("hack/conformance-network{flag}"), &outcome)?;
            return Ok(i32::from(!all));
        }
        ClusterCommand::ConformanceStorage { focus } => {
            let cluster = Cluster::open(id)?;
            let outcome = storage::run(&cluster, &focus)?;
            let command = match focus == storage::FOCUS {
                true => "hack/conformance-storage".to_owned(),
                false => format!("hack/conformance-storage --focus '{focus}'"),
            };
            let name = if focus == storage::FOCUS { "conformance-storage" } else { "conformance" };
            conformance::report(name, &command, &outcome)?;
            let failed = outcome.values().any(|fate| matches!(fate, Fate::Ended(state) if state != "passed"));
            return Ok(i32::from(failed || outcome.is_empty()));
        }
        ClusterCommand::Down => clean::remove(id)?,
    }
    Ok(0)
}
