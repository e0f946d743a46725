//! Latency of connections, throughput of one stream, and what each program costs per run.
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Report;
use crate::netns;
use crate::probe::Asked;
use crate::sh::{self, wait_for};
use crate::standalone::{Pod, Standalone};

const ROUNDS: usize = 20;
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Connections to a Service's address against those to its only backend.
pub(super) fn latency(
    lab: &Standalone,
    report: &mut Report,
    from: &Pod,
    services: &[(&str, String, String)],
) -> Result<()> {
    for (what, service, backend) in services {
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            // Who comes first changes from round to round.
            for turn in 0..2 {
                let (target, into) = if (round + turn) % 2 == 0 { (service, &mut ours) } else { (backend, &mut peer) };
                let seen: Asked = lab.probe(from, &["ask", target, "--count", "200"])?;
                ensure!(seen.failures.is_empty(), "{target}: {seen:?}");
                into.push(seen.latency.p50 as f64);
            }
        }
        report.row(&format!("connect pod to Service, {what}"), "us", ours, Some((peer, "pod to pod")));
    }
    Ok(())
}

/// A network namespace and a cgroup to run in.
#[derive(Clone)]
pub(super) struct Place {
    netns: PathBuf,
    cgroup: String,
}

impl Place {
    /// That of a pod, in its node's cgroup: the socket hooks see it.
    pub(super) fn pod(lab: &Standalone, pod: &Pod) -> Result<Self> {
        // Seen from outside of the node, an absolute link in the path (/var/run) would lead astray.
        let inside = lab.cri(pod.node)?.netns(&pod.sandbox.id)?.replace("/var/run/", "/run/");
        let node = lab.node(pod.node);
        Ok(Self { netns: node.path(&inside)?, cgroup: format!("{}/system", node.cgroup) })
    }

    fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(sh::own("keelway-lab")?);
        command.args(["enter", "--cgroup", &self.cgroup, "--net"]).arg(&self.netns).args(["--", "iperf3"]).args(args);
        Ok(command)
    }
}

/// Two namespaces of the lab with a veth pair between them and nothing else, and the address of the second.
pub(super) fn raw_pair(lab: &Standalone) -> Result<(Place, Place, String)> {
    let [one, two] = ["raw1", "raw2"].map(|name| netns::name(&lab.lab.id, name));
    for (name, link) in [(&one, None), (&two, Some(&one))] {
        sh::run(&["ip", "netns", "add", name])?;
        if let Some(peer) = link {
            sh::run(&["ip", "-n", peer, "link", "add", "raw", "type", "veth", "peer", "name", "raw", "netns", name])?;
        }
    }
    for (name, address) in [(&one, "198.18.0.1/30"), (&two, "198.18.0.2/30")] {
        sh::run(&["ip", "-n", name, "addr", "add", address, "dev", "raw"])?;
        sh::run(&["ip", "-n", name, "link", "set", "raw", "up"])?;
    }
    let cgroup = &lab.lab.outside.cgroup;
    let place = |name: &str| Place { netns: Path::new("/run/netns").join(name), cgroup: cgroup.clone() };
    Ok((place(&one), place(&two), "198.18.0.2".to_owned()))
}

/// One run of iperf3; what it says at its end.
fn iperf(from: &Place, to: &Place, address: &str, options: &[&str]) -> Result<Value> {
    // It serves one client and ends.
    let mut server = to.command(&["-s", "-1"])?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let answer = wait_for("iperf3", Duration::from_secs(5), || {
        let output = from.command(&[&["-c", address, "-J"], options].concat())?.output()?;
        let answer: Value = serde_json::from_slice(&output.stdout)?;
        ensure!(answer["error"].is_null(), "{address}: {}", answer["error"]);
        Ok(answer["end"].clone())
    });
    if answer.is_err() {
        // What it started ends with the lab.
        server.kill()?;
    }
    server.wait()?;
    answer
}

/// One TCP stream on a node and across nodes, against the raw pair.
pub(super) fn throughput(
    report: &mut Report,
    paths: &[(&str, &Place, &Place, &str)],
    raw: &(Place, Place, String),
) -> Result<()> {
    let mut figures = vec![Vec::new(); paths.len()];
    let mut peer = Vec::new();
    let rate = |from: &Place, to: &Place, address: &str| -> Result<f64> {
        let end = iperf(from, to, address, &["-t", "3"])?;
        Ok(end["sum_received"]["bits_per_second"].as_f64().context("no rate in iperf3's answer")? / 1e9)
    };
    for _ in 0..3 {
        for ((_, from, to, address), into) in paths.iter().zip(&mut figures) {
            into.push(rate(from, to, address)?);
        }
        peer.push(rate(&raw.0, &raw.1, &raw.2)?);
    }
    for ((what, ..), ours) in paths.iter().zip(figures) {
        report.row(&format!("one TCP stream, {what}"), "Gbit/s", ours, Some((peer.clone(), "raw veth pair")));
    }
    Ok(())
}

/// While this lives the kernel times BPF programs; a process of its own puts the old value back, however we end.
struct Timing(Child);

impl Timing {
    fn on() -> Result<Self> {
        let old = fs::read_to_string(STATS).context(STATS)?;
        let script = format!("echo 1 >{STATS} && echo on; read end; echo {} >{STATS}", old.trim());
        let mut command = Command::new("sh");
        command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
        let this = Self(command.spawn()?);
        wait_for(STATS, Duration::from_secs(2), || {
            ensure!(fs::read_to_string(STATS)?.trim() == "1", "the kernel does not time programs");
            Ok(())
        })?;
        Ok(this)
    }
}

impl Drop for Timing {
    fn drop(&mut self) {
        if let Some(mut input) = self.0.stdin.take() {
            let _ = input.write_all(b"\n");
        }
        let _ = self.0.wait();
    }
}

/// Nanoseconds and runs of each program attached on the lab's nodes, by program id, with its name.
fn counters(lab: &Standalone) -> Result<HashMap<u64, (String, u64, u64)>> {
    let mut ids = HashSet::new();
    for node in lab.lab.nodes() {
        for kind in ["link", "prog"] {
            // Which of them are ours: those pinned in the node's own bpffs.
            let list: Value = serde_json::from_str(&node.run(&["bpftool", "-jf", kind, "show"])?)?;
            let pinned = list.as_array().into_iter().flatten().filter(|entry| entry["pinned"].is_array());
            ids.extend(pinned.filter_map(|entry| entry[if kind == "link" { "prog_id" } else { "id" }].as_u64()));
        }
    }
    let all: Value = serde_json::from_str(&sh::run(&["bpftool", "-j", "prog", "show"])?)?;
    let ours = all.as_array().into_iter().flatten().filter_map(|program| {
        let id = program["id"].as_u64().filter(|id| ids.contains(id))?;
        let count = |key: &str| program[key].as_u64().unwrap_or(0);
        Some((id, (program["name"].as_str()?.to_owned(), count("run_time_ns"), count("run_cnt"))))
    });
    Ok(ours.collect())
}

/// Nanoseconds per run of each program under small UDP packets and new connections. A program that hands on to
/// another by a tail call is charged for both, so only the entries appear.
pub(super) fn programs(
    lab: &Standalone,
    report: &mut Report,
    from: &Pod,
    asks: &[String],
    paths: &[(&str, &Place, &Place, &str)],
) -> Result<()> {
    let _timing = Timing::on()?;
    let mut figures: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..3 {
        let before = counters(lab)?;
        for (_, from, to, address) in paths {
            iperf(from, to, address, &["-u", "-l", "64", "-b", "20M", "-t", "1"])?;
        }
        for target in asks {
            for options in [&[][..], &["--udp"], &["--udp", "--unconnected"]] {
                let options = [&["ask", target, "--count", "300", "--timeout", "300"], options].concat();
                let _: Asked = lab.probe(from, &options)?;
                let _: Asked = lab.probe_on_node(1, &options)?;
            }
        }
        let mut by_name: HashMap<String, (u64, u64)> = HashMap::new();
        for (id, (name, time, runs)) in counters(lab)? {
            let (_, old_time, old_runs) = before.get(&id).cloned().unwrap_or_default();
            let sum = by_name.entry(name).or_default();
            sum.0 += time.saturating_sub(old_time);
            sum.1 += runs.saturating_sub(old_runs);
        }
        for (name, (time, runs)) in by_name.into_iter().filter(|(_, (_, runs))| *runs >= 100) {
            figures.entry(name).or_default().push(time as f64 / runs as f64);
        }
    }
    ensure!(!figures.is_empty(), "no pinned program ran");
    for (name, ours) in figures {
        report.row(&format!("program {name}, each run"), "ns", ours, None);
    }
    Ok(())
}
