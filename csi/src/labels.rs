//! `keelway-csi label-snapshots`: gives each VolumeSnapshotContent that somebody made for a snapshot of this node the label by
//! which this node's csi-snapshotter takes it.
//!
//! Upstream's snapshot-controller labels contents that it makes itself, by the node of their volume. One that a person made for
//! a snapshot that is there already (`spec.source.snapshotHandle`) names no volume: only the driver that has it knows. So each
//! node asks its own driver, over its socket, for the contents that nobody has taken.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use futures::TryStreamExt;
use hyper_util::rt::TokioIo;
use keelway_csi::LOCAL_DRIVER;
use keelway_csi::csi::GetSnapshotRequest;
use keelway_csi::csi::controller_client::ControllerClient;
use keelway_csi::server::socket_path;
use kube::api::{Patch, PatchParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use serde_json::json;
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::{Endpoint, Uri};

/// The first argument that asks for this.
pub const COMMAND: &str = "label-snapshots";

/// What csi-snapshotter selects by with `--node-deployment` (external-snapshotter's `VolumeSnapshotContentManagedByLabel`).
const LABEL: &str = "snapshot.storage.kubernetes.io/managed-by";

/// How long to wait before a driver or an API server that did not answer is asked again.
const PAUSE: Duration = Duration::from_secs(5);
/// How long the driver may take to say whether it has a snapshot.
const PATIENCE: Duration = Duration::from_secs(30);

/// Label the VolumeSnapshotContents that were made by hand for snapshots of this node
#[derive(Debug, Parser)]
#[command(name = "keelway-csi label-snapshots", version)]
struct Flags {
    /// The socket of this node's driver
    #[arg(long, default_value = "unix:///csi/csi.sock")]
    endpoint: String,
    /// This node's name, which is the label's value
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
}

/// Runs until it is killed. The first argument is [`COMMAND`]; the API server is the one of this pod.
pub async fn run() -> anyhow::Result<()> {
    let flags = Flags::parse_from(std::env::args_os().skip(1));
    let socket = socket_path(&flags.endpoint)?;
    let kind = GroupVersionKind::gvk("snapshot.storage.k8s.io", "v1", "VolumeSnapshotContent");
    let client = Client::try_default().await.context("find the API server")?;
    let api: Api<DynamicObject> = Api::all_with(client, &ApiResource::from_gvk(&kind));
    // Only those that nobody has: a labelled one leaves the watch.
    let config = watcher::Config::default().labels(&format!("!{LABEL}"));
    let mut seen = pin!(watcher(api.clone(), config).default_backoff().applied_objects());
    let mut open = BTreeMap::new();
    let mut again = tokio::time::interval(PAUSE);
    tracing::info!(node = flags.node_name, "labelling contents");
    loop {
        tokio::select! {
            content = seen.try_next() => match content {
                Ok(Some(content)) => {
                    if let (Some(name), Some(handle)) = (&content.metadata.name, handle(&content)) {
                        open.insert(name.clone(), handle.to_owned());
                    }
                }
                Ok(None) => anyhow::bail!("the watch of VolumeSnapshotContents ended"),
                Err(error) => {
                    tracing::warn!(%error, "watching VolumeSnapshotContents");
                    continue;
                }
            },
            _ = again.tick() => {}
        }
        for (name, handle) in std::mem::take(&mut open) {
            match settle(&api, &socket, &flags.node_name, &name, &handle).await {
                Ok(true) => tracing::info!(content = name, snapshot = handle, "labelled"),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(content = name, "{error:#}");
                    open.insert(name, handle);
                }
            }
        }
    }
}

/// The snapshot that this content is of, when it is one of this driver that was there before its content.
fn handle(content: &DynamicObject) -> Option<&str> {
    let labelled = content.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(LABEL));
    let ours = content.data.pointer("/spec/driver")?.as_str()? == LOCAL_DRIVER;
    (ours && !labelled).then(|| content.data.pointer("/spec/source/snapshotHandle")?.as_str())?
}

/// Labels the content when this node has its snapshot; whether it does.
async fn settle(
    api: &Api<DynamicObject>,
    socket: &Path,
    node: &str,
    content: &str,
    snapshot: &str,
) -> anyhow::Result<bool> {
    if !has(socket, snapshot).await? {
        return Ok(false);
    }
    let label = Patch::Merge(json!({"metadata": {"labels": {LABEL: node}}}));
    match api.patch_metadata(content, &PatchParams::default(), &label).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error).context("label it"),
    }
}

/// Whether the driver has this snapshot.
async fn has(socket: &Path, snapshot: &str) -> anyhow::Result<bool> {
    let socket = PathBuf::from(socket);
    let dial = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The name is not used; HTTP wants one.
    let channel = Endpoint::from_static("http://localhost")
        .timeout(PATIENCE)
        .connect_with_connector(dial)
        .await
        .context("dial the driver")?;
    let request = GetSnapshotRequest { snapshot_id: snapshot.to_owned(), ..Default::default() };
    match ControllerClient::new(channel).get_snapshot(request).await {
        Ok(_) => Ok(true),
        // A handle that no driver of ours ever gave away names no snapshot.
        Err(status) if matches!(status.code(), Code::NotFound | Code::InvalidArgument) => Ok(false),
        Err(status) => Err(status).context("ask the driver for the snapshot"),
    }
}

#[cfg(test)]
mod tests {
    use keelway_csi::LOCAL_DRIVER;
    use kube::core::DynamicObject;
    use serde_json::{Value, json};

    use super::{LABEL, handle};

    fn content(driver: &str, source: &Value, labels: &Value) -> DynamicObject {
        let text = json!({"metadata": {"name": "a", "labels": labels}, "spec": {"driver": driver, "source": source}});
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn contents_of_others_and_those_that_somebody_has_are_left_alone() {
        let (there, made, none) = (json!({"snapshotHandle": "kws-1"}), json!({"volumeHandle": "kwl-1"}), json!({}));
        assert_eq!(handle(&content(LOCAL_DRIVER, &there, &none)), Some("kws-1"));
        assert_eq!(handle(&content("another.csi.example", &there, &none)), None);
        assert_eq!(handle(&content(LOCAL_DRIVER, &made, &none)), None);
        assert_eq!(handle(&content(LOCAL_DRIVER, &there, &json!({LABEL: "node1"}))), None);
    }
}
