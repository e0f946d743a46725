//! The witness: counts what reaches a machine's devices, below every socket of it.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike};

use super::{Watch, Watched};

/// `PACKET_OUTGOING` of `<linux/if_packet.h>`: what the machine itself sends.
const OUTGOING: u8 = 4;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Counts for as long as asked.
pub(super) fn watch(wanted: &Watch) -> Result<Watched> {
    let socket = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("a packet socket (it takes CAP_NET_RAW)")?;
    // Short, so that silence does not outlast the watch.
    setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(100))?;
    let (end, mut report) = (Instant::now() + Duration::from_secs_f64(wanted.seconds), Watched::default());
    let mut buffer = [0; 128];
    while Instant::now() < end {
        let (length, from) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            other => other?,
        };
        if from.is_some_and(|from| from.pkttype() == OUTGOING) {
            continue;
        }
        if let Some((source, protocol)) = sender(&buffer[..length]) {
            *report.arrived.entry(format!("{protocol} {source}")).or_default() += 1;
        }
    }
    Ok(report)
}

/// Source address and transport of an IP packet; `None` for anything but TCP and UDP without extension headers.
fn sender(packet: &[u8]) -> Option<(IpAddr, &'static str)> {
    let (source, protocol): (IpAddr, u8) = match packet.first()? >> 4 {
        4 => (Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?).into(), *packet.get(9)?),
        6 => (Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?).into(), *packet.get(6)?),
        _ => return None,
    };
    match protocol {
        TCP => Some((source, "tcp")),
        UDP => Some((source, "udp")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::sender;

    #[test]
    fn reads_who_sent_a_packet() {
        let mut v4 = [0; 40];
        (v4[0], v4[9]) = (0x45, 17);
        v4[12..16].copy_from_slice(&[10, 0, 0, 1]);
        assert_eq!(sender(&v4), Some(("10.0.0.1".parse().unwrap(), "udp")));
        let mut v6 = [0; 60];
        (v6[0], v6[6], v6[23]) = (0x60, 6, 1);
        assert_eq!(sender(&v6), Some(("::1".parse().unwrap(), "tcp")));
        v6[6] = 58;
        assert_eq!((sender(&v6), sender(&[]), sender(&[0x45])), (None, None, None));
    }
}
