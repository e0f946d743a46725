//! The agent's configuration: command line and YAML file in, one checked [`Config`] out.
//!
//! [`flags`] holds what can be said (the flags are the keys of the file), [`check`] turns it into values or an error that
//! names the setting, [`host`] reads what the host is asked for defaults. Flags win over the file.

mod cgroup;
mod check;
mod flags;
mod host;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

pub use check::ConfigError;
pub use flags::{CleanupArgs, Cli, Command, Flags, InstallCniArgs, Text};
pub use host::Host;

/// Where the configuration file is looked for when `--config` is absent.
pub const DEFAULT_FILE: &str = "/etc/keelway/agent.yaml";

/// Where desired state comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// The Kubernetes API, by the pod's service account.
    InCluster {
        /// `--api-servers`: URLs to dial instead of the in-cluster address; empty: last known ones, then in-cluster.
        api_servers: Vec<String>,
    },
    /// The Kubernetes API, by a kubeconfig file.
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// `--api-servers`: URLs to dial instead of the file's; empty: the file's.
        api_servers: Vec<String>,
    },
    /// A directory of YAML files.
    Manifests {
        /// The directory.
        dir: PathBuf,
    },
}

/// How packets reach pods on other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// By one VXLAN device in collect-metadata mode.
    Vxlan,
    /// By plain routes to the other nodes' addresses.
    Routed,
}

impl Routing {
    /// As in `--routing`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Routed => "routed",
        }
    }
}

/// How a client outside is answered by a pod of another node than the one that it dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadBalancerMode {
    /// By the node that was dialled, whose address the pod sees.
    Snat,
    /// By the pod's node; the pod sees the client.
    Dsr,
    /// TCP as [`Self::Dsr`], everything else as [`Self::Snat`].
    Hybrid,
}

impl LoadBalancerMode {
    /// As in `--load-balancer-mode`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Snat => "snat",
            Self::Dsr => "dsr",
            Self::Hybrid => "hybrid",
        }
    }
}

/// Whether flows that only turn round here do so before the kernel's stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Xdp {
    /// No: by tc, as all else.
    Off,
    /// By the devices' drivers.
    Native,
    /// By the kernel, for any device.
    Generic,
    /// By the driver where it can, else by the kernel.
    Auto,
}

impl Xdp {
    /// As in `--xdp`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Auto => "auto",
        }
    }
}

/// On which of the node's addresses node ports answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// On all, and for the host's own processes on the loopback address too.
    All,
    /// On those of the Node object.
    Primary,
    /// On those inside of these prefixes; of a family that has none here, or all of it, on all.
    In(Vec<IpNet>),
}

impl NodePortAddresses {
    /// Whether node ports answer on all addresses of a family (kube-proxy's rule: each family is told for itself).
    pub fn is_all(&self, ipv6: bool) -> bool {
        match self {
            Self::All => true,
            Self::Primary => false,
            Self::In(prefixes) => {
                let mut own = prefixes.iter().filter(|prefix| prefix.addr().is_ipv6() == ipv6).peekable();
                own.peek().is_none() || own.any(|prefix| prefix.prefix_len() == 0)
            }
        }
    }
}

/// A range of ports, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The first.
    pub first: u16,
    /// The last; not below the first.
    pub last: u16,
}

/// Where to serve HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// `None`: every address of both families.
    pub host: Option<IpAddr>,
    /// TCP port; 0 lets the kernel choose.
    pub port: u16,
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host {
            None => write!(f, ":{}", self.port),
            Some(IpAddr::V4(host)) => write!(f, "{host}:{}", self.port),
            Some(IpAddr::V6(host)) => write!(f, "[{host}]:{}", self.port),
        }
    }
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where desired state comes from.
    pub source: SourceConfig,
    /// The name of this node's Node object.
    pub node_name: String,
    /// The cgroup v2 directory at which socket hooks attach.
    pub cgroup_root: PathBuf,
    /// The bpffs mount; pins live in `keelway` below it.
    pub bpffs: PathBuf,
    /// Leases, journals, last known API servers.
    pub state_dir: PathBuf,
    /// `agent.sock`.
    pub run_dir: PathBuf,
    /// How packets reach pods on other nodes.
    pub routing: Routing,
    /// How clients outside are answered by pods of other nodes.
    pub load_balancer_mode: LoadBalancerMode,
    /// Whether flows that only turn round here do so before the kernel's stack.
    pub xdp: Xdp,
    /// Node devices; empty: the device of the node's InternalIP.
    pub devices: Vec<String>,
    /// MTU of pods in bytes; `None`: from the device, less the tunnel's overhead.
    pub mtu: Option<u32>,
    /// UDP port of the tunnel.
    pub vxlan_port: u16,
    /// Ports that masquerading picks from.
    pub snat_ports: PortRange,
    /// On which of the node's addresses node ports answer.
    pub nodeport_addresses: NodePortAddresses,
    /// Where `/metrics` is served; `None`: nowhere.
    pub metrics_addr: Option<Listen>,
    /// Whether `/metrics` has kube-proxy's own names too.
    pub kube_proxy_metrics: bool,
    /// Where `/healthz`, `/livez` and `/readyz` are served; `None`: nowhere.
    pub healthz_addr: Option<Listen>,
    /// For how long `keelway-cni` STATUS stays good without an agent.
    pub status_grace: Duration,
}

/// What the CNI plugin has to know of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginConfig {
    /// As in [`Config`].
    pub state_dir: PathBuf,
    /// As in [`Config`].
    pub run_dir: PathBuf,
    /// As in [`Config`].
    pub status_grace: Duration,
}

impl PluginConfig {
    /// What an `install-cni` is told, over the agent's file.
    ///
    /// # Errors
    /// The first setting that cannot be used, by name, with its value and what was expected.
    pub fn load(args: &InstallCniArgs) -> Result<Self, ConfigError> {
        let flags = Flags {
            run_dir: args.run_dir.clone(),
            state_dir: args.state_dir.clone(),
            status_grace: args.status_grace.clone(),
            ..Flags::default()
        };
        check::check_plugin(&flags, &host::read_file(args.config.as_deref())?)
    }
}

impl Config {
    /// The configuration of a `run`: `flags` over the file that they name (or the default file, which may be absent).
    ///
    /// # Errors
    /// The first setting that cannot be used, by name, with its value and what was expected.
    pub fn load(flags: &Flags, host: &Host) -> Result<Self, ConfigError> {
        let file = host::read_file(flags.config.as_deref())?;
        check::check(flags, &file, host)
    }

    /// `keelway` below the bpffs mount.
    pub fn pin_dir(&self) -> PathBuf {
        self.bpffs.join("keelway")
    }

    /// The agent's gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }
}

#[cfg(test)]
mod tests;
