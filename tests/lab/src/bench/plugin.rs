//! Calls of network plugins, each timed from the start of its process to its end, as a runtime waits for it.
//!
//! The calls are made by a program inside the node ([`Calls::run`]), so that entering the node is not part of them.
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::Report;
use crate::probe::Percentiles;
use crate::standalone::Standalone;

/// Pods of each plugin.
const PODS: usize = 100;
/// Calls that are under way at once, in the second round.
const AT_ONCE: usize = 20;
/// Where Debian's plugins are.
const DEBIAN: &str = "/usr/lib/cni";
const PEER: &str = "bridge + host-local, IPv4 only";
const CONFLIST: &str = "/etc/cni/net.d/05-keelway.conflist";
/// One family, since the peer waits a second for an IPv6 address; and no masquerading, which would call iptables.
const BRIDGE: &str = r#"{"cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "kwbench0", "isGateway": true,
    "ipam": {"type": "host-local", "subnet": "10.250.0.0/16"}}"#;

/// What to call, inside a node.
#[derive(Args, Debug)]
pub struct Calls {
    /// ADD or DEL.
    command: String,
    /// Many calls at once, each time until the last is done.
    #[arg(long)]
    at_once: bool,
}

impl Calls {
    /// Calls both plugins for every pod in turn, and prints the microseconds of each call, or of each round of calls at once.
    pub fn run(&self) -> Result<()> {
        let list: Value = serde_json::from_slice(&fs::read(CONFLIST).context(CONFLIST)?)?;
        let mut ours = list["plugins"][0].clone();
        (ours["name"], ours["cniVersion"]) = (list["name"].clone(), json!("1.0.0"));
        let ours = ours.to_string();
        let plugins = [("/opt/cni/bin", "keelway-cni", ours.as_str()), (DEBIAN, "bridge", BRIDGE)];
        let call = |pod, which: usize| {
            let (dir, program, config) = plugins[which];
            self.call(dir, program, config, pod, which).with_context(|| format!("{program}, pod {pod}"))
        };
        let mut times: [Vec<u64>; 2] = [Vec::new(), Vec::new()];
        let size = if self.at_once { AT_ONCE } else { 1 };
        for (round, pods) in (0..PODS).collect::<Vec<_>>().chunks(size).enumerate() {
            for turn in 0..2 {
                // Who comes first changes from round to round.
                let which = (round + turn) % 2;
                let start = Instant::now();
                let took = std::thread::scope(|scope| {
                    let calls: Vec<_> = pods.iter().map(|pod| scope.spawn(move || call(*pod, which))).collect();
                    let ended = calls.into_iter().map(|call| call.join().expect("a call does not panic"));
                    ended.collect::<Result<Vec<u64>>>()
                })?;
                let whole = u64::try_from(start.elapsed().as_micros())?;
                times[which].push(if self.at_once { whole } else { took[0] });
            }
        }
        println!("{}", json!(times));
        Ok(())
    }

    fn call(&self, dir: &str, program: &str, config: &str, pod: usize, which: usize) -> Result<u64> {
        let name = netns(pod, which);
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=bench-{pod};K8S_POD_INFRA_CONTAINER_ID={name};K8S_POD_UID=uid-of-bench-{pod}"
        );
        let start = Instant::now();
        let mut child = Command::new(Path::new(dir).join(program))
            .env("CNI_COMMAND", &self.command)
            .env("CNI_CONTAINERID", &name)
            .env("CNI_NETNS", format!("/run/netns/{name}"))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", dir)
            .env("CNI_ARGS", args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("its input")?.write_all(config.as_bytes())?;
        let output = child.wait_with_output()?;
        let took = start.elapsed();
        ensure!(output.status.success(), "{}", crate::sh::words(&output));
        Ok(u64::try_from(took.as_micros())?)
    }
}

fn netns(pod: usize, which: usize) -> String {
    format!("bench-{which}-{pod}")
}

/// ADD and DEL of both plugins, and the agent's memory while the pods are there.
pub(super) fn measure(lab: &Standalone, report: &mut Report) -> Result<()> {
    let node = lab.node(1);
    if !Path::new(DEBIAN).join("bridge").exists() {
        report.skip("CNI ADD and DEL", "no bridge plugin (Debian's containernetworking-plugins)");
        return Ok(());
    }
    let pods: Vec<String> = (0..PODS)
        .map(|pod| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: bench-{pod}, namespace: default, uid: uid-of-bench-{pod}}}\n\
                 spec: {{nodeName: {}}}\nstatus: {{phase: Pending}}\n",
                node.name
            )
        })
        .collect();
    lab.write("bench-pods", &pods.join("---\n"))?;
    let script = format!(
        "for i in $(seq 0 {}); do ip netns add bench-0-$i && ip netns add bench-1-$i || exit 1; done",
        PODS - 1
    );
    node.run(&["sh", "-c", &script])?;
    let own = std::env::current_exe()?.display().to_string();
    for command in ["ADD", "DEL"] {
        let times: [Vec<u64>; 2] = serde_json::from_str(&node.run(&[&own, "bench-cni", command])?)?;
        let ms = |times: &[u64], wanted: fn(Percentiles) -> u64| {
            let times = times.iter().map(|time| std::time::Duration::from_micros(*time)).collect();
            vec![wanted(Percentiles::of(times)) as f64 / 1000.0]
        };
        let whole = |times: &[u64]| times.iter().map(|time| *time as f64 / 1000.0).collect::<Vec<_>>();
        report.row(&format!("CNI {command}, p50 of {PODS}"), "ms", whole(&times[0]), Some((whole(&times[1]), PEER)));
        let [ours, theirs] = [0, 1].map(|which| ms(&times[which], |all| all.p99));
        report.row(&format!("CNI {command}, p99 of {PODS}"), "ms", ours, Some((theirs, PEER)));
        if command == "ADD" {
            memory(lab, report, "agent RSS with its pods and 100 more")?;
        }
    }
    for command in ["ADD", "DEL"] {
        let rounds: [Vec<u64>; 2] = serde_json::from_str(&node.run(&[&own, "bench-cni", command, "--at-once"])?)?;
        let [ours, theirs] = rounds.map(|round| round.iter().map(|time| *time as f64 / 1000.0).collect::<Vec<_>>());
        let what = format!("CNI {command}, {AT_ONCE} at once, until all are done");
        report.row(&what, "ms", ours, Some((theirs, PEER)));
    }
    Ok(())
}

/// The resident memory of a node's agent.
pub(super) fn memory(lab: &Standalone, report: &mut Report, what: &str) -> Result<()> {
    let script = "grep VmRSS: /proc/$(busybox pidof keelway-agent)/status";
    let text = lab.node(1).run(&["sh", "-c", script])?;
    let kib: f64 = text.split_whitespace().nth(1).context("VmRSS")?.parse()?;
    report.row(what, "MiB", vec![kib / 1024.0], None);
    Ok(())
}
