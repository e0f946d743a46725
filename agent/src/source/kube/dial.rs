//! One client over several API servers: each request goes to the server that answered last, and a server that does not
//! answer is passed over for the next.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::kube::client::Body;
use ::kube::{Client, Config};
use http::{Request, Response, Uri};

use super::{CONNECT_TIMEOUT, KubeError, READ_TIMEOUT};
use crate::source::{Kind, Status};

#[derive(Clone)]
struct Server {
    url: String,
    client: Client,
}

struct Servers {
    /// Never empty.
    all: Vec<Server>,
    /// Index of the one that is dialled.
    current: usize,
    status: Status,
}

struct Shared {
    base: Config,
    /// What certificates of servers that are dialled by address must name; `None`: that address.
    server_name: Option<&'static str>,
    servers: Mutex<Servers>,
}

/// A handle on the API servers.
#[derive(Clone)]
pub(super) struct Dialer(Arc<Shared>);

impl Dialer {
    /// With the credentials of `base` for each of `urls`, of which there is one at least.
    pub(super) fn new(base: Config, server_name: Option<&'static str>, urls: &[String]) -> Result<Self, KubeError> {
        let all: Vec<Server> = urls.iter().map(|url| server(&base, server_name, url)).collect::<Result<_, _>>()?;
        if all.is_empty() {
            return Err(KubeError::Client { url: String::new(), reason: "no API server is known".to_owned() });
        }
        let servers = Mutex::new(Servers { all, current: 0, status: Status::default() });
        Ok(Self(Arc::new(Shared { base, server_name, servers })))
    }

    fn lock(&self) -> MutexGuard<'_, Servers> {
        // Each writer leaves `current` within `all`.
        self.0.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The URL that is dialled.
    pub(super) fn current(&self) -> String {
        let servers = self.lock();
        servers.all[servers.current].url.clone()
    }

    /// Keeps `status` told of the server that is dialled, and of kinds that are well.
    pub(super) fn report_to(&self, status: Status) {
        let mut servers = self.lock();
        status.describe(format!("kubernetes {}", servers.all[servers.current].url));
        servers.status = status;
    }

    /// Knows these servers from now on; connections to those that stay are kept.
    pub(super) fn set_servers(&self, urls: &[String]) {
        let mut servers = self.lock();
        let kept = |url: &String| servers.all.iter().find(|server| server.url == *url).cloned();
        let made = |url: &String| kept(url).map_or_else(|| server(&self.0.base, self.0.server_name, url), Ok);
        let all: Vec<Server> = urls
            .iter()
            .filter_map(|url| made(url).inspect_err(|error| tracing::warn!(%error, "not dialled")).ok())
            .collect();
        if all.is_empty() {
            return;
        }
        let current = &servers.all[servers.current].url;
        servers.current = all.iter().position(|server| server.url == *current).unwrap_or(0);
        servers.all = all;
        servers.describe();
    }

    /// A client whose requests go to whichever server answers.
    pub(super) fn client(&self) -> Client {
        let dialer = self.clone();
        let service = tower::service_fn(move |request| dialer.clone().send(request));
        Client::new(service, self.0.base.default_namespace.clone())
    }

    async fn send(self, mut request: Request<Body>) -> Result<Response<Body>, ::kube::Error> {
        let server = {
            let servers = self.lock();
            servers.all[servers.current].clone()
        };
        if let Some(uri) = newest(request.uri()) {
            *request.uri_mut() = uri;
        }
        let kind = watched_kind(request.uri());
        let answer = server.client.send(request).await;
        match &answer {
            Ok(response) if response.status().is_server_error() => self.pass_over(&server.url),
            Ok(response) => {
                if let (Some(kind), true) = (kind, response.status().is_success()) {
                    self.lock().status.clear(kind.as_str());
                }
            }
            Err(_) => self.pass_over(&server.url),
        }
        answer
    }

    /// Dials the next server from now on, unless that was done already.
    pub(super) fn pass_over(&self, url: &str) {
        let mut servers = self.lock();
        if servers.all.len() > 1 && servers.all[servers.current].url == url {
            servers.current = (servers.current + 1) % servers.all.len();
            servers.describe();
        }
    }
}

impl Servers {
    fn describe(&self) {
        self.status.describe(format!("kubernetes {}", self.all[self.current].url));
    }
}

/// The same request without `resourceVersion=0`, where it is that of a streaming list. With it the server may begin at any
/// state that it has cached: a policy that was there before the agent asked could be missing after the first list.
/// Without it the server answers as new as its store.
fn newest(uri: &Uri) -> Option<Uri> {
    let query = uri.query()?;
    if !query.split('&').any(|pair| pair == "sendInitialEvents=true") {
        return None;
    }
    let kept: Vec<&str> = query.split('&').filter(|pair| *pair != "resourceVersion=0").collect();
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(format!("{}?{}", uri.path(), kept.join("&")).parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// The kind that a request of a watch is about; those that name a namespace are no watch's.
fn watched_kind(uri: &Uri) -> Option<Kind> {
    let (parent, plural) = uri.path().rsplit_once('/')?;
    let one_namespace = parent.contains("/namespaces/");
    Kind::ALL.into_iter().find(|kind| kind.plural() == plural && !one_namespace)
}

fn server(base: &Config, server_name: Option<&'static str>, url: &str) -> Result<Server, KubeError> {
    let wrong = |reason: String| KubeError::Client { url: url.to_owned(), reason };
    let uri: Uri = url.parse().map_err(|error: http::uri::InvalidUri| wrong(error.to_string()))?;
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let by_address = host.parse::<std::net::IpAddr>().is_ok();
    let mut config = base.clone();
    if by_address && config.tls_server_name.is_none() {
        config.tls_server_name = server_name.map(str::to_owned);
    }
    config.cluster_url = uri;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    // The watches have their own pauses.
    config.default_retry = false;
    let client = Client::try_from(config).map_err(|error| wrong(error.to_string()))?;
    Ok(Server { url: url.to_owned(), client })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streaming_lists_ask_for_the_newest_state_and_resumed_watches_for_their_own() {
        let streaming: Uri =
            "/api/v1/pods?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&resourceVersion=0"
                .parse()
                .unwrap();
        let expected = "/api/v1/pods?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
        assert_eq!(newest(&streaming).unwrap(), expected);
        let resumed: Uri = "/api/v1/pods?watch=true&resourceVersion=0".parse().unwrap();
        assert_eq!(newest(&resumed), None);
    }

    #[test]
    fn only_watches_say_that_their_kind_is_well() {
        let kind = |path: &str| watched_kind(&path.parse().unwrap());
        assert_eq!(kind("/apis/networking.k8s.io/v1/networkpolicies?watch=true"), Some(Kind::NetworkPolicy));
        assert_eq!(kind("/api/v1/namespaces?watch=true"), Some(Kind::Namespace));
        assert_eq!(kind("/apis/networking.k8s.io/v1/namespaces/default/networkpolicies"), None);
    }
}
