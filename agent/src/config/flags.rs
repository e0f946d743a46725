//! What can be said on the command line and, under the same names, in the configuration file.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use serde::Deserialize;
use serde::de::{self, SeqAccess, Visitor};

/// keelway-agent: one node's Kubernetes network. Reads Services, EndpointSlices, Pods, Nodes, Namespaces and
/// NetworkPolicies, and keeps the kernel's tables like them.
#[derive(Debug, Parser)]
#[command(
    name = "keelway-agent",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_precedence_over_arg = true
)]
pub struct Cli {
    /// What to do; `run` when absent.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Settings of `run`.
    #[command(flatten)]
    pub flags: Flags,
}

/// What the agent's binary can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent (the default).
    Run(Box<Flags>),
    /// Remove everything that the agent left in the kernel and on disk: programs, maps, devices, routes, leases.
    Cleanup(Box<CleanupArgs>),
    /// Install the CNI plugin and its configuration on this node.
    InstallCni(InstallCniArgs),
    /// Print the version.
    Version,
}

/// A setting as written, before it is checked. In the file it may be a string, a number, a boolean or a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text(pub String);

impl FromStr for Text {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string, a number or a list of them")
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Text, E> {
                Ok(Text(value.to_owned()))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Text, A::Error> {
                let mut parts = Vec::new();
                while let Some(Text(part)) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Text(parts.join(",")))
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

/// Settings. Each is a flag and, without the dashes in front, a key of the configuration file.
#[derive(Clone, Debug, Default, Args, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Flags {
    /// Configuration file: the flags below as YAML keys. Flags win over it. [default: /etc/keelway/agent.yaml, if there]
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Read desired state from the Kubernetes API that this file names. Without this and --manifests: in-cluster.
    #[arg(long, value_name = "FILE", help_heading = "Source")]
    pub kubeconfig: Option<Text>,

    /// Read desired state from the YAML files of this directory, which is watched. No Kubernetes is needed.
    #[arg(long, value_name = "DIR", help_heading = "Source")]
    pub manifests: Option<Text>,

    /// API servers to dial, in order of preference. [default: the last known ones, else the in-cluster address]
    #[arg(long, value_name = "URL,...", help_heading = "Source")]
    pub api_servers: Option<Text>,

    /// Name of this node's Node object. [default: $NODE_NAME, else the host name]
    #[arg(long, value_name = "NAME", help_heading = "Node")]
    pub node_name: Option<Text>,

    /// Where socket hooks attach: all processes of the cgroups below are served. [default: the cgroup v2 mount]
    #[arg(long, value_name = "DIR", help_heading = "Node")]
    pub cgroup_root: Option<Text>,

    /// The bpffs mount; pins live in `keelway` below it. [default: /sys/fs/bpf]
    #[arg(long, value_name = "DIR", help_heading = "Node")]
    pub bpffs: Option<Text>,

    /// State that outlives reboots: leases, journals, last known API servers. [default: /var/lib/keelway]
    #[arg(long, value_name = "DIR", help_heading = "Node")]
    pub state_dir: Option<Text>,

    /// Holds agent.sock. [default: /run/keelway]
    #[arg(long, value_name = "DIR", help_heading = "Node")]
    pub run_dir: Option<Text>,

    /// How packets reach pods on other nodes: vxlan or routed. [default: vxlan]
    #[arg(long, value_name = "MODE", help_heading = "Network")]
    pub routing: Option<Text>,

    /// How a client outside is answered by a pod of another node than it dialled: snat (by the node that it dialled, whose address
    /// the pod sees), dsr (by the pod's node; the pod sees the client) or hybrid (TCP as dsr, all else as snat). [default: snat]
    #[arg(long, value_name = "MODE", help_heading = "Network")]
    pub load_balancer_mode: Option<Text>,

    /// Turns flows between clients outside and Services' backends on other nodes round before the kernel's stack, on the node's
    /// devices: native (in their drivers), generic (for any device), auto (the driver where it can) or off. [default: off]
    #[arg(long, value_name = "MODE", help_heading = "Network")]
    pub xdp: Option<Text>,

    /// Node devices that carry Service traffic, or auto: the device of the node's InternalIP. [default: auto]
    #[arg(long, value_name = "NAME,...", help_heading = "Network")]
    pub devices: Option<Text>,

    /// MTU of pods in bytes, or auto: the device's, less the tunnel's overhead. [default: auto]
    #[arg(long, value_name = "BYTES", help_heading = "Network")]
    pub mtu: Option<Text>,

    /// UDP port of the VXLAN tunnel, the same on all nodes. [default: 8472]
    #[arg(long, value_name = "PORT", help_heading = "Network")]
    pub vxlan_port: Option<Text>,

    /// Source ports of masqueraded connections. [default: 61000-64511]
    #[arg(long, value_name = "FIRST-LAST", help_heading = "Network")]
    pub snat_ports: Option<Text>,

    /// Addresses of the node on which node ports answer: all, primary (those of the Node object), or those in prefixes, of a
    /// family without any all. [default: all]
    #[arg(long, value_name = "CIDR,...", help_heading = "Network")]
    pub nodeport_addresses: Option<Text>,

    /// Serves /metrics; off to serve none. [default: 127.0.0.1:9965]
    #[arg(long, value_name = "ADDR", help_heading = "Serving")]
    pub metrics_addr: Option<Text>,

    /// Serve kube-proxy's metrics under its own names (kubeproxy_...) beside ours: true or false. [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", help_heading = "Serving")]
    pub kube_proxy_metrics: Option<Text>,

    /// Serves /healthz, /livez and /readyz; off to serve none. [default: :10256]
    #[arg(long, value_name = "ADDR", help_heading = "Serving")]
    pub healthz_addr: Option<Text>,

    /// How long CNI STATUS stays good while no agent runs, e.g. 90s or 5m. [default: 5m]
    #[arg(long, value_name = "DURATION", help_heading = "Serving")]
    pub status_grace: Option<Text>,
}

/// Settings of `cleanup`.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Remove what a former kube-proxy left in the kernel, and nothing of this agent. Its live connections go on.
    #[arg(long)]
    pub kube_proxy: bool,

    /// With --kube-proxy: although a kube-proxy runs, and although connections go on through its virtual servers of IPVS, which end.
    #[arg(long, requires = "kube_proxy")]
    pub force: bool,

    /// The settings that the agent ran with, as far as they say where things are.
    #[command(flatten)]
    pub flags: Flags,
}

/// Settings of `install-cni`.
#[derive(Clone, Debug, Args)]
pub struct InstallCniArgs {
    /// Where the container runtime looks for CNI plugins.
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,

    /// Where the container runtime looks for CNI configurations.
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,

    /// The plugin to install. [default: keelway-cni beside this executable]
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,

    /// The agent's configuration file, for run-dir, state-dir and status-grace. [default: /etc/keelway/agent.yaml, if there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// The agent's run directory on the node: the configuration names agent.sock in it. [default: /run/keelway]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<Text>,

    /// The agent's state directory on the node: DELs wait there while no agent runs. [default: /var/lib/keelway]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<Text>,

    /// How long STATUS stays good while no agent runs. [default: 5m]
    #[arg(long, value_name = "DURATION")]
    pub status_grace: Option<Text>,

    /// Install although another plugin's configuration is there.
    #[arg(long)]
    pub allow_foreign_cni: bool,
}
