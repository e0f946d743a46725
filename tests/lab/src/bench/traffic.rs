//! Latency of connections, throughput of one stream, and what each program costs per run.
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use serde_json::Value;

use super::Report;
use super::turns::stay;
use crate::netns;
use crate::sh::{self, wait_for};
use crate::standalone::{Pod, Standalone};
use crate::{Lab, Node};

/// Runs of iperf3 each way, of a second.
const ROUNDS: usize = 10;
/// CPUs of the two ends: what one does shall not wait for the other.
pub(super) const CLIENT: usize = 0;
/// See [`CLIENT`].
pub(super) const SERVER: usize = 1;
/// Host numbers of the peers on the switch, which no node has.
const HOSTS: [u8; 2] = [201, 202];
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

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

    /// That of a node.
    pub(super) fn node(lab: &Standalone, number: usize) -> Self {
        let node = lab.node(number);
        Self { netns: node.netns(), cgroup: format!("{}/system", node.cgroup) }
    }

    /// A namespace that was made by name within a node.
    pub(super) fn within(node: &Node, name: &str) -> Result<Self> {
        Ok(Self { netns: node.path(&format!("/run/netns/{name}"))?, cgroup: format!("{}/system", node.cgroup) })
    }

    fn command(&self, argv: &[&str]) -> Result<Command> {
        let mut command = Command::new(sh::own("keelway-lab")?);
        command.args(["enter", "--cgroup", &self.cgroup, "--net"]).arg(&self.netns).arg("--").args(argv);
        Ok(command)
    }

    /// Answers there on port 8080, as a pod does, one connection at a time: a thread for each would cost more than the network.
    pub(super) fn serve(&self) -> Result<Server> {
        let probe = sh::own("keelway-probe")?.display().to_string();
        let server = Server(self.command(&[&probe, "serve", "--name", "peer", "--one-by-one"])?.spawn()?);
        self.keep_on(SERVER)?;
        Ok(server)
    }

    /// Keeps every thread of every process there on one CPU; what they start stays there too.
    pub(super) fn keep_on(&self, cpu: usize) -> Result<()> {
        let wanted = fs::metadata(&self.netns)?.ino();
        wait_for("a process to keep on a CPU", Duration::from_secs(5), || {
            let mut kept = 0;
            for process in fs::read_dir("/proc")?.flatten() {
                // Those that ended meanwhile, and what are not processes, have none.
                let Ok(theirs) = fs::metadata(process.path().join("ns/net")) else { continue };
                let threads = fs::read_dir(process.path().join("task")).into_iter().flatten().flatten();
                for thread in threads.filter(|_| theirs.ino() == wanted) {
                    let id: i32 = thread.file_name().to_string_lossy().parse()?;
                    kept += u32::from(stay(Pid::from_raw(id), cpu).is_ok());
                }
            }
            ensure!(kept > 0, "none runs in {}", self.netns.display());
            Ok(())
        })
    }

    /// Times ours and the peer's in turn; the medians of blocks in microseconds. The process is in our cgroup.
    pub(super) fn turns(&self, timed: &str, ours: &str, peer: (&Self, &str)) -> Result<Vec<[f64; 2]>> {
        self.turns_with(timed, ours, peer, &[])
    }

    /// The same, with the process in the cgroup of whose turn it is.
    pub(super) fn turns_at_home(&self, timed: &str, ours: &str, peer: (&Self, &str)) -> Result<Vec<[f64; 2]>> {
        self.turns_with(timed, ours, peer, &["--rounds", "40", "--cgroups", &self.cgroup, &peer.0.cgroup])
    }

    /// New connections, `at_once` of them at a time, each of them from its first packet to its end.
    pub(super) fn crowds_at_home(&self, at_once: usize, ours: &str, peer: (&Self, &str)) -> Result<Vec<[f64; 2]>> {
        let at_once = at_once.to_string();
        let more = ["--at-once", &at_once, "--rounds", "20", "--cgroups", &self.cgroup, &peer.0.cgroup];
        self.turns_with("whole", ours, peer, &more)
    }

    fn turns_with(
        &self,
        timed: &str,
        ours: &str,
        (there, peer): (&Self, &str),
        more: &[&str],
    ) -> Result<Vec<[f64; 2]>> {
        let lab = sh::own("keelway-lab")?.display().to_string();
        let netns = [&self.netns, &there.netns].map(|netns| netns.display().to_string());
        let cpu = CLIENT.to_string();
        let argv =
            [&lab, "bench-turns", timed, "--cpu", &cpu, "--targets", ours, peer, "--netns", &netns[0], &netns[1]];
        let argv = [&argv[..], more].concat();
        let blocks: Vec<[u64; 2]> = serde_json::from_str(&sh::checked(&mut self.command(&argv)?)?)?;
        Ok(blocks.into_iter().map(|pair| pair.map(|nanoseconds| nanoseconds as f64 / 1000.0)).collect())
    }
}

/// A server of the bench's own, gone with it.
pub(super) struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two machines on the lab's switch with the kernel's own VXLAN between them, set up by hand, with the MTU of pods, and the inner
/// address of the second.
pub(super) fn vxlan_pair(lab: &Standalone) -> Result<(Place, Place, String)> {
    let id = &lab.lab.id;
    let names = ["vxlan1", "vxlan2"];
    for (name, number) in names.iter().zip(HOSTS) {
        netns::plug(id, name, number)?;
    }
    for (index, name) in names.iter().enumerate() {
        let namespace = netns::name(id, name);
        let ip = |args: &str| {
            let argv: Vec<&str> = ["ip", "-n", &namespace].into_iter().chain(args.split(' ')).collect();
            sh::run(&argv)
        };
        let remote = netns::v4(HOSTS[1 - index]);
        ip(&format!("link add vx0 mtu 1450 type vxlan id 9 dev eth0 dstport 4789 remote {remote}"))?;
        ip(&format!("addr add 198.18.1.{}/30 dev vx0", index + 1))?;
        ip("link set vx0 up")?;
    }
    let cgroup = &lab.lab.outside.cgroup;
    let place =
        |name: &str| Place { netns: Path::new("/run/netns").join(netns::name(id, name)), cgroup: cgroup.clone() };
    Ok((place(names[0]), place(names[1]), "198.18.1.2".to_owned()))
}

/// Two namespaces of the lab with a veth pair between them and nothing else, and the address of the second.
pub(super) fn raw_pair(lab: &Lab) -> Result<(Place, Place, String)> {
    let [one, two] = ["raw1", "raw2"].map(|name| netns::name(&lab.id, name));
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
    let cgroup = &lab.outside.cgroup;
    let place = |name: &str| Place { netns: Path::new("/run/netns").join(name), cgroup: cgroup.clone() };
    Ok((place(&one), place(&two), "198.18.0.2".to_owned()))
}

/// One run of iperf3; what it says at its end.
fn iperf(from: &Place, to: &Place, address: &str, options: &[&str]) -> Result<Value> {
    let cpus = format!("{CLIENT},{SERVER}");
    // It serves one client and ends.
    let mut server = to.command(&["iperf3", "-s", "-1"])?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let answer = wait_for("iperf3", Duration::from_secs(5), || {
        let output = from.command(&[&["iperf3", "-c", address, "-J", "-A", &cpus], options].concat())?.output()?;
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

/// A way of ours: where from, where to, and the address there.
pub(super) type Way<'a> = (&'a Place, &'a Place, &'a str);

/// One TCP stream our way and the peer's, in turn, in Gbit/s.
pub(super) fn throughput(ours: Way<'_>, peer: Way<'_>) -> Result<Vec<[f64; 2]>> {
    let rate = |(from, to, address): Way<'_>| -> Result<f64> {
        let end = iperf(from, to, address, &["-t", "1", "-O", "0.2"])?;
        Ok(end["sum_received"]["bits_per_second"].as_f64().context("no rate in iperf3's answer")? / 1e9)
    };
    let mut pairs = Vec::new();
    for round in 0..ROUNDS {
        // Who comes first changes from round to round.
        let mut pair = [0.0; 2];
        for turn in 0..2 {
            let which = (round + turn) % 2;
            pair[which] = rate([ours, peer][which])?;
        }
        pairs.push(pair);
    }
    Ok(pairs)
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
fn counters(lab: &Lab) -> Result<HashMap<u64, (String, u64, u64)>> {
    let mut ids = HashSet::new();
    for node in lab.nodes() {
        for kind in ["link", "prog"] {
            // Which of them are ours: those pinned in the node's own bpffs.
            // It gives up when another's goes while it looks.
            let list: Value = wait_for("bpftool", Duration::from_secs(2), || {
                Ok(serde_json::from_str(&node.run(&["bpftool", "-jf", kind, "show"])?)?)
            })?;
            let pinned = list.as_array().into_iter().flatten().filter(|entry| entry["pinned"].is_array());
            ids.extend(pinned.filter_map(|entry| entry[if kind == "link" { "prog_id" } else { "id" }].as_u64()));
        }
    }
    for node in lab.nodes() {
        // Filters have no pin; nobody else has any on a node's devices.
        let list: Value = wait_for("bpftool", Duration::from_secs(2), || {
            Ok(serde_json::from_str(&node.run(&["bpftool", "-j", "net", "show"])?)?)
        })?;
        let filters = list.as_array().into_iter().flatten().filter_map(|part| part["tc"].as_array()).flatten();
        ids.extend(filters.filter_map(|filter| filter["prog_id"].as_u64().or_else(|| filter["id"].as_u64())));
    }
    let all: Value = wait_for("bpftool", Duration::from_secs(2), || {
        Ok(serde_json::from_str(&sh::run(&["bpftool", "-j", "prog", "show"])?)?)
    })?;
    let ours = all.as_array().into_iter().flatten().filter_map(|program| {
        let id = program["id"].as_u64().filter(|id| ids.contains(id))?;
        let count = |key: &str| program[key].as_u64().unwrap_or(0);
        Some((id, (program["name"].as_str()?.to_owned(), count("run_time_ns"), count("run_cnt"))))
    });
    Ok(ours.collect())
}

/// What a row of a program says of the packets that it ran on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// Small UDP packets of flows that are known: the hooks on devices.
    Packets,
    /// The same in a mode of routing, and of the hooks on devices only the one before the kernel's stack.
    Early(&'static str),
    /// New connections and questions: the hooks on sockets.
    Sockets,
}

/// Nanoseconds of each run of the programs that `load` runs. A program that hands on to another by a tail call is charged for both,
/// so only the entries appear; the kernel's own timing is in the figures.
pub(super) fn programs(
    lab: &Lab,
    report: &mut Report,
    load: Load,
    mut traffic: impl FnMut() -> Result<()>,
) -> Result<()> {
    let _timing = Timing::on()?;
    let mut figures: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..5 {
        let before = counters(lab)?;
        traffic()?;
        let mut by_name: HashMap<String, (u64, u64)> = HashMap::new();
        for (id, (name, time, runs)) in counters(lab)? {
            let (_, old_time, old_runs) = before.get(&id).cloned().unwrap_or_default();
            let sum = by_name.entry(name).or_default();
            sum.0 += time.saturating_sub(old_time);
            sum.1 += runs.saturating_sub(old_runs);
        }
        let of_devices = |name: &str| ["pod_", "node_", "vxlan_"].iter().any(|prefix| name.starts_with(prefix));
        let wanted = |name: &str| match load {
            Load::Packets => of_devices(name),
            Load::Early(_) => name == "node_xdp",
            Load::Sockets => !of_devices(name),
        };
        for (name, (time, runs)) in by_name.into_iter().filter(|(name, (_, runs))| *runs >= 100 && wanted(name)) {
            figures.entry(name).or_default().push(time as f64 / runs as f64);
        }
    }
    ensure!(!figures.is_empty(), "no pinned program ran");
    let on = match load {
        Load::Packets => "each packet of a known flow".to_owned(),
        Load::Early(routing) => format!("each packet of a known flow ({routing})"),
        Load::Sockets => "each call".to_owned(),
    };
    for (name, ours) in figures {
        report.row(&format!("program {name}, {on}"), "ns", ours, None);
    }
    Ok(())
}

/// Small UDP packets each way.
pub(super) fn small_packets((from, to, address): Way<'_>) -> Result<()> {
    iperf(from, to, address, &["-u", "-l", "64", "-b", "20M", "-t", "1"]).map(drop)
}
