//! Load that notices everything: paced flows of every kind, new connections at a steady rate, and clients that are not let in,
//! all at once, counted by sequence numbers and by packets on the receiver's device. Run once while something happens and once while nothing does,
//! it says what the something cost.
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::programs::root;
use crate::probe::{Asked, Flowed, Watched};
use crate::process::Process;
use crate::sh::{self, SOON, wait_for};
use crate::standalone::{Pod, Standalone};

const VIPS: [[&str; 2]; 2] = [["10.96.0.20", "fd00:10:96::20"], ["10.96.0.21", "fd00:10:96::21"]];
/// Messages per second of a flow, connections per second of a client.
const RATE: &str = "50";
/// Milliseconds for which a forbidden client waits; it tries again at once.
const DENIED_WAIT: u64 = 200;
const POLICY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: load, namespace: default}\n\
    spec: {podSelector: {matchLabels: {load: server}}, ingress: [{from: [{podSelector: {matchLabels: {load: client}}}]}]}\n";

/// The pods and Services of the load, on nodes 1 and 2.
#[derive(Debug)]
pub struct Load {
    client: Pod,
    near: Pod,
    far: Pod,
    strangers: [Pod; 2],
    outside: [IpAddr; 2],
    _server: Process,
}

/// How a flow reaches its server.
#[derive(Clone, Copy, Debug)]
enum Path {
    Near,
    Far,
    /// A Service, exchanged for a backend by the socket hooks.
    Service,
    /// A Service, by the veth's hook alone.
    Packets,
    /// Masqueraded.
    Outside,
}

/// Path, UDP, IPv6.
const FLOWS: [(Path, bool, bool); 10] = [
    (Path::Near, false, false),
    (Path::Near, true, true),
    (Path::Far, false, true),
    (Path::Far, true, false),
    (Path::Service, false, false),
    (Path::Service, true, true),
    (Path::Packets, false, true),
    (Path::Packets, true, false),
    (Path::Outside, false, false),
    (Path::Outside, true, true),
];

/// New connections: past the sockets, UDP.
const CLIENTS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

impl Load {
    /// Starts the pods and waits until everything that should be reached is, and nothing else.
    pub fn new(s: &Standalone) -> Result<Self> {
        let probe = sh::own("keelway-probe")?.display().to_string();
        let server = [("load", "server")];
        let this = Self {
            client: s.pod(1, "client", &[("load", "client")])?,
            near: s.pod(1, "near", &server)?,
            far: s.pod(2, "far", &server)?,
            strangers: [s.pod(1, "stranger1", &[])?, s.pod(2, "stranger2", &[])?],
            outside: [s.lab.outside.v4.into(), s.lab.outside.v6.into()],
            _server: s.lab.outside.spawn("server", &[&probe, "serve", "--name", "outside"])?,
        };
        for (index, protocol) in ["TCP", "UDP"].into_iter().enumerate() {
            s.service(&format!("load-{index}"), VIPS[index], protocol, 80, &[&this.near, &this.far])?;
        }
        s.write("load", POLICY)?;
        wait_for("the load's way", SOON, || {
            for (path, udp, v6) in FLOWS {
                let report: Asked = this.probe(
                    s,
                    path,
                    &["ask", &this.target(path, udp, v6)?, if udp { "--udp" } else { "--count=1" }],
                )?;
                ensure!(report.answered() == 1, "{path:?}, UDP {udp}, IPv6 {v6}: {report:?}");
            }
            for from in &this.strangers {
                let report: Asked =
                    s.probe(from, &["ask", &at(&this.near, false), "--timeout", &DENIED_WAIT.to_string()])?;
                ensure!(report.answered() == 0, "{} still gets in", from.name);
            }
            Ok(())
        })?;
        Ok(this)
    }

    fn target(&self, path: Path, udp: bool, v6: bool) -> Result<String> {
        let address: IpAddr = match path {
            Path::Near => self.near.address(v6),
            Path::Far => self.far.address(v6),
            Path::Service | Path::Packets => return socket(VIPS[usize::from(udp)][usize::from(v6)], 80),
            Path::Outside => self.outside[usize::from(v6)],
        };
        Ok(SocketAddr::from((address, 8080)).to_string())
    }

    fn probe<T: serde::de::DeserializeOwned>(&self, s: &Standalone, path: Path, args: &[&str]) -> Result<T> {
        match path {
            Path::Packets => s.probe_past_sockets(&self.client, args),
            _ => s.probe(&self.client, args),
        }
    }

    /// Runs the load for `seconds` and `event` beside it, which has to be over before the load is.
    pub fn run(&self, s: &Standalone, seconds: u64, event: impl FnOnce() -> Result<()>) -> Result<Counted> {
        let before = self.lost_segments(s)?;
        let start = Instant::now();
        let length = seconds.to_string();
        let watched = (seconds + 5).to_string();
        let mut counted = thread::scope(|scope| -> Result<Counted> {
            let witnesses = [&self.near, &self.far].map(|pod| {
                let watched = &watched;
                scope.spawn(move || -> Result<Watched> { s.probe(pod, &["watch", "--seconds", watched]) })
            });
            thread::sleep(Duration::from_millis(500));
            let flows = FLOWS.map(|(path, udp, v6)| {
                let length = &length;
                scope.spawn(move || -> Result<Flowed> {
                    let target = self.target(path, udp, v6)?;
                    let mut args = vec!["flow", &target, "--seconds", length, "--rate", RATE];
                    args.extend(udp.then_some("--udp"));
                    self.probe(s, path, &args)
                })
            });
            let clients = CLIENTS.map(|(past, udp)| {
                scope.spawn(move || -> Result<Asked> {
                    let path = if past { Path::Packets } else { Path::Service };
                    let target = self.target(path, udp, past)?;
                    let count = (seconds * RATE.parse::<u64>()?).to_string();
                    // Long enough for a lost SYN to be sent again: what it costs is then seen as the slowest connection.
                    let mut args = vec!["ask", &target, "--count", &count, "--rate", RATE, "--timeout", "3000"];
                    args.extend(udp.then_some("--udp"));
                    self.probe(s, path, &args)
                })
            });
            let knocking = self.strangers.each_ref().map(|from| {
                let count = (seconds * 1000 / DENIED_WAIT).to_string();
                let near = at(&self.near, false);
                scope.spawn(move || -> Result<Asked> {
                    s.probe(from, &["ask", &near, "--count", &count, "--timeout", &DENIED_WAIT.to_string()])
                })
            });
            let throwing = self.strangers.each_ref().map(|from| {
                let (far, length) = (at(&self.far, true), &length);
                scope.spawn(move || -> Result<Flowed> {
                    s.probe(from, &["flow", &far, "--udp", "--seconds", length, "--rate", RATE])
                })
            });
            thread::sleep(Duration::from_millis(500));
            event()?;
            let took = start.elapsed();
            ensure!(
                took < Duration::from_secs(seconds),
                "what was to happen under the load took {took:?}, longer than it"
            );
            let joined = "a probe does not panic";
            let mut counted = Counted::default();
            for ((path, udp, v6), flow) in FLOWS.into_iter().zip(flows) {
                counted.flow(path, udp, v6, &flow.join().expect(joined)?);
            }
            for ((past, udp), client) in CLIENTS.into_iter().zip(clients) {
                counted.client(past, udp, &client.join().expect(joined)?);
            }
            let mut tried = 0;
            for stranger in knocking {
                let asked = stranger.join().expect(joined)?;
                tried += asked.tried;
                counted.through += asked.answered();
            }
            for stranger in throwing {
                let flowed = stranger.join().expect(joined)?;
                tried += flowed.sent;
                counted.through += flowed.answered;
            }
            for witness in witnesses {
                let seen = witness.join().expect(joined)?;
                ensure!(seen.from(self.client.address(false)) > 0, "the witness saw nothing: {seen:?}");
                let addresses = self.strangers.iter().flat_map(|pod| [pod.address(false), pod.address(true)]);
                counted.through += addresses.map(|address| seen.from(address)).sum::<u64>();
            }
            let (what, through) = ("packets and answers of clients that are not let in".to_owned(), counted.through);
            counted.lines.push(Line { what, tried, bad: through, slowest: 0 });
            Ok(counted)
        })?;
        let lost = self.lost_segments(s)?.saturating_sub(before);
        let what = "TCP segments lost, of the client and the near server".to_owned();
        counted.lines.push(Line { what, tried: 0, bad: lost, slowest: 0 });
        Ok(counted)
    }

    /// TCP segments that the client's and the near server's kernels sent in vain so far: sent again, less those that the other
    /// end answered as duplicates, which a busy machine sends by itself.
    fn lost_segments(&self, s: &Standalone) -> Result<u64> {
        let mut total = 0;
        for pod in [&self.client, &self.near] {
            let text = s.exec(pod, &["busybox", "cat", "/proc/net/snmp", "/proc/net/netstat"])?.stdout;
            let again = counter(&text, "Tcp:", "RetransSegs")?;
            total += again.saturating_sub(counter(&text, "TcpExt:", "TCPDSACKRecv")?);
        }
        Ok(total)
    }
}

/// One counter of `/proc/net/snmp` or `netstat`: a line of names, then one of values.
fn counter(text: &str, group: &str, name: &str) -> Result<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group));
    let (names, values) = lines.next().zip(lines.next()).with_context(|| format!("no {group} counters"))?;
    let mut pairs = names.split_whitespace().zip(values.split_whitespace());
    let (_, value) = pairs.find(|(found, _)| *found == name).with_context(|| format!("no counter {name}"))?;
    Ok(value.parse()?)
}

/// One kind of traffic and what became of it.
#[derive(Clone, Debug)]
pub struct Line {
    /// Which.
    pub what: String,
    /// Messages, connections or attempts.
    pub tried: u64,
    /// Those that did not fare as they should: lost, failed, or let through.
    pub bad: u64,
    /// For flows the longest silence, for connections the slowest, in milliseconds.
    pub slowest: u64,
}

/// What the load saw.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// Each kind of traffic.
    pub lines: Vec<Line>,
    through: u64,
}

impl Counted {
    fn flow(&mut self, path: Path, udp: bool, v6: bool, flow: &Flowed) {
        let way = match path {
            Path::Near => "pod to pod, one node",
            Path::Far => "pod to pod, two nodes",
            Path::Service => "pod to Service, by sockets",
            Path::Packets => "pod to Service, by packets",
            Path::Outside => "pod to the outside",
        };
        let what = format!("messages lost: {} {way}, IPv{}", transport(udp), if v6 { 6 } else { 4 });
        let bad = flow.lost() + flow.duplicates + flow.failures.values().sum::<u64>();
        self.lines.push(Line { what, tried: flow.sent, bad, slowest: flow.longest_gap / 1000 });
    }

    fn client(&mut self, past: bool, udp: bool, asked: &Asked) {
        let way = if past { "packets, IPv6" } else { "sockets, IPv4" };
        let what = format!("new connections failed: {} Service by {way}", transport(udp));
        let bad = asked.tried - asked.answered();
        self.lines.push(Line { what, tried: asked.tried, bad, slowest: asked.latency.max / 1000 });
    }
}

fn transport(udp: bool) -> &'static str {
    if udp { "UDP" } else { "TCP" }
}

fn at(pod: &Pod, v6: bool) -> String {
    SocketAddr::from((pod.address(v6), 8080)).to_string()
}

fn socket(address: &str, port: u16) -> Result<String> {
    Ok(SocketAddr::from((address.parse::<IpAddr>()?, port)).to_string())
}

/// Prints both side by side and writes `target/report/<name>.json`; whether nothing of ours was lost, failed or let through.
///
/// # Errors
/// When the report cannot be written.
pub fn report(name: &str, command: &str, ours: &Counted, control: &Counted) -> Result<bool> {
    println!("{:62} {:>6} {:>5} {:>8}   {:>6} {:>5} {:>8}", "", "ours", "", "slowest", "control", "", "slowest");
    let mut rows = Vec::new();
    for (our, its) in ours.lines.iter().zip(&control.lines) {
        println!(
            "{:62} {:>6} {:>5} {:>5} ms   {:>7} {:>5} {:>5} ms",
            our.what, our.tried, our.bad, our.slowest, its.tried, its.bad, its.slowest
        );
        rows.push(json!({"what": our.what, "unit": "count", "ours": our.bad, "peer": its.bad,
            "peer_name": "the same load with nothing happening", "ratio": null, "goal": 0,
            "met": our.bad == 0, "ours_tried": our.tried, "peer_tried": its.tried,
            "ours_slowest_ms": our.slowest, "peer_slowest_ms": its.slowest}));
    }
    let dir = root().join("target/report");
    fs::create_dir_all(&dir)?;
    let text: Value = json!({"name": name, "command": command, "rows": rows});
    fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(&text)?)?;
    Ok(!rows.is_empty() && ours.lines.iter().all(|line| line.bad == 0))
}
