//! Packets that only turn round at a node, on their way to a node port's backend elsewhere: by XDP beside tc.
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::super::report::Report;
use super::super::traffic::{self, Load};
use crate::services::Backend;
use crate::sh::{self, wait_for};
use crate::standalone::{Pod, Standalone};
use crate::{Lab, netns};

const NODE_PORT: u16 = 30080;
/// Nobody listens there: an answer would be a packet more.
const BACKEND_PORT: u16 = 9;
/// Floods of a second in each.
const FLOODS: usize = 3;

struct Nodes {
    s: Standalone,
    routing: &'static str,
    file: PathBuf,
    sink: Pod,
}

/// Measures it, `turns` times by either way; the devices are veths, whose drivers make what XDP saves, and turn it into a socket buffer again.
pub(super) fn measure(turns: usize, report: &mut Report) -> Result<()> {
    println!("node port to another node: tc, XDP");
    for routing in ["routed", "vxlan"] {
        let nodes = Nodes::new(routing)?;
        for mode in ["generic", "native"] {
            let mut pairs = Vec::new();
            for _ in 0..turns {
                let [ours, tc] = [nodes.floods(mode)?, nodes.floods("off")?];
                pairs.extend(ours.into_iter().zip(tc).map(|(ours, tc)| [ours, tc]));
            }
            let what = format!("packets to a node port, backend on another node ({routing}), XDP {mode} on veth");
            report.pairs(&what, "1/s", &pairs, "tc");
        }
        nodes.set("native")?;
        traffic::programs(&nodes.s.lab, report, Load::Early(routing), || nodes.flood().map(drop))?;
    }
    Ok(())
}

impl Nodes {
    fn new(routing: &'static str) -> Result<Self> {
        let lab = Lab::new(2)?;
        let file = lab.dir.join("agent.yaml");
        fs::write(&file, text(routing, "off"))?;
        let s = Standalone::on(lab, &["--config", &file.display().to_string()])?;
        let sink = s.pod(2, "sink", &[])?;
        let spec = json!({
            "type": "NodePort", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:10:96::10"],
            "ports": [{"protocol": "UDP", "port": 80, "nodePort": NODE_PORT, "targetPort": BACKEND_PORT}],
        });
        let backend = Backend { port: BACKEND_PORT, ..Backend::pod(&s, &sink) };
        s.put_service("sink", &spec, &json!({}), &[backend])?;
        // As what comes over a real wire: tc serves senders that leave it to the device.
        s.lab.outside.run(&["ethtool", "-K", "eth0", "tx", "off"])?;
        Ok(Self { s, routing, file, sink })
    }

    fn set(&self, mode: &str) -> Result<()> {
        fs::write(&self.file, text(self.routing, mode))?;
        self.s.stop_agent(1, Signal::SIGKILL)?;
        self.s.start_agent(1)?;
        self.s.wait_synced(1)?;
        if mode == "native" {
            self.receive_by_xdp()?;
        }
        Ok(())
    }

    /// A veth hands over what a program sends back to an end that has one as well.
    fn receive_by_xdp(&self) -> Result<()> {
        let status = self.s.status(1)?;
        let mut hooks = status["hooks"].as_array().context("no hooks")?.iter();
        let program = hooks.find(|hook| hook["hook"] == "node-xdp").context("no XDP hook")?["programId"].to_string();
        let switch = self.s.node(1).netns().with_file_name(netns::name(&self.s.lab.id, "switch"));
        let (net, port) = (format!("--net={}", switch.display()), netns::port(&self.s.node(1).name));
        let on_port =
            ["nsenter", &net, "bpftool", "net", "attach", "xdpdrv", "id", &program, "dev", &port, "overwrite"];
        sh::run(&on_port).map(drop)
    }

    /// Packets per second that reached the pod.
    fn floods(&self, mode: &str) -> Result<Vec<f64>> {
        self.set(mode)?;
        // The first finds the neighbours.
        self.flood()?;
        (0..FLOODS).map(|_| self.flood()).collect()
    }

    fn flood(&self) -> Result<f64> {
        let own = sh::own("keelway-lab")?.display().to_string();
        let target = SocketAddr::new(self.s.node(1).v4.into(), NODE_PORT).to_string();
        let (before, start) = (self.received()?, Instant::now());
        self.s.lab.outside.run(&[&own, "bench-flood", &target])?;
        let took = start.elapsed().as_secs_f64().min(1.0);
        let packets = wait_for("packets at the pod", Duration::from_secs(2), || {
            let packets = self.received()? - before;
            ensure!(packets > 100, "{packets} have arrived");
            Ok(packets)
        })?;
        Ok(packets as f64 / took)
    }

    fn received(&self) -> Result<u64> {
        let path = self.s.cri(2)?.netns(&self.sink.sandbox.id)?.replace("/var/run/", "/run/");
        let net = format!("--net={}", self.s.node(2).path(&path)?.display());
        let text = sh::run(&["nsenter", &net, "ip", "-j", "-s", "link", "show", "dev", "eth0"])?;
        let links: Value = serde_json::from_str(&text)?;
        links[0]["stats64"]["rx"]["packets"].as_u64().context("no count of packets")
    }
}

fn text(routing: &str, xdp: &str) -> String {
    format!("routing: {routing}\nxdp: {xdp}\n")
}
