//! One connection, numbered messages at a steady pace, every loss counted.
use std::collections::HashSet;
use std::ffi::CStr;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::prctl;

use super::ask::local;
use super::{Flow, Flowed, Percentiles, failure, unix_micros};

/// How long to wait for the last answers; longer than a lost segment's first retransmissions, and than a busy machine halts.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the process calls itself once it has been answered, for [`crate::Lab::wait_for_flows`].
pub(crate) const UNDER_WAY: &CStr = c"kw-under-way";

/// The two ways of sending a line and of reading one back.
enum Wire {
    Tcp(TcpStream),
    /// With where to send to, if it is not connected.
    Udp(UdpSocket, Option<SocketAddr>),
}

impl Wire {
    fn send(&self, line: &str) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => (&*stream).write_all(format!("{line}\n").as_bytes()),
            Self::Udp(socket, None) => socket.send(line.as_bytes()).map(drop),
            Self::Udp(socket, Some(target)) => socket.send_to(line.as_bytes(), target).map(drop),
        }
    }
}

/// Runs the flow. An error is only one that kept it from starting; what happens later is counted.
pub(super) fn flow(wanted: &Flow) -> Result<Flowed> {
    let wire = open(wanted).with_context(|| format!("connecting to {}", wanted.target))?;
    let start = Instant::now();
    let gap = Duration::from_secs_f64(1.0 / wanted.rate.max(1) as f64);
    let total = (wanted.seconds * wanted.rate as f64).round() as u32;
    let (mut sent, mut broken) = (0, None);
    let (under_way, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut report = thread::scope(|scope| {
        let reader = scope.spawn(|| read_answers(&wire, start, gap, &under_way, &over));
        let mut is_named = false;
        for number in 0..total {
            if wanted.until.as_ref().is_some_and(|file| file.exists()) {
                break;
            }
            thread::sleep((start + gap * number).saturating_duration_since(Instant::now()));
            if !is_named && under_way.load(Ordering::Relaxed) {
                // Nobody but the lab looks at it.
                is_named = prctl::set_name(UNDER_WAY).is_ok();
            }
            match wire.send(&number.to_string()) {
                Ok(()) => sent += 1,
                // On a connected UDP socket an ICMP error answers an earlier message; this one was not sent.
                Err(error) => {
                    broken = Some(failure(&error));
                    if matches!(wire, Wire::Tcp(_)) {
                        break;
                    }
                }
            }
        }
        over.store(true, Ordering::Relaxed);
        match &wire {
            Wire::Tcp(stream) => drop(stream.shutdown(Shutdown::Write)),
            // The server's answer to this one says that nothing more is to come.
            Wire::Udp(..) => drop(wire.send("end")),
        }
        reader.join().expect("the reader does not panic")
    });
    // A connection ends once, whether its reader, its writer or both see it.
    let is_told = matches!(wire, Wire::Tcp(_)) && !report.failures.is_empty();
    if let Some(kind) = broken.filter(|_| !is_told) {
        *report.failures.entry(kind).or_default() += 1;
    }
    report.sent = sent;
    Ok(report)
}

fn open(wanted: &Flow) -> io::Result<Wire> {
    if wanted.udp {
        let socket = UdpSocket::bind(local(wanted.target))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        if wanted.unconnected {
            return Ok(Wire::Udp(socket, Some(wanted.target)));
        }
        socket.connect(wanted.target)?;
        return Ok(Wire::Udp(socket, None));
    }
    let stream = TcpStream::connect_timeout(&wanted.target, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(Wire::Tcp(stream))
}

/// Reads until the end of the flow, an error of a connection, or silence: of datagrams, after the last one was sent.
fn read_answers(wire: &Wire, start: Instant, gap: Duration, under_way: &AtomicBool, over: &AtomicBool) -> Flowed {
    let (mut report, mut seen, mut times, mut last) = (Flowed::default(), HashSet::new(), Vec::new(), start);
    let mut note = |line: &str, report: &mut Flowed| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(name), Some(number)) = (words.first(), words.get(2)) else { return true };
        let Ok(number) = number.parse::<u32>() else { return false };
        let now = Instant::now();
        if seen.insert(number) {
            report.answered += 1;
            under_way.store(true, Ordering::Relaxed);
            *report.answers.entry((*name).to_owned()).or_default() += 1;
            let came = unix_micros();
            report.heard.entry((*name).to_owned()).or_insert((came, came)).1 = came;
            times.push(now.saturating_duration_since(start + gap * number));
            report.longest_gap = report.longest_gap.max(u64::try_from((now - last).as_micros()).unwrap_or(u64::MAX));
            last = now;
        } else {
            report.duplicates += 1;
        }
        true
    };
    match wire {
        Wire::Tcp(stream) => {
            for line in BufReader::new(stream).lines() {
                match line {
                    Ok(line) => drop(note(&line, &mut report)),
                    Err(error) => {
                        *report.failures.entry(failure(&error)).or_default() += 1;
                        break;
                    }
                }
            }
        }
        Wire::Udp(socket, _) => {
            let mut buffer = [0; 2048];
            loop {
                match socket.recv(&mut buffer) {
                    Ok(length) if note(&String::from_utf8_lossy(&buffer[..length]), &mut report) => {}
                    Ok(_) => break,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && over.load(Ordering::Relaxed) => break,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => *report.failures.entry(failure(&error)).or_default() += 1,
                }
            }
        }
    }
    report.latency = Percentiles::of(times);
    report
}
