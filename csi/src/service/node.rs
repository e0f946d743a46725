//! The node service: volumes are brought to pods and taken from them.

use tonic::{Request, Response, Status};

use super::{Shared, finished, refuse, signed};
use crate::csi::node_server::Node;
use crate::csi::node_service_capability::{Rpc, Type, rpc};
use crate::csi::volume_usage::Unit;
use crate::csi::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodePublishVolumeResponse,
    NodeServiceCapability, NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse, VolumeUsage,
};
use crate::error::Error;
use crate::ops::Usage;
use crate::request;

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
        let guard = self.0.volumes.enter(&unstage.id).map_err(refuse)?;
        self.0.run(Some(guard), move |volumes| volumes.unstage(&unstage)).await?;
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let publish = request::Publish::parse(request.into_inner(), &self.0.kubelet_dir).map_err(refuse)?;
        let guard = self.0.volumes.enter(&publish.id).map_err(refuse)?;
        self.0.run(Some(guard), move |volumes| volumes.publish(&publish)).await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let unpublish = request::Unpublish::parse(request.into_inner(), &self.0.kubelet_dir).map_err(refuse)?;
        let guard = self.0.volumes.enter(&unpublish.id).map_err(refuse)?;
        self.0.run(Some(guard), move |volumes| volumes.unpublish(&unpublish)).await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let stats = request::Stats::parse(request.into_inner(), &self.0.kubelet_dir).map_err(refuse)?;
        // Not guarded: asking changes nothing, and must not get in the way of what does.
        let (bytes, inodes) = self.0.run(None, move |volumes| volumes.stats(&stats)).await?;
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
        use rpc::Type::{GetVolumeStats, SingleNodeMultiWriter, StageUnstageVolume};
        let capability =
            |kind: rpc::Type| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind as i32 })) };
        let capabilities = [StageUnstageVolume, GetVolumeStats, SingleNodeMultiWriter].map(capability).into();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.0.node.to_string(),
            // The kernel makes loop devices as they are asked for: no limit of ours.
            max_volumes_per_node: 0,
            accessible_topology: Some(self.0.topology()),
        }))
    }
}

async fn steps(shared: &Shared, stage: request::Stage) -> crate::error::Result<()> {
    let volumes = shared.volumes.clone();
    let Some(mut staging) = blocking(move || volumes.stage(stage)).await? else { return Ok(()) };
    if staging.needs_format() {
        let closed = |_| Error::io("wait for a mkfs", std::io::Error::other("the driver is stopping"));
        let _slot = shared.format_slots.acquire().await.map_err(closed)?;
        let volumes = shared.volumes.clone();
        staging = blocking(move || volumes.format(staging)).await?;
    }
    let volumes = shared.volumes.clone();
    blocking(move || volumes.finish(staging)).await
}

async fn blocking<T, F>(act: F) -> crate::error::Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> crate::error::Result<T> + Send + 'static,
{
    match tokio::task::spawn_blocking(act).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Error::io("run a step", std::io::Error::other(error))),
    }
}
