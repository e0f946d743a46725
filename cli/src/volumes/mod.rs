//! This node's local volumes, asked of the CSI driver's own socket.

pub mod local;
pub mod show;
pub mod socket;
pub mod storage;

use std::path::Path;
use std::time::Duration;

use keelway_csi::csi::ListVolumesRequest;
use keelway_csi::csi::controller_client::ControllerClient;

/// Where deploy/csi has the driver listen.
pub const DEFAULT_SOCKET: &str = "/var/lib/kubelet/plugins/local.csi.keelway.dev/csi.sock";

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The driver's id of it.
    pub id: String,
    /// Its size in bytes.
    pub capacity: i64,
}

/// What there is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Volumes {
    /// No driver listens on this node, which need not have one.
    NoDriver,
    /// The driver's list.
    Listed(Vec<Volume>),
    /// A driver is there and does not answer as it should.
    Unwell(String),
}

/// Asks the driver at `socket`.
pub async fn list(socket: &Path, timeout: Duration) -> Volumes {
    let absent = |kind| matches!(kind, std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused);
    match tokio::net::UnixStream::connect(socket).await {
        Ok(_) => {}
        Err(error) if absent(error.kind()) => return Volumes::NoDriver,
        Err(error) => return Volumes::Unwell(format!("{}: {error}", socket.display())),
    }
    match tokio::time::timeout(timeout, ask(socket, timeout)).await {
        Ok(Ok(volumes)) => Volumes::Listed(volumes),
        Ok(Err(reason)) => Volumes::Unwell(format!("{}: {reason}", socket.display())),
        Err(_) => Volumes::Unwell(format!("{}: no answer within {timeout:?}", socket.display())),
    }
}

async fn ask(socket: &Path, timeout: Duration) -> Result<Vec<Volume>, String> {
    let channel = keelway_api::connect(socket, timeout).await.map_err(|error| error.to_string())?;
    let mut client = ControllerClient::new(channel);
    let mut volumes = Vec::new();
    let mut starting_token = String::new();
    loop {
        let request = ListVolumesRequest { max_entries: 0, starting_token };
        let page = client.list_volumes(request).await.map_err(|status| status.message().to_owned())?.into_inner();
        let found = page.entries.into_iter().filter_map(|entry| entry.volume);
        volumes.extend(found.map(|volume| Volume { id: volume.volume_id, capacity: volume.capacity_bytes }));
        starting_token = page.next_token;
        if starting_token.is_empty() {
            return Ok(volumes);
        }
    }
}
