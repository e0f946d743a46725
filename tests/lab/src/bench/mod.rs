//! `make bench`: what Keelway costs, each figure beside its peer's of the same run.
mod plugin;
mod report;
mod traffic;

use std::net::SocketAddr;

use anyhow::{Result, ensure};

pub use plugin::Calls;
use report::Report;
use traffic::Place;

use crate::probe::Asked;
use crate::sh::{self, wait_for};
use crate::standalone::{self, Standalone};

const NEAR: [&str; 2] = ["10.96.0.20", "fd00:10:96::20"];
const FAR: [&str; 2] = ["10.96.0.21", "fd00:10:96::21"];
const NEAR_UDP: [&str; 2] = ["10.96.0.22", "fd00:10:96::22"];

/// Runs it all, about two minutes; whether every figure could be measured.
pub fn run() -> Result<bool> {
    if let Some(reason) = standalone::missing() {
        anyhow::bail!(reason);
    }
    println!("programs: {}", sh::own("keelway-agent")?.display());
    let mut report = Report::default();
    println!("two nodes, three pods");
    let lab = Standalone::new(2, &[])?;
    let client = lab.pod(1, "client", &[])?;
    let (near, far) = (lab.pod(1, "near", &[])?, lab.pod(2, "far", &[])?);
    lab.service("near", NEAR, "TCP", 80, &[&near])?;
    lab.service("far", FAR, "TCP", 80, &[&far])?;
    lab.service("near-udp", NEAR_UDP, "UDP", 80, &[&near])?;
    let at = |address: &str, port: u16| -> Result<String> { Ok(SocketAddr::new(address.parse()?, port).to_string()) };
    let mut services = Vec::new();
    for (what, vip, pod, v6) in [
        ("same node, IPv4", NEAR[0], &near, false),
        ("same node, IPv6", NEAR[1], &near, true),
        ("other node, IPv4", FAR[0], &far, false),
    ] {
        services.push((what, at(vip, 80)?, SocketAddr::new(pod.address(v6), 8080).to_string()));
    }
    for (_, service, _) in &services {
        wait_for(service, std::time::Duration::from_secs(10), || {
            let seen: Asked = lab.probe(&client, &["ask", service])?;
            ensure!(seen.answered() == 1, "{seen:?}");
            Ok(())
        })?;
    }
    // A part that fails is named at the end; the others are measured all the same.
    println!("latency of connections");
    part(&mut report, "connect latency", |report| traffic::latency(&lab, report, &client, &services));
    if let Some(reason) = sh::missing(&["iperf3"], &[]) {
        report.skip("throughput and programs", &reason);
    } else {
        let [from, to, across] = [Place::pod(&lab, &client)?, Place::pod(&lab, &near)?, Place::pod(&lab, &far)?];
        let (near, far) = (near.address(false).to_string(), far.address(false).to_string());
        let paths =
            [("pod to pod, one node", &from, &to, near.as_str()), ("pod to pod, across nodes", &from, &across, &far)];
        println!("throughput of one stream");
        part(&mut report, "throughput", |report| traffic::throughput(report, &paths, &traffic::raw_pair(&lab)?));
        println!("time of each program");
        part(&mut report, "nanoseconds of programs", |report| {
            let mut asks: Vec<String> = services.iter().map(|(_, service, _)| service.clone()).collect();
            asks.extend([at(NEAR_UDP[0], 80)?, at(NEAR_UDP[1], 80)?]);
            traffic::programs(&lab, report, &client, &asks, &paths)
        });
    }
    println!("calls of the network plugin");
    part(&mut report, "agent RSS", |report| plugin::memory(&lab, report, "agent RSS with 2 pods, after the traffic"));
    part(&mut report, "CNI ADD and DEL", |report| plugin::measure(&lab, report));
    drop(lab);
    report.end()
}

fn part(report: &mut Report, what: &str, measure: impl FnOnce(&mut Report) -> Result<()>) {
    if let Err(error) = measure(report) {
        report.skip(what, &format!("{error:#}"));
    }
}
