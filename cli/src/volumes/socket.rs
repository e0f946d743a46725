//! What only a running driver can say.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use keelway_csi::csi::controller_client::ControllerClient;
use keelway_csi::csi::node_client::NodeClient;
use keelway_csi::csi::volume_usage::Unit;
use keelway_csi::csi::{ControllerListVolumeHealthRequest, NodeGetVolumeStatsRequest, VolumeHealthErrorType};
use tonic::transport::Channel;

/// Something that is wrong with a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// How bad it is, in one word.
    pub status: &'static str,
    /// For programs.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// The driver's socket.
#[derive(Clone, Debug)]
pub struct Driver {
    channel: Option<Channel>,
    timeout: Duration,
}

impl Driver {
    /// Dials the driver; one that is not there answers nothing.
    pub async fn dial(socket: &Path, timeout: Duration) -> Self {
        Self { channel: keelway_api::connect(socket, timeout).await.ok(), timeout }
    }

    /// What is wrong with each volume that something is wrong with; nothing when the driver does not say.
    pub async fn health(&self) -> Option<BTreeMap<String, Vec<Health>>> {
        let mut client = ControllerClient::new(self.channel.clone()?);
        let (mut found, mut starting_token) = (BTreeMap::new(), String::new());
        loop {
            let request = ControllerListVolumeHealthRequest { starting_token, ..Default::default() };
            let answer = tokio::time::timeout(self.timeout, client.controller_list_volume_health(request)).await;
            let page = answer.ok()?.ok()?.into_inner();
            for volume in page.entries {
                let entries = volume.health_statuses.into_iter().map(|entry| Health {
                    status: word(entry.status()),
                    reason: entry.reason,
                    message: entry.message,
                });
                found.insert(volume.volume_id, entries.collect());
            }
            starting_token = page.next_token;
            if starting_token.is_empty() {
                return Some(found);
            }
        }
    }

    /// Bytes that are used in a volume that is mounted at this path.
    pub async fn used(&self, id: &str, path: &Path) -> Option<u64> {
        let mut client = NodeClient::new(self.channel.clone()?);
        let request = NodeGetVolumeStatsRequest {
            volume_id: id.to_owned(),
            volume_path: path.to_str()?.to_owned(),
            ..Default::default()
        };
        let answer = tokio::time::timeout(self.timeout, client.node_get_volume_stats(request)).await.ok()?.ok()?;
        let usage = answer.into_inner().usage.into_iter().find(|usage| usage.unit() == Unit::Bytes)?;
        u64::try_from(usage.used).ok()
    }
}

fn word(status: VolumeHealthErrorType) -> &'static str {
    match status {
        VolumeHealthErrorType::UnknownVolumeHealthType => "unknown",
        VolumeHealthErrorType::Degraded => "degraded",
        VolumeHealthErrorType::Inaccessible => "inaccessible",
        VolumeHealthErrorType::DataLoss => "data loss",
    }
}
