//! Links: finding, creating veth pairs, changing, deleting.

use std::os::fd::{AsFd as _, AsRawFd as _};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkInfo, LinkMessage,
};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};

use crate::{Error, Handle, Netns, Result};

/// `IFLA_INET6_ADDR_GEN_MODE`: how a link gets its IPv6 link-local address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddrGenMode {
    /// From the hardware address.
    Eui64,
    /// Not at all.
    None,
}

/// What the kernel says of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index within its namespace.
    pub index: u32,
    /// Name within its namespace.
    pub name: String,
    /// Hardware address; none on links without Ethernet framing.
    pub mac: Option<[u8; 6]>,
    /// In bytes.
    pub mtu: u32,
    /// Administratively up (`IFF_UP`).
    pub up: bool,
    /// Carrier present (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// Resolves neighbours (no `IFF_NOARP`).
    pub arp: bool,
    /// Is the loopback.
    pub loopback: bool,
    /// `veth`, `vxlan`, ...; empty for hardware and loopback.
    pub kind: String,
    /// Index of the veth peer or lower device, in the namespace that `peer_netnsid` names.
    pub peer_index: Option<u32>,
    /// This namespace's id for the peer's namespace; `None` when it is this one.
    pub peer_netnsid: Option<i32>,
    /// Its attributes when it is a VXLAN device.
    pub vxlan: Option<crate::vxlan::VxlanState>,
}

/// A veth pair to create. Both ends are down afterwards.
#[derive(Clone, Debug)]
pub struct Veth<'a> {
    /// Name of the near end.
    pub name: &'a str,
    /// Its hardware address; `None` lets the kernel choose.
    pub mac: Option<[u8; 6]>,
    /// Name of the far end.
    pub peer_name: &'a str,
    /// The far end's hardware address.
    pub peer_mac: Option<[u8; 6]>,
    /// Where the far end is born: it is never visible in the near namespace. `None` is the near namespace.
    pub peer_netns: Option<&'a Netns>,
    /// Of both ends, in bytes.
    pub mtu: u32,
}

impl Handle {
    /// The link called `name`; `None` when there is none.
    ///
    /// # Errors
    /// [`Error::BadName`]; the kernel's.
    pub async fn link(&self, name: &str) -> Result<Option<Link>> {
        check_name(name)?;
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        self.get_link(message, || format!("look up link {name}")).await
    }

    /// As [`Handle::link`], but absence is [`Error::NoLink`].
    ///
    /// # Errors
    /// [`Error::NoLink`], [`Error::BadName`]; the kernel's.
    pub async fn require_link(&self, name: &str) -> Result<Link> {
        self.link(name).await?.ok_or_else(|| Error::NoLink { name: name.into() })
    }

    /// The link with `index`; `None` when there is none.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn link_by_index(&self, index: u32) -> Result<Option<Link>> {
        if index == 0 {
            return Ok(None);
        }
        self.get_link(by_index(index), || format!("look up link #{index}")).await
    }

    async fn get_link(&self, mut message: LinkMessage, what: impl Fn() -> String) -> Result<Option<Link>> {
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let answer = self.get_one(RouteNetlinkMessage::GetLink(message), what).await?;
        Ok(answer.and_then(to_link))
    }

    /// Every link of the namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn links(&self) -> Result<Vec<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        self.list(RouteNetlinkMessage::GetLink(message), || "list links".into(), to_link).await
    }

    /// Creates a veth pair.
    ///
    /// # Errors
    /// [`Error::Kernel`] with `EEXIST` when either name is taken in its namespace; [`Error::BadName`].
    pub async fn create_veth(&self, veth: &Veth<'_>) -> Result<()> {
        check_name(veth.name)?;
        check_name(veth.peer_name)?;
        let mut peer = end(veth.peer_name, veth.peer_mac, veth.mtu);
        if let Some(netns) = veth.peer_netns {
            peer.attributes.push(LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()));
        }
        let mut message = end(veth.name, veth.mac, veth.mtu);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.execute(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL, || {
            format!("create veth {} with peer {}", veth.name, veth.peer_name)
        })
        .await
    }

    /// Deletes the link called `name` (a veth's peer goes with it). Answers whether it was there.
    ///
    /// # Errors
    /// [`Error::BadName`]; the kernel's.
    pub async fn delete_link(&self, name: &str) -> Result<bool> {
        check_name(name)?;
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        absent_is_false(self.execute(RouteNetlinkMessage::DelLink(message), 0, || format!("delete link {name}")).await)
    }

    /// As [`Handle::delete_link`], in the calling thread's namespace, over a socket and on a thread of its own: the kernel works
    /// on a request while it is being sent, and for a device that goes it waits for grace periods of RCU, tens of
    /// milliseconds in which nothing else of this socket and thread would go on. Several at once wait together.
    ///
    /// # Errors
    /// [`Error::BadName`], [`Error::Io`] when there is no socket or thread; the kernel's.
    pub async fn delete_link_apart(name: &str) -> Result<bool> {
        let name = name.to_owned();
        let io = |source| Error::io("delete a link on a thread of its own", source);
        let apart = tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io)?;
            runtime.block_on(async { Self::open()?.delete_link(&name).await })
        });
        apart.await.unwrap_or_else(|error| Err(io(std::io::Error::other(error))))
    }

    /// Sets the link up or down.
    ///
    /// # Errors
    /// The kernel's; `ENODEV` when it is gone.
    pub async fn set_up(&self, index: u32, up: bool) -> Result<()> {
        self.set_flag(index, LinkFlags::Up, up, if up { "up" } else { "down" }).await
    }

    /// Lets the link resolve neighbours, or not (`IFF_NOARP`).
    ///
    /// # Errors
    /// The kernel's.
    pub async fn set_arp(&self, index: u32, arp: bool) -> Result<()> {
        self.set_flag(index, LinkFlags::Noarp, !arp, if arp { "arp on" } else { "arp off" }).await
    }

    /// Sets the MTU, in bytes.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` outside what the device allows.
    pub async fn set_mtu(&self, index: u32, mtu: u32) -> Result<()> {
        self.set_attribute(index, LinkAttribute::Mtu(mtu), || format!("set mtu {mtu} of link #{index}")).await
    }

    /// Sets the hardware address.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn set_mac(&self, index: u32, mac: [u8; 6]) -> Result<()> {
        self.set_attribute(index, LinkAttribute::Address(mac.into()), || format!("set mac of link #{index}")).await
    }

    /// Renames the link; it must be down on kernels before 6.2.
    ///
    /// # Errors
    /// [`Error::BadName`]; the kernel's.
    pub async fn rename(&self, index: u32, name: &str) -> Result<()> {
        check_name(name)?;
        let what = || format!("rename link #{index} to {name}");
        self.set_attribute(index, LinkAttribute::IfName(name.into()), what).await
    }

    /// Sets how the link gets its IPv6 link-local address. Takes effect when it next goes up.
    ///
    /// # Errors
    /// The kernel's; `EAFNOSUPPORT` where IPv6 is off.
    pub async fn set_addr_gen_mode(&self, index: u32, mode: AddrGenMode) -> Result<()> {
        let kernel = match mode {
            AddrGenMode::Eui64 => In6AddrGenMode::Eui64,
            AddrGenMode::None => In6AddrGenMode::None,
        };
        let spec = vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(kernel)])];
        let what = || format!("set addr_gen_mode {mode:?} of link #{index}");
        self.set_attribute(index, LinkAttribute::AfSpecUnspec(spec), what).await
    }

    async fn set_attribute(&self, index: u32, attribute: LinkAttribute, what: impl Fn() -> String) -> Result<()> {
        let mut message = by_index(index);
        message.attributes.push(attribute);
        self.execute(RouteNetlinkMessage::SetLink(message), 0, what).await
    }

    async fn set_flag(&self, index: u32, flag: LinkFlags, on: bool, word: &str) -> Result<()> {
        let mut message = by_index(index);
        message.header.change_mask = flag;
        if on {
            message.header.flags = flag;
        }
        self.execute(RouteNetlinkMessage::SetLink(message), 0, || format!("set link #{index} {word}")).await
    }
}

fn by_index(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn end(name: &str, mac: Option<[u8; 6]>, mtu: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.extend([LinkAttribute::IfName(name.into()), LinkAttribute::Mtu(mtu)]);
    message.attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.into())));
    message
}

/// The kernel's `dev_valid_name`, so that a bad name is named and not an `EINVAL`.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let bad = name.is_empty()
        || name.len() > 15
        || name == "."
        || name == ".."
        || name.bytes().any(|b| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace() || b == 0x0b);
    if bad { Err(Error::BadName(name.into())) } else { Ok(()) }
}

pub(crate) fn absent_is_false(result: Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.is_absent() => Ok(false),
        Err(e) => Err(e),
    }
}

fn to_link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        arp: !flags.contains(LinkFlags::Noarp),
        loopback: flags.contains(LinkFlags::Loopback),
        kind: String::new(),
        peer_index: None,
        peer_netnsid: None,
        vxlan: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Link(index) => link.peer_index = Some(index),
            LinkAttribute::LinkNetNsId(id) => link.peer_netnsid = Some(id),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
                        LinkInfo::Data(InfoData::Vxlan(data)) => {
                            link.vxlan = Some(crate::vxlan::VxlanState::read(&data));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_are_the_kernels() {
        for good in ["eth0", "kw0123456789abc", "a", "..."] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "a\tb", "0123456789abcdef"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
