//! An API server that holds its objects in memory and only lists and watches: tens of thousands of objects are there at
//! once, and what a client of it costs is the client's own.
//!
//! It speaks as much of the protocol as kube-proxy and keelway-agent ask for: lists, watches from a version, streaming lists
//! (`sendInitialEvents`), the selector of one name. Other selectors select everything; what is written to it is thanked for and
//! forgotten.
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::Host;

/// Kinds by the plural name in their path, with their `apiVersion`.
const KINDS: [(&str, &str, &str); 7] = [
    ("nodes", "v1", "Node"),
    ("namespaces", "v1", "Namespace"),
    ("services", "v1", "Service"),
    ("pods", "v1", "Pod"),
    ("endpointslices", "discovery.k8s.io/v1", "EndpointSlice"),
    ("networkpolicies", "networking.k8s.io/v1", "NetworkPolicy"),
    ("servicecidrs", "networking.k8s.io/v1", "ServiceCIDR"),
];
/// Events of a list that are sent at once.
const CHUNK: usize = 64;

struct Store {
    /// By kind, then by namespace and name: the object as JSON.
    objects: BTreeMap<&'static str, BTreeMap<String, String>>,
    /// What watches are told: the kind, the object's key and the event, numbered from 1 by their place.
    log: Vec<(&'static str, String, Bytes)>,
}

struct Shared {
    store: Mutex<Store>,
    /// The number of the newest event.
    newest: watch::Sender<usize>,
}

/// A running server. It ends with this value.
pub struct MemoryApi {
    shared: Arc<Shared>,
    address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl MemoryApi {
    /// Listens at port 8001 of a machine of the lab, on all its addresses.
    pub fn start(host: &Host) -> Result<Self> {
        let netns = File::open(host.netns())?;
        let bind = move || -> Result<std::net::TcpListener> {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            Ok(std::net::TcpListener::bind("[::]:8001")?)
        };
        // A thread of its own enters the namespace; the socket stays there.
        let listener = std::thread::spawn(bind).join().expect("binding does not panic")?;
        Self::serve(listener, SocketAddr::new(host.v4.into(), 8001))
    }

    /// Answers at `listener`, which clients reach at `address`.
    pub fn serve(listener: std::net::TcpListener, address: SocketAddr) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let store = Store { objects: KINDS.map(|(plural, ..)| (plural, BTreeMap::new())).into(), log: Vec::new() };
        let shared = Arc::new(Shared { store: Mutex::new(store), newest: watch::Sender::new(0) });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let listener = runtime.block_on(async { tokio::net::TcpListener::from_std(listener) })?;
        runtime.spawn(async move { axum::serve(listener, router).await });
        Ok(Self { shared, address, _runtime: runtime })
    }

    /// Writes a kubeconfig for its clients.
    pub fn kubeconfig(&self, dir: &Path) -> Result<PathBuf> {
        let path = dir.join("memory-api.conf");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: 'http://{}'}}}}]\n\
             users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
            self.address
        );
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// Puts objects in place of those of the same kind and name. Watches are told of all of them together.
    ///
    /// # Errors
    /// One is of no kind that is served here.
    pub fn put(&self, objects: impl IntoIterator<Item = Value>) -> Result<()> {
        let mut store = self.shared.lock();
        for mut object in objects {
            let (plural, api, kind) = *KINDS
                .iter()
                .find(|(_, _, kind)| object["kind"] == *kind)
                .with_context(|| format!("kind {}", object["kind"]))?;
            let version = store.log.len() + 1;
            let name = key(&object);
            object["apiVersion"] = json!(api);
            object["metadata"]["resourceVersion"] = json!(version.to_string());
            object["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
            if object["metadata"]["uid"].is_null() {
                object["metadata"]["uid"] = json!(format!("uid-of-{kind}-{name}"));
            }
            let text = object.to_string();
            let of_kind = store.objects.get_mut(plural).context("a kind")?;
            let change = if of_kind.insert(name.clone(), text.clone()).is_some() { "MODIFIED" } else { "ADDED" };
            store.log.push((plural, name, event(change, &text)));
        }
        let newest = store.log.len();
        drop(store);
        self.shared.newest.send_replace(newest);
        Ok(())
    }

    /// Changes an object.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn change(&self, plural: &str, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
        let text =
            self.shared.lock().objects.get(plural).and_then(|all| all.get(&format!("{namespace}/{name}"))).cloned();
        let mut object = serde_json::from_str(&text.with_context(|| format!("no {plural} {namespace}/{name}"))?)?;
        change(&mut object);
        self.put([object])
    }

    /// Removes an object.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) -> Result<()> {
        let mut store = self.shared.lock();
        let (plural, of_kind) = store.objects.iter_mut().find(|(kind, _)| **kind == plural).context("a kind")?;
        let plural = *plural;
        let key = format!("{namespace}/{name}");
        let text = of_kind.remove(&key).with_context(|| format!("{plural} {key}"))?;
        store.log.push((plural, key, event("DELETED", &text)));
        let newest = store.log.len();
        drop(store);
        self.shared.newest.send_replace(newest);
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("nobody panics with this lock")
    }
}

fn key(object: &Value) -> String {
    let of = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    format!("{}/{}", of("namespace"), of("name"))
}

fn event(change: &str, object: &str) -> Bytes {
    format!("{{\"type\":\"{change}\",\"object\":{object}}}\n").into()
}

async fn answer(State(shared): State<Arc<Shared>>, method: Method, uri: Uri) -> Response {
    let asked = |name: &str| {
        let mut pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    if method != Method::GET {
        return (StatusCode::CREATED, [(header::CONTENT_TYPE, "application/json")], "{}").into_response();
    }
    let parts: Vec<&str> = uri.path().split('/').collect();
    let found = KINDS.iter().find_map(|kind| Some((kind, parts.iter().rposition(|part| *part == kind.0)?)));
    // Below `namespaces` are the objects of others.
    let found = match found {
        Some((kind, place)) if kind.0 == "namespaces" && parts.len() > place + 2 => {
            KINDS.iter().find(|kind| kind.0 == parts[place + 2]).map(|kind| (kind, place + 2))
        }
        found => found,
    };
    let Some(((plural, api, kind), place)) = found else { return absent(uri.path()) };
    if let Some(name) = parts.get(place + 1) {
        let namespace = if parts[place - 2] == "namespaces" { parts[place - 1] } else { "" };
        let object = shared.lock().objects[plural].get(&format!("{namespace}/{name}")).cloned();
        return object.map_or_else(|| absent(uri.path()), json_of);
    }
    // A name of a cluster's object: kube-proxy asks for its own node only.
    let only = asked("fieldSelector").and_then(|selector| selector.strip_prefix("metadata.name%3D"));
    let only = only.map(|name| format!("/{name}"));
    let wanted = |key: &str| only.as_ref().is_none_or(|only| only == key);
    if !matches!(asked("watch"), Some("true" | "1")) {
        let store = shared.lock();
        let items = store.objects[plural].iter().filter(|(key, _)| wanted(key));
        let items = items.map(|(_, object)| object.as_str()).collect::<Vec<_>>().join(",");
        let version = store.log.len();
        return json_of(format!(
            "{{\"kind\":\"{kind}List\",\"apiVersion\":\"{api}\",\"metadata\":{{\"resourceVersion\":\"{version}\"}},\
             \"items\":[{items}]}}"
        ));
    }
    let (mut begin, mut place) = (Vec::new(), 0);
    if asked("sendInitialEvents") == Some("true") {
        let store = shared.lock();
        place = store.log.len();
        let all = store.objects[plural].iter().filter(|(key, _)| wanted(key));
        let all: Vec<Bytes> = all.map(|(_, object)| event("ADDED", object)).collect();
        begin = all.chunks(CHUNK).map(|chunk| Bytes::from(chunk.concat())).collect();
        let done = json!({"kind": kind, "apiVersion": api, "metadata": {"resourceVersion": place.to_string(),
            "creationTimestamp": null, "annotations": {"k8s.io/initial-events-end": "true"}}});
        begin.push(event("BOOKMARK", &done.to_string()));
    } else if let Some(version) = asked("resourceVersion").and_then(|text| text.parse().ok()) {
        place = version;
    }
    let (sender, receiver) = mpsc::channel(8);
    tokio::spawn(follow(shared, (plural, only), begin, place, sender));
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Sends `begin`, then what the log has of a kind (or of one object) from `place` on, until nobody listens.
async fn follow(
    shared: Arc<Shared>,
    (plural, only): (&str, Option<String>),
    begin: Vec<Bytes>,
    mut place: usize,
    sender: mpsc::Sender<Bytes>,
) {
    let mut newest = shared.newest.subscribe();
    for chunk in begin {
        if sender.send(chunk).await.is_err() {
            return;
        }
    }
    loop {
        let _ = newest.borrow_and_update();
        let new: Vec<Bytes> = {
            let store = shared.lock();
            let new = store.log[place.min(store.log.len())..].iter().filter(|(of, ..)| *of == plural);
            let new = new.filter(|(_, key, _)| only.as_ref().is_none_or(|only| only == key));
            let new = new.map(|(.., event)| event.clone()).collect();
            place = store.log.len();
            new
        };
        for chunk in new.chunks(CHUNK) {
            if sender.send(Bytes::from(chunk.concat())).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            () = sender.closed() => return,
        }
    }
}

fn json_of(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

fn absent(path: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404,
        "message": format!("nothing is served at {path}")});
    (StatusCode::NOT_FOUND, [(header::CONTENT_TYPE, "application/json")], status.to_string()).into_response()
}
