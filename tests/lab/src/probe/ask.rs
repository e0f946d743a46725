//! Many connections, one question each.
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::{Ask, Asked, Percentiles, Request, failure, unix_micros};

/// One answer: who, whom they saw, how long it took, and whether it came from the address asked.
struct Answer {
    name: String,
    peer: String,
    took: Duration,
    right_source: bool,
}

/// Asks one after another.
pub(super) fn ask(wanted: &Ask) -> Asked {
    let mut report = Asked::default();
    let (mut times, start, resent) = (Vec::new(), Instant::now(), resent_syns());
    for number in 0..wanted.count {
        if let Some(gap) = Duration::from_secs(number).checked_div(u32::try_from(wanted.rate).unwrap_or(u32::MAX)) {
            thread::sleep((start + gap).saturating_duration_since(Instant::now()));
        }
        report.tried += 1;
        let begin = unix_micros();
        let answer = if wanted.udp { ask_udp(wanted, number) } else { ask_stream(wanted, number) };
        if wanted.log {
            let outcome = answer.as_ref().map(|answer| answer.name.clone()).map_err(failure);
            report.log.push(Request { begin, end: unix_micros(), outcome });
        }
        match answer {
            Ok(answer) => {
                *report.answers.entry(answer.name).or_default() += 1;
                *report.seen_as.entry(answer.peer).or_default() += 1;
                report.wrong_source += u64::from(!answer.right_source);
                times.push(answer.took);
            }
            Err(error) => *report.failures.entry(failure(&error)).or_default() += 1,
        }
    }
    report.resent = resent_syns() - resent;
    report.per_second = times.len() as f64 / start.elapsed().as_secs_f64();
    report.latency = Percentiles::of(times);
    report
}

/// `TCPSynRetrans` of this network namespace (Documentation/networking/snmp_counter.rst); 0 where there is no /proc to tell.
fn resent_syns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap_or_default();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let mut both = names.split(' ').zip(values.split(' '));
    both.find(|(name, _)| *name == "TCPSynRetrans").and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
}

fn ask_stream(wanted: &Ask, number: u64) -> io::Result<Answer> {
    let (limit, start) = (Duration::from_millis(wanted.timeout), Instant::now());
    let mut stream = connect(wanted, limit)?;
    let took = start.elapsed();
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(format!("{number}\n").as_bytes())?;
    let mut line = String::new();
    if BufReader::new(&stream).read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    read_answer(&line, number, took, stream.peer_addr()? == wanted.target)
}

fn connect(wanted: &Ask, limit: Duration) -> io::Result<TcpStream> {
    if !wanted.sctp {
        let stream = TcpStream::connect_timeout(&wanted.target, limit)?;
        stream.set_nodelay(true)?;
        return Ok(stream);
    }
    let socket = Socket::new(Domain::for_address(wanted.target), Type::STREAM, Some(Protocol::SCTP))?;
    socket.connect_timeout(&wanted.target.into(), limit)?;
    // To read and write it is as one of TCP (RFC 6458 section 4, the one-to-one style).
    Ok(socket.into())
}

fn ask_udp(wanted: &Ask, number: u64) -> io::Result<Answer> {
    let start = Instant::now();
    let socket = UdpSocket::bind(local(wanted.target))?;
    socket.set_read_timeout(Some(Duration::from_millis(wanted.timeout)))?;
    let mut buffer = [0; 2048];
    let (length, source) = if wanted.unconnected {
        socket.send_to(number.to_string().as_bytes(), wanted.target)?;
        socket.recv_from(&mut buffer)?
    } else {
        socket.connect(wanted.target)?;
        socket.send(number.to_string().as_bytes())?;
        (socket.recv(&mut buffer)?, socket.peer_addr()?)
    };
    read_answer(&String::from_utf8_lossy(&buffer[..length]), number, start.elapsed(), source == wanted.target)
}

fn read_answer(line: &str, number: u64, took: Duration, right_source: bool) -> io::Result<Answer> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        [name, peer, echoed] if echoed == number.to_string() => {
            Ok(Answer { name: name.to_owned(), peer: peer.to_owned(), took, right_source })
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "wrong answer")),
    }
}

/// Any address and port of the target's family.
pub(super) fn local(target: SocketAddr) -> SocketAddr {
    match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}
