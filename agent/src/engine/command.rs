//! What the rest of the agent asks of the engine.

use std::collections::BTreeMap;

use keelway_cni::{Lease, LeaseKey, PodRef};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Attached, EngineStatus, Known, ListedService, Progress, Selection, Versions};

/// Why the engine could not do as asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The first full lists are not in yet.
    #[error("the agent has not yet read all objects from its source")]
    NotSynced,
    /// The tables or programs refused.
    #[error("{0}")]
    Kernel(String),
}

/// What the local API asks of the engine.
pub enum Command {
    /// Answers the pod's uid once the pod, its namespace and policies are known. Dropping the receiver gives up.
    Admit {
        /// As the runtime names it; an empty uid takes the pod of that name.
        pod: PodRef,
        /// Receives the uid.
        reply: oneshot::Sender<String>,
    },
    /// Answers the versions of a namespace's policies as far as they are known.
    KnownPolicies {
        /// Which namespace.
        namespace: String,
        /// Receives them.
        reply: oneshot::Sender<Known>,
    },
    /// Answers once the policies of a namespace are in the tables as listed, or have changed otherwise. Dropping the receiver
    /// gives up.
    AwaitPolicies {
        /// Which namespace.
        namespace: String,
        /// What [`Command::KnownPolicies`] answered before the list was made.
        before: Known,
        /// The list.
        listed: Versions,
        /// Never receives [`Progress::Behind`].
        reply: oneshot::Sender<Progress>,
    },
    /// Puts the policy of a leased pod into the kernel, ahead of its endpoint.
    Prepare {
        /// The lease, its pod's uid filled in.
        lease: Lease,
        /// Done or why not.
        reply: oneshot::Sender<Result<(), EngineError>>,
    },
    /// Attaches the programs to the pod's veth pair and makes it an endpoint.
    Attach {
        /// What there is to know about it.
        attached: Attached,
        /// Done or why not.
        reply: oneshot::Sender<Result<(), EngineError>>,
    },
    /// Forgets an endpoint and the policy that only it needed.
    Detach {
        /// Which.
        key: LeaseKey,
        /// Name of the host's end of the pair.
        host_ifname: String,
        /// Done or why not.
        reply: oneshot::Sender<Result<(), EngineError>>,
    },
    /// Whether the endpoint's entries and programs are in place; what is not, in words.
    Verify {
        /// Which.
        key: LeaseKey,
        /// What is missing.
        reply: oneshot::Sender<Vec<String>>,
    },
    /// What Services are programmed as.
    Services {
        /// Which.
        which: Selection,
        /// Receives them.
        reply: oneshot::Sender<BTreeMap<keelway_proxy::ObjectName, ListedService>>,
    },
    /// Everything that is shown.
    Status {
        /// Receives it.
        reply: oneshot::Sender<EngineStatus>,
    },
}

/// How the rest of the agent speaks to the engine.
#[derive(Clone)]
pub struct Handle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) synced: watch::Receiver<bool>,
}

impl Handle {
    /// Whether the tables are in step with the source.
    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }

    /// Sends a command and waits for its answer; `None` when the engine is gone.
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}
