//! IP sets (`<linux/netfilter/ipset/ip_set.h>`): their names, what is in them, and their end.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::message::{Attributes, Request};
use super::{Refused, change, dump};

const SUBSYSTEM: u16 = 6;
const DESTROY: u16 = 3;
const LIST: u16 = 7;
const ATTRIBUTE_PROTOCOL: u16 = 1;
const ATTRIBUTE_NAME: u16 = 2;
const ATTRIBUTE_FLAGS: u16 = 6 | 0x4000;
const ATTRIBUTE_MEMBERS: u16 = 8;
const MEMBER_ADDRESS: u16 = 1;
const MEMBER_PORT: u16 = 4;
const MEMBER_PROTOCOL: u16 = 7;
const ADDRESS_V4: u16 = 1;
const ADDRESS_V6: u16 = 2;
/// Names only.
const LIST_NAMES: u32 = 2;
/// The oldest that all kernels of interest speak.
const PROTOCOL: u8 = 6;

/// The names of all sets.
///
/// # Errors
/// What the kernel says; also that it has no sets.
pub fn names() -> Result<Vec<String>, Refused> {
    let request = Request::new(SUBSYSTEM, LIST, 0)
        .with(ATTRIBUTE_PROTOCOL, &[PROTOCOL])
        .with(ATTRIBUTE_FLAGS, &LIST_NAMES.to_be_bytes());
    dump("ipset", request, SUBSYSTEM << 8 | LIST, |_, attributes| attributes.name(ATTRIBUTE_NAME))
}

/// What a set has in it; which of these depends on its type (`hash:ip`, `hash:ip,port`, `bitmap:port`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The address.
    pub address: Option<IpAddr>,
    /// IANA protocol number.
    pub protocol: Option<u8>,
    /// The port.
    pub port: Option<u16>,
}

/// What is in a set.
///
/// # Errors
/// What the kernel says; also that there is no such set.
pub fn members(name: &str) -> Result<Vec<Member>, Refused> {
    let request =
        Request::new(SUBSYSTEM, LIST, 0).with(ATTRIBUTE_PROTOCOL, &[PROTOCOL]).with_name(ATTRIBUTE_NAME, name);
    let all = dump("ipset", request, SUBSYSTEM << 8 | LIST, |_, attributes| {
        Some(attributes.nested(ATTRIBUTE_MEMBERS)?.map(|(_, one)| member(Attributes::of(one))).collect::<Vec<_>>())
    })?;
    Ok(all.concat())
}

fn member(attributes: Attributes<'_>) -> Member {
    let ip = |attributes: Attributes<'_>| -> Option<IpAddr> {
        if let Some(bytes) = attributes.get(ADDRESS_V4) {
            return Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into());
        }
        Some(Ipv6Addr::from(<[u8; 16]>::try_from(attributes.get(ADDRESS_V6)?).ok()?).into())
    };
    Member {
        address: attributes.nested(MEMBER_ADDRESS).and_then(ip),
        protocol: attributes.get(MEMBER_PROTOCOL).and_then(|bytes| bytes.first()).copied(),
        port: attributes.be16(MEMBER_PORT),
    }
}

/// Ends a set that no rule uses.
///
/// # Errors
/// What the kernel says; `EBUSY` while a rule uses it.
pub fn destroy(name: &str) -> Result<(), Refused> {
    let request =
        Request::new(SUBSYSTEM, DESTROY, 0).with(ATTRIBUTE_PROTOCOL, &[PROTOCOL]).with_name(ATTRIBUTE_NAME, name);
    change("ipset", request, 0)
}
