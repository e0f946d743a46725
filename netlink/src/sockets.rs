//! Sockets of the own network namespace that are connected to somebody who is gone: found by `sock_diag`, and ended so that their
//! programs notice (`SOCK_DESTROY`, `CONFIG_INET_DIAG_DESTROY`).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};

use crate::{Error, Result};

/// `TCP_ESTABLISHED`, which connected UDP sockets are in too.
const ESTABLISHED: u8 = 1;
/// Bytes that one read can need: the kernel's dumps are at most this long.
const BUFFER: usize = 32 * 1024;

/// A connected socket.
#[derive(Clone, Debug)]
pub struct Connected {
    /// The kernel's cookie, as BPF programs see it.
    pub cookie: u64,
    /// Whom it is connected to.
    pub peer: SocketAddr,
    id: SocketId,
    family: u8,
    protocol: u8,
}

fn open() -> Result<Socket> {
    let io = |source| Error::io("open a sock_diag socket", source);
    let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(io)?;
    socket.bind_auto().map_err(io)?;
    socket.connect(&NetlinkAddr::new(0, 0)).map_err(io)?;
    Ok(socket)
}

fn send<T>(socket: &Socket, message: T, flags: u16, what: &str) -> Result<()>
where
    T: NetlinkSerializable + std::fmt::Debug,
    NetlinkPayload<T>: From<T>,
{
    let mut request = NetlinkMessage::from(message);
    request.header.flags = flags;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0).map(drop).map_err(|source| Error::io(what, source))
}

/// Reads answers until `each` has seen the last one.
fn receive(
    socket: &Socket,
    what: &str,
    mut each: impl FnMut(NetlinkPayload<SockDiagMessage>) -> Result<bool>,
) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let size = socket.recv(&mut buffer.as_mut_slice(), 0).map_err(|source| Error::io(what, source))?;
        let mut offset = 0;
        while offset < size {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(&buffer[offset..size])
                .map_err(|error| Error::Broken { what: what.into(), reason: error.to_string() })?;
            // Messages are padded to four bytes.
            offset += (message.header.length as usize).next_multiple_of(4).max(16);
            if each(message.payload)? {
                return Ok(());
            }
        }
    }
}

/// Sockets of `protocol` (IANA number: TCP or UDP) that are connected to one of `peers`. Blocks.
///
/// # Errors
/// The kernel's.
pub fn connected_to(protocol: u8, peers: &BTreeSet<SocketAddr>) -> Result<Vec<Connected>> {
    const WHAT: &str = "list sockets";
    let socket = open()?;
    let mut found = Vec::new();
    for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let request = InetRequest {
            family,
            protocol,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::from_bits_truncate(1 << ESTABLISHED),
            socket_id,
        };
        send(&socket, SockDiagMessage::InetRequest(request), NLM_F_REQUEST | NLM_F_DUMP, WHAT)?;
        receive(&socket, WHAT, |payload| match payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(answer)) => {
                let id = answer.header.socket_id;
                let peer = SocketAddr::new(canonical(id.destination_address), id.destination_port);
                if peers.contains(&peer) {
                    // Two words of the host's order, the lower one first.
                    let cookie = u64::from_ne_bytes(id.cookie);
                    found.push(Connected { cookie, peer, id, family, protocol });
                }
                Ok(false)
            }
            NetlinkPayload::Done(_) => Ok(true),
            NetlinkPayload::Error(error) if error.code.is_some() => Err(Error::io(WHAT, error.to_io())),
            _ => Ok(false),
        })?;
    }
    Ok(found)
}

fn canonical(addr: IpAddr) -> IpAddr {
    addr.to_canonical()
}

/// Ends a socket: its program's next call fails with `ECONNABORTED`. False when it is gone already.
///
/// # Errors
/// The kernel's; `EOPNOTSUPP` where it was built without `CONFIG_INET_DIAG_DESTROY`.
pub fn destroy(found: &Connected) -> Result<bool> {
    const WHAT: &str = "end a socket whose peer is gone";
    let socket = open()?;
    let request = InetRequest {
        family: found.family,
        protocol: found.protocol,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::from_bits_truncate(1 << ESTABLISHED),
        socket_id: found.id.clone(),
    };
    let message = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
    send(&socket, message, NLM_F_REQUEST | NLM_F_ACK, WHAT)?;
    let mut ended = true;
    receive(&socket, WHAT, |payload| match payload {
        NetlinkPayload::Error(error) if error.code.is_none() => Ok(true),
        NetlinkPayload::Error(error) => match error.to_io() {
            io if io.raw_os_error() == Some(libc::ENOENT) => {
                ended = false;
                Ok(true)
            }
            io => Err(Error::io(WHAT, io)),
        },
        _ => Ok(false),
    })?;
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_connected_socket_is_found_and_others_are_not() {
        let peer: SocketAddr = "127.0.0.1:4097".parse().unwrap();
        let bound = UdpSocket::bind("127.0.0.1:0").unwrap();
        let dialled = UdpSocket::bind("127.0.0.1:0").unwrap();
        dialled.connect(peer).unwrap();
        let found = connected_to(17, &BTreeSet::from([peer])).unwrap();
        let ports: Vec<u16> = found.iter().map(|one| one.id.source_port).collect();
        assert!(ports.contains(&dialled.local_addr().unwrap().port()), "{found:?}");
        assert!(!ports.contains(&bound.local_addr().unwrap().port()), "{found:?}");
        assert!(found.iter().all(|one| one.cookie != 0), "{found:?}");
    }
}
