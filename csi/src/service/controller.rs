//! The controller service: volumes come and go.

use tonic::{Request, Response, Status};

use super::health::storage_of;
use super::{Shared, offered, refuse, signed, timestamp};
use crate::csi::controller_server::Controller;
use crate::csi::controller_service_capability::{Rpc, Type, rpc};
use crate::csi::validate_volume_capabilities_response::Confirmed;
use crate::csi::{
    ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, ControllerGetCapabilitiesRequest,
    ControllerGetCapabilitiesResponse, ControllerGetVolumeHealthRequest, ControllerGetVolumeHealthResponse,
    ControllerGetVolumeRequest, ControllerGetVolumeResponse, ControllerListVolumeHealthRequest,
    ControllerListVolumeHealthResponse, ControllerModifyVolumeRequest, ControllerModifyVolumeResponse,
    ControllerServiceCapability, CreateSnapshotRequest, CreateSnapshotResponse, CreateVolumeRequest,
    CreateVolumeResponse, DeleteSnapshotRequest, DeleteSnapshotResponse, DeleteVolumeRequest, DeleteVolumeResponse,
    GetCapacityRequest, GetCapacityResponse, GetSnapshotRequest, GetSnapshotResponse, ListSnapshotsRequest,
    ListSnapshotsResponse, ListVolumesRequest, ListVolumesResponse, Snapshot, ValidateVolumeCapabilitiesRequest,
    ValidateVolumeCapabilitiesResponse, Volume, VolumeContentSource, controller_get_volume_response,
    list_snapshots_response, list_volumes_response,
};
use crate::error::Error;
use crate::model::{self, Content, FsType, GRAIN, Record, Shape, Source, VolumeId};
use crate::request::{self, known_id, known_snapshot};

/// The controller service.
#[derive(Clone)]
pub struct ControllerService(pub Shared);

impl ControllerService {
    // Someone who asks one node's driver for volumes of all nodes must not be led to believe that it could.
    fn expands(&self) -> bool {
        self.0.volumes.features().expand && !self.0.expand_on_node
    }

    fn modifies(&self) -> bool {
        self.0.volumes.features().modify && !self.0.expand_on_node
    }

    fn snapshots(&self, call: &'static str) -> Result<(), Status> {
        offered(self.0.volumes.features().snapshots, call, "no backend that is served has snapshots")
    }

    fn volume(&self, record: Record) -> Volume {
        Volume {
            capacity_bytes: signed(record.size),
            volume_id: record.id.into(),
            accessible_topology: vec![self.0.topology()],
            content_source: record.source.map(source),
            ..Default::default()
        }
    }
}

fn source(source: Source) -> VolumeContentSource {
    use crate::csi::volume_content_source::{SnapshotSource, Type, VolumeSource};
    let source = match source {
        Source::Snapshot(id) => Type::Snapshot(SnapshotSource { snapshot_id: id.into() }),
        Source::Volume(id) => Type::Volume(VolumeSource { volume_id: id.into() }),
    };
    VolumeContentSource { r#type: Some(source) }
}

/// A snapshot as callers see it. It is whole from the moment that it is known.
pub(super) fn snapshot(shared: &Shared, snapshot: model::Snapshot) -> Snapshot {
    Snapshot {
        size_bytes: signed(snapshot.size),
        snapshot_id: snapshot.id.into(),
        source_volume_id: snapshot.volume.into(),
        creation_time: Some(timestamp(snapshot.created_ns)),
        ready_to_use: true,
        group_snapshot_id: snapshot.group.map(|group| group.id.to_string()).unwrap_or_default(),
        accessible_topology: vec![shared.topology()],
    }
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let create = request::Create::parse(request.into_inner(), &self.0.node).map_err(refuse)?;
        let guard = self.0.volumes.enter_name("volume", &create.name).map_err(refuse)?;
        // Only what is made from something may have to be copied.
        let record = match create.source {
            Some(_) => {
                let store = self.0.volumes.store(create.parameters.backend);
                self.0.run_long(guard, store, move |volumes| volumes.create(create)).await?
            }
            None => self.0.run(Some(guard), move |volumes| volumes.create(create)).await?,
        };
        Ok(Response::new(CreateVolumeResponse { volume: Some(self.volume(record)) }))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let id = request.into_inner().volume_id;
        if id.is_empty() {
            return Err(refuse(Error::Missing { field: "volume_id" }));
        }
        // An id that we never issued names a volume that is not there, which is what was asked for.
        if let Ok(id) = known_id(&id) {
            let guard = self.0.volumes.enter(&id).map_err(refuse)?;
            self.0.run(Some(guard), move |volumes| volumes.delete(&id)).await?;
        }
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        let asked = request::Validate::parse(&request).map_err(refuse)?;
        let record = self.0.volumes.get(&asked.id).map_err(refuse)?;
        let message = match (asked.usages, asked.parameters) {
            (Err(why), _) | (_, Err(why)) => why,
            (_, Ok(Some(parameters))) if parameters != record.parameters => {
                "parameters differ from the volume's".into()
            }
            (Ok((_, usages)), _) => {
                let fits = |usage: &request::Usage| {
                    usage.fits(record.content, &record.id).and_then(|()| usage.options(record.content).map(drop))
                };
                let mutable = record.mutable.with(&asked.mutable);
                match (usages.iter().try_for_each(fits), mutable) {
                    (Err(error), _) | (_, Err(error)) => error.to_string(),
                    (_, Ok(mutable)) if mutable != record.mutable => {
                        "mutable_parameters differ from the volume's".into()
                    }
                    _ if !asked.context_matches => "the volume_context of this driver's volumes is empty".into(),
                    _ => String::new(),
                }
            }
        };
        let confirmed = message.is_empty().then_some(Confirmed {
            volume_context: request.volume_context,
            volume_capabilities: request.volume_capabilities,
            parameters: request.parameters,
            mutable_parameters: request.mutable_parameters,
        });
        Ok(Response::new(ValidateVolumeCapabilitiesResponse { confirmed, message }))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let request = request.into_inner();
        let list = request::List::parse(request.max_entries, &request.starting_token).map_err(refuse)?;
        let (page, token) = self.0.volumes.list(list);
        let entry = |record| list_volumes_response::Entry { volume: Some(self.volume(record)), status: None };
        let entries = page.into_iter().map(entry).collect();
        Ok(Response::new(ListVolumesResponse { entries, next_token: token.unwrap_or_default() }))
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        let asked = request::Capacity::parse(&request.into_inner(), &self.0.node).map_err(refuse)?;
        let backend = asked.backend;
        // A class may be for other nodes' drivers, which serve other backends.
        let (available, largest) = match asked.here && backend.is_none_or(|kind| self.0.volumes.serves(kind)) {
            true => {
                let what = storage_of(backend.unwrap_or_default());
                self.0.look(&what, move |volumes| volumes.available(backend)).await?
            }
            false => (0, 0),
        };
        let (available, largest) = (available / GRAIN * GRAIN, largest / GRAIN * GRAIN);
        let device = backend.unwrap_or_default().has_device();
        // A volume is at least of the smallest filesystem's size; of which, the class's capability says.
        let least = asked.shape.map(|shape| match shape {
            Shape::Mount(Some(fs)) if device => Content::Filesystem(fs).min_size(),
            Shape::Mount(None) if device => Content::Filesystem(FsType::Ext4).min_size(),
            _ => Content::Raw.min_size(),
        });
        Ok(Response::new(GetCapacityResponse {
            available_capacity: signed(available),
            maximum_volume_size: Some(signed(largest)),
            minimum_volume_size: least.map(signed),
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        use rpc::Type::{
            CloneVolume, CreateDeleteSnapshot, CreateDeleteVolume, ExpandVolume, GetCapacity, GetSnapshot, GetVolume,
            GetVolumeHealth, ListSnapshots, ListVolumeHealth, ListVolumes, ModifyVolume, SingleNodeMultiWriter,
        };
        let mut types = vec![
            CreateDeleteVolume,
            GetCapacity,
            ListVolumes,
            GetVolume,
            SingleNodeMultiWriter,
            GetVolumeHealth,
            ListVolumeHealth,
        ];
        if self.0.volumes.features().snapshots {
            types.extend([CreateDeleteSnapshot, ListSnapshots, GetSnapshot, CloneVolume]);
        }
        if self.expands() {
            types.push(ExpandVolume);
        }
        if self.modifies() {
            types.push(ModifyVolume);
        }
        let capability =
            |kind: rpc::Type| ControllerServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind as i32 })) };
        let capabilities = types.into_iter().map(capability).collect();
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        self.snapshots("CreateSnapshot")?;
        let take = request::Take::parse(request.into_inner()).map_err(refuse)?;
        let guard = self.0.volumes.enter_name("snapshot", &take.name).map_err(refuse)?;
        let store = self.0.volumes.store_of(&take.volume);
        let taken = self.0.run_long(guard, store, move |volumes| volumes.take(&take)).await?;
        Ok(Response::new(CreateSnapshotResponse { snapshot: Some(snapshot(&self.0, taken)) }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        self.snapshots("DeleteSnapshot")?;
        let id = request.into_inner().snapshot_id;
        if id.is_empty() {
            return Err(refuse(Error::Missing { field: "snapshot_id" }));
        }
        if let Ok(id) = known_snapshot(&id) {
            self.0.run(None, move |volumes| volumes.drop_snapshot(&id)).await?;
        }
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        self.snapshots("ListSnapshots")?;
        let list = request::ListSnapshots::parse(&request.into_inner()).map_err(refuse)?;
        let (page, token) = self.0.volumes.snapshots(&list);
        let entry = |found| list_snapshots_response::Entry { snapshot: Some(snapshot(&self.0, found)) };
        let entries = page.into_iter().map(entry).collect();
        Ok(Response::new(ListSnapshotsResponse { entries, next_token: token.unwrap_or_default() }))
    }

    async fn get_snapshot(
        &self,
        request: Request<GetSnapshotRequest>,
    ) -> Result<Response<GetSnapshotResponse>, Status> {
        self.snapshots("GetSnapshot")?;
        let id = request.into_inner().snapshot_id;
        if id.is_empty() {
            return Err(refuse(Error::Missing { field: "snapshot_id" }));
        }
        let found = known_snapshot(&id).and_then(|id| self.0.volumes.snapshot(&id)).map_err(refuse)?;
        Ok(Response::new(GetSnapshotResponse { snapshot: Some(snapshot(&self.0, found)) }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        offered(
            self.expands(),
            "ControllerExpandVolume",
            "no backend that is served grows, or nodes expand by themselves",
        )?;
        let expand = request::Expand::parse(request.into_inner()).map_err(refuse)?;
        let guard = self.0.volumes.enter(&expand.id).map_err(refuse)?;
        let (size, node) = self.0.run(Some(guard), move |volumes| volumes.expand(&expand)).await?;
        Ok(Response::new(ControllerExpandVolumeResponse {
            capacity_bytes: signed(size),
            node_expansion_required: node,
        }))
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        let id = known(request.into_inner().volume_id)?;
        let record = self.0.volumes.get(&id).map_err(refuse)?;
        Ok(Response::new(ControllerGetVolumeResponse {
            volume: Some(self.volume(record)),
            status: Some(controller_get_volume_response::VolumeStatus::default()),
        }))
    }

    async fn controller_modify_volume(
        &self,
        request: Request<ControllerModifyVolumeRequest>,
    ) -> Result<Response<ControllerModifyVolumeResponse>, Status> {
        offered(
            self.modifies(),
            "ControllerModifyVolume",
            "no backend that is served can, or one driver is asked for all",
        )?;
        let modify = request::Modify::parse(request.into_inner()).map_err(refuse)?;
        let guard = self.0.volumes.enter(&modify.id).map_err(refuse)?;
        self.0.run(Some(guard), move |volumes| volumes.modify(&modify)).await?;
        Ok(Response::new(ControllerModifyVolumeResponse {}))
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<ControllerListVolumeHealthRequest>,
    ) -> Result<Response<ControllerListVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        let list = request::List::parse(request.max_entries, &request.starting_token).map_err(refuse)?;
        let (page, token) = self.0.volumes.list(list);
        let entries = self.0.health_of_all(page.into_iter().map(|record| record.id).collect()).await?;
        Ok(Response::new(ControllerListVolumeHealthResponse { entries, next_token: token.unwrap_or_default() }))
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<ControllerGetVolumeHealthRequest>,
    ) -> Result<Response<ControllerGetVolumeHealthResponse>, Status> {
        let id = known(request.into_inner().volume_id)?;
        self.0.volumes.get(&id).map_err(refuse)?;
        Ok(Response::new(ControllerGetVolumeHealthResponse { volume_health: Some(self.0.health(&id).await?) }))
    }
}

fn known(id: String) -> Result<VolumeId, Status> {
    if id.is_empty() {
        return Err(refuse(Error::Missing { field: "volume_id" }));
    }
    known_id(&id).map_err(refuse)
}
