//! Desired state from the Kubernetes API: one watch a kind, through one [`dial::Dialer`] that knows several API servers.
//!
//! While no API server answers, what was delivered stays in force; each watch tries again with growing pauses, and the
//! status says what fails. When a watch has to start over, what vanished in between is delivered as deletions.

mod dial;
mod policies;
mod remember;
mod watch;

use std::path::{Path, PathBuf};

use ::kube::config::{KubeConfigOptions, Kubeconfig};
use ::kube::{Api, Config};
use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};
use tokio::sync::mpsc;

use super::{Event, Kind, Object, Source, Status, Times, Version, convert};
use dial::Dialer;
pub use policies::{ListError, PolicyLister};
use remember::Remembered;

/// How many seconds the connection to one API server may take before the next one is tried.
const CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// A connection with nothing to read for so long is dead: a watch hears a bookmark about every minute.
const READ_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(150);
/// The name in every API server's certificate, for those that are dialled by address.
const SERVER_NAME: &str = "kubernetes.default.svc";
/// EndpointSlices that no proxy of the standard kind reads need not be sent to us. (Those of other proxies' Services are read, as by
/// kube-proxy: whose a Service is, it says itself.)
const SLICE_SELECTOR: &str = "!service.kubernetes.io/headless";

/// The Kubernetes API cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KubeError {
    /// No service account.
    #[error("in-cluster: {0}; outside of a cluster, say --kubeconfig FILE or --manifests DIR")]
    InCluster(#[from] ::kube::config::InClusterError),
    /// The kubeconfig is no good.
    #[error("kubeconfig: {path}: {reason}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A client cannot be made.
    #[error("API server {url}: {reason}")]
    Client {
        /// Which.
        url: String,
        /// What is wrong.
        reason: String,
    },
}

/// The Kubernetes API as a source.
pub struct Kubernetes {
    dialer: Dialer,
    /// Where the API servers' addresses are kept; `None` when they are given.
    remembered: Option<Remembered>,
}

impl Kubernetes {
    /// By the pod's service account. Dials `api_servers`; where there are none, the servers last known to `state_dir`, then
    /// the in-cluster address.
    ///
    /// # Errors
    /// There is no service account, or its certificate authority is no good. No server is asked yet.
    pub fn in_cluster(api_servers: &[String], state_dir: &Path) -> Result<Self, KubeError> {
        // By name first: that needs no environment, and only the credentials count.
        let base = Config::incluster_dns()?;
        let given = !api_servers.is_empty();
        let last_resort =
            Config::incluster_env().map_or_else(|_| base.cluster_url.to_string(), |env| env.cluster_url.to_string());
        let last_resort = last_resort.trim_end_matches('/').to_owned();
        let remembered = (!given).then(|| Remembered::open(state_dir, last_resort));
        let urls = remembered.as_ref().map_or_else(|| api_servers.to_vec(), Remembered::urls);
        Ok(Self { dialer: Dialer::new(base, Some(SERVER_NAME), &urls)?, remembered })
    }

    /// By a kubeconfig file. Dials `api_servers`, else the server that the file names.
    ///
    /// # Errors
    /// The file is no good. No server is asked yet.
    pub async fn kubeconfig(path: &Path, api_servers: &[String]) -> Result<Self, KubeError> {
        let wrong = |reason: String| KubeError::Kubeconfig { path: path.to_owned(), reason };
        let file = Kubeconfig::read_from(path).map_err(|error| wrong(error.to_string()))?;
        let base = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
            .await
            .map_err(|error| wrong(error.to_string()))?;
        let own = [base.cluster_url.to_string().trim_end_matches('/').to_owned()];
        let urls = if api_servers.is_empty() { &own[..] } else { api_servers };
        Ok(Self { dialer: Dialer::new(base, None, urls)?, remembered: None })
    }

    /// Asks for policies, dialling as the watches do.
    pub fn policy_lister(&self) -> PolicyLister {
        PolicyLister(self.dialer.clone())
    }

    /// For other requests, dialling as the watches do.
    pub fn client(&self) -> ::kube::Client {
        self.dialer.client()
    }
}

impl Source for Kubernetes {
    fn describe(&self) -> String {
        format!("kubernetes {}", self.dialer.current())
    }

    async fn run(self, events: mpsc::Sender<Event>, status: Status) {
        self.dialer.report_to(status.clone());
        let client = self.dialer.client();
        let all = watch::Watch { events, status };
        let (dialer, mut remembered) = (self.dialer.clone(), self.remembered);
        tokio::join!(
            all.clone().run(
                Kind::Node,
                Api::<v1::Node>::all(client.clone()),
                "",
                |node| { convert::node(node).map(Object::Node).map(Some) },
                no_fallback
            ),
            all.clone().run(
                Kind::ServiceCidr,
                Api::<networking::ServiceCIDR>::all(client.clone()),
                "",
                |range| { convert::service_cidr(range).map(Object::ServiceCidr).map(Some) },
                no_fallback
            ),
            all.clone().run(
                Kind::Namespace,
                Api::<v1::Namespace>::all(client.clone()),
                "",
                |namespace| { convert::namespace(namespace).map(Object::Namespace).map(Some) },
                no_fallback
            ),
            all.clone().run(
                Kind::Service,
                Api::<v1::Service>::all(client.clone()),
                "",
                |service| { convert::service(service).map(Object::Service).map(Some) },
                no_fallback
            ),
            all.clone().run(
                Kind::EndpointSlice,
                Api::<discovery::EndpointSlice>::all(client.clone()),
                SLICE_SELECTOR,
                move |slice| {
                    let converted = convert::endpoint_slice(slice)?;
                    if let (Some(remembered), Some((slice, _))) = (&mut remembered, &converted)
                        && let Some(urls) = remembered.note(slice)
                    {
                        dialer.set_servers(&urls);
                    }
                    Ok(converted.map(|(slice, happened)| Object::EndpointSlice(slice, Times::now(happened))))
                },
                no_fallback,
            ),
            all.clone().run(
                Kind::NetworkPolicy,
                Api::<networking::NetworkPolicy>::all(client.clone()),
                "",
                |policy| Ok(Some(Object::NetworkPolicy(convert::network_policy(policy)?, version(policy)))),
                // When unsure, deny and say so.
                |policy| Some(Object::NetworkPolicy(convert::deny_all(policy)?, version(policy))),
            ),
            all.run(
                Kind::Pod,
                Api::<v1::Pod>::all(client),
                "",
                |pod| convert::pod(pod).map(Object::Pod).map(Some),
                no_fallback
            ),
        );
    }
}

fn version(policy: &networking::NetworkPolicy) -> Version {
    policy.metadata.resource_version.clone().unwrap_or_default()
}

/// What was known of an object that cannot be understood any more stays in force.
fn no_fallback<K>(_: &K) -> Option<Object> {
    None
}
