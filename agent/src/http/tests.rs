use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn serves_health_and_counts_what_it_said() {
    let loopback = Listen { host: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), port: 0 };
    let (health, metrics) = (Health::default(), Metrics::new("t", 0));
    let listener = bind("healthz-addr", loopback).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(serve(listener, health_routes(health.clone(), metrics.clone())));

    let before = get(address, "/healthz").await;
    assert!(before.starts_with("HTTP/1.1 503") && before.contains("lastUpdated"), "{before}");
    assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 503"));
    health.set_synced();
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
    let after = get(address, "/healthz").await;
    assert!(after.starts_with("HTTP/1.1 200") && after.contains("application/json"), "{after}");
    assert!(get(address, "/other").await.starts_with("HTTP/1.1 404"));
    server.abort();

    let listener = bind("metrics-addr", loopback).await.unwrap();
    let address = listener.local_addr().unwrap();
    let refresh: Refresh = Arc::new(|metrics| metrics.set_map("refreshed", 1, 2));
    let server = tokio::spawn(serve(listener, metrics_routes(metrics, refresh)));
    let scraped = get(address, "/metrics").await;
    for line in [
        "keelway_proxy_healthz_total{code=\"503\"} 1",
        "keelway_proxy_healthz_total{code=\"200\"} 1",
        "keelway_proxy_livez_total{code=\"200\"} 1",
        "keelway_map_capacity{map=\"refreshed\"} 2",
    ] {
        assert!(scraped.contains(line), "{line} is missing from\n{scraped}");
    }
    server.abort();
}

#[tokio::test]
async fn an_address_in_use_is_named_with_its_setting() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    let listen = Listen { host: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), port };
    let error = bind("healthz-addr", listen).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("healthz-addr: cannot listen on 127.0.0.1:{port}: ")), "{error}");
}
