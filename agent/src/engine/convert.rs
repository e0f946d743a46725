//! Between the pure crates' words and the layout's.

use std::net::IpAddr;

use ipnet::IpNet;
use keelway_layout as layout;
use keelway_layout::{Addr, Port, PrefixKey};
use keelway_policy as policy;
use keelway_proxy as proxy;

pub fn prefix(net: IpNet) -> PrefixKey {
    PrefixKey::new(net.network().into(), bits(net))
}

/// Bits of 128: an IPv4 prefix is kept mapped.
fn bits(net: IpNet) -> u32 {
    u32::from(net.prefix_len()) + if net.addr().is_ipv4() { 96 } else { 0 }
}

/// `None` for a prefix that no IPv4 or IPv6 network has.
pub fn net(addr: Addr, bits: u32) -> Option<IpNet> {
    let ip = IpAddr::from(addr);
    let len = if ip.is_ipv4() { bits.checked_sub(96)? } else { bits };
    IpNet::new(ip, u8::try_from(len).ok()?).ok()
}

pub fn frontend_key(key: &proxy::FrontendKey) -> layout::FrontendKey {
    layout::FrontendKey::new(key.addr.into(), Port::new(key.port), key.proto)
}

pub fn from_frontend_key(key: &layout::FrontendKey) -> proxy::FrontendKey {
    proxy::FrontendKey { addr: key.addr().into(), port: key.port().get(), proto: key.proto() }
}

pub fn frontend(frontend: &proxy::Frontend) -> layout::Frontend {
    let mut flags = 0;
    if frontend.flags & proxy::flags::ANY_PORT != 0 {
        flags |= layout::frontend_flags::REFUSE;
    }
    if frontend.flags & proxy::flags::DROP_WHEN_EMPTY != 0 {
        flags |= layout::frontend_flags::DROP_WHEN_EMPTY;
    }
    layout::Frontend {
        id: frontend.id,
        count: frontend.count,
        affinity_seconds: frontend.affinity_seconds,
        flags,
        reserved: [0; 2],
    }
}

pub fn from_frontend(frontend: &layout::Frontend) -> proxy::Frontend {
    let mut flags = 0;
    if frontend.flags & layout::frontend_flags::REFUSE != 0 {
        flags |= proxy::flags::ANY_PORT;
    }
    if frontend.flags & layout::frontend_flags::DROP_WHEN_EMPTY != 0 {
        flags |= proxy::flags::DROP_WHEN_EMPTY;
    }
    proxy::Frontend { id: frontend.id, count: frontend.count, affinity_seconds: frontend.affinity_seconds, flags }
}

pub fn backend(backend: &proxy::Backend) -> layout::Backend {
    layout::Backend {
        addr: backend.addr.into(),
        port: Port::new(backend.port),
        proto: backend.proto,
        ..layout::Backend::default()
    }
}

pub fn from_backend(backend: &layout::Backend) -> proxy::Backend {
    proxy::Backend { addr: backend.addr.into(), port: backend.port.get(), proto: backend.proto }
}

pub const fn slot_key(key: &proxy::SlotKey) -> layout::SlotKey {
    layout::SlotKey { frontend: key.frontend, slot: key.slot }
}

const fn direction(direction: policy::Direction) -> layout::Direction {
    match direction {
        policy::Direction::Ingress => layout::Direction::Ingress,
        policy::Direction::Egress => layout::Direction::Egress,
    }
}

const fn from_direction(number: u8) -> Option<policy::Direction> {
    match number {
        0 => Some(policy::Direction::Ingress),
        1 => Some(policy::Direction::Egress),
        _ => None,
    }
}

pub fn rule_key(key: &policy::RuleKey) -> layout::RuleKey {
    let port = key.port;
    layout::RuleKey::new(
        key.subject,
        key.peer,
        direction(key.direction),
        port.proto,
        Port::new(port.port),
        port.bits.into(),
    )
}

pub fn from_rule_key(key: &layout::RuleKey) -> Option<policy::RuleKey> {
    Some(policy::RuleKey {
        subject: key.subject(),
        direction: from_direction(key.direction())?,
        peer: key.peer(),
        port: policy::PortPrefix {
            proto: key.proto(),
            port: key.port().get(),
            bits: u8::try_from(key.port_bits()?).ok()?,
        },
    })
}

pub fn cidr_key(key: &policy::CidrKey) -> layout::CidrKey {
    layout::CidrKey::new(key.subject, direction(key.direction), key.prefix.network().into(), bits(key.prefix))
}

pub fn from_cidr_key(key: &layout::CidrKey) -> Option<policy::CidrKey> {
    Some(policy::CidrKey {
        subject: key.subject(),
        direction: from_direction(u8::try_from(key.direction()).ok()?)?,
        prefix: net(key.addr(), key.addr_bits()?)?,
    })
}
