//! Pods through the container runtime interface, as a kubelet starts them: the runtime calls the CNI plugin, with
//! CNI_ARGS from the pod's metadata.
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};

/// Generated messages and client of `runtime.v1`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

use v1::runtime_service_client::RuntimeServiceClient;

/// Longer than a plugin may take, and than any test's program in a pod.
const LIMIT: Duration = Duration::from_secs(180);

/// A pod to start: one container in its own network.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Namespace of the Pod object.
    pub namespace: String,
    /// Name of the Pod object, also the host name inside.
    pub name: String,
    /// UID of the Pod object.
    pub uid: String,
    /// An image that was imported.
    pub image: String,
    /// The container's program and arguments; the image's own if empty.
    pub command: Vec<String>,
    /// Directories of the node mounted into it: (path on the node, path inside).
    pub mounts: Vec<(String, String)>,
}

/// A started pod.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// The runtime's id of the pod, which is the container id that the CNI plugin got.
    pub id: String,
    /// The runtime's id of its container.
    pub container: String,
    /// Its addresses, as the plugin answered; the primary family first.
    pub addresses: Vec<IpAddr>,
}

/// What a program in a container answered.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Executed {
    pub stdout: String,
    pub stderr: String,
    pub exit_code: i32,
}

/// A client of one runtime. Calls block.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

impl Cri {
    /// Dials the runtime's socket; fails at once when nothing listens there.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let path: PathBuf = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost").timeout(LIMIT);
        let dialled = runtime.block_on(endpoint.connect_with_connector(connector));
        let channel = dialled.with_context(|| format!("dialling {}", socket.display()))?;
        Ok(Self { runtime, client: RuntimeServiceClient::new(channel) })
    }

    /// The runtime's name and version.
    pub fn version(&self) -> Result<String> {
        let answer = self.runtime.block_on(self.client.clone().version(v1::VersionRequest::default()))?.into_inner();
        Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
    }

    /// Whether the runtime says that its network is ready; otherwise its reason.
    pub fn network_ready(&self) -> Result<Result<(), String>> {
        let answer = self.runtime.block_on(self.client.clone().status(v1::StatusRequest::default()))?.into_inner();
        let conditions = answer.status.unwrap_or_default().conditions;
        let network = conditions.into_iter().find(|condition| condition.r#type == "NetworkReady");
        let network = network.context("the runtime says nothing of its network")?;
        Ok(if network.status { Ok(()) } else { Err(format!("{}: {}", network.reason, network.message)) })
    }

    /// Starts the pod and its container.
    pub fn run(&self, pod: &PodSpec) -> Result<Sandbox> {
        let config = sandbox_config(pod);
        let mut client = self.client.clone();
        self.runtime.block_on(async {
            let request = v1::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
            let id = client.run_pod_sandbox(request).await.context("RunPodSandbox")?.into_inner().pod_sandbox_id;
            let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
            let status = client.pod_sandbox_status(request).await.context("PodSandboxStatus")?.into_inner().status;
            let network = status.unwrap_or_default().network.unwrap_or_default();
            let ips = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|ip| ip.ip));
            let addresses = ips
                .map(|ip| ip.parse().with_context(|| format!("address `{ip}` of {}", pod.name)))
                .collect::<Result<_>>()?;
            let request = v1::CreateContainerRequest {
                pod_sandbox_id: id.clone(),
                config: Some(container_config(pod)),
                sandbox_config: Some(config),
            };
            let container =
                client.create_container(request).await.context("CreateContainer")?.into_inner().container_id;
            let request = v1::StartContainerRequest { container_id: container.clone() };
            client.start_container(request).await.context("StartContainer")?;
            Ok(Sandbox { id, container, addresses })
        })
    }

    /// Runs a program in a container to its end.
    pub fn exec<S: AsRef<str>>(&self, container: &str, command: &[S]) -> Result<Executed> {
        let request = v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|word| word.as_ref().to_owned()).collect(),
            timeout: 0,
        };
        let answer = self.runtime.block_on(self.client.clone().exec_sync(request)).context("ExecSync")?.into_inner();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Executed { stdout: text(answer.stdout), stderr: text(answer.stderr), exit_code: answer.exit_code })
    }

    /// Kills a container and leaves its pod.
    pub fn kill_container(&self, container: &str) -> Result<()> {
        let request = v1::StopContainerRequest { container_id: container.to_owned(), timeout: 0 };
        self.runtime.block_on(self.client.clone().stop_container(request)).context("StopContainer").map(drop)
    }

    /// Stops a pod, which takes it off the network, and removes it.
    pub fn remove(&self, sandbox: &str) -> Result<()> {
        let mut client = self.client.clone();
        self.runtime.block_on(async {
            let id = sandbox.to_owned();
            client
                .stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id.clone() })
                .await
                .context("StopPodSandbox")?;
            client
                .remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id })
                .await
                .context("RemovePodSandbox")?;
            Ok(())
        })
    }

    /// Ids of all pods that the runtime knows, dead ones too.
    pub fn list(&self) -> Result<Vec<String>> {
        let answer = self.runtime.block_on(self.client.clone().list_pod_sandbox(v1::ListPodSandboxRequest {}))?;
        Ok(answer.into_inner().items.into_iter().map(|pod| pod.id).collect())
    }

    /// The network namespace of a pod, as a path inside the node.
    pub fn netns(&self, sandbox: &str) -> Result<String> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.to_owned(), verbose: true };
        let answer = self.runtime.block_on(self.client.clone().pod_sandbox_status(request))?.into_inner();
        let info: serde_json::Value = serde_json::from_str(answer.info.get("info").context("no details of the pod")?)?;
        let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array().cloned().unwrap_or_default();
        let network = namespaces.iter().find(|namespace| namespace["type"] == "network");
        match network.and_then(|namespace| namespace["path"].as_str()) {
            Some(path) => Ok(path.to_owned()),
            None => bail!("the runtime names no network namespace for {sandbox}"),
        }
    }
}

fn sandbox_config(pod: &PodSpec) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            attempt: 0,
        }),
        hostname: pod.name.clone(),
        log_directory: format!("/var/log/pods/{}_{}_{}", pod.namespace, pod.name, pod.uid),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: format!("/kubepods/pod{}", pod.uid),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container_config(pod: &PodSpec) -> v1::ContainerConfig {
    let mounts = pod.mounts.iter().map(|(host, inside)| v1::Mount {
        container_path: inside.clone(),
        host_path: host.clone(),
        ..Default::default()
    });
    let added = ["NET_RAW", "NET_ADMIN"].map(str::to_owned).to_vec();
    let security = v1::LinuxContainerSecurityContext {
        capabilities: Some(v1::Capability { add_capabilities: added, ..Default::default() }),
        ..Default::default()
    };
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "main".into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: pod.image.clone() }),
        command: pod.command.clone(),
        mounts: mounts.collect(),
        log_path: "main.log".into(),
        linux: Some(v1::LinuxContainerConfig { security_context: Some(security) }),
        ..Default::default()
    }
}
