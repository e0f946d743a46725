//! Routes that end: what is for nobody is refused here instead of leaving by the default route.

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};

use crate::addr::family;
use crate::link::absent_is_false;
use crate::route::{PROTOCOL_KEELWAY, TABLE_MAIN};
use crate::{Handle, Result};

/// Longer than any other metric, so that a real route to the same prefix wins.
const METRIC: u32 = u32::MAX;

impl Handle {
    /// Packets to `to` that no longer prefix takes are answered with "host unreachable". One that is there already is left alone.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn ensure_unreachable(&self, to: IpNet) -> Result<()> {
        let request = RouteNetlinkMessage::NewRoute(message(to));
        match self.execute(request, NLM_F_CREATE | NLM_F_EXCL, || format!("add unreachable route {to}")).await {
            Err(error) if error.errno() == Some(Errno::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Takes that back; answers whether it was there.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn delete_unreachable(&self, to: IpNet) -> Result<bool> {
        let request = RouteNetlinkMessage::DelRoute(message(to));
        absent_is_false(self.execute(request, 0, || format!("delete unreachable route {to}")).await)
    }
}

fn message(to: IpNet) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(to.addr());
    message.header.destination_prefix_length = to.prefix_len();
    message.header.table = u8::try_from(TABLE_MAIN).unwrap_or_default();
    message.header.protocol = RouteProtocol::from(PROTOCOL_KEELWAY);
    message.header.kind = RouteType::Unreachable;
    message.header.scope = RouteScope::Universe;
    message.attributes.push(RouteAttribute::Destination(to.network().into()));
    message.attributes.push(RouteAttribute::Priority(METRIC));
    message
}
