//! Who the driver is and what it can do.

use tonic::{Request, Response, Status};

use crate::LOCAL_DRIVER;
use crate::backend::Features;
use crate::csi::identity_server::Identity;
use crate::csi::plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};
use crate::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};

/// The identity service. Sockets are opened after recovery, so whoever can ask is told that the driver is ready.
#[derive(Clone, Debug)]
pub struct IdentityService {
    /// Whether the controller service is served, too.
    pub controller: bool,
    /// What the backends can do.
    pub features: Features,
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
        if self.controller && self.features.snapshots {
            // SNAPSHOT_ACCESSIBILITY_CONSTRAINTS is not advertised yet, though snapshots say where they are: csi-test
            // 5.6 compares that topology by the private state of its protobuf messages, which no driver can pass.
            types.push(service::Type::GroupControllerService);
        }
        if self.controller && self.features.tracking {
            types.push(service::Type::SnapshotMetadataService);
        }
        let capability =
            |kind: service::Type| PluginCapability { r#type: Some(Type::Service(Service { r#type: kind as i32 })) };
        let mut capabilities: Vec<_> = types.into_iter().map(capability).collect();
        if self.features.expand {
            // In use or not.
            let online = Type::VolumeExpansion(VolumeExpansion { r#type: volume_expansion::Type::Online as i32 });
            capabilities.push(PluginCapability { r#type: Some(online) });
        }
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}
