//! A driver of the bench's own, and a volume of it as a provisioner and a kubelet ask for one.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use keelway_csi::csi;
use keelway_csi::csi::controller_client::ControllerClient;
use keelway_csi::csi::node_client::NodeClient;
use keelway_csi::csi::volume_capability::access_mode::Mode;
use keelway_csi::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::Kind;
use crate::sh;

/// A running keelway-csi; dropping it stops it.
pub struct Driver {
    child: Child,
    socket: PathBuf,
}

impl Driver {
    /// With its pool in the directory `base`.
    pub fn start(place: &Path, base: &str, backends: &str) -> Result<Self> {
        let socket = place.join(format!("{base}.sock"));
        let log = fs::File::create(place.join(format!("{base}.log")))?;
        let child = Command::new(sh::own("keelway-csi")?)
            .args(["--node-name=bench", "--no-registration", &format!("--backends={backends}")])
            .arg(format!("--endpoint=unix://{}", socket.display()))
            .arg(format!("--state-dir={}", place.join(base).join("state").display()))
            .arg(format!("--pool-dir={}", place.join(base).join("pool").display()))
            .arg(format!("--kubelet-dir={}", place.join("kubelet").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("starting keelway-csi")?;
        let driver = Self { child, socket };
        sh::wait_for("keelway-csi", Duration::from_secs(10), || {
            std::os::unix::net::UnixStream::connect(&driver.socket)
                .with_context(|| fs::read_to_string(driver.socket.with_extension("log")).unwrap_or_default())
        })?;
        Ok(driver)
    }

    pub async fn dial(&self) -> Result<Channel> {
        let path = self.socket.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        Ok(Endpoint::from_static("http://localhost").connect_with_connector(connector).await?)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// A volume's requests.
pub struct Volume {
    controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
    kind: Kind,
    name: String,
    /// How large it is to be; a fleet of them has to find room on the machine's disk.
    pub mebibytes: i64,
    id: String,
    staging: PathBuf,
    /// The pod's directory.
    pub target: PathBuf,
}

impl Volume {
    /// With the directories that a kubelet makes before it asks.
    pub fn new(channel: Channel, place: &Path, kind: Kind, name: &str) -> Result<Self> {
        // Names of one driver's volumes are its own.
        let name =
            format!("{name}-{}", kind.name().split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default());
        let (staging, pods) = (place.join("kubelet/staging").join(&name), place.join("kubelet/pods").join(&name));
        fs::create_dir(&staging)?;
        fs::create_dir(&pods)?;
        let (controller, node) = (ControllerClient::new(channel.clone()), NodeClient::new(channel));
        Ok(Self {
            controller,
            node,
            kind,
            name,
            mebibytes: 64,
            id: String::new(),
            staging,
            target: pods.join("target"),
        })
    }

    /// Create, stage, publish.
    pub async fn there(&mut self) -> Result<()> {
        let volume_capability = Some(csi::VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume {
                fs_type: self.kind.fs_type().into(),
                ..Default::default()
            })),
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter as i32 }),
        });
        let request = csi::CreateVolumeRequest {
            name: self.name.clone(),
            capacity_range: Some(csi::CapacityRange { required_bytes: self.mebibytes << 20, limit_bytes: 0 }),
            volume_capabilities: volume_capability.clone().into_iter().collect(),
            parameters: self.kind.parameters().iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            ..Default::default()
        };
        let made = self.controller.create_volume(request).await.context("CreateVolume")?.into_inner();
        self.id = made.volume.context("CreateVolume answered no volume")?.volume_id;
        let request = csi::NodeStageVolumeRequest {
            volume_id: self.id.clone(),
            staging_target_path: text(&self.staging),
            volume_capability: volume_capability.clone(),
            ..Default::default()
        };
        self.node.node_stage_volume(request).await.context("NodeStageVolume")?;
        let request = csi::NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            staging_target_path: text(&self.staging),
            target_path: text(&self.target),
            volume_capability,
            ..Default::default()
        };
        self.node.node_publish_volume(request).await.context("NodePublishVolume").map(drop)
    }

    /// Unpublish, unstage, delete.
    pub async fn back(&mut self) -> Result<()> {
        let request = csi::NodeUnpublishVolumeRequest { volume_id: self.id.clone(), target_path: text(&self.target) };
        self.node.node_unpublish_volume(request).await.context("NodeUnpublishVolume")?;
        let request =
            csi::NodeUnstageVolumeRequest { volume_id: self.id.clone(), staging_target_path: text(&self.staging) };
        self.node.node_unstage_volume(request).await.context("NodeUnstageVolume")?;
        let request = csi::DeleteVolumeRequest { volume_id: self.id.clone(), ..Default::default() };
        self.controller.delete_volume(request).await.context("DeleteVolume").map(drop)
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
