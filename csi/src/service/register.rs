//! Registration with the kubelet: it finds our socket in its `plugins_registry`, and asks who is there.

use tonic::{Request, Response, Status};

use crate::LOCAL_DRIVER;
use crate::registration::registration_server::Registration;
use crate::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};

/// The registration service.
#[derive(Clone, Debug)]
pub struct RegistrationService {
    /// The path of the CSI socket, as the kubelet sees it.
    pub endpoint: String,
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".into(),
            name: LOCAL_DRIVER.into(),
            endpoint: self.endpoint.clone(),
            // The kubelet compares this with the CSI versions it speaks; any 1.x is one to it.
            supported_versions: vec!["1.0.0".into()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            tracing::info!("registered with the kubelet");
        } else {
            // The kubelet tries again for as long as the socket is there.
            tracing::error!(error = status.error, "the kubelet refused the registration");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
