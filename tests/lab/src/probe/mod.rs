//! The traffic that the lab's assertions are made of: a server that says who it is, and clients that count.
//!
//! A message is one line; the server's answer is its host name, the peer's address as it sees it, and the line. The
//! program `keelway-probe` runs these in pods and on machines and prints a report as one line of JSON.
mod ask;
pub(crate) mod flow;
mod pause;
mod serve;
mod watch;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use crate::sh;

/// What `keelway-probe` does.
#[derive(Subcommand, Debug)]
pub enum Probe {
    /// Hold a pod's namespaces and reap its orphans, until told to end.
    Pause,
    /// Answer on this port, TCP, UDP and, where the kernel has it, SCTP, both families, until told to end.
    Serve {
        /// The port, of each transport.
        #[arg(long, default_value_t = 8080)]
        port: u16,
        /// The address; all of both families if not given.
        #[arg(long, default_value = "::")]
        address: IpAddr,
        /// What to call itself; the host name if not given.
        #[arg(long)]
        name: Option<String>,
        /// Serve one connection after another, without a thread for each.
        #[arg(long)]
        one_by_one: bool,
    },
    /// Ask once over each of many new connections.
    Ask(Ask),
    /// Send numbered messages at a steady pace over one connection.
    Flow(Flow),
    /// Count the TCP and UDP packets that arrive, by sender.
    Watch(Watch),
}

/// Many connections, one question each.
#[derive(Args, Debug)]
pub struct Ask {
    /// Address and port.
    pub target: SocketAddr,
    /// UDP instead of TCP.
    #[arg(long)]
    pub udp: bool,
    /// SCTP instead of TCP.
    #[arg(long, conflicts_with = "udp")]
    pub sctp: bool,
    /// For UDP: do not connect the socket; send with an address each time.
    #[arg(long)]
    pub unconnected: bool,
    /// How many.
    #[arg(long, default_value_t = 1)]
    pub count: u64,
    /// Connections per second; 0 for as many as it can.
    #[arg(long, default_value_t = 0)]
    pub rate: u64,
    /// Milliseconds until a connection or an answer counts as timed out. A busy machine takes its time, and who is answered does not
    /// wait for it: what is expected to fail wants less.
    #[arg(long, default_value_t = 5000)]
    pub timeout: u64,
    /// Report every question with its times.
    #[arg(long)]
    pub log: bool,
}

/// One connection, many messages.
#[derive(Args, Debug)]
pub struct Flow {
    /// Address and port.
    pub target: SocketAddr,
    /// UDP instead of TCP.
    #[arg(long)]
    pub udp: bool,
    /// For UDP: do not connect the socket; send with an address each time.
    #[arg(long)]
    pub unconnected: bool,
    /// Messages per second.
    #[arg(long, default_value_t = 200)]
    pub rate: u64,
    /// How long to send, in seconds.
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
    /// Ends earlier when there is a file of this name.
    #[arg(long)]
    pub until: Option<PathBuf>,
}

/// Packets that arrive.
#[derive(Args, Debug)]
pub struct Watch {
    /// How long to count, in seconds.
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
}

/// What [`Ask`] saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Connections tried.
    pub tried: u64,
    /// Answers, by the host name in them.
    pub answers: BTreeMap<String, u64>,
    /// The client's own address as servers saw it, counted.
    pub seen_as: BTreeMap<String, u64>,
    /// Failures by kind: `refused`, `timeout`, `reset`, `unreachable`, `denied`, ...
    pub failures: BTreeMap<String, u64>,
    /// UDP answers whose source was not the address asked.
    pub wrong_source: u64,
    /// SYNs and their answers that were sent again in this network namespace meanwhile, which they are after a second without an
    /// answer: one was lost, even if all was well in the end.
    #[serde(default)]
    pub resent: u64,
    /// Microseconds until a connection stood (for UDP: until the answer), of the successful ones.
    pub latency: Percentiles,
    /// Successful questions per second.
    pub per_second: f64,
    /// With [`Ask::log`], every question in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<Request>,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// When it began, in microseconds since 1970.
    pub begin: u64,
    /// When it was answered or had failed.
    pub end: u64,
    /// Who answered, or the kind of failure.
    pub outcome: Result<String, String>,
}

/// What [`Flow`] saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Flowed {
    /// Messages sent.
    pub sent: u64,
    /// Messages answered, each counted once.
    pub answered: u64,
    /// Answers that came twice.
    pub duplicates: u64,
    /// Errors by kind, as in [`Asked::failures`]; any ends a TCP flow.
    pub failures: BTreeMap<String, u64>,
    /// Who answered, counted.
    pub answers: BTreeMap<String, u64>,
    /// When each one's first and last answer came, in microseconds since 1970.
    #[serde(default)]
    pub heard: BTreeMap<String, (u64, u64)>,
    /// The longest time between two answers, in microseconds.
    pub longest_gap: u64,
    /// Microseconds from a message to its answer.
    pub latency: Percentiles,
}

/// What [`Watch`] saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watched {
    /// Packets, by transport and sender: `udp 10.244.1.2`.
    pub arrived: BTreeMap<String, u64>,
}

impl Watched {
    /// Packets of either transport from `sender`.
    pub fn from(&self, sender: IpAddr) -> u64 {
        ["tcp", "udp"].iter().filter_map(|transport| self.arrived.get(&format!("{transport} {sender}"))).sum()
    }
}

impl Asked {
    /// How many were answered.
    pub fn answered(&self) -> u64 {
        self.answers.values().sum()
    }
}

impl Flowed {
    /// Messages that were never answered.
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }
}

/// Now, as the reports have it: microseconds since 1970.
pub fn unix_micros() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Of a set of measured times, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Percentiles {
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub max: u64,
}

impl Percentiles {
    /// The percentiles of these times; all 0 for none.
    pub fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |share: f64| {
            let index = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
            times.get(index).map_or(0, |time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
        };
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

/// The word under which an error is counted.
fn failure(error: &std::io::Error) -> String {
    let word = match error.kind() {
        ErrorKind::ConnectionRefused => "refused",
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout",
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => "reset",
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "unreachable",
        ErrorKind::PermissionDenied => "denied",
        _ => return error.to_string(),
    };
    word.to_owned()
}

/// Does what is asked; clients print their report.
pub fn run(probe: &Probe) -> Result<()> {
    match probe {
        Probe::Pause => pause::pause(),
        Probe::Serve { port, address, name, one_by_one } => {
            serve::serve((*address, *port).into(), name.as_deref(), *one_by_one)
        }
        Probe::Ask(wanted) => print(&ask::ask(wanted)),
        Probe::Flow(wanted) => print(&flow::flow(wanted)?),
        Probe::Watch(wanted) => print(&watch::watch(wanted)?),
    }
}

fn print(report: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(report)?);
    Ok(())
}

/// Asks until it is as wanted: the directory is read within a moment, not at once.
///
/// # Panics
/// It is never, with what was seen last.
#[track_caller]
pub fn eventually(what: &str, mut ask: impl FnMut() -> Asked, wanted: impl Fn(&Asked) -> bool) {
    let attempt = || {
        let asked = ask();
        anyhow::ensure!(wanted(&asked), "{asked:?}");
        Ok(())
    };
    sh::wait_for(what, sh::SOON, attempt).unwrap();
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let times = |n: u64| (1..=n).map(Duration::from_micros).collect::<Vec<_>>();
        assert_eq!(Percentiles::of(times(100)), Percentiles { p50: 50, p90: 90, p99: 99, max: 100 });
        assert_eq!(Percentiles::of(times(1)), Percentiles { p50: 1, p90: 1, p99: 1, max: 1 });
        assert_eq!(Percentiles::of(vec![]), Percentiles::default());
    }

    #[test]
    fn counts_answers_refusals_and_a_whole_flow() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        std::thread::spawn(move || serve::serve((Ipv6Addr::UNSPECIFIED, port).into(), Some("me"), false));
        let target: SocketAddr = format!("127.0.0.1:{port}").parse().unwrap();
        let ask = |udp, unconnected| {
            ask::ask(&Ask { target, udp, sctp: false, unconnected, count: 5, rate: 0, timeout: 5000, log: false })
        };
        crate::sh::wait_for("the server", crate::sh::SOON, || {
            anyhow::ensure!(ask(true, false).answered() == 5);
            Ok(())
        })
        .unwrap();
        for report in [ask(false, false), ask(true, false), ask(true, true)] {
            assert_eq!((report.answers.get("me"), report.wrong_source), (Some(&5), 0), "{report:?}");
        }
        for udp in [false, true] {
            let flowed =
                flow::flow(&Flow { target, udp, unconnected: udp, rate: 1000, seconds: 0.3, until: None }).unwrap();
            assert!(flowed.lost() == 0 && flowed.sent >= 250 && flowed.failures.is_empty(), "{flowed:?}");
        }
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let refused = ask::ask(&Ask {
            target: closed,
            udp: false,
            sctp: false,
            unconnected: false,
            count: 2,
            rate: 0,
            timeout: 500,
            log: false,
        });
        assert_eq!(refused.failures.get("refused"), Some(&2), "{refused:?}");
    }
}
