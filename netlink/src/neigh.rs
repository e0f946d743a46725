//! Neighbour entries that never have to be asked for.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteProtocol;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};

use crate::addr::family;
use crate::link::absent_is_false;
use crate::{Handle, PROTOCOL_KEELWAY, Result};

/// What the kernel says of a neighbour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Index of the link.
    pub index: u32,
    /// Whose entry it is.
    pub address: IpAddr,
    /// Hardware address; none while unresolved.
    pub mac: Option<[u8; 6]>,
    /// Never expires and is never asked for (`NUD_PERMANENT`).
    pub permanent: bool,
}

impl Handle {
    /// Makes `address` a permanent neighbour with `mac` on the link.
    ///
    /// # Errors
    /// The kernel's; `ENODEV` when the link is gone.
    pub async fn replace_neighbour(&self, index: u32, address: IpAddr, mac: [u8; 6]) -> Result<()> {
        let mut message = message(index, address);
        message.header.state = NeighbourState::Permanent;
        message.attributes.extend([
            NeighbourAttribute::LinkLayerAddress(mac.into()),
            NeighbourAttribute::Protocol(RouteProtocol::from(PROTOCOL_KEELWAY)),
        ]);
        let request = RouteNetlinkMessage::NewNeighbour(message);
        self.execute(request, NLM_F_CREATE | NLM_F_REPLACE, || format!("set neighbour {address} on link #{index}"))
            .await
    }

    /// Deletes the neighbour; answers whether it was there.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn delete_neighbour(&self, index: u32, address: IpAddr) -> Result<bool> {
        let request = RouteNetlinkMessage::DelNeighbour(message(index, address));
        absent_is_false(self.execute(request, 0, || format!("delete neighbour {address} on link #{index}")).await)
    }

    /// The neighbours of both families on the link.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn neighbours(&self, index: u32) -> Result<Vec<Neighbour>> {
        let mut message = NeighbourMessage::default();
        message.attributes.push(NeighbourAttribute::IfIndex(index));
        let request = RouteNetlinkMessage::GetNeighbour(message);
        let what = || format!("list neighbours of link #{index}");
        self.list(request, what, |m| to_neighbour(m).filter(|n| n.index == index)).await
    }
}

fn message(index: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    message
}

fn to_neighbour(message: RouteNetlinkMessage) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    if message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(IpAddr::V4(ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(IpAddr::V6(ip)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        index: message.header.ifindex,
        address: address?,
        mac,
        permanent: message.header.state == NeighbourState::Permanent,
    })
}
