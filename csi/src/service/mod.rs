//! The gRPC services: each call is validated, guarded, and handed to a thread that may block.

mod controller;
mod identity;
mod node;
mod register;

pub use controller::ControllerService;
pub use identity::IdentityService;
pub use node::NodeService;
pub use register::RegistrationService;

use std::sync::Arc;

use tokio::sync::Semaphore;
use tonic::Status;

use crate::error::{Error, Result};
use crate::ops::Volumes;
use crate::state::Guard;
use crate::{TOPOLOGY_KEY, csi};

/// What the services share.
#[derive(Clone)]
pub struct Shared {
    /// The volumes of this node.
    pub volumes: Arc<Volumes>,
    /// This node's name.
    pub node: Arc<str>,
    /// The kubelet's directory: no target lies elsewhere.
    pub kubelet_dir: Arc<std::path::Path>,
    /// Slots for mkfs.
    pub format_slots: Arc<Semaphore>,
}

impl Shared {
    /// Where volumes of this node can be reached from.
    fn topology(&self) -> csi::Topology {
        csi::Topology { segments: [(TOPOLOGY_KEY.to_owned(), self.node.to_string())].into() }
    }

    /// Runs an operation on a thread that may block, to its end even when the caller goes away.
    async fn run<T: Send + 'static>(
        &self,
        guard: Option<Guard>,
        act: impl FnOnce(&Volumes) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let volumes = self.volumes.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            act(&volumes)
        });
        finished(task.await)
    }
}

/// The outcome of a task, as a status.
fn finished<T>(outcome: std::result::Result<Result<T>, tokio::task::JoinError>) -> std::result::Result<T, Status> {
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            tracing::warn!(%error, code = ?error.code(), "refused");
            Err(error.into())
        }
        Err(error) => {
            tracing::error!(%error, "an operation panicked");
            Err(Status::internal("an operation failed unexpectedly; the driver's log says more"))
        }
    }
}

fn refuse(error: Error) -> Status {
    tracing::debug!(%error, code = ?error.code(), "refused");
    error.into()
}

/// Sizes are far below 2^63; see `request::controller`.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
