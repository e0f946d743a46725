//! The gRPC services: each call is validated, guarded, and handed to a thread that may block.

mod controller;
mod group;
mod health;
mod identity;
mod metadata;
mod node;
mod register;
mod slots;

pub use controller::ControllerService;
pub use group::GroupService;
pub use identity::IdentityService;
pub use metadata::MetadataService;
pub use node::NodeService;
pub use register::RegistrationService;
pub use slots::Slots;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::{Code, Status};

use crate::error::{Error, Result};
use crate::model::VolumeId;
use crate::ops::{PATIENCE, Volumes, hung};
use crate::state::{Guard, Store};
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
    /// Slots for what takes long: mkfs and copies.
    pub long_slots: Slots,
    /// The most volumes that the scheduler is to bring to this node; 0 for no limit.
    pub max_volumes: i64,
    /// Whether callers of the controller service are told that only nodes expand and modify: one of them speaks for all
    /// nodes.
    pub expand_on_node: bool,
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

    /// Like [`Shared::run`], for what waits for the volume's disk: should that not answer, the volume's health says so.
    async fn run_on<T: Send + 'static>(
        &self,
        id: &VolumeId,
        act: impl FnOnce(&Volumes) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let guard = self.volumes.enter(id).map_err(refuse)?;
        let noted = self.volumes.probes.note(id.as_str());
        self.run(Some(guard), move |volumes| {
            let _noted = noted;
            act(volumes)
        })
        .await
    }

    /// Like [`Shared::run`], for what may take long: it waits for one of a few slots of its store, and goes on without its
    /// caller.
    async fn run_long<T: Send + 'static>(
        &self,
        guard: Guard,
        store: Store,
        act: impl FnOnce(&Volumes) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let (volumes, slots) = (self.volumes.clone(), self.long_slots.clone());
        let task = tokio::spawn(async move {
            let _guard = guard;
            slots.run(store, move || act(&volumes)).await
        });
        finished(task.await)
    }

    /// Looks at a volume, or at what volumes are stored in, for so long only; what does not answer holds up nobody else.
    async fn probe<T: Send + 'static>(
        &self,
        what: &str,
        act: impl FnOnce(&Volumes) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let probe = self.volumes.probes.begin(what).map_err(refuse)?;
        let volumes = self.volumes.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _probe = probe;
            act(&volumes)
        });
        match tokio::time::timeout(PATIENCE, task).await {
            Ok(outcome) => finished(outcome),
            Err(_) => Err(refuse(hung(what, PATIENCE))),
        }
    }

    /// Like [`Shared::probe`], for who may wait until others have looked.
    async fn look<T: Send + 'static>(
        &self,
        what: &str,
        act: impl Fn(&Volumes) -> Result<T> + Clone + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let start = Instant::now();
        loop {
            match self.probe(what, act.clone()).await {
                Err(status) if status.code() == Code::Aborted && start.elapsed() < PATIENCE => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => return other,
            }
        }
    }
}

/// Runs a step on a thread that may block. Once begun it goes on without its caller.
async fn blocking<T: Send + 'static>(act: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let outcome = tokio::task::spawn_blocking(act).await;
    outcome.unwrap_or_else(|error| Err(Error::io("run an operation", std::io::Error::other(error))))
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

fn timestamp(nanoseconds: u64) -> prost_types::Timestamp {
    let part = 1_000_000_000;
    // Both fit: there are less than 2^30 nanoseconds in a second, and less than 2^63 seconds in a u64 of nanoseconds.
    prost_types::Timestamp { seconds: (nanoseconds / part) as i64, nanos: (nanoseconds % part) as i32 }
}

/// Refuses a call whose capability is not advertised, whatever it is about.
fn offered(is: bool, call: &'static str, why: &'static str) -> std::result::Result<(), Status> {
    if is { Ok(()) } else { Err(refuse(Error::NotOffered { call, why })) }
}

fn refuse(error: Error) -> Status {
    tracing::debug!(%error, code = ?error.code(), "refused");
    error.into()
}

/// Sizes are far below 2^63; see `request::controller`.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
