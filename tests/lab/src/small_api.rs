//! One API server in a node, with nothing but its store: no controllers, no kubelet. In front of it a proxy without
//! encryption that can hold back what the server says of one kind of objects, as a slow watch would.
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

use crate::process::Process;
use crate::sh::{SOON, wait_for};
use crate::{Lab, Node, sh};

/// Where agents are to dial, within the node.
const PROXY: &str = "127.0.0.1:8001";
const KUBECTL_PROXY: &str = "127.0.0.1:8002";
const TOKENS: &str = "admin,admin,1,\"system:masters\"\n";

/// A running API server. It ends with this value.
pub struct SmallApi<'a> {
    node: &'a Node,
    dir: PathBuf,
    kubectl: PathBuf,
    /// While set, nothing of the watches of `held` reaches a client.
    hold: Arc<AtomicBool>,
    processes: Vec<Process>,
}

/// Why there can be none here.
pub fn missing() -> Option<String> {
    let bin = crate::cluster::programs::bin_dir().ok()?;
    let absent = ["etcd", "kube-apiserver", "kubectl"].into_iter().find(|name| !bin.join(name).is_file())?;
    Some(format!("no {absent} in {}: `keelway-lab build` makes it", bin.display()))
}

impl<'a> SmallApi<'a> {
    /// Starts one in the first node of `lab`. `held` is the plural name of the kind that can be held back.
    pub fn start(lab: &'a Lab, held: &'static str) -> Result<Self> {
        let (node, dir) = (lab.node(1), lab.dir.join("api"));
        std::fs::create_dir_all(&dir)?;
        let bin = crate::cluster::programs::bin_dir()?;
        let program = |name: &str| bin.join(name).display().to_string();
        let file = |name: &str| dir.join(name).display().to_string();
        sh::run(&["openssl", "genrsa", "-out", &file("sa.key"), "2048"])?;
        std::fs::write(dir.join("tokens"), TOKENS)?;
        write_config(&dir.join("admin.conf"), "https://127.0.0.1:6443")?;
        Self::write_kubeconfig(lab)?;
        let etcd = [
            program("etcd"),
            format!("--data-dir={}", file("etcd")),
            "--unsafe-no-fsync".into(),
            "--listen-client-urls=http://127.0.0.1:2379".into(),
            "--advertise-client-urls=http://127.0.0.1:2379".into(),
            "--listen-peer-urls=http://127.0.0.1:2380".into(),
        ];
        let api = [
            program("kube-apiserver"),
            "--etcd-servers=http://127.0.0.1:2379".into(),
            "--bind-address=127.0.0.1".into(),
            "--secure-port=6443".into(),
            "--endpoint-reconciler-type=none".into(),
            format!("--cert-dir={}", file("certs")),
            format!("--token-auth-file={}", file("tokens")),
            format!("--service-account-key-file={}", file("sa.key")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112".into(),
            "--authorization-mode=RBAC".into(),
            "--disable-admission-plugins=ServiceAccount".into(),
        ];
        let proxy =
            [program("kubectl"), format!("--kubeconfig={}", file("admin.conf")), "proxy".into(), "--port=8002".into()];
        let hold = Arc::new(AtomicBool::new(false));
        let mut this = Self { node, kubectl: bin.join("kubectl"), hold, processes: Vec::new(), dir: dir.clone() };
        this.processes.push(node.spawn("api-etcd", &etcd)?);
        this.processes.push(node.spawn("api-server", &api)?);
        wait_for("the API server", 3 * SOON, || {
            this.processes.iter_mut().try_for_each(Process::check)?;
            let args = [program("kubectl"), format!("--kubeconfig={}", file("admin.conf"))];
            let said = node.run(&[&args[..], &["get".into(), "--raw=/readyz".into()]].concat())?;
            ensure!(said.trim() == "ok", "it is not ready");
            let namespace = ["get".to_owned(), "namespace".to_owned(), "default".to_owned()];
            node.run(&[&args[..], &namespace[..]].concat()).map(drop)
        })?;
        this.processes.push(node.spawn("api-proxy", &proxy)?);
        serve(&node.netns(), held, Arc::clone(&this.hold))?;
        Ok(this)
    }

    /// What an agent is to be given as `--kubeconfig`, before there is a server.
    pub fn write_kubeconfig(lab: &Lab) -> Result<PathBuf> {
        let dir = lab.dir.join("api");
        std::fs::create_dir_all(&dir)?;
        write_config(&dir.join("agent.conf"), &format!("http://{PROXY}"))?;
        Ok(dir.join("agent.conf"))
    }

    /// What an agent is to be given as `--kubeconfig`.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("agent.conf")
    }

    /// Holds back the watches of the kind, or lets them go on; nothing is lost.
    pub fn hold(&self, hold: bool) {
        self.hold.store(hold, Ordering::SeqCst);
    }

    /// Runs kubectl as an administrator; its output.
    pub fn kubectl(&self, args: &[&str], input: &str) -> Result<String> {
        let kubectl = self.kubectl.display().to_string();
        let config = format!("--kubeconfig={}", self.dir.join("admin.conf").display());
        let cache = format!("--cache-dir={}", self.dir.join("cache").display());
        let argv = [&[kubectl.as_str(), &config, &cache], args].concat();
        let mut child =
            self.node.command(&argv)?.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "kubectl {args:?}: {}", sh::words(&output));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Makes the objects of `yaml`.
    pub fn create(&self, yaml: &str) -> Result<()> {
        self.kubectl(&["create", "-f", "-"], yaml).map(drop)
    }

    /// Makes the Node object of the node that this runs in.
    pub fn node(&self, pod_cidr: &str) -> Result<()> {
        let node = self.node;
        self.create(&format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\n\
             spec: {{podCIDR: {pod_cidr}, podCIDRs: [{pod_cidr}]}}\n",
            node.name
        ))?;
        let status = format!(r#"{{"status":{{"addresses":[{{"type":"InternalIP","address":"{}"}}]}}}}"#, node.v4);
        self.kubectl(&["patch", "node", &node.name, "--subresource=status", "-p", &status], "").map(drop)
    }

    /// Makes a Pod of this node; its uid.
    pub fn pod(&self, name: &str) -> Result<String> {
        let node = &self.node.name;
        self.create(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\n\
             spec: {{nodeName: {node}, containers: [{{name: c, image: i}}]}}\n"
        ))?;
        self.kubectl(&["get", "pod", name, "-o", "jsonpath={.metadata.uid}"], "")
    }

    /// Ends the server, and with it the connections of its clients.
    pub fn stop(&mut self) -> Result<()> {
        // The proxy first: its clients are then refused, and hear of it at once.
        while let Some(mut process) = self.processes.pop() {
            process.stop(Signal::SIGKILL)?;
        }
        Ok(())
    }
}

fn write_config(path: &Path, server: &str) -> Result<()> {
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{name: c, cluster: {{server: '{server}', insecure-skip-tls-verify: true}}}}]\n\
         users: [{{name: u, user: {{token: admin}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
    );
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

/// Serves [`PROXY`] in the network namespace of this file.
fn serve(netns: &Path, held: &'static str, hold: Arc<AtomicBool>) -> Result<()> {
    let netns = std::fs::File::open(netns)?;
    let (ready, bound) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Threads that are started from here are in this namespace, too.
        let listener = setns(netns, CloneFlags::CLONE_NEWNET)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(TcpListener::bind(PROXY)?));
        match listener {
            Err(error) => drop(ready.send(Err(error))),
            Ok(listener) => {
                let _ = ready.send(Ok(()));
                for client in listener.incoming().flatten() {
                    let hold = Arc::clone(&hold);
                    std::thread::spawn(move || drop(forward(client, held, &hold)));
                }
            }
        }
    });
    bound.recv().context("the proxy's thread")?
}

fn forward(mut client: TcpStream, held: &str, hold: &AtomicBool) -> Result<()> {
    let mut server = TcpStream::connect(KUBECTL_PROXY)?;
    let is_held = AtomicBool::new(false);
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 65536];
            while let Ok(count @ 1..) = from_client.read(&mut buffer) {
                // A request is small and comes in one piece.
                let text = String::from_utf8_lossy(&buffer[..count]);
                let watches =
                    |line: &str| line.starts_with("GET ") && line.contains(held) && line.contains("watch=true");
                if text.lines().any(watches) {
                    is_held.store(true, Ordering::SeqCst);
                }
                if to_server.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            let _ = to_server.shutdown(Shutdown::Both);
        });
        let mut buffer = [0; 65536];
        while let Ok(count @ 1..) = server.read(&mut buffer) {
            while is_held.load(Ordering::SeqCst) && hold.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
            if client.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
    });
    Ok(())
}
