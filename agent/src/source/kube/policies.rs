//! Which NetworkPolicies a namespace has at this moment, asked of the API server's store rather than of a watch.

use std::collections::BTreeMap;
use std::time::Duration;

use ::kube::api::ListParams;
use ::kube::{Api, Error};
use k8s_openapi::api::networking::v1::NetworkPolicy;

use super::dial::Dialer;
use crate::source::Version;

/// How long one API server may take. A pod waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(1);
/// The second try goes to another server where there is one, and over a new connection where the old one had died.
const TRIES: u32 = 2;

/// Why there is no list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// No API server answers, or none that has its store.
    #[error("no API server answers: {0}")]
    Away(String),
    /// The server asks to be left alone for a while (HTTP 429).
    #[error("the API server is busy: {0}")]
    Busy(String),
    /// The server says no: it would say so for ever.
    #[error("listing networkpolicies: {0}")]
    Refused(String),
}

/// Lists NetworkPolicies, dialling as the watches do.
#[derive(Clone)]
pub struct PolicyLister(pub(super) Dialer);

impl PolicyLister {
    /// Name and version of each policy of `namespace`, no older than this call: without a `resourceVersion` the server
    /// answers from a quorum of its store (Kubernetes API concepts, "the resourceVersion parameter").
    ///
    /// # Errors
    /// See [`ListError`].
    pub async fn versions(&self, namespace: &str) -> Result<BTreeMap<String, Version>, ListError> {
        let api: Api<NetworkPolicy> = Api::namespaced(self.0.client(), namespace);
        let mut problem = String::new();
        for _ in 0..TRIES {
            let server = self.0.current();
            // Names and versions are all that is asked for.
            match tokio::time::timeout(PATIENCE, api.list_metadata(&ListParams::default())).await {
                Ok(Ok(list)) => {
                    let versions = list.items.into_iter().map(|item| {
                        (item.metadata.name.unwrap_or_default(), item.metadata.resource_version.unwrap_or_default())
                    });
                    return Ok(versions.collect());
                }
                Ok(Err(Error::Api(status))) if status.code < 500 => {
                    let text = status.message.clone();
                    return Err(if status.code == 429 { ListError::Busy(text) } else { ListError::Refused(text) });
                }
                Ok(Err(error)) => problem = format!("{server}: {error}"),
                Err(_) => {
                    problem = format!("{server}: no answer within {PATIENCE:?}");
                    self.0.pass_over(&server);
                }
            }
        }
        Err(ListError::Away(problem))
    }
}
