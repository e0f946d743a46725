//! The group controller service: snapshots of several volumes at one moment.

use tonic::{Request, Response, Status};

use super::controller::snapshot;
use super::{Shared, refuse, timestamp};
use crate::csi::group_controller_server::GroupController;
use crate::csi::group_controller_service_capability::{Rpc, Type, rpc};
use crate::csi::{
    CreateVolumeGroupSnapshotRequest, CreateVolumeGroupSnapshotResponse, DeleteVolumeGroupSnapshotRequest,
    DeleteVolumeGroupSnapshotResponse, GetVolumeGroupSnapshotRequest, GetVolumeGroupSnapshotResponse,
    GroupControllerGetCapabilitiesRequest, GroupControllerGetCapabilitiesResponse, GroupControllerServiceCapability,
    VolumeGroupSnapshot,
};
use crate::model::{GroupId, Snapshot};
use crate::request::{TakeGroup, group_of};
use crate::state::Store;

/// The group controller service.
#[derive(Clone)]
pub struct GroupService(pub Shared);

impl GroupService {
    fn group(&self, id: &GroupId, snapshots: Vec<Snapshot>) -> VolumeGroupSnapshot {
        let at = snapshots.first().map(|member| timestamp(member.created_ns));
        VolumeGroupSnapshot {
            group_snapshot_id: id.to_string(),
            snapshots: snapshots.into_iter().map(|member| snapshot(&self.0, member)).collect(),
            creation_time: at,
            ready_to_use: true,
        }
    }
}

#[tonic::async_trait]
impl GroupController for GroupService {
    async fn group_controller_get_capabilities(
        &self,
        _: Request<GroupControllerGetCapabilitiesRequest>,
    ) -> Result<Response<GroupControllerGetCapabilitiesResponse>, Status> {
        let kind = rpc::Type::CreateDeleteGetVolumeGroupSnapshot;
        let capability = GroupControllerServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind as i32 })) };
        Ok(Response::new(GroupControllerGetCapabilitiesResponse { capabilities: vec![capability] }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<CreateVolumeGroupSnapshotRequest>,
    ) -> Result<Response<CreateVolumeGroupSnapshotResponse>, Status> {
        let take = TakeGroup::parse(request.into_inner()).map_err(refuse)?;
        let guard = self.0.volumes.enter_name("group", &take.name).map_err(refuse)?;
        let store = take.volumes.first().map_or(Store::Pool, |id| self.0.volumes.store_of(id));
        let (id, snapshots) = self.0.run_long(guard, store, move |volumes| volumes.take_group(&take)).await?;
        Ok(Response::new(CreateVolumeGroupSnapshotResponse { group_snapshot: Some(self.group(&id, snapshots)) }))
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<DeleteVolumeGroupSnapshotRequest>,
    ) -> Result<Response<DeleteVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        match group_of(&request.group_snapshot_id, &request.snapshot_ids) {
            Ok((id, named)) => {
                let guard = self.0.volumes.enter_name("group", id.as_str()).map_err(refuse)?;
                self.0.run(Some(guard), move |volumes| volumes.drop_group(&id, &named)).await?;
            }
            // What we never issued is not there, which is what was asked for.
            Err(crate::error::Error::NoSuchGroup { .. }) => {}
            Err(error) => return Err(refuse(error)),
        }
        Ok(Response::new(DeleteVolumeGroupSnapshotResponse {}))
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<GetVolumeGroupSnapshotRequest>,
    ) -> Result<Response<GetVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        let (id, named) = group_of(&request.group_snapshot_id, &request.snapshot_ids).map_err(refuse)?;
        let snapshots = self.0.volumes.group(&id, &named).map_err(refuse)?;
        Ok(Response::new(GetVolumeGroupSnapshotResponse { group_snapshot: Some(self.group(&id, snapshots)) }))
    }
}
