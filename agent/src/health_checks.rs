//! What load balancers ask of a node: one HTTP server for each Service with a `healthCheckNodePort`, in kube-proxy's words
//! (kubernetes/kubernetes, pkg/proxy/healthcheck/service_health.go).
//!
//! Ports are taken and given back as Services come and go. One that cannot be taken is a problem and an Event of the Service,
//! and tried again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use keelway_proxy::{HealthCheck, ObjectName};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config::NodePortAddresses;
use crate::engine::Devices;
use crate::events::{Note, Recorder};
use crate::http::{self, Health};

/// Until a port that was taken is tried again.
const RETRY: Duration = Duration::from_secs(5);
const BACKLOG: u32 = 128;

/// One server: a Service's, on a port and an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    service: ObjectName,
    address: SocketAddr,
}

struct Server {
    /// Local endpoints, now.
    count: watch::Sender<usize>,
    task: JoinHandle<()>,
}

/// Keeps the servers as they are wanted.
pub struct HealthChecks {
    /// What is to be answered.
    pub wanted: watch::Receiver<Vec<HealthCheck>>,
    /// On which addresses node ports answer. For all of a family, none is named: one that comes later, or is a load balancer's own,
    /// is answered too.
    pub node_ports: NodePortAddresses,
    /// Knows those of this node.
    pub devices: watch::Receiver<Option<Devices>>,
    /// Whether the agent is up to its work.
    pub health: Health,
    /// Receives what is wrong, in words.
    pub problems: watch::Sender<Vec<String>>,
    /// For the Services' own Events.
    pub events: Recorder,
}

impl HealthChecks {
    /// Runs until whoever wants health checks is gone.
    pub async fn run(mut self) {
        let mut servers = BTreeMap::new();
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let devices = self.devices.borrow_and_update().clone();
            let known = devices.iter().flat_map(|devices| &devices.node_ports).map(|(address, _)| *address);
            let any = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
            let any = any.into_iter().filter(|any| self.node_ports.is_all(any.is_ipv6()));
            let named = known.filter(|address| !self.node_ports.is_all(address.is_ipv6()));
            let addresses: Vec<IpAddr> = any.chain(named).collect();
            let problems = self.sync(&mut servers, &wanted, &addresses).await;
            let again = !problems.is_empty();
            self.tell(problems);
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                changed = self.devices.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(RETRY), if again => {}
            }
        }
    }

    /// Where a health check is served, and what it counts there. Without any family there is nothing to count.
    fn places(check: &HealthCheck, addresses: &[IpAddr]) -> Vec<(Place, usize)> {
        let place = |address| Place { service: check.service.clone(), address: SocketAddr::new(address, check.port) };
        let counted = |address: &IpAddr| if address.is_ipv6() { check.ipv6 } else { check.ipv4 };
        addresses.iter().filter_map(|address| counted(address).map(|count| (place(*address), count))).collect()
    }

    async fn sync(
        &self,
        servers: &mut BTreeMap<Place, Server>,
        wanted: &[HealthCheck],
        addresses: &[IpAddr],
    ) -> BTreeMap<ObjectName, String> {
        let wanted: BTreeMap<Place, usize> = wanted.iter().flat_map(|check| Self::places(check, addresses)).collect();
        let gone: Vec<Place> = servers.keys().filter(|place| !wanted.contains_key(place)).cloned().collect();
        for place in gone {
            if let Some(server) = servers.remove(&place) {
                server.task.abort();
                // Ports go from one Service to another: it is free when the task has ended, not when it is told to.
                let _ = server.task.await;
                tracing::info!(service = %place.service, address = %place.address, "health check closed");
            }
        }
        let mut problems = BTreeMap::new();
        for (place, count) in wanted {
            if let Some(server) = servers.get(&place) {
                server.count.send_replace(count);
                continue;
            }
            match listen(place.address) {
                Ok(listener) => {
                    tracing::info!(service = %place.service, address = %place.address, "health check open");
                    servers.insert(place.clone(), self.serve(&place.service, listener, count));
                }
                // A kernel without IPv6 has no client either.
                Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {}
                Err(error) => {
                    problems.insert(
                        place.service.clone(),
                        format!("{}: healthCheckNodePort: cannot listen on {}: {error}", place.service, place.address),
                    );
                }
            }
        }
        problems
    }

    fn serve(&self, service: &ObjectName, listener: TcpListener, count: usize) -> Server {
        let (count, counted) = watch::channel(count);
        let state = Answering { service: service.clone(), count: counted, health: self.health.clone() };
        let routes = Router::new().fallback(answer).with_state(state);
        Server { count, task: tokio::spawn(http::serve(listener, routes)) }
    }

    fn tell(&self, problems: BTreeMap<ObjectName, String>) {
        let known: BTreeSet<String> = self.problems.borrow().iter().cloned().collect();
        for (service, problem) in problems.iter().filter(|(_, problem)| !known.contains(*problem)) {
            tracing::warn!("{problem}");
            self.events.warn(service, Note::HealthCheckPort, problem);
        }
        self.problems.send_if_modified(|now| {
            let next: Vec<String> = problems.into_values().collect();
            let changed = *now != next;
            *now = next;
            changed
        });
    }
}

/// As kube-proxy listens: each family by itself.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

#[derive(Clone)]
struct Answering {
    service: ObjectName,
    count: watch::Receiver<usize>,
    health: Health,
}

async fn answer(State(state): State<Answering>) -> Response {
    let count = *state.count.borrow();
    let healthy = state.health.report().live();
    let status = if count > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        (header::CONTENT_TYPE.as_str(), "application/json".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS.as_str(), "nosniff".to_owned()),
        ("x-load-balancing-endpoint-weight", count.to_string()),
    ];
    (status, headers, body(&state.service, count, healthy)).into_response()
}

/// kube-proxy's, to the byte. Names of objects need no escapes.
fn body(service: &ObjectName, count: usize, healthy: bool) -> String {
    format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{}\",\n\t\t\"name\": \"{}\"\n\t}},\n\t\"localEndpoints\": {count},\n\t\
         \"serviceProxyHealthy\": {healthy}\n}}",
        service.namespace, service.name
    )
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    async fn get(host: &str, port: u16) -> Option<String> {
        let mut stream = TcpStream::connect((host, port)).await.ok()?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    }

    fn check(name: &str, port: u16, ipv4: usize, ipv6: Option<usize>) -> HealthCheck {
        HealthCheck { service: ObjectName::new("default", name), port, ipv4: Some(ipv4), ipv6 }
    }

    async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
        for _ in 0..1200 {
            if holds().await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("never {what}");
    }

    fn free_port() -> u16 {
        std::net::TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
    }

    #[tokio::test]
    async fn ports_follow_services_and_are_given_back() {
        let (first, second) = (free_port(), free_port());
        let (wanted_tx, wanted) = watch::channel(vec![check("a", first, 2, Some(0))]);
        let (problems, seen) = watch::channel(Vec::new());
        let health = Health::default();
        health.set_synced();
        let events = Recorder::none();
        let (_devices_tx, devices) = watch::channel(None);
        let (node_ports, health) = (NodePortAddresses::All, health.clone());
        tokio::spawn(HealthChecks { wanted, node_ports, devices, health, problems, events }.run());
        until("served", async || get("127.0.0.1", first).await.is_some()).await;
        let answer = get("127.0.0.1", first).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.to_lowercase().contains("x-load-balancing-endpoint-weight: 2"), "{answer}");
        assert!(answer.contains("\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"), "{answer}");
        let v6 = get("::1", first).await.unwrap();
        assert!(v6.starts_with("HTTP/1.1 503") && v6.contains("\"localEndpoints\": 0"), "each family counts: {v6}");

        // Endpoints come and go: same server. The port goes to another Service: the other's words.
        wanted_tx.send_replace(vec![check("a", first, 0, None)]);
        until("no endpoints", async || get("127.0.0.1", first).await.is_some_and(|it| it.starts_with("HTTP/1.1 503")))
            .await;
        until("v6 given back", async || get("::1", first).await.is_none()).await;
        wanted_tx.send_replace(vec![check("b", first, 1, None), check("a", second, 1, None)]);
        until("changed hands", async || get("127.0.0.1", first).await.is_some_and(|it| it.contains("\"b\""))).await;
        until("moved", async || get("127.0.0.1", second).await.is_some_and(|it| it.contains("\"a\""))).await;
        assert_eq!(*seen.borrow(), Vec::<String>::new());

        // Gone with the Service, and the port is anybody's.
        wanted_tx.send_replace(Vec::new());
        until("closed", async || get("127.0.0.1", first).await.is_none()).await;
        let theirs = std::net::TcpListener::bind(("0.0.0.0", first)).unwrap();

        // Somebody else's port is a problem, and served once it is free.
        wanted_tx.send_replace(vec![check("c", first, 1, None)]);
        until("a problem", async || !seen.borrow().is_empty()).await;
        let problem = seen.borrow()[0].clone();
        assert!(problem.starts_with("default/c: healthCheckNodePort: cannot listen on 0.0.0.0:"), "{problem}");
        drop(theirs);
        until("served after all", async || get("127.0.0.1", first).await.is_some_and(|it| it.contains("\"c\""))).await;
        until("no problem", async || seen.borrow().is_empty()).await;
    }

    #[tokio::test]
    async fn node_port_addresses_alone_answer() {
        let port = free_port();
        let (_wanted_tx, wanted) = watch::channel(vec![check("a", port, 1, Some(1))]);
        let devices = |address: &str| Devices {
            node: Vec::new(),
            xdp: BTreeMap::new(),
            vxlan: None,
            config: keelway_layout::NodeConfig::default(),
            host_addresses: Vec::new(),
            own: Vec::new(),
            node_ports: vec![(address.parse().unwrap(), false)],
        };
        let (devices_tx, watched) = watch::channel(None);
        let (problems, _seen) = watch::channel(Vec::new());
        let (health, events) = (Health::default(), Recorder::none());
        let node_ports = NodePortAddresses::In(vec!["127.0.0.0/8".parse().unwrap()]);
        tokio::spawn(HealthChecks { wanted, node_ports, devices: watched, health, problems, events }.run());
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(get("127.0.0.1", port).await.is_none(), "not before the addresses are known");
        devices_tx.send_replace(Some(devices("127.0.0.2")));
        until("served", async || get("127.0.0.2", port).await.is_some()).await;
        assert!(get("127.0.0.1", port).await.is_none());
        assert!(get("::1", port).await.is_some(), "of the other family nothing was said: all of it");
        devices_tx.send_replace(Some(devices("127.0.0.1")));
        until("moved", async || get("127.0.0.1", port).await.is_some() && get("127.0.0.2", port).await.is_none()).await;
    }
}
