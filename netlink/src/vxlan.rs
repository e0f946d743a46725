//! One VXLAN device in collect-metadata mode: programs give each packet its peer and network id.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};

use crate::link::check_name;
use crate::{Error, Handle, Link, Result};

/// The device to have. The underlay may be IPv4 or IPv6: it follows from the tunnel key of each packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan<'a> {
    /// Name.
    pub name: &'a str,
    /// UDP port, host byte order.
    pub port: u16,
    /// In bytes, of the inner packet.
    pub mtu: u32,
    /// Hardware address; `None` lets the kernel choose (and accepts any).
    pub mac: Option<[u8; 6]>,
}

/// What the kernel says of a VXLAN device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VxlanState {
    /// Takes peer and id from the packet's metadata.
    pub collect_metadata: bool,
    /// UDP port, host byte order.
    pub port: u16,
    /// Learns addresses from what it receives.
    pub learning: bool,
    /// Sends IPv6 outer packets without UDP checksum.
    pub zero_csum6_tx: bool,
    /// Accepts them.
    pub zero_csum6_rx: bool,
}

/// What to do with a link of that name that is something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnMismatch {
    /// Leave it and answer [`Error::LinkDiffers`].
    Fail,
    /// Delete it and make ours.
    Recreate,
}

impl Handle {
    /// Makes sure that the device exists as described and is up; an existing one that fits is kept.
    /// Its MTU is corrected in place, anything else follows `on_mismatch`.
    ///
    /// # Errors
    /// [`Error::LinkDiffers`] with the first attribute that differs; the kernel's, such as `EEXIST` when another
    /// device has a socket on that port.
    pub async fn ensure_vxlan(&self, wanted: &Vxlan<'_>, on_mismatch: OnMismatch) -> Result<Link> {
        check_name(wanted.name)?;
        match self.link(wanted.name).await? {
            None => self.create_vxlan(wanted).await?,
            Some(found) => match (difference(wanted, &found), on_mismatch) {
                (None, _) => {}
                (Some(e), OnMismatch::Fail) => return Err(e),
                (Some(_), OnMismatch::Recreate) => {
                    self.delete_link(wanted.name).await?;
                    self.create_vxlan(wanted).await?;
                }
            },
        }
        let link = self.require_link(wanted.name).await?;
        if link.mtu != wanted.mtu {
            self.set_mtu(link.index, wanted.mtu).await?;
        }
        if !link.up {
            self.set_up(link.index, true).await?;
        }
        self.require_link(wanted.name).await
    }

    async fn create_vxlan(&self, wanted: &Vxlan<'_>) -> Result<()> {
        let mut message = LinkMessage::default();
        message.attributes.extend([LinkAttribute::IfName(wanted.name.into()), LinkAttribute::Mtu(wanted.mtu)]);
        message.attributes.extend(wanted.mac.map(|mac| LinkAttribute::Address(mac.into())));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::CollectMetadata(true),
                InfoVxlan::Port(wanted.port),
                InfoVxlan::Learning(false),
                // Of the IPv6 underlay; whether a packet has a checksum is said by its tunnel key.
                InfoVxlan::UDPZeroCsumTX(true),
                InfoVxlan::UDPZeroCsumRX(true),
            ])),
        ]));
        self.execute(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL, || {
            format!("create vxlan {} on port {}", wanted.name, wanted.port)
        })
        .await
    }
}

/// The first attribute in which `found` is not `wanted`; MTU and up are set in place and not counted.
fn difference(wanted: &Vxlan<'_>, found: &Link) -> Option<Error> {
    let differs = |field, found: String, wanted_value: String| {
        (found != wanted_value).then(|| Error::LinkDiffers {
            name: wanted.name.into(),
            field,
            found,
            wanted: wanted_value,
        })
    };
    let Some(state) = &found.vxlan else {
        return differs("kind", format!("{:?}", found.kind), format!("{:?}", "vxlan"));
    };
    differs("collect-metadata mode", state.collect_metadata.to_string(), true.to_string())
        .or_else(|| differs("port", state.port.to_string(), wanted.port.to_string()))
        .or_else(|| differs("learning", state.learning.to_string(), false.to_string()))
        .or_else(|| differs("udp6zerocsumtx", state.zero_csum6_tx.to_string(), true.to_string()))
        .or_else(|| differs("udp6zerocsumrx", state.zero_csum6_rx.to_string(), true.to_string()))
        .or_else(|| {
            let mac = wanted.mac?;
            differs("mac", format!("{:02x?}", found.mac), format!("{:02x?}", Some(mac)))
        })
}

impl VxlanState {
    pub(crate) fn read(data: &[InfoVxlan]) -> Self {
        let mut state = Self::default();
        for info in data {
            match info {
                InfoVxlan::CollectMetadata(on) => state.collect_metadata = *on,
                InfoVxlan::Port(port) => state.port = *port,
                InfoVxlan::Learning(on) => state.learning = *on,
                InfoVxlan::UDPZeroCsumTX(on) => state.zero_csum6_tx = *on,
                InfoVxlan::UDPZeroCsumRX(on) => state.zero_csum6_rx = *on,
                _ => {}
            }
        }
        state
    }
}
