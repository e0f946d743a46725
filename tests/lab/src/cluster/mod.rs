//! A real, dual-stack Kubernetes in the lab: a control plane on a machine that is no node, kubelets on the nodes.
pub mod balancer;
pub mod conformance;
mod control_plane;
pub mod demo;
mod images;
pub mod install;
pub mod kubelet;
mod pki;
pub mod programs;
pub mod storage;
pub mod suite;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::host::Host;
use crate::lab::Lab;
use crate::netns::CONTROL_PLANE;
use crate::node::Node;
use crate::sh::{self, SOON, wait_for};
use pki::Pki;

/// The lab's id of the cluster that the command line handles.
pub const ID: &str = "cluster";

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Its machines.
    pub lab: Lab,
    /// The control plane's machine.
    pub control_plane: Host,
    /// Where its programs are.
    pub bin: PathBuf,
    pki: Pki,
}

impl Cluster {
    /// Brings a cluster up; returns when every kubelet has registered and has its pod CIDRs.
    pub fn up(id: &str, nodes: u8) -> Result<Self> {
        if let Some(reason) = programs::missing(programs::CLUSTER) {
            anyhow::bail!(reason);
        }
        let mut lab = Lab::named(id, 0)?;
        let bin = programs::bin_dir()?;
        let control_plane = lab.add_host("cp", CONTROL_PLANE)?;
        let pki = Pki::at(&lab.dir.join("pki"));
        images::write(&bin, &lab.dir.join("images"))?;
        control_plane::start(&control_plane, &bin, &pki)?;
        for _ in 0..nodes {
            lab.add_node()?;
        }
        let this = Self { lab, control_plane, bin, pki };
        std::thread::scope(|scope| {
            let starting: Vec<_> = this.lab.nodes().iter().map(|node| scope.spawn(|| this.start_node(node))).collect();
            starting.into_iter().try_for_each(|thread| thread.join().expect("starting a node does not panic"))
        })?;
        for node in this.lab.nodes() {
            this.route_pods(node)?;
        }
        Ok(this)
    }

    /// The cluster that another process brought up and kept.
    pub fn open(id: &str) -> Result<Self> {
        let lab = Lab::open(id).context("no cluster is up: `keelway-lab cluster up`")?;
        let control_plane = lab.host("cp", CONTROL_PLANE)?;
        let pki = Pki::at(&lab.dir.join("pki"));
        Ok(Self { bin: programs::bin_dir()?, control_plane, pki, lab })
    }

    /// Starts what runs on a node, after it was added or has booted again.
    pub fn start_node(&self, node: &Node) -> Result<()> {
        let mut images: Vec<PathBuf> =
            fs::read_dir(self.lab.dir.join("images"))?.flatten().map(|entry| entry.path()).collect();
        images.retain(|path| path.extension().is_some_and(|extension| extension == "tar"));
        kubelet::start(node, &self.bin, &self.pki, &control_plane::server(&self.control_plane), &images)
    }

    /// Ends a node's kubelet and nothing else; its pods go on.
    pub fn stop_kubelet(&self, node: &Node) -> Result<()> {
        node.run(&["sh", "-c", "kill $(pidof kubelet)"])?;
        wait_for("the kubelet to end", SOON, || {
            let left = node.run(&["sh", "-c", "pidof kubelet || true"])?;
            ensure!(left.trim().is_empty(), "it runs as {left}");
            Ok(())
        })
    }

    /// Starts the kubelet that [`Cluster::stop_kubelet`] ended.
    pub fn start_kubelet(&self, node: &Node) -> Result<()> {
        kubelet::spawn(node, &self.bin, &self.pki, &self.server())
    }

    /// The API server reaches pods and webhooks, and is no node: it reaches each node's pods through that node.
    pub fn route_pods(&self, node: &Node) -> Result<()> {
        let path = "jsonpath={.spec.podCIDRs[0]} {.spec.podCIDRs[1]}";
        let cidrs = wait_for(&format!("{} to register", node.name), 3 * SOON, || {
            let text = self.kubectl(&["get", "node", &node.name, "-o", path])?;
            let (v4, v6) = text.trim().split_once(' ').context("no pod CIDRs yet")?;
            ensure!(!v6.is_empty(), "no pod CIDRs yet");
            Ok((v4.to_owned(), v6.to_owned()))
        })?;
        self.control_plane.run(&["ip", "route", "replace", &cidrs.0, "via", &node.v4.to_string()])?;
        self.control_plane.run(&["ip", "-6", "route", "replace", &cidrs.1, "via", &node.v6.to_string()])?;
        Ok(())
    }

    /// The administrator's kubeconfig; its address is the control plane's in the lab's network.
    pub fn kubeconfig(&self) -> PathBuf {
        PathBuf::from(self.pki.file("admin.conf"))
    }

    /// The API server's URL in the lab's network.
    pub fn server(&self) -> String {
        control_plane::server(&self.control_plane)
    }

    /// Runs kubectl as the administrator.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.control_plane.run(&self.kubectl_argv(args))
    }

    /// The command line of kubectl, for [`Host::command`] of the control plane.
    pub fn kubectl_argv(&self, args: &[&str]) -> Vec<String> {
        let (program, config) = (self.bin.join("kubectl"), self.kubeconfig());
        let mut argv = vec![program.to_string_lossy().into_owned(), format!("--kubeconfig={}", config.display())];
        argv.extend(args.iter().map(|&arg| arg.to_owned()));
        argv
    }

    /// Applies manifests given as text.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        let mut command = self.control_plane.command(&self.kubectl_argv(&["apply", "-f", "-"]))?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("kubectl's input")?.write_all(manifests.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "kubectl apply: {}", sh::words(&output));
        Ok(())
    }

    /// Applies what a directory with a kustomization.yaml brings.
    pub fn apply_kustomization(&self, dir: &Path) -> Result<()> {
        self.kubectl(&["apply", "--server-side", "-k", &dir.to_string_lossy()]).map(drop)
    }

    /// Imports an image archive on every node.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let (ctr, file) = (self.bin.join("ctr"), archive.to_string_lossy());
        for node in self.lab.nodes() {
            node.run(&[&ctr.to_string_lossy(), "-n", "k8s.io", "images", "import", &file])?;
        }
        Ok(())
    }

    /// Waits until kubectl's condition holds, e.g. `["node", "--all", "--for=condition=Ready"]`.
    pub fn wait(&self, condition: &[&str], seconds: u32) -> Result<()> {
        let limit = format!("--timeout={seconds}s");
        self.kubectl(&[&["wait", &limit], condition].concat()).map(drop)
    }
}
