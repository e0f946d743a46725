//! The server: says who it is and whom it sees.
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

/// Serves until SIGTERM. (As a pod's first process it would ignore that signal without saying so.)
pub(super) fn serve(port: u16, name: Option<&str>) -> Result<()> {
    let stop: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    stop.thread_block()?;
    let name = name
        .map_or_else(|| nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned(), str::to_owned);
    let all = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let tcp = TcpListener::bind(all).with_context(|| format!("listening on {all}"))?;
    let udp = UdpSocket::bind(all).with_context(|| format!("binding {all}"))?;
    let for_udp = name.clone();
    thread::spawn(move || serve_udp(&udp, &for_udp));
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let name = name.clone();
            thread::spawn(move || serve_tcp(&stream, &name));
        }
    });
    stop.wait()?;
    Ok(())
}

fn serve_tcp(stream: &TcpStream, name: &str) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let peer = plain(stream.peer_addr().ok()?.ip());
    let mut output = stream;
    for line in BufReader::new(stream).lines() {
        output.write_all(format!("{name} {peer} {}\n", line.ok()?).as_bytes()).ok()?;
    }
    Some(())
}

fn serve_udp(socket: &UdpSocket, name: &str) {
    let mut buffer = [0; 2048];
    loop {
        // An earlier answer's ICMP error shows up here; the next question is still to come.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let text = String::from_utf8_lossy(&buffer[..length]);
        let _ = socket.send_to(format!("{name} {} {text}", plain(peer.ip())).as_bytes(), peer);
    }
}

fn plain(address: IpAddr) -> IpAddr {
    address.to_canonical()
}
