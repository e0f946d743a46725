//! Who the driver is and what it can do.

use tonic::{Request, Response, Status};

use crate::LOCAL_DRIVER;
use crate::csi::identity_server::Identity;
use crate::csi::plugin_capability::{Service, Type, service};
use crate::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};

/// The identity service. Sockets are opened after recovery, so whoever can ask is told that the driver is ready.
#[derive(Clone, Debug)]
pub struct IdentityService {
    /// Whether the controller service is served, too.
    pub controller: bool,
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: LOCAL_DRIVER.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let mut types = vec![service::Type::VolumeAccessibilityConstraints];
        if self.controller {
            types.push(service::Type::ControllerService);
        }
        let capability =
            |kind: service::Type| PluginCapability { r#type: Some(Type::Service(Service { r#type: kind as i32 })) };
        let capabilities = types.into_iter().map(capability).collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}
