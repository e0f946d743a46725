//! `make bench-services`: what Services cost beside real kube-proxy on the same objects, in one run on one machine.
mod early;
mod objects;
mod site;
mod sync;

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::unistd::Pid;

use super::report::{Goal, Report};
use super::traffic::{self, CLIENT, Load};
use super::turns::stay;
use crate::cluster::programs::bin_dir;
use crate::sh::{self, wait_for};
use site::{Mode, Side, Site};

/// Rounds of a second for each side.
const FLOODS: usize = 5;

/// Clients of a crowd.
const CROWD: usize = 16;

/// How much of it.
#[derive(Args, Debug)]
pub struct Options {
    /// Numbers of Services beside kube-proxy in nftables mode, rising; 0 for none of it.
    #[arg(long, value_delimiter = ',', default_value = "1,1000,30000")]
    nftables: Vec<usize>,
    /// The same beside iptables mode, which takes minutes from some thousands on.
    #[arg(long, value_delimiter = ',', default_value = "1,1000")]
    iptables: Vec<usize>,
    /// Services with ten endpoints each for the full sync and one change, beside nftables mode.
    #[arg(long, default_value_t = 10_000)]
    sync_nftables: usize,
    /// The same beside iptables mode.
    #[arg(long, default_value_t = 1000)]
    sync_iptables: usize,
    /// Changes between XDP and tc for packets to another node's pod, a start of the agent each; 0 for none of it.
    #[arg(long, default_value_t = 3)]
    xdp: usize,
    /// Measure the sync and the changes of ours alone: no kube-proxy, and no ratios.
    #[arg(long)]
    alone: bool,
    /// Seconds that kube-proxy may take for a sync before it is given up.
    #[arg(long, default_value_t = 400)]
    patience: u64,
}

impl Options {
    const fn patience(&self) -> Duration {
        Duration::from_secs(self.patience)
    }
}

/// A UDP sender for [`flood`].
#[derive(Args, Debug)]
pub struct Flood {
    /// Where to.
    target: SocketAddr,
    /// How long.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Flows that it alternates between.
    #[arg(long, default_value_t = 16)]
    flows: usize,
}

impl Flood {
    /// Sends datagrams of 64 bytes as fast as it can, from one CPU.
    ///
    /// # Errors
    /// When a socket cannot be had. What is sent in vain is not.
    pub fn run(&self) -> Result<()> {
        stay(Pid::from_raw(0), CLIENT)?;
        let socket = |_| -> Result<UdpSocket> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(self.target)?;
            Ok(socket)
        };
        let sockets: Vec<UdpSocket> = (0..self.flows).map(socket).collect::<Result<_>>()?;
        let (start, length) = (Instant::now(), Duration::from_secs_f64(self.seconds));
        while start.elapsed() < length {
            for socket in &sockets {
                for _ in 0..8 {
                    let _ = socket.send(&[b'x'; 64]);
                }
            }
        }
        Ok(())
    }
}

/// Why it cannot run here.
fn missing() -> Option<String> {
    let kube_proxy = bin_dir().ok()?.join("kube-proxy");
    let absent = || format!("no {}: `make cluster-programs` builds it", kube_proxy.display());
    sh::missing(
        &["ip", "busybox", "nft", "iptables", "conntrack"],
        &["keelway-agent", "keelway-cni", "keelway", "keelway-probe"],
    )
    .or_else(|| (!kube_proxy.is_file()).then(absent))
}

/// Runs it all; whether every figure could be measured.
///
/// # Errors
/// What it needs is not here, or the lab cannot be made.
pub fn run(options: &Options) -> Result<bool> {
    if let Some(reason) = missing() {
        anyhow::bail!(reason);
    }
    println!("programs: {}", sh::own("keelway-agent")?.display());
    let mut report = Report::default();
    let sizes = [(Mode::Nftables, &options.nftables), (Mode::Iptables, &options.iptables)];
    for (mode, sizes) in sizes {
        if sizes.iter().any(|size| *size > 0) {
            super::part(&mut report, &format!("traffic beside {}", mode.peer()), |report| {
                traffic_beside(mode, sizes, options.patience(), report)
            });
        }
    }
    for (mode, services) in [(Mode::Nftables, options.sync_nftables), (Mode::Iptables, options.sync_iptables)] {
        if services > 0 {
            super::part(&mut report, &format!("sync beside {}", mode.peer()), |report| {
                sync::measure(mode, services, options.patience(), options.alone, report)
            });
        }
    }
    if options.xdp > 0 {
        let what = "packets to a node port by XDP and by tc";
        match sh::missing(&["ethtool", "bpftool", "containerd", "runc"], &[]) {
            Some(reason) => report.skip(what, &reason),
            None => super::part(&mut report, what, |report| early::measure(options.xdp, report)),
        }
    }
    report.end("bench-services")
}

fn traffic_beside(mode: Mode, sizes: &[usize], patience: Duration, report: &mut Report) -> Result<()> {
    println!("traffic beside {}", mode.peer());
    let mut site = Site::new()?;
    site.api.put(objects::targets(&site))?;
    site.start_agent()?;
    site.add_pods()?;
    site.start_kube_proxy(mode)?;
    let mut first: Option<Vec<f64>> = None;
    let bare = traffic::raw_pair(&site.lab)?;
    let _server = bare.1.serve()?;
    for services in sizes.iter().filter(|size| **size > 0) {
        println!("  {services} Services");
        site.api.put(objects::fillers(site.fillers..*services, 1))?;
        site.fillers = site.fillers.max(*services);
        site.wait_programmed(patience)?;
        let [ours, peer] = [Side::Ours, Side::Peer].map(|side| site.place(side, "client"));
        let (ours, peer) = (ours?, peer?);
        let vips = [Side::Ours, Side::Peer].map(|side| SocketAddr::new(objects::vip(side), 80).to_string());
        let what = format!("new connections to a Service, {services} Services ({})", mode.name());
        let rates = per_second(&ours.turns_at_home("whole", &vips[0], (&peer, &vips[1]))?);
        report.pairs(&what, "1/s", &rates, mode.peer());
        report.goal(&what, Goal::RatioAtLeast(1.3));
        // One after the other waits for wake-ups most of the time; a crowd keeps both CPUs at work.
        let crowd = format!("new connections to a Service, {CROWD} at a time, {services} Services ({})", mode.name());
        let crowded = per_second(&ours.crowds_at_home(CROWD, &vips[0], (&peer, &vips[1]))?);
        report.pairs(&crowd, "1/s", &crowded, mode.peer());
        report.goal(&crowd, Goal::RatioAtLeast(1.3));
        // What either way costs beside no Service at all: the bound of any data plane between these pods.
        for (side, vip, named) in [(Side::Ours, &vips[0], "ours"), (Side::Peer, &vips[1], mode.peer())] {
            let client = site.place(side, "client")?;
            let server = SocketAddr::new(site.server(side)?, 8080).to_string();
            let rates = per_second(&client.turns_at_home("whole", vip, (&client, &server))?);
            let what = format!(
                "{named}: new connections to a Service beside its pod's own address, {services} Services ({})",
                mode.name()
            );
            report.pairs(&what, "1/s", &rates, "without a Service");
            // What no data plane between two namespaces is faster than.
            let rates = client.crowds_at_home(CROWD, vip, (&bare.0, &format!("{}:8080", bare.2)))?;
            let what = format!(
                "{named}: new connections to a Service, {CROWD} at a time, beside no data plane, {services} Services ({})",
                mode.name()
            );
            report.pairs(&what, "1/s", &per_second(&rates), "raw veth pair");
        }
        let what = format!("question and answer, {services} Services ({})", mode.name());
        report.pairs(&what, "us", &ours.turns_at_home("answer", &vips[0], (&peer, &vips[1]))?, mode.peer());
        // Ours with so many beside ours with the fewest.
        let ours: Vec<f64> = rates.iter().map(|pair| pair[0]).collect();
        match &first {
            None => first = Some(ours),
            Some(fewest) => {
                let what = format!("new connections, {services} Services beside {} ({})", sizes[0], mode.name());
                report.row(&what, "1/s", ours, Some((fewest.clone(), "ours with the fewest")));
                report.goal(&what, Goal::RatioAtLeast(0.9));
            }
        }
        let what = format!("packets to a node port from outside, {services} Services ({})", mode.name());
        report.pairs(&what, "1/s", &floods(&site)?, mode.peer());
    }
    if mode == Mode::Nftables {
        let vip = SocketAddr::new(objects::vip(Side::Ours), 80).to_string();
        let probe = sh::own("keelway-probe")?.display().to_string();
        traffic::programs(&site.lab, report, Load::Packets, || flood(&site, Side::Ours).map(drop))?;
        traffic::programs(&site.lab, report, Load::Sockets, || {
            let ask = ["ip", "netns", "exec", "client", &probe, "ask", &vip, "--count", "500"];
            let node = site.node(Side::Ours);
            node.run(&ask)?;
            node.run(&[&ask[..], &["--udp", "--unconnected"]].concat()).map(drop)
        })?;
    }
    Ok(())
}

fn per_second(micros: &[[f64; 2]]) -> Vec<[f64; 2]> {
    micros.iter().map(|pair| pair.map(|micros| 1e6 / micros)).collect()
}

/// Packets per second that reached each side's pod through its node port.
fn floods(site: &Site) -> Result<Vec<[f64; 2]>> {
    let mut pairs = Vec::new();
    for round in 0..FLOODS {
        let mut pair = [0.0; 2];
        for turn in 0..2 {
            // Who comes first changes from round to round.
            let which = (round + turn) % 2;
            pair[which] = flood(site, [Side::Ours, Side::Peer][which])?;
        }
        pairs.push(pair);
    }
    Ok(pairs)
}

fn flood(site: &Site, side: Side) -> Result<f64> {
    let own = sh::own("keelway-lab")?.display().to_string();
    let target = SocketAddr::new(site.node(side).v4.into(), objects::node_port(side) + 1).to_string();
    let (before, start) = (site.received(side)?, Instant::now());
    site.lab.outside.run(&[&own, "bench-flood", &target])?;
    let took = start.elapsed().as_secs_f64().min(1.0);
    let packets = wait_for("packets at the pod", Duration::from_secs(2), || {
        let packets = site.received(side)? - before;
        ensure!(packets > 0, "none has arrived");
        Ok(packets)
    })?;
    Ok(packets as f64 / took)
}

/// A number after a metric's name and labels, in the text of `/metrics`; the sum over the labels that match.
fn metric(text: &str, name: &str) -> Result<f64> {
    let lines = text
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']) || name.ends_with(' ')));
    let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    values.reduce(|sum, value| sum + value).with_context(|| format!("no metric {name}"))
}
