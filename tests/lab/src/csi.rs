//! A node's CSI driver, called over its socket as a kubelet and a provisioner call it.
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use keelway_csi::csi;
use keelway_csi::csi::controller_client::ControllerClient;
use keelway_csi::csi::node_client::NodeClient;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::node::Node;

/// A client of one driver. Calls block.
#[derive(Debug)]
pub struct Csi {
    runtime: Runtime,
    channel: Channel,
    /// The node's root directory, seen from outside.
    root: PathBuf,
}

/// Where a volume's file system is on its node.
#[derive(Clone, Debug)]
pub struct Volume {
    /// The driver's id of it.
    pub id: String,
    staging: String,
}

impl Csi {
    /// Dials the driver's socket on a node, from outside the node.
    pub fn connect(node: &Node, socket: &str) -> Result<Self> {
        let socket = node.path(socket)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let path: PathBuf = socket.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let dialled = runtime.block_on(Endpoint::from_static("http://localhost").connect_with_connector(connector));
        let channel = dialled.with_context(|| format!("dialling {}", socket.display()))?;
        Ok(Self { runtime, channel, root: node.path("/")? })
    }

    /// Makes a volume of this many bytes and stages it.
    pub fn create(&self, name: &str, bytes: i64) -> Result<Volume> {
        let mut controller = ControllerClient::new(self.channel.clone());
        let request = csi::CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
            volume_capabilities: vec![capability()],
            ..Default::default()
        };
        let made = self.runtime.block_on(controller.create_volume(request)).context("CreateVolume")?.into_inner();
        let id = made.volume.context("CreateVolume answered no volume")?.volume_id;
        let staging = format!("/var/lib/kubelet/plugins/kubernetes.io/csi/{name}/globalmount");
        // The caller makes the staging directory, as a kubelet does, and the target's parent.
        fs::create_dir_all(self.root.join(staging.trim_start_matches('/')))?;
        let request = csi::NodeStageVolumeRequest {
            volume_id: id.clone(),
            staging_target_path: staging.clone(),
            volume_capability: Some(capability()),
            ..Default::default()
        };
        let mut node = NodeClient::new(self.channel.clone());
        self.runtime.block_on(node.node_stage_volume(request)).context("NodeStageVolume")?;
        Ok(Volume { id, staging })
    }

    /// Publishes a volume for a pod and returns the path on the node.
    pub fn publish(&self, volume: &Volume, pod: &str) -> Result<String> {
        let target = target(volume, pod);
        fs::create_dir_all(
            self.root.join(format!("var/lib/kubelet/pods/{pod}/volumes/kubernetes.io~csi/{}", volume.id)),
        )?;
        let request = csi::NodePublishVolumeRequest {
            volume_id: volume.id.clone(),
            staging_target_path: volume.staging.clone(),
            target_path: target.clone(),
            volume_capability: Some(capability()),
            ..Default::default()
        };
        let mut node = NodeClient::new(self.channel.clone());
        self.runtime.block_on(node.node_publish_volume(request)).context("NodePublishVolume")?;
        Ok(target)
    }

    /// Takes a volume from a pod.
    pub fn unpublish(&self, volume: &Volume, pod: &str) -> Result<()> {
        let request =
            csi::NodeUnpublishVolumeRequest { volume_id: volume.id.clone(), target_path: target(volume, pod) };
        let mut node = NodeClient::new(self.channel.clone());
        self.runtime.block_on(node.node_unpublish_volume(request)).context("NodeUnpublishVolume").map(drop)
    }

    /// Unstages and deletes a volume.
    pub fn delete(&self, volume: &Volume) -> Result<()> {
        let request =
            csi::NodeUnstageVolumeRequest { volume_id: volume.id.clone(), staging_target_path: volume.staging.clone() };
        let mut node = NodeClient::new(self.channel.clone());
        self.runtime.block_on(node.node_unstage_volume(request)).context("NodeUnstageVolume")?;
        let request = csi::DeleteVolumeRequest { volume_id: volume.id.clone(), ..Default::default() };
        let mut controller = ControllerClient::new(self.channel.clone());
        self.runtime.block_on(controller.delete_volume(request)).context("DeleteVolume").map(drop)
    }
}

fn target(volume: &Volume, pod: &str) -> String {
    format!("/var/lib/kubelet/pods/{pod}/volumes/kubernetes.io~csi/{}/mount", volume.id)
}

fn capability() -> csi::VolumeCapability {
    let mode = csi::volume_capability::access_mode::Mode::SingleNodeWriter;
    csi::VolumeCapability {
        access_type: Some(csi::volume_capability::AccessType::Mount(csi::volume_capability::MountVolume {
            fs_type: "ext4".to_owned(),
            ..Default::default()
        })),
        access_mode: Some(csi::volume_capability::AccessMode { mode: mode as i32 }),
    }
}
