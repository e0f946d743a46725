//! IPVS' virtual servers (`<linux/ip_vs.h>`). Their real servers come and go with them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use nix::errno::Errno;

use super::message::{Attributes, Request, attribute};
use super::{IPV4, IPV6, Refused, change, dump, get};

/// There while the kernel has IPVS. Asking for its family would load the module where it is not.
const PRESENT: &str = "/proc/net/ip_vs";
/// `GENL_ID_CTRL`, which knows the families.
const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

const DELETE_SERVICE: u8 = 3;
const GET_SERVICE: u8 = 4;
const SERVICE: u16 = 1;
const SERVICE_FAMILY: u16 = 1;
const SERVICE_PROTOCOL: u16 = 2;
const SERVICE_ADDRESS: u16 = 3;
const SERVICE_PORT: u16 = 4;
const SERVICE_MARK: u16 = 5;

/// What clients dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtualServer {
    /// An address.
    Address {
        /// IANA number.
        protocol: u8,
        /// Port 0 is every port that has no virtual server of its own.
        address: SocketAddr,
    },
    /// Whatever a rule of the firewall gave this mark.
    Mark(u32),
}

impl fmt::Display for VirtualServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { protocol: 6, address } => write!(f, "TCP {address}"),
            Self::Address { protocol: 17, address } => write!(f, "UDP {address}"),
            Self::Address { protocol: 132, address } => write!(f, "SCTP {address}"),
            Self::Address { protocol, address } => write!(f, "protocol {protocol} {address}"),
            Self::Mark(mark) => write!(f, "firewall mark {mark}"),
        }
    }
}

/// The kernel's IPVS.
pub struct Ipvs {
    family: u16,
}

impl Ipvs {
    /// `None` where the kernel has none, or its module is not loaded.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> Result<Option<Self>, Refused> {
        if !Path::new(PRESENT).exists() {
            return Ok(None);
        }
        let request = Request::generic(CONTROL, GET_FAMILY).with_name(FAMILY_NAME, "IPVS");
        let family = get("IPVS", &request, |attributes| attributes.ne16(FAMILY_ID))?;
        Ok(family.map(|family| Self { family }))
    }

    /// All virtual servers of this network namespace.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn virtual_servers(&self) -> Result<Vec<VirtualServer>, Refused> {
        dump("IPVS", Request::generic(self.family, GET_SERVICE), self.family, |_, attributes| read(attributes))
    }

    /// Removes a virtual server that has an address, with its real servers. The kernel drops what comes of connections through
    /// them. One that is gone is no error.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn delete(&self, protocol: u8, address: SocketAddr) -> Result<(), Refused> {
        match change("IPVS", delete_request(self.family, protocol, address), 0) {
            Err(Refused { errno: Errno::ESRCH, .. }) => Ok(()),
            done => done,
        }
    }
}

fn delete_request(family: u16, protocol: u8, address: SocketAddr) -> Request {
    let (of, bytes) = match address.ip() {
        IpAddr::V4(ip) => (IPV4, [&ip.octets()[..], &[0; 12]].concat()),
        IpAddr::V6(ip) => (IPV6, ip.octets().to_vec()),
    };
    let server = [
        attribute(SERVICE_FAMILY, &u16::from(of).to_ne_bytes()),
        attribute(SERVICE_PROTOCOL, &u16::from(protocol).to_ne_bytes()),
        attribute(SERVICE_ADDRESS, &bytes),
        attribute(SERVICE_PORT, &address.port().to_be_bytes()),
    ];
    Request::generic(family, DELETE_SERVICE).with_nest(SERVICE, &server.concat())
}

fn read(attributes: Attributes<'_>) -> Option<VirtualServer> {
    let server = attributes.nested(SERVICE)?;
    if let Some(mark) = server.ne32(SERVICE_MARK) {
        return Some(VirtualServer::Mark(mark));
    }
    // 16 bytes for either family.
    let bytes = server.get(SERVICE_ADDRESS)?;
    let ip: IpAddr = if server.ne16(SERVICE_FAMILY)? == u16::from(IPV4) {
        Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(..4)?).ok()?).into()
    } else {
        Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()
    };
    let protocol = u8::try_from(server.ne16(SERVICE_PROTOCOL)?).ok()?;
    Some(VirtualServer::Address { protocol, address: SocketAddr::new(ip, server.be16(SERVICE_PORT)?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netfilter::message;

    #[test]
    fn what_is_asked_for_is_read_as_it_was_meant() {
        for address in ["10.96.0.1:443", "[fd00::1]:53"].map(|text| text.parse().unwrap()) {
            let bytes = delete_request(27, 17, address).to_bytes(5, 1);
            let (message, _) = message::first(&bytes).unwrap();
            assert_eq!((message.kind, message.family, bytes[17]), (27, DELETE_SERVICE, 1));
            assert_eq!(read(message.attributes()), Some(VirtualServer::Address { protocol: 17, address }));
        }
        let marked = attribute(SERVICE_MARK, &7_u32.to_ne_bytes());
        let bytes = Request::generic(27, GET_SERVICE).with_nest(SERVICE, &marked).to_bytes(0, 1);
        let (message, _) = message::first(&bytes).unwrap();
        assert_eq!(read(message.attributes()), Some(VirtualServer::Mark(7)));
    }
}
