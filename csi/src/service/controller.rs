//! The controller service: volumes come and go.

use tonic::{Request, Response, Status};

use super::{Shared, refuse, signed};
use crate::csi::controller_server::Controller;
use crate::csi::controller_service_capability::{Rpc, Type, rpc};
use crate::csi::validate_volume_capabilities_response::Confirmed;
use crate::csi::{
    ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, ControllerServiceCapability,
    CreateVolumeRequest, CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse, GetCapacityRequest,
    GetCapacityResponse, ListVolumesRequest, ListVolumesResponse, ValidateVolumeCapabilitiesRequest,
    ValidateVolumeCapabilitiesResponse, Volume, list_volumes_response,
};
use crate::error::Error;
use crate::model::{GRAIN, Record};
use crate::request::{self, known_id};

/// The controller service.
#[derive(Clone)]
pub struct ControllerService(pub Shared);

impl ControllerService {
    fn volume(&self, record: Record) -> Volume {
        Volume {
            capacity_bytes: signed(record.size),
            volume_id: record.id.into(),
            accessible_topology: vec![self.0.topology()],
            ..Default::default()
        }
    }
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let create = request::Create::parse(request.into_inner(), &self.0.node).map_err(refuse)?;
        let guard = self.0.volumes.enter_name(&create.name).map_err(refuse)?;
        let record = self.0.run(Some(guard), move |volumes| volumes.create(create)).await?;
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
        let message = match (asked.content, asked.parameters) {
            (Err(why), _) | (_, Err(why)) => why,
            (Ok(content), _) if content != record.content => format!("the volume is {}", record.content),
            (_, Ok(Some(parameters))) if parameters != record.parameters => {
                "parameters differ from the volume's".into()
            }
            _ if !asked.context_matches => "volume_context and mutable_parameters of this driver are empty".into(),
            _ => String::new(),
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
        let list = request::List::parse(&request.into_inner()).map_err(refuse)?;
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
        let available = match asked.here {
            true => self.0.run(None, |volumes| volumes.available()).await? / GRAIN * GRAIN,
            false => 0,
        };
        Ok(Response::new(GetCapacityResponse {
            available_capacity: signed(available),
            maximum_volume_size: Some(signed(available)),
            minimum_volume_size: asked.content.map(|content| signed(content.min_size())),
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        use rpc::Type::{CreateDeleteVolume, GetCapacity, ListVolumes, SingleNodeMultiWriter};
        let capability =
            |kind: rpc::Type| ControllerServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind as i32 })) };
        let capabilities = [CreateDeleteVolume, GetCapacity, ListVolumes, SingleNodeMultiWriter].map(capability).into();
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }
}
