//! The server: says who it is and whom it sees.
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use socket2::{Domain, Protocol, Socket, Type};

/// Serves until SIGTERM. (As a pod's first process it would ignore that signal without saying so.)
pub(super) fn serve(all: SocketAddr, name: Option<&str>, one_by_one: bool) -> Result<()> {
    let stop: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    stop.thread_block()?;
    let name = name
        .map_or_else(|| nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned(), str::to_owned);
    let tcp = TcpListener::bind(all).with_context(|| format!("listening on {all}"))?;
    let udp = UdpSocket::bind(all).with_context(|| format!("binding {all}"))?;
    let for_udp = name.clone();
    thread::spawn(move || serve_udp(&udp, &for_udp));
    if let Some(sctp) = listen_sctp(all)? {
        let name = name.clone();
        thread::spawn(move || serve_streams(&sctp, &name, one_by_one));
    }
    thread::spawn(move || serve_streams(&tcp, &name, one_by_one));
    stop.wait()?;
    Ok(())
}

/// None where the kernel has no SCTP. (Its sockets of the one-to-one style accept, read and write as TCP's do, RFC 6458 section 4.)
fn listen_sctp(all: SocketAddr) -> Result<Option<TcpListener>> {
    let socket = match Socket::new(Domain::for_address(all), Type::STREAM, Some(Protocol::SCTP)) {
        Err(error) if error.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => return Ok(None),
        other => other?,
    };
    socket.bind(&all.into()).with_context(|| format!("binding {all} for SCTP"))?;
    socket.listen(128)?;
    Ok(Some(socket.into()))
}

fn serve_streams(listener: &TcpListener, name: &str, one_by_one: bool) {
    for stream in listener.incoming().flatten() {
        if one_by_one {
            answer(&stream, name);
            continue;
        }
        let name = name.to_owned();
        thread::spawn(move || answer(&stream, &name));
    }
}

fn answer(stream: &TcpStream, name: &str) -> Option<()> {
    // SCTP has an option of its own for it.
    let _ = stream.set_nodelay(true);
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
