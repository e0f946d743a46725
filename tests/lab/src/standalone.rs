//! Keelway without Kubernetes: agents that read a directory of manifests, pods that containerd starts through the plugin. The
//! lab plays the controllers: it writes what they would.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::containerd::{Containerd, PROBE, basic_images};
use crate::cri::{Cri, PodSpec, Sandbox};
use crate::process::Process;
use crate::sh::{self, SOON, wait_for};
use crate::{Lab, Node};

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its name, in namespace `default` unless it says otherwise.
    pub name: String,
    /// Number of its node.
    pub node: usize,
    /// Its sandbox.
    pub sandbox: Sandbox,
    namespace: String,
    labels: BTreeMap<String, String>,
}

impl Pod {
    /// The address of one family.
    pub fn address(&self, v6: bool) -> IpAddr {
        *self.sandbox.addresses.iter().find(|address| address.is_ipv6() == v6).expect("an address of both families")
    }
}

/// A lab with Keelway on every node.
pub struct Standalone {
    /// The nodes.
    pub lab: Lab,
    /// Where the agents read their objects.
    pub manifests: PathBuf,
    agents: Mutex<BTreeMap<usize, Process>>,
    runtimes: BTreeMap<usize, (Containerd, Cri)>,
    agent_args: Vec<String>,
}

/// What tests that use this need; the reason to skip when something is missing.
pub fn missing() -> Option<String> {
    sh::missing(&["containerd", "runc", "busybox", "ip"], &["keelway-agent", "keelway-cni", "keelway", "keelway-probe"])
}

impl Standalone {
    /// `nodes` nodes with containerd and an agent each, in sync.
    pub fn new(nodes: u8, agent_args: &[&str]) -> Result<Self> {
        Self::on(Lab::new(nodes)?, agent_args)
    }

    /// The same on the nodes of a lab that is there already.
    pub fn on(lab: Lab, agent_args: &[&str]) -> Result<Self> {
        let nodes = lab.nodes().len();
        let manifests = lab.dir.join("manifests");
        std::fs::create_dir_all(&manifests)?;
        let mut this = Self {
            lab,
            manifests,
            agents: Mutex::default(),
            runtimes: BTreeMap::new(),
            agent_args: agent_args.iter().map(ToString::to_string).collect(),
        };
        for number in 1..=nodes {
            this.write_node(number)?;
        }
        let images = basic_images(&this.lab.dir.join("images"))?;
        for number in 1..=nodes {
            this.install(number)?;
            this.start_agent(number)?;
            this.start_runtime(number, &images)?;
        }
        for number in 1..=nodes {
            this.wait_synced(number)?;
        }
        Ok(this)
    }

    /// A node of the lab.
    pub fn node(&self, number: usize) -> &Node {
        self.lab.node(number)
    }

    /// The pod CIDRs of a node, IPv4 first.
    pub fn pod_cidrs(number: usize) -> [String; 2] {
        [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")]
    }

    fn write_node(&self, number: usize) -> Result<()> {
        let node = self.lab.node(number);
        let [v4, v6] = Self::pod_cidrs(number);
        self.write(
            &format!("node-{}", node.name),
            &format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\nspec: {{podCIDRs: [\"{v4}\", \"{v6}\"]}}\n\
                 status: {{addresses: [{{type: InternalIP, address: \"{}\"}}, {{type: InternalIP, address: \"{}\"}}]}}\n",
                node.name, node.v4, node.v6
            ),
        )
    }

    /// Writes (or replaces) one file of objects, whole.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.manifests.join(format!("{name}.yaml"));
        let fresh = self.manifests.join(format!(".{name}.new"));
        std::fs::write(&fresh, text)?;
        std::fs::rename(&fresh, &path).with_context(|| path.display().to_string())
    }

    /// Removes a file of objects.
    pub fn remove_file(&self, name: &str) -> Result<()> {
        Ok(std::fs::remove_file(self.manifests.join(format!("{name}.yaml")))?)
    }

    fn install(&self, number: usize) -> Result<()> {
        let node = self.lab.node(number);
        let agent = sh::own("keelway-agent")?.display().to_string();
        let cni = sh::own("keelway-cni")?.display().to_string();
        node.run(&[&agent, "install-cni", "--from", &cni])?;
        Ok(())
    }

    /// Starts (or starts again) a node's agent; `program` in place of the one that was built.
    pub fn start_agent_from(&self, number: usize, program: &Path) -> Result<()> {
        let node = self.lab.node(number);
        let program = program.display().to_string();
        let manifests = self.manifests.display().to_string();
        let mut argv = vec![program.as_str(), "--manifests", &manifests, "--node-name", &node.name];
        argv.extend(self.agent_args.iter().map(String::as_str));
        let agent = node.spawn("agent", &argv)?;
        self.agents.lock().expect("nobody panics with this lock").insert(number, agent);
        Ok(())
    }

    /// Starts (or starts again) a node's agent.
    pub fn start_agent(&self, number: usize) -> Result<()> {
        self.start_agent_from(number, &sh::own("keelway-agent")?)
    }

    /// Ends a node's agent, with a signal of choice.
    pub fn stop_agent(&self, number: usize, signal: Signal) -> Result<()> {
        let agent = self.agents.lock().expect("nobody panics with this lock").remove(&number);
        agent.context("no agent runs")?.stop(signal).map(drop)
    }

    /// The agent's log.
    pub fn agent_log(&self, number: usize) -> String {
        std::fs::read_to_string(self.lab.node(number).log("agent")).unwrap_or_default()
    }

    fn start_runtime(&mut self, number: usize, images: &[PathBuf]) -> Result<()> {
        let node = self.lab.node(number);
        let containerd = Containerd::start(node, None)?;
        containerd.import(node, images)?;
        let cri = containerd.cri(node)?;
        self.runtimes.insert(number, (containerd, cri));
        Ok(())
    }

    /// A power cut, and the boot after it: containerd and the agent run again, no pod does, and no kubelet has tidied up yet.
    pub fn reboot(&mut self, number: usize) -> Result<()> {
        self.kill_node(number)?;
        self.start_again(number)
    }

    fn start_again(&mut self, number: usize) -> Result<()> {
        self.lab.node(number).boot_node()?;
        self.start_agent(number)?;
        self.start_runtime(number, &[])?;
        self.wait_synced(number)
    }

    /// The runtime of a node.
    pub fn cri(&self, number: usize) -> Result<&Cri> {
        Ok(&self.runtimes.get(&number).context("no runtime")?.1)
    }

    /// Pulls a node's plug. Its pods' objects stay, as in an API server that has not noticed yet.
    pub fn kill_node(&mut self, number: usize) -> Result<()> {
        self.lab.node(number).kill_node()?;
        self.runtimes.remove(&number);
        drop(self.agents.lock().expect("nobody panics with this lock").remove(&number));
        Ok(())
    }

    /// Boots a node again, with its agent and its runtime; images and the plugin are on its disk. As a kubelet would, it
    /// then removes the pods that died with the node.
    pub fn boot_node(&mut self, number: usize) -> Result<()> {
        self.start_again(number)?;
        let cri = self.cri(number)?;
        cri.list()?.iter().try_for_each(|sandbox| cri.remove(sandbox))
    }

    /// What `keelway status -o json` says on a node.
    pub fn status(&self, number: usize) -> Result<serde_json::Value> {
        let keelway = sh::own("keelway")?.display().to_string();
        let output = self.lab.node(number).exec(&[&keelway, "status", "-o", "json"])?;
        // 3 is an answer too: it says what is wrong.
        anyhow::ensure!(matches!(output.status.code(), Some(0 | 3)), "keelway status: {}", sh::words(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Waits until a node's tables are in step with the manifests.
    pub fn wait_synced(&self, number: usize) -> Result<()> {
        wait_for(&format!("the agent of node {number} to be in sync"), SOON, || {
            let status = self.status(number)?;
            anyhow::ensure!(status["synced"] == true, "not in sync: {}", status["problems"]);
            Ok(())
        })
        .with_context(|| self.agent_log(number))
    }

    /// Runs a pod with the probe's server (TCP and UDP port 8080) on a node.
    pub fn pod(&self, number: usize, name: &str, labels: &[(&str, &str)]) -> Result<Pod> {
        self.pod_in("default", number, name, labels)
    }

    /// The same in a namespace.
    pub fn pod_in(&self, namespace: &str, number: usize, name: &str, labels: &[(&str, &str)]) -> Result<Pod> {
        self.pod_with(namespace, number, name, labels, Vec::new())
    }

    /// The same with directories of the node mounted into it: (path on the node, path inside).
    pub fn pod_with(
        &self,
        namespace: &str,
        number: usize,
        name: &str,
        labels: &[(&str, &str)],
        mounts: Vec<(String, String)>,
    ) -> Result<Pod> {
        let spec = PodSpec {
            namespace: namespace.into(),
            name: name.into(),
            uid: format!("uid-of-{namespace}-{name}"),
            image: PROBE.into(),
            command: Vec::new(),
            mounts,
        };
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let mut pod = Pod {
            name: name.into(),
            node: number,
            sandbox: Sandbox { id: String::new(), container: String::new(), addresses: Vec::new() },
            namespace: namespace.into(),
            labels,
        };
        // First the object, as an API server would have it before any kubelet acts on it.
        self.write_pod(&pod, &spec.uid)?;
        let (_, cri) = self.runtimes.get(&number).context("no runtime")?;
        pod.sandbox = cri.run(&spec).with_context(|| self.agent_log(number))?;
        self.write_pod(&pod, &spec.uid)?;
        Ok(pod)
    }

    fn write_pod(&self, pod: &Pod, uid: &str) -> Result<()> {
        let node = &self.lab.node(pod.node).name;
        let labels = serde_json::to_string(&pod.labels)?;
        let ips: Vec<_> = pod.sandbox.addresses.iter().map(|ip| serde_json::json!({"ip": ip.to_string()})).collect();
        let (Pod { name, namespace, .. }, ips) = (pod, serde_json::to_string(&ips)?);
        self.write(
            &format!("pod-{namespace}-{name}"),
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: {uid}, labels: {labels}}}\n\
                 spec: {{nodeName: {node}}}\nstatus: {{phase: Running, podIPs: {ips}}}\n"
            ),
        )
    }

    /// Kills a pod's container with SIGKILL and leaves the pod; its Services are for the caller to write.
    pub fn kill_container(&self, pod: &Pod) -> Result<()> {
        let (_, cri) = self.runtimes.get(&pod.node).context("no runtime")?;
        cri.kill_container(&pod.sandbox.container)
    }

    /// Ends a pod and removes its object.
    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        let (_, cri) = self.runtimes.get(&pod.node).context("no runtime")?;
        cri.remove(&pod.sandbox.id)?;
        self.remove_file(&format!("pod-{}-{}", pod.namespace, pod.name))
    }

    /// Runs the probe in a pod: `args` are those of `keelway-probe`. Its JSON report.
    pub fn probe<T: serde::de::DeserializeOwned>(&self, pod: &Pod, args: &[&str]) -> Result<T> {
        let (_, cri) = self.runtimes.get(&pod.node).context("no runtime")?;
        let argv = [&["keelway-probe"], args].concat();
        let done = cri.exec(&pod.sandbox.container, &argv)?;
        serde_json::from_str(&done.stdout).with_context(|| format!("{argv:?}: {done:?}"))
    }

    /// Runs the probe on a node itself, in its cgroup: its socket hooks apply.
    pub fn probe_on_node<T: serde::de::DeserializeOwned>(&self, number: usize, args: &[&str]) -> Result<T> {
        let probe = sh::own("keelway-probe")?.display().to_string();
        let text = self.lab.node(number).run(&[&[probe.as_str()], args].concat())?;
        serde_json::from_str(&text).with_context(|| format!("{args:?}: {text}"))
    }

    /// Runs the probe in a pod's network but outside its node's cgroup: no socket hook sees what it does, only the hooks
    /// of the pod's interface.
    pub fn probe_past_sockets<T: serde::de::DeserializeOwned>(&self, pod: &Pod, args: &[&str]) -> Result<T> {
        let (_, cri) = self.runtimes.get(&pod.node).context("no runtime")?;
        // Seen from outside of the node, an absolute link in the path (/var/run) would lead astray.
        let netns = cri.netns(&pod.sandbox.id)?.replace("/var/run/", "/run/");
        let netns = self.lab.node(pod.node).path(&netns)?;
        let mut command = Command::new(sh::own("keelway-lab")?);
        command.args(["enter", "--cgroup", &self.lab.outside.cgroup, "--net"]).arg(netns).arg("--");
        let text = sh::checked(command.arg(sh::own("keelway-probe")?).args(args))?;
        serde_json::from_str(&text).with_context(|| format!("{args:?}: {text}"))
    }

    /// Runs a command in a pod.
    pub fn exec(&self, pod: &Pod, argv: &[&str]) -> Result<crate::cri::Executed> {
        let (_, cri) = self.runtimes.get(&pod.node).context("no runtime")?;
        cri.exec(&pod.sandbox.container, argv)
    }

    /// Writes a Service in `default` with one port over both families, and its slices with `backends` as ready endpoints.
    pub fn service(&self, name: &str, vips: [&str; 2], protocol: &str, port: u16, backends: &[&Pod]) -> Result<()> {
        let [v4, v6] = vips;
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
             spec: {{type: ClusterIP, clusterIP: {v4}, clusterIPs: [\"{v4}\", \"{v6}\"], \
             ports: [{{name: p, protocol: {protocol}, port: {port}, targetPort: 8080}}]}}\n"
        );
        for (family, is_v6) in [("IPv4", false), ("IPv6", true)] {
            let endpoints: Vec<_> = backends
                .iter()
                .map(|pod| {
                    serde_json::json!({
                        "addresses": [pod.address(is_v6).to_string()],
                        "conditions": {"ready": true},
                        "nodeName": self.lab.node(pod.node).name,
                    })
                })
                .collect();
            write!(
                text,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n\
                 metadata: {{name: {name}-{is_v6}, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}\n\
                 ports: [{{name: p, protocol: {protocol}, port: 8080}}]\nendpoints: {}\n",
                serde_json::to_string(&endpoints)?
            )?;
        }
        self.write(&format!("service-{name}"), &text)
    }
}

/// A lab of this many nodes, whose agents have these flags beside their usual ones; the test that calls it is skipped, with the
/// reason, where programs are missing.
#[macro_export]
macro_rules! standalone_or_skip {
    ($nodes:expr) => {
        $crate::standalone_or_skip!($nodes, &[])
    };
    ($nodes:expr, $args:expr) => {{
        if let Some(reason) = $crate::standalone::missing() {
            println!("skipped: {reason}");
            return;
        }
        $crate::standalone::Standalone::new($nodes, $args).unwrap()
    }};
}
