//! What the kernel tells unasked: addresses that come and go.

use std::net::IpAddr;

use futures::StreamExt as _;
use futures::channel::mpsc::UnboundedReceiver;
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::SocketAddr;
use tokio::task::JoinHandle;

use crate::addr::to_address;
use crate::{Error, Result};

/// Tells when addresses come to, change on or leave any link of a network namespace.
#[derive(Debug)]
pub struct AddressMonitor {
    told: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    task: JoinHandle<()>,
}

impl AddressMonitor {
    /// Listens in the network namespace of the calling thread, from now on. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Io`] when no socket can be had.
    pub fn open() -> Result<Self> {
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let opened = rtnetlink::new_multicast_connection(&groups);
        let (connection, _, told) = opened.map_err(|source| Error::io("listen for addresses", source))?;
        Ok(Self { told, task: tokio::spawn(connection) })
    }

    /// Waits for a change of an address that is `wanted`, or for the news that some were lost, in which case it may be any; `false`
    /// once the socket is closed. Nothing is lost when it is dropped while waiting.
    pub async fn changed(&mut self, wanted: impl Fn(&IpAddr) -> bool) -> bool {
        loop {
            let Some((message, _)) = self.told.next().await else { return false };
            let message = match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(gone)) => {
                    RouteNetlinkMessage::NewAddress(gone)
                }
                NetlinkPayload::InnerMessage(message) => message,
                // More than the socket could hold.
                _ => return true,
            };
            if to_address(message).is_none_or(|address| wanted(&address.address.addr())) {
                return true;
            }
        }
    }
}

impl Drop for AddressMonitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}
