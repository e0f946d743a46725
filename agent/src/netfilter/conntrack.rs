//! The kernel's table of connections (`<linux/netfilter/nfnetlink_conntrack.h>`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::message::{Attributes, Request};
use super::{Refused, dump};

const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const NEW: u16 = SUBSYSTEM << 8;

const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_INFO: u16 = 4;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const TCP_INFO: u16 = 1;
const TCP_STATE: u16 = 1;
/// `IPS_DST_NAT`.
const DESTINATION_CHANGED: u32 = 1 << 5;
/// From here on a TCP connection is over: TIME_WAIT, CLOSE.
const TCP_OVER: u8 = 7;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// A flow whose destination the kernel changes: by rules of NAT, or by IPVS, which says so here while `net.ipv4.vs.conntrack` is 1 (a
/// kube-proxy sets it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// IANA protocol number.
    pub protocol: u8,
    /// Who opened it.
    pub client: SocketAddr,
    /// What was dialled.
    pub dialled: SocketAddr,
    /// Who answers.
    pub backend: SocketAddr,
    /// Whom it answers: the client, or in whose name the kernel sends the client's packets on.
    pub answered: SocketAddr,
    /// IPVS changes it, and only while it has the virtual server.
    pub by_ipvs: bool,
}

/// Every flow under way whose destination is changed, with ports. Not datagrams of IPVS, which any backend may have.
///
/// # Errors
/// What the kernel says; also that it tracks no connections.
pub fn translated() -> Result<Vec<Translated>, Refused> {
    dump("conntrack", Request::new(SUBSYSTEM, GET, 0), NEW, |_, attributes| read(attributes))
}

fn read(attributes: Attributes<'_>) -> Option<Translated> {
    let by_ipvs = attributes.be32(STATUS)? & DESTINATION_CHANGED == 0;
    let (protocol, client, dialled) = tuple(attributes.nested(TUPLE_ORIGINAL)?)?;
    let (_, backend, answered) = tuple(attributes.nested(TUPLE_REPLY)?)?;
    if backend == dialled || (by_ipvs && protocol == UDP) {
        return None;
    }
    let tcp = || attributes.nested(PROTOCOL_INFO)?.nested(TCP_INFO)?.get(TCP_STATE)?.first().copied();
    let over = protocol == TCP && tcp().is_some_and(|state| state >= TCP_OVER);
    (!over).then_some(Translated { protocol, client, dialled, backend, answered, by_ipvs })
}

/// Protocol, source, destination.
fn tuple(attributes: Attributes<'_>) -> Option<(u8, SocketAddr, SocketAddr)> {
    let (addresses, ports) = (attributes.nested(TUPLE_IP)?, attributes.nested(TUPLE_PROTOCOL)?);
    let address = |v4: u16, v6: u16| -> Option<IpAddr> {
        if let Some(bytes) = addresses.get(v4) {
            return Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into());
        }
        Some(Ipv6Addr::from(<[u8; 16]>::try_from(addresses.get(v6)?).ok()?).into())
    };
    let protocol = *ports.get(1)?.first()?;
    let (source, destination) = (address(1, 3)?, address(2, 4)?);
    Some((protocol, SocketAddr::new(source, ports.be16(2)?), SocketAddr::new(destination, ports.be16(3)?)))
}
