//! containerd on a node: Debian's 1.6, or 2.x as a cluster's kubelet wants it.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cri::Cri;
use crate::image::Image;
use crate::node::Node;
use crate::process::Process;
use crate::sh::{self, SOON, wait_for};

/// The image that holds a pod's namespaces, under the name that both versions are told.
pub const PAUSE: &str = "registry.k8s.io/pause:3.10.2";

/// The image with the probe and busybox.
pub const PROBE: &str = "keelway.local/probe:lab";

const SOCKET: &str = "/run/containerd/containerd.sock";

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    process: Process,
    ctr: PathBuf,
}

impl Containerd {
    /// Starts the machine's own containerd (configuration version 2), or the one in `bin` (configuration version 3).
    pub fn start(node: &Node, bin: Option<&Path>) -> Result<Self> {
        let (program, ctr, config) = match bin {
            None => (sh::system("containerd")?, sh::system("ctr")?, V2),
            Some(dir) => (dir.join("containerd"), dir.join("ctr"), V3),
        };
        let file = node.dir.join("containerd.toml");
        fs::write(&file, config.replace("@PAUSE@", PAUSE))?;
        // It finds its shim by the path: each version must find its own.
        let path = format!("PATH={}:{}", program.parent().unwrap_or(Path::new("/usr/bin")).display(), sh::PATH);
        let argv = ["env", &path, &program.to_string_lossy(), "-c", &file.to_string_lossy()];
        let process = node.spawn("containerd", &argv)?;
        let mut this = Self { process, ctr };
        let socket = node.path(SOCKET)?;
        wait_for("containerd", SOON, || {
            this.process.check()?;
            Cri::connect(&socket)?.version()
        })?;
        Ok(this)
    }

    /// A client of its CRI plugin, from outside the node.
    pub fn cri(&self, node: &Node) -> Result<Cri> {
        Cri::connect(&node.path(SOCKET)?)
    }

    /// Imports image archives.
    pub fn import(&self, node: &Node, archives: &[PathBuf]) -> Result<()> {
        for archive in archives {
            let ctr = self.ctr.to_string_lossy();
            node.run(&[
                &ctr,
                "-n",
                "k8s.io",
                "images",
                "import",
                "--snapshotter",
                "overlayfs",
                &archive.to_string_lossy(),
            ])
            .with_context(|| format!("importing {}", archive.display()))?;
        }
        Ok(())
    }

    /// Lets it run on after this value is gone.
    pub fn keep(self) {
        self.process.keep();
    }
}

/// Writes the archives of [`PAUSE`] and [`PROBE`] into `dir`.
pub fn basic_images(dir: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(dir)?;
    let probe = sh::own("keelway-probe")?;
    let (pause_tar, probe_tar) = (dir.join("pause.tar"), dir.join("probe.tar"));
    Image::new(PAUSE, &["/keelway-probe", "pause"]).file(&probe, "/keelway-probe")?.write(&pause_tar)?;
    let image = Image::new(PROBE, &["/bin/keelway-probe", "serve"]).busybox(&[])?;
    image.file(&probe, "/bin/keelway-probe")?.write(&probe_tar)?;
    Ok(vec![pause_tar, probe_tar])
}

/// Adjusting the score of the OOM killer downwards needs a privilege that containers of this kind may lack.
const V2: &str = r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "@PAUSE@"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
"#;

/// `lo` is the runtime's business; without this it wants the `loopback` plugin that distributions install beside it.
const V3: &str = r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "@PAUSE@"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"
    use_internal_loopback = true
"#;
