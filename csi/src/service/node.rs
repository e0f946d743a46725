//! The node service: volumes are brought to pods and taken from them.

use tonic::{Request, Response, Status};

use super::health::storage;
use super::{Shared, blocking, finished, offered, refuse, signed};
use crate::backend::Usage;
use crate::csi::node_get_storage_health_response::StorageBackendHealth;
use crate::csi::node_server::Node;
use crate::csi::node_service_capability::{Rpc, Type, rpc};
use crate::csi::volume_usage::Unit;
use crate::csi::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse,
    NodeGetInfoRequest, NodeGetInfoResponse, NodeGetStorageHealthRequest, NodeGetStorageHealthResponse,
    NodeGetVolumeHealthRequest, NodeGetVolumeHealthResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest,
    NodeUnstageVolumeResponse, VolumeUsage,
};
use crate::error::Error;
use crate::request;
use crate::state::Store;

/// The node service.
#[derive(Clone)]
pub struct NodeService(pub Shared);

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let stage = request::Stage::parse(request.into_inner(), &self.0.kubelet_dir).map_err(refuse)?;
        let guard = self.0.volumes.enter(&stage.id).map_err(refuse)?;
        let shared = self.0.clone();
        // A task of its own: between the steps there is a wait that a caller who goes away must not cut short.
        let task = tokio::spawn(async move {
            let _guard = guard;
            steps(&shared, stage).await
        });
        finished(task.await)?;
        Ok(Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let unstage = request::Unstage::parse(request.into_inner(), &self.0.kubelet_dir).map_err(refuse)?;
        let id = unstage.id.clone();
        self.0.run_on(&id, move |volumes| volumes.unstage(&unstage)).await?;
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        if request::Inline::is_one(&request) {
            let inline = request::Inline::parse(request, &self.0.kubelet_dir).map_err(refuse)?;
            self.0.publish_inline(inline).await?;
            return Ok(Response::new(NodePublishVolumeResponse {}));
        }
        let publish = request::Publish::parse(request, &self.0.kubelet_dir).map_err(refuse)?;
        let id = publish.id.clone();
        self.0.run_on(&id, move |volumes| volumes.publish(&publish)).await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        if let Some(name) = request::inline_name(&request.volume_id) {
            let root = &self.0.kubelet_dir;
            let target = request::TargetPath::parse("target_path", &request.target_path, root).map_err(refuse)?;
            let guard = self.0.volumes.enter_name("volume", &name).map_err(refuse)?;
            self.0.run(Some(guard), move |volumes| volumes.end_inline(&name, &target)).await?;
            return Ok(Response::new(NodeUnpublishVolumeResponse {}));
        }
        let unpublish = request::Unpublish::parse(request, &self.0.kubelet_dir).map_err(refuse)?;
        let id = unpublish.id.clone();
        self.0.run_on(&id, move |volumes| volumes.unpublish(&unpublish)).await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let stats =
            request::Stats::parse(request.volume_id, request.volume_path, &self.0.kubelet_dir).map_err(refuse)?;
        let id = self.0.volumes.by_handle(&stats.id).map_err(refuse)?;
        // Not guarded: asking changes nothing, and must not get in the way of what does.
        let (bytes, inodes) = self.0.probe(id.as_str(), move |volumes| volumes.stats(&stats)).await?;
        let usage = |usage: Usage, unit: Unit| VolumeUsage {
            available: signed(usage.available),
            total: signed(usage.total),
            used: signed(usage.used),
            unit: unit as i32,
        };
        let inodes = inodes.map(|inodes| usage(inodes, Unit::Inodes));
        let usage = std::iter::once(usage(bytes, Unit::Bytes)).chain(inodes).collect();
        Ok(Response::new(NodeGetVolumeStatsResponse { usage }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        use rpc::Type::{
            ExpandVolume, GetStorageHealth, GetVolumeHealth, GetVolumeStats, SingleNodeMultiWriter, StageUnstageVolume,
            VolumeMountGroup,
        };
        let capability =
            |kind: rpc::Type| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind as i32 })) };
        let mut types = vec![
            StageUnstageVolume,
            GetVolumeStats,
            SingleNodeMultiWriter,
            VolumeMountGroup,
            GetVolumeHealth,
            GetStorageHealth,
        ];
        if self.0.volumes.features().expand {
            types.push(ExpandVolume);
        }
        let capabilities = types.into_iter().map(capability).collect();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        offered(self.0.volumes.features().expand, "NodeExpandVolume", "no backend that is served grows")?;
        let expand = request::NodeExpand::parse(request.into_inner(), &self.0.kubelet_dir).map_err(refuse)?;
        let guard = self.0.volumes.enter(&expand.id).map_err(refuse)?;
        let size = self.0.run(Some(guard), move |volumes| volumes.node_expand(&expand)).await?;
        Ok(Response::new(NodeExpandVolumeResponse { capacity_bytes: signed(size) }))
    }

    async fn node_get_volume_health(
        &self,
        request: Request<NodeGetVolumeHealthRequest>,
    ) -> Result<Response<NodeGetVolumeHealthResponse>, Status> {
        let handle = request.into_inner().volume_id;
        if handle.is_empty() {
            return Err(refuse(Error::Missing { field: "volume_id" }));
        }
        let id = self.0.volumes.by_handle(&handle).map_err(refuse)?;
        let mut health = self.0.health(&id).await?;
        health.volume_id = handle;
        Ok(Response::new(NodeGetVolumeHealthResponse { volume_health: Some(health) }))
    }

    async fn node_get_storage_health(
        &self,
        _: Request<NodeGetStorageHealthRequest>,
    ) -> Result<Response<NodeGetStorageHealthResponse>, Status> {
        let findings = self.0.storage_health().await?;
        let entry = |finding: crate::ops::Finding| StorageBackendHealth {
            status: storage(finding.severity) as i32,
            reason: finding.reason.into(),
            message: finding.message,
            volume_capability: None,
        };
        let backend_health = findings.into_iter().map(entry).collect();
        Ok(Response::new(NodeGetStorageHealthResponse { backend_health }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.0.node.to_string(),
            max_volumes_per_node: self.0.max_volumes,
            accessible_topology: Some(self.0.topology()),
        }))
    }
}

impl Shared {
    /// Makes an inline volume and brings it to its pod, to the end even when the caller goes away.
    async fn publish_inline(&self, inline: request::Inline) -> Result<(), Status> {
        let guard = self.volumes.enter_name("volume", &inline.create.name).map_err(refuse)?;
        let shared = self.clone();
        let task = tokio::spawn(async move {
            let _name = guard;
            let (name, target) = (inline.create.name.clone(), inline.target.clone());
            let volumes = shared.volumes.clone();
            let (stage, guard, made) = blocking(move || volumes.inline(inline)).await?;
            let outcome = steps(&shared, stage).await;
            drop(guard);
            if outcome.is_err() && made {
                // Of a volume that its pod never had, nobody would ask to be rid.
                let volumes = shared.volumes.clone();
                if let Err(error) = blocking(move || volumes.end_inline(&name, &target)).await {
                    tracing::error!(%error, "an inline volume that could not be mounted could not be removed");
                }
            }
            outcome
        });
        finished(task.await)
    }
}

async fn steps(shared: &Shared, stage: request::Stage) -> crate::error::Result<()> {
    let volumes = shared.volumes.clone();
    let Some(mut staging) = blocking(move || volumes.stage(stage)).await? else { return Ok(()) };
    if staging.needs_format() {
        let (volumes, store) = (shared.volumes.clone(), shared.volumes.store_of(staging.id()));
        // Of a file nobody sees how far its mkfs is.
        let _noted = (store != Store::Pool).then(|| shared.volumes.probes.note(staging.id().as_str()));
        staging = shared.long_slots.run(store, move || volumes.format(staging)).await?;
    }
    let (volumes, _noted) = (shared.volumes.clone(), shared.volumes.probes.note(staging.id().as_str()));
    blocking(move || volumes.finish(staging)).await
}
