//! From what was written to what is meant: every setting is checked here, and only here.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::cgroup::NoMount;
use super::flags::{Flags, Text};
use super::{
    Config, Host, Listen, LoadBalancerMode, NodePortAddresses, PluginConfig, PortRange, Routing, SourceConfig, Xdp,
};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("--config {path}: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The file is not YAML, or has an unknown key or one of the wrong kind.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// Which key and where.
        reason: String,
    },
    /// A setting has a value that cannot be used.
    #[error("{field}: {value:?} is not {expected}")]
    Value {
        /// The setting.
        field: &'static str,
        /// What it says.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Two sources are asked for.
    #[error("kubeconfig ({kubeconfig:?}) and manifests ({manifests:?}): expected one source, not two")]
    TwoSources {
        /// The one.
        kubeconfig: String,
        /// The other.
        manifests: String,
    },
    /// A default cannot be found out.
    #[error("{field}: not set, and {reason}")]
    NoDefault {
        /// The setting.
        field: &'static str,
        /// Why there is no default.
        reason: &'static str,
    },
}

/// Room that the kernel and the tunnel need, and the smallest MTU of IPv6.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 1280..=65535;

/// Checks `flags` over `file`.
pub(super) fn check(flags: &Flags, file: &Flags, host: &Host) -> Result<Config, ConfigError> {
    let plugin = check_plugin(flags, file)?;
    Ok(Config {
        source: source(flags, file)?,
        node_name: node_name(over(&flags.node_name, &file.node_name), host)?,
        cgroup_root: cgroup_root(over(&flags.cgroup_root, &file.cgroup_root), host)?,
        bpffs: path("bpffs", over(&flags.bpffs, &file.bpffs), "/sys/fs/bpf")?,
        state_dir: plugin.state_dir,
        run_dir: plugin.run_dir,
        routing: routing(over(&flags.routing, &file.routing))?,
        load_balancer_mode: load_balancer_mode(over(&flags.load_balancer_mode, &file.load_balancer_mode))?,
        xdp: xdp(over(&flags.xdp, &file.xdp))?,
        devices: devices(over(&flags.devices, &file.devices))?,
        mtu: mtu(over(&flags.mtu, &file.mtu))?,
        vxlan_port: port("vxlan-port", over(&flags.vxlan_port, &file.vxlan_port), 8472)?,
        snat_ports: snat_ports(over(&flags.snat_ports, &file.snat_ports))?,
        nodeport_addresses: nodeport_addresses(over(&flags.nodeport_addresses, &file.nodeport_addresses))?,
        metrics_addr: listen("metrics-addr", over(&flags.metrics_addr, &file.metrics_addr), "127.0.0.1:9965")?,
        kube_proxy_metrics: boolean(
            "kube-proxy-metrics",
            over(&flags.kube_proxy_metrics, &file.kube_proxy_metrics),
            false,
        )?,
        healthz_addr: listen("healthz-addr", over(&flags.healthz_addr, &file.healthz_addr), ":10256")?,
        status_grace: plugin.status_grace,
    })
}

/// Checks what the CNI plugin has to know of the agent, of `flags` over `file`.
pub(super) fn check_plugin(flags: &Flags, file: &Flags) -> Result<PluginConfig, ConfigError> {
    Ok(PluginConfig {
        state_dir: path("state-dir", over(&flags.state_dir, &file.state_dir), "/var/lib/keelway")?,
        run_dir: path("run-dir", over(&flags.run_dir, &file.run_dir), "/run/keelway")?,
        status_grace: duration("status-grace", over(&flags.status_grace, &file.status_grace), "5m")?,
    })
}

/// The flag, else the file's key.
fn over<'a>(flag: &'a Option<Text>, file: &'a Option<Text>) -> Option<&'a str> {
    flag.as_ref().or(file.as_ref()).map(|text| text.0.trim())
}

fn wrong(field: &'static str, value: &str, expected: &'static str) -> ConfigError {
    ConfigError::Value { field, value: value.to_owned(), expected }
}

/// A flag that names a source overrides the file's choice of another one.
fn source(flags: &Flags, file: &Flags) -> Result<SourceConfig, ConfigError> {
    let chosen = if flags.kubeconfig.is_some() || flags.manifests.is_some() { flags } else { file };
    let api_servers = api_servers(over(&flags.api_servers, &file.api_servers))?;
    match (&chosen.kubeconfig, &chosen.manifests) {
        (Some(kubeconfig), Some(manifests)) => {
            Err(ConfigError::TwoSources { kubeconfig: kubeconfig.0.clone(), manifests: manifests.0.clone() })
        }
        (Some(_), None) => {
            Ok(SourceConfig::Kubeconfig { path: path("kubeconfig", over(&chosen.kubeconfig, &None), "")?, api_servers })
        }
        (None, Some(_)) if !api_servers.is_empty() => {
            Err(wrong("api-servers", &api_servers.join(","), "used together with manifests: leave one out"))
        }
        (None, Some(_)) => Ok(SourceConfig::Manifests { dir: path("manifests", over(&chosen.manifests, &None), "")? }),
        (None, None) => Ok(SourceConfig::InCluster { api_servers }),
    }
}

fn api_servers(value: Option<&str>) -> Result<Vec<String>, ConfigError> {
    let Some(value) = value else { return Ok(Vec::new()) };
    const EXPECTED: &str = "a list of https://HOST[:PORT] URLs, separated by commas";
    let one = |text: &str| {
        let url = text.trim().trim_end_matches('/');
        let uri: http::Uri = url.parse().map_err(|_| wrong("api-servers", text, EXPECTED))?;
        let scheme_fits = matches!(uri.scheme_str(), Some("https" | "http"));
        if scheme_fits && uri.host().is_some() && matches!(uri.path(), "" | "/") && uri.query().is_none() {
            Ok(url.to_owned())
        } else {
            Err(wrong("api-servers", text, EXPECTED))
        }
    };
    value.split(',').map(one).collect()
}

fn node_name(value: Option<&str>, host: &Host) -> Result<String, ConfigError> {
    const EXPECTED: &str = "a node name: lower case letters, digits, '-' and '.', at most 253 characters";
    let name = match value.or(host.node_name.as_deref()) {
        Some(name) => name.to_owned(),
        None if host.hostname.is_empty() => {
            return Err(ConfigError::NoDefault { field: "node-name", reason: "the host has no name" });
        }
        // As the kubelet does.
        None => host.hostname.trim().to_lowercase(),
    };
    let label_fits = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(label_fits) {
        Ok(name)
    } else {
        Err(wrong("node-name", &name, EXPECTED))
    }
}

fn cgroup_root(value: Option<&str>, host: &Host) -> Result<PathBuf, ConfigError> {
    match value {
        Some("auto") | None => host.cgroup2_mount().map_err(|none| ConfigError::NoDefault {
            field: "cgroup-root",
            reason: match none {
                NoMount::None => "no cgroup v2 file system is mounted (mount -t cgroup2 none /sys/fs/cgroup)",
                NoMount::ContainerOnly => {
                    "only this container's part of the cgroup v2 hierarchy is mounted: mount the node's /sys/fs/cgroup, \
                     for example at /host/cgroup"
                }
            },
        }),
        value => path("cgroup-root", value, ""),
    }
}

fn path(field: &'static str, value: Option<&str>, default: &str) -> Result<PathBuf, ConfigError> {
    let value = value.unwrap_or(default);
    // A daemon's working directory is nobody's business, but files handed over on a command line may be relative.
    let relative_is_fine = matches!(field, "kubeconfig" | "manifests");
    if value.is_empty() || (!relative_is_fine && !value.starts_with('/')) {
        return Err(wrong(field, value, if relative_is_fine { "a path" } else { "an absolute path" }));
    }
    Ok(value.into())
}

fn routing(value: Option<&str>) -> Result<Routing, ConfigError> {
    match value.unwrap_or("vxlan") {
        "vxlan" => Ok(Routing::Vxlan),
        "routed" => Ok(Routing::Routed),
        other => Err(wrong("routing", other, "vxlan or routed")),
    }
}

fn load_balancer_mode(value: Option<&str>) -> Result<LoadBalancerMode, ConfigError> {
    match value.unwrap_or("snat") {
        "snat" => Ok(LoadBalancerMode::Snat),
        "dsr" => Ok(LoadBalancerMode::Dsr),
        "hybrid" => Ok(LoadBalancerMode::Hybrid),
        other => Err(wrong("load-balancer-mode", other, "snat, dsr or hybrid")),
    }
}

fn xdp(value: Option<&str>) -> Result<Xdp, ConfigError> {
    match value.unwrap_or("off") {
        "off" => Ok(Xdp::Off),
        "native" => Ok(Xdp::Native),
        "generic" => Ok(Xdp::Generic),
        "auto" => Ok(Xdp::Auto),
        other => Err(wrong("xdp", other, "off, native, generic or auto")),
    }
}

fn devices(value: Option<&str>) -> Result<Vec<String>, ConfigError> {
    let Some(value) = value.filter(|value| *value != "auto") else { return Ok(Vec::new()) };
    let one = |name: &str| {
        let name = name.trim();
        let fits = (1..=15).contains(&name.len())
            && name != "auto"
            && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
        if fits {
            Ok(name.to_owned())
        } else {
            Err(wrong("devices", value, "auto, or device names of 1 to 15 characters, separated by commas"))
        }
    };
    value.split(',').map(one).collect()
}

fn mtu(value: Option<&str>) -> Result<Option<u32>, ConfigError> {
    match value {
        None | Some("auto") => Ok(None),
        Some(text) => match text.parse() {
            Ok(mtu) if MTU_RANGE.contains(&mtu) => Ok(Some(mtu)),
            _ => Err(wrong("mtu", text, "auto or a number from 1280 to 65535")),
        },
    }
}

fn port(field: &'static str, value: Option<&str>, default: u16) -> Result<u16, ConfigError> {
    match value.map(u16::from_str) {
        None => Ok(default),
        Some(Ok(port)) if port != 0 => Ok(port),
        Some(_) => Err(wrong(field, value.unwrap_or_default(), "a port from 1 to 65535")),
    }
}

fn snat_ports(value: Option<&str>) -> Result<PortRange, ConfigError> {
    let value = value.unwrap_or("61000-64511");
    let range = value.split_once('-').and_then(|(first, last)| {
        Some(PortRange { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? })
    });
    match range {
        Some(range) if range.first >= 1024 && range.first <= range.last => Ok(range),
        _ => Err(wrong("snat-ports", value, "a range FIRST-LAST of ports from 1024 to 65535")),
    }
}

fn nodeport_addresses(value: Option<&str>) -> Result<NodePortAddresses, ConfigError> {
    let one = |text: &str| {
        const EXPECTED: &str = "all, primary, or a list of prefixes such as 10.0.0.0/8, separated by commas";
        text.trim().parse::<ipnet::IpNet>().map_err(|_| wrong("nodeport-addresses", text, EXPECTED))
    };
    match value.unwrap_or("all") {
        "all" | "" => Ok(NodePortAddresses::All),
        "primary" => Ok(NodePortAddresses::Primary),
        list => Ok(NodePortAddresses::In(list.split(',').map(one).collect::<Result<_, _>>()?)),
    }
}

fn listen(field: &'static str, value: Option<&str>, default: &str) -> Result<Option<Listen>, ConfigError> {
    let value = value.unwrap_or(default);
    let expected = "IP:PORT, [IPv6]:PORT, :PORT or off";
    if value == "off" {
        return Ok(None);
    }
    let (host, port) = value.rsplit_once(':').ok_or_else(|| wrong(field, value, expected))?;
    let port = port.parse().map_err(|_| wrong(field, value, expected))?;
    let host = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        None if host.is_empty() => None,
        None => Some(IpAddr::V4(host.parse().map_err(|_| wrong(field, value, expected))?)),
        Some(Some(v6)) => Some(IpAddr::V6(v6.parse().map_err(|_| wrong(field, value, expected))?)),
        Some(None) => return Err(wrong(field, value, expected)),
    };
    Ok(Some(Listen { host, port }))
}

fn boolean(field: &'static str, value: Option<&str>, default: bool) -> Result<bool, ConfigError> {
    match value {
        None => Ok(default),
        Some("true") => Ok(true),
        Some("false") => Ok(false),
        Some(other) => Err(wrong(field, other, "true or false")),
    }
}

fn duration(field: &'static str, value: Option<&str>, default: &str) -> Result<Duration, ConfigError> {
    let value = value.unwrap_or(default);
    let split = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let (number, unit) = value.split_at(split);
    let factor: Option<u64> = match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        _ => None,
    };
    number
        .parse::<u64>()
        .ok()
        .zip(factor)
        .and_then(|(number, factor)| number.checked_mul(factor))
        .map(Duration::from_secs)
        .ok_or_else(|| wrong(field, value, "a whole number with its unit, such as 90s, 5m or 1h"))
}
