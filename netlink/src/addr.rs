//! Addresses of links.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};

use crate::link::absent_is_false;
use crate::{Handle, Result};

/// How an address is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AddressOptions {
    /// IPv6: usable at once, no duplicate address detection (`IFA_F_NODAD`).
    pub nodad: bool,
    /// No route for the prefix (`IFA_F_NOPREFIXROUTE`).
    pub noprefixroute: bool,
}

/// What the kernel says of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Index of its link.
    pub index: u32,
    /// Address and prefix length; the host bits are kept.
    pub address: IpNet,
    /// IPv6: still in duplicate address detection, or failed it.
    pub tentative: bool,
    /// As [`AddressOptions::noprefixroute`].
    pub noprefixroute: bool,
    /// Reaches beyond the link (scope global).
    pub global: bool,
}

impl Handle {
    /// Adds `address` to the link, or replaces its options when it is there already.
    ///
    /// # Errors
    /// The kernel's; `ENODEV` when the link is gone, `EACCES` or `EPERM` where IPv6 is disabled on it.
    pub async fn replace_address(&self, index: u32, address: IpNet, options: AddressOptions) -> Result<()> {
        let mut message = message(index, address);
        let mut flags = AddressFlags::empty();
        if options.nodad {
            flags |= AddressFlags::Nodad;
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        if options.noprefixroute {
            flags |= AddressFlags::Noprefixroute;
        }
        message.attributes.push(AddressAttribute::Flags(flags));
        let request = RouteNetlinkMessage::NewAddress(message);
        self.execute(request, NLM_F_CREATE | NLM_F_REPLACE, || format!("add {address} to link #{index}")).await
    }

    /// Removes `address` from the link; answers whether it was there.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn delete_address(&self, index: u32, address: IpNet) -> Result<bool> {
        let request = RouteNetlinkMessage::DelAddress(message(index, address));
        absent_is_false(self.execute(request, 0, || format!("remove {address} from link #{index}")).await)
    }

    /// The addresses of both families, of one link or of all.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn addresses(&self, index: Option<u32>) -> Result<Vec<Address>> {
        let mut message = AddressMessage::default();
        message.header.index = index.unwrap_or(0);
        let what = || index.map_or_else(|| "list addresses".into(), |i| format!("list addresses of link #{i}"));
        let request = RouteNetlinkMessage::GetAddress(message);
        self.list(request, what, |m| to_address(m).filter(|a| index.is_none_or(|i| i == a.index))).await
    }
}

fn message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes.extend([AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())]);
    message
}

pub(crate) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

pub(crate) fn to_address(message: RouteNetlinkMessage) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return None };
    // IPv4 has the own address in LOCAL and the peer's in ADDRESS, IPv6 only ADDRESS unless there is a peer.
    let (mut local, mut other, mut flags) = (None, None, u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            AddressAttribute::Flags(all) => flags = all.bits(),
            _ => {}
        }
    }
    let flags = AddressFlags::from_bits_retain(flags);
    Some(Address {
        index: message.header.index,
        address: IpNet::new(local.or(other)?, message.header.prefix_len).ok()?,
        tentative: flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed),
        noprefixroute: flags.contains(AddressFlags::Noprefixroute),
        global: u8::from(message.header.scope) == 0,
    })
}
