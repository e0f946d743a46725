//! Two nodes with the same objects: ours with an agent, the peer's with kube-proxy and pods on routed veth pairs.
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::traffic::{Place, Server};
use super::objects;
use crate::cluster::programs::bin_dir;
use crate::memory_api::MemoryApi;
use crate::probe::Asked;
use crate::sh::{self, wait_for};
use crate::{Lab, Node, Process, plugin};

/// What kube-proxy writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Maps and chains of nftables.
    Nftables,
    /// Chains of iptables.
    Iptables,
}

impl Mode {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }

    pub(super) const fn peer(self) -> &'static str {
        match self {
            Self::Nftables => "kube-proxy nftables",
            Self::Iptables => "kube-proxy iptables",
        }
    }
}

/// Whose node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Ours,
    Peer,
}

/// The lab of the bench.
pub(super) struct Site {
    servers: Vec<(Side, IpAddr, Server)>,
    agent: Option<Process>,
    kube_proxy: Option<Process>,
    pub(super) api: MemoryApi,
    kubeconfig: PathBuf,
    /// How many Services there are beside the targets.
    pub(super) fillers: usize,
    // Last, so that what runs in it ends first.
    pub(super) lab: Lab,
}

impl Site {
    pub(super) fn new() -> Result<Self> {
        let lab = Lab::new(2)?;
        let api = MemoryApi::start(&lab.outside)?;
        let kubeconfig = api.kubeconfig(&lab.dir)?;
        Ok(Self { servers: Vec::new(), agent: None, kube_proxy: None, api, kubeconfig, fillers: 0, lab })
    }

    pub(super) fn node(&self, side: Side) -> &Node {
        self.lab.node(if side == Side::Ours { 1 } else { 2 })
    }

    pub(super) const fn cidr(side: Side) -> &'static str {
        match side {
            Side::Ours => "10.244.1.0/24",
            Side::Peer => "10.244.2.0/24",
        }
    }

    /// Starts the agent; it may still be reading when this returns.
    pub(super) fn spawn_agent(&mut self) -> Result<()> {
        let node = self.node(Side::Ours);
        let own = |name: &str| sh::own(name).map(|path| path.display().to_string());
        node.run(&[own("keelway-agent")?, "install-cni".into(), "--from".into(), own("keelway-cni")?])?;
        let kubeconfig = self.kubeconfig.display().to_string();
        let argv = [own("keelway-agent")?, "--kubeconfig".into(), kubeconfig, "--node-name".into(), node.name.clone()];
        self.agent = Some(node.spawn("agent", &argv)?);
        Ok(())
    }

    /// What the agent has said.
    pub(super) fn agent_output(&self) -> String {
        self.agent.as_ref().map(Process::output).unwrap_or_default()
    }

    /// Starts the agent and waits until it is in sync.
    pub(super) fn start_agent(&mut self) -> Result<()> {
        self.spawn_agent()?;
        wait_for("the agent to be in sync", Duration::from_secs(60), || self.agent_synced())
    }

    pub(super) fn agent_synced(&self) -> Result<()> {
        self.node(Side::Ours).run(&["busybox", "wget", "-qO-", "http://127.0.0.1:10256/healthz"]).map(drop)
    }

    pub(super) fn start_kube_proxy(&mut self, mode: Mode) -> Result<()> {
        let node = self.node(Side::Peer);
        let config = self.lab.dir.join("kube-proxy.yaml");
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: {}\n\
             clientConnection: {{kubeconfig: {}, contentType: application/json}}\nhostnameOverride: {}\n\
             clusterCIDR: 10.244.0.0/16\nconntrack: {{maxPerCore: 0}}\n",
            mode.name(),
            self.kubeconfig.display(),
            node.name
        );
        std::fs::write(&config, text)?;
        let argv = [bin_dir()?.join("kube-proxy").display().to_string(), format!("--config={}", config.display())];
        self.kube_proxy = Some(node.spawn("kube-proxy", &argv)?);
        Ok(())
    }

    /// The text of a side's `/metrics`.
    pub(super) fn metrics(&self, side: Side) -> Result<String> {
        let port = if side == Side::Ours { 9965 } else { 10249 };
        self.node(side).run(&["busybox", "wget", "-qO-", &format!("http://127.0.0.1:{port}/metrics")])
    }

    /// An entry of `/proc/<pid>/status` of a side's proxy, in MiB.
    pub(super) fn memory(&self, side: Side, field: &str) -> Result<f64> {
        let process = if side == Side::Ours { &self.agent } else { &self.kube_proxy };
        let pid = process.as_ref().context("it does not run")?.pid();
        let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line =
            text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).context("no such entry")?;
        Ok(line.split_whitespace().next().context("no number")?.parse::<f64>()? / 1024.0)
    }

    /// For how long a thread of the agent has run, and has waited for a CPU, in nanoseconds.
    pub(super) fn agent_thread(&self, name: &str) -> Result<[f64; 2]> {
        let pid = self.agent.as_ref().context("it does not run")?.pid();
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread = thread?.path();
            let read = |file: &str| std::fs::read_to_string(thread.join(file));
            if read("comm")?.trim() == name {
                let text = read("schedstat")?;
                let mut numbers = text.split_whitespace().map(str::parse::<f64>);
                let mut next = || numbers.next().context("a number of schedstat")?.context("a number of schedstat");
                return Ok([next()?, next()?]);
            }
        }
        anyhow::bail!("the agent has no thread {name}")
    }

    /// Pods `client` and `server` on both nodes, and the Services that the servers are behind.
    pub(super) fn add_pods(&mut self) -> Result<()> {
        let ours = self.node(Side::Ours);
        let mut server = String::new();
        for name in ["client", "server"] {
            let answer = plugin::call(ours, "ADD", name, "default", name, &format!("uid-{name}"))?;
            ensure!(answer.ok, "{answer:?}");
            server = answer.address()?;
        }
        let peer = self.node(Side::Peer);
        for (name, address) in [("client", "10.244.2.2"), ("server", "10.244.2.3")] {
            let script = format!(
                "set -e; ip netns add {name}; ip link add v-{name} type veth peer name eth0 netns {name}\n\
                 ip link set v-{name} address 02:00:00:00:00:01 up; ip route add {address}/32 dev v-{name}\n\
                 ip -n {name} link set lo up; ip -n {name} link set eth0 up; ip -n {name} addr add {address}/32 dev eth0\n\
                 ip -n {name} route add 169.254.1.1 dev eth0 scope link\n\
                 ip -n {name} route add default via 169.254.1.1\n\
                 ip -n {name} neigh add 169.254.1.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent\n"
            );
            peer.run(&["sh", "-c", &script])?;
        }
        for (side, address) in [(Side::Ours, server.as_str()), (Side::Peer, "10.244.2.3")] {
            self.api.put(objects::target(side, &self.node(side).name, address))?;
            self.servers.push((side, address.parse()?, self.place(side, "server")?.serve()?));
        }
        Ok(())
    }

    pub(super) fn place(&self, side: Side, pod: &str) -> Result<Place> {
        Place::within(self.node(side), pod)
    }

    /// The address of a side's server.
    pub(super) fn server(&self, side: Side) -> Result<IpAddr> {
        let found = self.servers.iter().find(|(of, ..)| *of == side);
        found.map(|(_, address, _)| *address).context("no pods yet")
    }

    /// Waits until both sides answer at a Service that is newer than every other.
    pub(super) fn wait_programmed(&self, patience: Duration) -> Result<()> {
        let (port, mark) = (8000 + (self.fillers % 30_000) as u16, format!("mark-{}", self.fillers));
        for side in [Side::Ours, Side::Peer] {
            // A port more on the targets, which is there only once the newest version of both objects is.
            let name = format!("target-{side:?}").to_lowercase();
            let more = |ports: &mut Value, port: Value| {
                let ports = ports.as_array_mut().expect("a list");
                ports.truncate(2);
                ports.push(port);
            };
            self.api.change("services", "default", &name, |service| {
                let port = json!({"name": mark, "protocol": "TCP", "port": port, "targetPort": 8080});
                more(&mut service["spec"]["ports"], port);
            })?;
            self.api.change("endpointslices", "default", &format!("{name}-1"), |slice| {
                more(&mut slice["ports"], json!({"name": mark, "protocol": "TCP", "port": 8080}));
            })?;
        }
        let probe = sh::own("keelway-probe")?.display().to_string();
        for side in [Side::Ours, Side::Peer] {
            let target = format!("{}:{port}", objects::vip(side));
            wait_for(&format!("{side:?} to have every Service"), patience, || {
                let argv = ["ip", "netns", "exec", "client", &probe, "ask", &target, "--timeout", "300"];
                let said: Value = serde_json::from_str(&self.node(side).run(&argv)?)?;
                let asked: Asked = serde_json::from_value(said)?;
                ensure!(asked.answered() == 1, "{asked:?}");
                Ok(())
            })?;
        }
        // What follows a sync: clean-up, metrics, garbage.
        std::thread::sleep(Duration::from_secs(3));
        Ok(())
    }

    /// Packets that have arrived at a side's server.
    pub(super) fn received(&self, side: Side) -> Result<u64> {
        let text = self.node(side).run(&["ip", "-n", "server", "-j", "-s", "link", "show", "eth0"])?;
        let links: Value = serde_json::from_str(&text)?;
        links[0]["stats64"]["rx"]["packets"].as_u64().context("no count of packets")
    }
}
