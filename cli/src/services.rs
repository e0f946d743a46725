//! `keelway services` and `keelway endpoints` for people.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use keelway_api::v1::{Backend, Frontend, ServiceState};

use crate::table;

/// `address:port`, the address in brackets where it needs them.
fn at(address: &str, port: u32) -> String {
    match (address.parse::<IpAddr>(), u16::try_from(port)) {
        (Ok(ip), Ok(port)) if ip.is_unspecified() => match ip.is_ipv6() {
            true => format!("[*]:{port}"),
            false => format!("*:{port}"),
        },
        (Ok(ip), Ok(port)) => SocketAddr::from((ip, port)).to_string(),
        _ => format!("{address}:{port}"),
    }
}

/// In one word.
pub fn state(backend: &Backend) -> &'static str {
    if backend.draining { "draining" } else { "ready" }
}

/// Whom the entry is for.
pub fn clients(frontend: &Frontend) -> &'static str {
    if frontend.outside { "outside" } else { "any" }
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// Who may and what else is special.
fn notes(frontend: &Frontend) -> String {
    let mut notes = frontend.flags.clone();
    if frontend.restricted {
        let ranges = frontend.source_ranges.join(",");
        notes.push(if ranges.is_empty() { "for nobody".into() } else { format!("for {ranges}") });
    }
    or_dash(notes.join(" "))
}

/// One row a frontend, then what is wrong.
pub fn frontends(services: &[ServiceState]) -> String {
    let rows = services.iter().flat_map(|service| {
        service.frontends.iter().map(move |frontend| {
            let ready = frontend.backends.iter().filter(|backend| !backend.draining).count();
            let affinity = frontend.affinity_seconds;
            vec![
                service.namespace.clone(),
                service.name.clone(),
                frontend.kind.clone(),
                at(&frontend.address, frontend.port),
                frontend.protocol.clone(),
                clients(frontend).to_owned(),
                frontend.policy.clone(),
                if affinity == 0 { "-".into() } else { format!("{affinity}s") },
                ready.to_string(),
                (frontend.backends.len() - ready).to_string(),
                frontend.backends.iter().map(|backend| backend.connections).sum::<u64>().to_string(),
                notes(frontend),
            ]
        })
    });
    let heading = [
        "NAMESPACE",
        "SERVICE",
        "KIND",
        "ADDRESS",
        "PROTOCOL",
        "CLIENTS",
        "POLICY",
        "AFFINITY",
        "READY",
        "DRAINING",
        "CONNECTIONS",
        "NOTES",
    ];
    let mut page = page(&heading, rows.collect());
    let problems: Vec<String> = services
        .iter()
        .flat_map(|s| s.problems.iter().map(move |problem| format!("  {}/{}: {problem}\n", s.namespace, s.name)))
        .collect();
    if !problems.is_empty() {
        page += &format!("\nProblems\n{}", problems.concat());
    }
    page
}

/// A backend of a Service, and the frontends that lead to it.
pub struct Endpoint<'a> {
    pub service: &'a ServiceState,
    pub protocol: &'a str,
    pub backend: &'a Backend,
    pub frontends: Vec<String>,
}

/// Each backend of each Service once. It drains where no frontend sends it new connections.
pub fn rows(services: &[ServiceState]) -> Vec<Endpoint<'_>> {
    let mut all = Vec::new();
    for service in services {
        let mut found: BTreeMap<(&str, IpAddr, u32), Endpoint<'_>> = BTreeMap::new();
        for frontend in &service.frontends {
            for backend in &frontend.backends {
                let Ok(ip) = backend.address.parse() else { continue };
                let row = found.entry((&frontend.protocol, ip, backend.port)).or_insert_with(|| Endpoint {
                    service,
                    protocol: &frontend.protocol,
                    backend,
                    frontends: Vec::new(),
                });
                if row.backend.draining {
                    row.backend = backend;
                }
                let name = at(&frontend.address, frontend.port);
                if !row.frontends.contains(&name) {
                    row.frontends.push(name);
                }
            }
        }
        all.extend(found.into_values());
    }
    all
}

/// One row a backend of a Service.
pub fn endpoints(services: &[ServiceState]) -> String {
    let row = |row: Endpoint<'_>| {
        vec![
            row.service.namespace.clone(),
            row.service.name.clone(),
            at(&row.backend.address, row.backend.port),
            row.protocol.to_owned(),
            state(row.backend).to_owned(),
            if row.backend.local { "here" } else { "elsewhere" }.to_owned(),
            row.backend.connections.to_string(),
            row.frontends.join(" "),
        ]
    };
    let heading = ["NAMESPACE", "SERVICE", "BACKEND", "PROTOCOL", "STATE", "PLACE", "CONNECTIONS", "FRONTENDS"];
    page(&heading, rows(services).into_iter().map(row).collect())
}

fn page(heading: &[&str], rows: Vec<Vec<String>>) -> String {
    if rows.is_empty() { "none\n".to_owned() } else { table::render(heading, &rows) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(address: &str, draining: bool, connections: u64) -> Backend {
        Backend { address: address.into(), port: 8080, draining, local: !draining, connections }
    }

    fn services() -> Vec<ServiceState> {
        let cluster_ip = Frontend {
            kind: "ClusterIP".into(),
            address: "fd00:96::1".into(),
            port: 80,
            protocol: "TCP".into(),
            policy: "Cluster".into(),
            affinity_seconds: 600,
            backends: vec![backend("fd00::1", false, 2), backend("fd00::2", true, 3)],
            ..Frontend::default()
        };
        let node_port = Frontend {
            kind: "NodePort".into(),
            address: "::".into(),
            port: 30080,
            outside: true,
            policy: "Local".into(),
            affinity_seconds: 0,
            flags: vec!["maglev".into()],
            restricted: true,
            backends: vec![backend("fd00::1", false, 2)],
            ..cluster_ip.clone()
        };
        let well = ServiceState {
            namespace: "ns".into(),
            name: "web".into(),
            frontends: vec![cluster_ip, node_port],
            problems: Vec::new(),
        };
        let troubled = ServiceState {
            namespace: "ns".into(),
            name: "late".into(),
            problems: vec!["10.96.0.1 is ns/web's".into()],
            ..ServiceState::default()
        };
        vec![well, troubled]
    }

    #[test]
    fn services_are_a_row_a_frontend_and_problems_are_named() {
        let page = frontends(&services());
        let words: Vec<Vec<&str>> = page.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            words[1],
            ["ns", "web", "ClusterIP", "[fd00:96::1]:80", "TCP", "any", "Cluster", "600s", "1", "1", "5", "-"]
        );
        assert_eq!(words[2][2..8], ["NodePort", "[*]:30080", "TCP", "outside", "Local", "-"]);
        assert_eq!(words[2][11..], ["maglev", "for", "nobody"]);
        assert!(page.ends_with("\nProblems\n  ns/late: 10.96.0.1 is ns/web's\n"), "{page}");
        assert_eq!(frontends(&[]), "none\n");
    }

    #[test]
    fn endpoints_are_a_row_a_backend_whatever_leads_to_it() {
        let page = endpoints(&services());
        let words: Vec<Vec<&str>> = page.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            words,
            [
                ["ns", "web", "[fd00::1]:8080", "TCP", "ready", "here", "2", "[fd00:96::1]:80", "[*]:30080"].to_vec(),
                ["ns", "web", "[fd00::2]:8080", "TCP", "draining", "elsewhere", "3", "[fd00:96::1]:80"].to_vec(),
            ]
        );
    }
}
