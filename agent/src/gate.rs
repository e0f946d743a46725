//! ADD waits for policies no older than the Pod.
//!
//! Pods and policies come by watches of their own. A policy that was made before a Pod may arrive after it, and the Pod would
//! send and receive what the policy forbids until then. So each ADD asks the API for the policies of the Pod's namespace
//! and waits until exactly those are in force: the Pod was there before the ADD, so a policy that is older than the Pod
//! is in the list. Asking and waiting go on beside the rest of the ADD; only bringing the interface up has to wait.
//!
//! Where no API server answers, what is known stays in force and pods start: the API server may be away for hours. A
//! directory of manifests needs none of this, it delivers policies no later than pods.

use std::time::{Duration, Instant};

use crate::engine::{Command, Handle, Known, Progress, progress};
use crate::http::Metrics;
use crate::source::kube::{ListError, PolicyLister};

/// How long policies may take to arrive; the runtime tries again after error 11.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Between two lists, so that policies that change all the time do not make us ask all the time.
const PAUSE: Duration = Duration::from_millis(50);

/// Knows whom to ask.
#[derive(Clone)]
pub struct Gate {
    engine: Handle,
    /// `None`: the source delivers policies no later than pods.
    lister: Option<PolicyLister>,
    metrics: Metrics,
}

impl Gate {
    /// In front of `engine`.
    pub fn new(engine: Handle, lister: Option<PolicyLister>, metrics: Metrics) -> Self {
        Self { engine, lister, metrics }
    }

    /// Returns when the policies in force in `namespace` are no older than this call, or when no API server can say.
    ///
    /// # Errors
    /// What is missing, in words, for an ADD that is to be tried again.
    pub async fn pass(&self, namespace: &str) -> Result<(), String> {
        let Some(lister) = &self.lister else { return Ok(()) };
        let start = Instant::now();
        let mut last = String::new();
        let done = tokio::time::timeout(TIMEOUT, self.in_step(lister, namespace, &mut last)).await;
        self.metrics.policies_awaited(start.elapsed().as_secs_f64());
        done.unwrap_or_else(|_| Err(format!("policies of namespace {namespace} are not in force yet: {last}")))
    }

    async fn in_step(&self, lister: &PolicyLister, namespace: &str, last: &mut String) -> Result<(), String> {
        let stopping = || "the agent is stopping".to_owned();
        loop {
            let before = self.known(namespace).await.ok_or_else(stopping)?;
            let listed = match lister.versions(namespace).await {
                Ok(listed) => listed,
                Err(error @ ListError::Away(_)) => {
                    tracing::warn!(%namespace, %error, "a pod starts under the policies that are known");
                    self.metrics.policies_unchecked();
                    return Ok(());
                }
                Err(error @ ListError::Busy(_)) => {
                    *last = error.to_string();
                    tokio::time::sleep(PAUSE * 4).await;
                    continue;
                }
                Err(error @ ListError::Refused(_)) => return Err(error.to_string()),
            };
            if let Progress::Behind(names) = progress(&before, &listed, &before) {
                *last = names.join(", ");
            }
            let namespace = namespace.to_owned();
            let asked = |reply| Command::AwaitPolicies { namespace, before, listed, reply };
            if self.engine.ask(asked).await.ok_or_else(stopping)? == Progress::InStep {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn known(&self, namespace: &str) -> Option<Known> {
        let namespace = namespace.to_owned();
        self.engine.ask(|reply| Command::KnownPolicies { namespace, reply }).await
    }
}
