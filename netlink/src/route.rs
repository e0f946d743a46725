//! Routes of both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage, route};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};

use crate::addr::family;
use crate::link::absent_is_false;
use crate::{Handle, Result};

/// The number that marks a route as ours (`ip route ... proto 75`); unassigned in iproute2's `rt_protos`.
pub const PROTOCOL_KEELWAY: u8 = 0x4b;
/// The main routing table.
pub const TABLE_MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// How far a destination is (IPv4; the kernel ignores it for IPv6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RouteScope {
    /// Somewhere.
    #[default]
    Global,
    /// Directly on the link.
    Link,
}

/// A unicast route with one next hop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination; the default route is `0.0.0.0/0` or `::/0`.
    pub to: IpNet,
    /// Gateway, of the destination's family.
    pub via: Option<IpAddr>,
    /// The gateway is reached on this link whatever the addresses say.
    pub onlink: bool,
    /// Index of the link; 0 only with a gateway.
    pub index: u32,
    /// Source address that the host prefers when it sends this way.
    pub src: Option<IpAddr>,
    /// Path MTU in bytes; `None` is the link's.
    pub mtu: Option<u32>,
    /// Scope.
    pub scope: RouteScope,
    /// Table; [`TABLE_MAIN`] unless something else is meant.
    pub table: u32,
    /// Who made it; [`PROTOCOL_KEELWAY`] for ours.
    pub protocol: u8,
    /// Metric; `None` is the family's default (0 for IPv4, 1024 for IPv6).
    pub priority: Option<u32>,
}

/// Which routes to list; `None` does not restrict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteFilter {
    /// Index of the link.
    pub index: Option<u32>,
    /// Table.
    pub table: Option<u32>,
    /// Who made them.
    pub protocol: Option<u8>,
}

impl Route {
    /// A route of ours to `to` over the link, in the main table, to be refined with struct update syntax.
    #[must_use]
    pub fn dev(to: IpNet, index: u32) -> Self {
        Self {
            to,
            via: None,
            onlink: false,
            index,
            src: None,
            mtu: None,
            scope: RouteScope::Link,
            table: TABLE_MAIN,
            protocol: PROTOCOL_KEELWAY,
            priority: None,
        }
    }

    /// A route of ours to `to` through `gateway`, which is taken to be on the link.
    #[must_use]
    pub fn via(to: IpNet, gateway: IpAddr, index: u32) -> Self {
        Self { via: Some(gateway), onlink: true, scope: RouteScope::Global, ..Self::dev(to, index) }
    }

    /// The default route of ours through `gateway`, of the gateway's family.
    #[must_use]
    pub fn default_via(gateway: IpAddr, index: u32) -> Self {
        Self::via(any(gateway.is_ipv4()), gateway, index)
    }
}

impl Handle {
    /// Adds the route, or replaces the one with the same destination, table and metric.
    ///
    /// # Errors
    /// The kernel's; `ENETDOWN` when the link is down, `EINVAL` when `src` is no address of this host.
    pub async fn replace_route(&self, route: &Route) -> Result<()> {
        let request = RouteNetlinkMessage::NewRoute(message(route));
        self.execute(request, NLM_F_CREATE | NLM_F_REPLACE, || describe("replace", route)).await
    }

    /// Deletes the route (all its attributes must match); answers whether it was there.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn delete_route(&self, route: &Route) -> Result<bool> {
        let request = RouteNetlinkMessage::DelRoute(message(route));
        absent_is_false(self.execute(request, 0, || describe("delete", route)).await)
    }

    /// The unicast routes that pass the filter. Multipath routes, which we never make, are left out.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn routes(&self, filter: RouteFilter) -> Result<Vec<Route>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.kind = RouteType::Unicast;
            message.header.protocol = RouteProtocol::from(filter.protocol.unwrap_or(0));
            message.attributes.extend(filter.index.map(RouteAttribute::Oif));
            message.attributes.extend(filter.table.map(RouteAttribute::Table));
            let request = RouteNetlinkMessage::GetRoute(message);
            found.extend(
                self.list(request, || "list routes".into(), |m| to_route(m).filter(|r| filter.takes(r))).await?,
            );
        }
        Ok(found)
    }
}

impl RouteFilter {
    /// The kernel filters too, but a kernel that filters less must not change the answer.
    fn takes(&self, route: &Route) -> bool {
        self.index.is_none_or(|i| i == route.index)
            && self.table.is_none_or(|t| t == route.table)
            && self.protocol.is_none_or(|p| p == route.protocol)
    }
}

fn describe(verb: &str, route: &Route) -> String {
    let via = route.via.map(|ip| format!(" via {ip}")).unwrap_or_default();
    let src = route.src.map(|ip| format!(" src {ip}")).unwrap_or_default();
    format!("{verb} route {}{via} on link #{}{src} table {}", route.to, route.index, route.table)
}

fn any(v4: bool) -> IpNet {
    let ip = if v4 { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    IpNet::new(ip, 0).expect("0 is a prefix length of both families")
}

fn message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.to.addr());
    message.header.destination_prefix_length = route.to.prefix_len();
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.kind = RouteType::Unicast;
    message.header.scope = match route.scope {
        RouteScope::Global => route::RouteScope::Universe,
        RouteScope::Link => route::RouteScope::Link,
    };
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    if route.to.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(route.to.network().into()));
    }
    attributes.extend(route.via.map(|ip| RouteAttribute::Gateway(ip.into())));
    attributes.extend((route.index != 0).then_some(RouteAttribute::Oif(route.index)));
    attributes.extend(route.src.map(|ip| RouteAttribute::PrefSource(ip.into())));
    attributes.extend(route.priority.map(RouteAttribute::Priority));
    attributes.extend(route.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    message
}

fn to_route(message: RouteNetlinkMessage) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = message else { return None };
    let header = &message.header;
    if header.kind != RouteType::Unicast || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let v4 = header.address_family == AddressFamily::Inet;
    let mut route = Route::dev(any(v4), 0);
    route.protocol = header.protocol.into();
    route.table = header.table.into();
    route.onlink = header.flags.contains(RouteFlags::Onlink);
    route.scope = if header.scope == route::RouteScope::Universe { RouteScope::Global } else { RouteScope::Link };
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                route.to = IpNet::new(ip(&to)?, message.header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Gateway(gateway) => route.via = ip(&gateway),
            RouteAttribute::Oif(index) => route.index = index,
            RouteAttribute::PrefSource(src) => route.src = ip(&src),
            RouteAttribute::Priority(priority) => route.priority = Some(priority),
            RouteAttribute::Table(table) => route.table = table,
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|m| if let RouteMetric::Mtu(mtu) = m { Some(*mtu) } else { None });
            }
            RouteAttribute::MultiPath(_) => return None,
            _ => {}
        }
    }
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
