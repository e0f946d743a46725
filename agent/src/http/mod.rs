//! What the agent serves over HTTP: `/healthz`, `/livez` and `/readyz` for load balancers and kubelets, `/metrics` for Prometheus.
//!
//! Pods can reach these ports, so connections are few, short and carry one request each.

pub mod health;
mod kube_proxy;
pub mod metrics;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::config::Listen;
pub use health::{Health, Report};
pub use metrics::Metrics;

/// Connections served at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// For how long a client may take to ask.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// For how long a connection may live.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// A server cannot start.
#[derive(Debug, thiserror::Error)]
#[error("{field}: cannot listen on {listen}: {source}")]
pub struct ServeError {
    field: &'static str,
    listen: Listen,
    source: std::io::Error,
}

/// Binds the address of setting `field`. Without a host: all addresses of both families, or of IPv4 where the kernel has
/// no IPv6.
///
/// # Errors
/// What the system said, with the setting.
pub async fn bind(field: &'static str, listen: Listen) -> Result<TcpListener, ServeError> {
    let host = listen.host.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    let mut bound = TcpListener::bind(SocketAddr::new(host, listen.port)).await;
    if bound.is_err() && listen.host.is_none() {
        bound = TcpListener::bind((Ipv4Addr::UNSPECIFIED, listen.port)).await;
    }
    bound.map_err(|source| ServeError { field, listen, source })
}

/// Brings gauges that are read, not counted, up to date before a scrape. Runs where it may block.
pub type Refresh = Arc<dyn Fn(&Metrics) + Send + Sync>;

/// `/healthz` and `/livez`, which mean what kube-proxy's do, and `/readyz`: this agent's first sync is done.
pub fn health_routes(health: Health, metrics: Metrics) -> Router {
    let routes =
        Router::new().route("/healthz", get(healthz)).route("/livez", get(livez)).route("/readyz", get(readyz));
    routes.with_state((health, metrics))
}

/// `/metrics`.
pub fn metrics_routes(metrics: Metrics, refresh: Refresh) -> Router {
    Router::new().route("/metrics", get(scrape)).with_state((metrics, refresh))
}

/// Serves `routes` until the future is dropped.
pub async fn serve(listener: TcpListener, routes: Router) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, or the client is gone already: neither is worth a busy loop.
                tracing::debug!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(routes.clone());
        tokio::spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
            drop(slot);
        });
    }
}

async fn healthz(State((health, metrics)): State<(Health, Metrics)>) -> Response {
    let report = health.report();
    let ok = report.takes_traffic();
    metrics.count_healthz(status(ok).as_u16());
    answer(ok, report.to_json(ok, true))
}

async fn livez(State((health, metrics)): State<(Health, Metrics)>) -> Response {
    let report = health.report();
    let ok = report.live();
    metrics.count_livez(status(ok).as_u16());
    answer(ok, report.to_json(ok, false))
}

async fn readyz(State((health, _)): State<(Health, Metrics)>) -> Response {
    let report = health.report();
    let ok = report.ready();
    answer(ok, report.to_json(ok, false))
}

fn status(ok: bool) -> StatusCode {
    if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn answer(ok: bool, body: String) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status(ok), headers, body).into_response()
}

async fn scrape(State((metrics, refresh)): State<(Metrics, Refresh)>) -> Response {
    let text = tokio::task::spawn_blocking(move || {
        refresh(&metrics);
        metrics.encode()
    })
    .await;
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "reading the metrics failed; the log says why\n").into_response(),
    }
}

#[cfg(test)]
mod tests;
