//! `make bench`: what Keelway costs, each figure beside its peer's of the same run.
mod plugin;
mod report;
mod services;
mod traffic;
mod turns;
mod volumes;

use std::net::SocketAddr;

use anyhow::{Result, ensure};

pub use plugin::Calls;
use report::Report;
pub use services::{Flood, Options as ServicesOptions, run as services};
use traffic::{Load, Place, SERVER, raw_pair, vxlan_pair};
pub use turns::Turns;
pub use volumes::run as volumes;

use crate::probe::Asked;
use crate::sh::{self, wait_for};
use crate::standalone::{self, Standalone};

const NEAR: [&str; 2] = ["10.96.0.20", "fd00:10:96::20"];
const FAR: [&str; 2] = ["10.96.0.21", "fd00:10:96::21"];
const NEAR_UDP: [&str; 2] = ["10.96.0.22", "fd00:10:96::22"];

/// Runs it all, about three minutes; whether every figure could be measured.
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
    let [from, to, across] = [Place::pod(&lab, &client)?, Place::pod(&lab, &near)?, Place::pod(&lab, &far)?];
    for server in [&to, &across] {
        server.keep_on(SERVER)?;
    }
    // A part that fails is named at the end; the others are measured all the same.
    println!("connections to Services");
    for (what, service, backend) in &services {
        let what = format!("connect pod to Service, {what}");
        part(&mut report, &what, |report| {
            report.pairs(&what, "us", &from.turns("connect", service, (&from, backend))?, "pod to pod");
            Ok(())
        });
    }
    println!("questions and answers, throughput of one stream");
    let (near_v4, far_v4) = (near.address(false).to_string(), far.address(false).to_string());
    let ways = [
        ("one node", (&from, &to, near_v4.as_str()), raw_pair(&lab.lab)?, "raw veth pair"),
        ("across nodes", (&from, &across, far_v4.as_str()), vxlan_pair(&lab)?, "kernel VXLAN"),
    ];
    let iperf = sh::missing(&["iperf3"], &[]);
    for (what, ours, peer, name) in &ways {
        let peer_way = (&peer.0, &peer.1, peer.2.as_str());
        let rr = format!("question and answer, pod to pod, {what}");
        part(&mut report, &rr, |report| {
            let _server = peer.1.serve()?;
            let (ours, peer) = (at(ours.2, 8080)?, at(&peer.2, 8080)?);
            wait_for(&peer, std::time::Duration::from_secs(5), || from.turns("answer", &ours, (peer_way.0, &peer)))
                .map(|pairs| report.pairs(&rr, "us", &pairs, name))
        });
        let stream = format!("one TCP stream, pod to pod, {what}");
        match &iperf {
            Some(reason) => report.skip(&stream, reason),
            None => part(&mut report, &stream, |report| {
                report.pairs(&stream, "Gbit/s", &traffic::throughput(*ours, peer_way)?, name);
                Ok(())
            }),
        }
    }
    println!("time of each program");
    if let Some(reason) = iperf {
        report.skip("nanoseconds of programs on packets", &reason);
    } else {
        part(&mut report, "nanoseconds of programs on packets", |report| {
            let host = Place::node(&lab, 1);
            traffic::programs(&lab.lab, report, Load::Packets, || {
                for way in [ways[0].1, ways[1].1, (&host, &to, near_v4.as_str())] {
                    traffic::small_packets(way)?;
                }
                Ok(())
            })
        });
    }
    part(&mut report, "nanoseconds of programs on sockets", |report| {
        let mut asks: Vec<String> = services.iter().map(|(_, service, _)| service.clone()).collect();
        asks.extend([at(NEAR_UDP[0], 80)?, at(NEAR_UDP[1], 80)?]);
        traffic::programs(&lab.lab, report, Load::Sockets, || {
            for target in &asks {
                for options in [&[][..], &["--udp"], &["--udp", "--unconnected"]] {
                    let options = [&["ask", target, "--count", "300", "--timeout", "300"], options].concat();
                    let _: Asked = lab.probe(&client, &options)?;
                    let _: Asked = lab.probe_on_node(1, &options)?;
                }
            }
            Ok(())
        })
    });
    println!("calls of the network plugin");
    part(&mut report, "agent RSS", |report| plugin::memory(&lab, report, "agent RSS with 2 pods, after the traffic"));
    part(&mut report, "CNI ADD and DEL", |report| plugin::measure(&lab, report));
    drop(lab);
    report.end("bench")
}

fn part(report: &mut Report, what: &str, measure: impl FnOnce(&mut Report) -> Result<()>) {
    if let Err(error) = measure(report) {
        report.skip(what, &format!("{error:#}"));
    }
}
