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
    let from = match key.from {
        proxy::Origin::Anyone => layout::From::Anyone,
        proxy::Origin::Outside => layout::From::Outside,
    };
    layout::FrontendKey::new(key.addr.into(), Port::new(key.port), key.proto).seen_from(from)
}

pub fn from_frontend_key(key: &layout::FrontendKey) -> proxy::FrontendKey {
    let from = if key.is_outside() { proxy::Origin::Outside } else { proxy::Origin::Anyone };
    proxy::FrontendKey { addr: key.addr().into(), port: key.port().get(), proto: key.proto(), from }
}

/// The bits of either side.
const FRONTEND_FLAGS: [(u32, u32); 10] = {
    use layout::frontend_flags as to;
    use proxy::flags as from;
    [
        (from::ANY_PORT, to::REFUSE),
        (from::DROP_WHEN_EMPTY, to::DROP_WHEN_EMPTY),
        (from::NODE_ADDRESS, to::NODE_ADDRESS),
        (from::HOST_ONLY, to::HOST_ONLY),
        (from::OUTSIDE_DIFFERS, to::OUTSIDE_DIFFERS),
        (from::SOURCE_RANGES, to::SOURCE_RANGES),
        (from::NODE_PORT, to::NODE_PORT),
        (from::HASHED, to::HASHED),
        (from::KEEP_SOURCE, to::KEEP_SOURCE),
        (from::INDEXED, to::INDEXED),
    ]
};

// One that is forgotten here would be lost without a word.
const _: () = {
    let (mut all, mut i) = (0, 0);
    while i < FRONTEND_FLAGS.len() {
        all |= FRONTEND_FLAGS[i].0;
        i += 1;
    }
    assert!(all == proxy::flags::ALL);
};

pub fn frontend(frontend: &proxy::Frontend) -> layout::Frontend {
    let set = FRONTEND_FLAGS.iter().filter(|(from, _)| frontend.flags & from != 0);
    layout::Frontend {
        id: frontend.id,
        count: frontend.count,
        affinity_seconds: frontend.affinity_seconds,
        flags: set.fold(0, |flags, (_, to)| flags | to),
        reserved: [0; 2],
    }
}

pub fn from_frontend(frontend: &layout::Frontend) -> proxy::Frontend {
    let set = FRONTEND_FLAGS.iter().filter(|(_, to)| frontend.flags & to != 0);
    proxy::Frontend {
        id: frontend.id,
        count: frontend.count,
        affinity_seconds: frontend.affinity_seconds,
        flags: set.fold(0, |flags, (from, _)| flags | from),
    }
}

pub fn backend(backend: &proxy::Backend, draining: bool) -> layout::Backend {
    layout::Backend {
        addr: backend.addr.into(),
        port: Port::new(backend.port),
        proto: backend.proto,
        flags: if draining { layout::backend_flags::DRAINING } else { 0 },
        ..layout::Backend::default()
    }
}

/// The backend and whether it is draining.
pub fn from_backend(backend: &layout::Backend) -> (proxy::Backend, bool) {
    let draining = backend.flags & layout::backend_flags::DRAINING != 0;
    (proxy::Backend { addr: backend.addr.into(), port: backend.port.get(), proto: backend.proto }, draining)
}

pub const fn slot_key(key: &proxy::SlotKey) -> layout::SlotKey {
    layout::SlotKey { frontend: key.frontend, slot: key.slot }
}

/// Where SLOTS keeps the slot that holds a backend.
pub const fn member_key(frontend: u32, backend: u32) -> layout::SlotKey {
    layout::SlotKey { frontend: frontend | layout::MEMBER_BIT, slot: backend }
}

pub fn source_range_key(frontend: u32, net: IpNet) -> layout::SourceRangeKey {
    layout::SourceRangeKey::new(frontend, net.network().into(), bits(net))
}

/// `None` for a key that this agent does not write.
pub fn from_source_range_key(key: &layout::SourceRangeKey) -> Option<(u32, IpNet)> {
    Some((key.frontend(), net(key.addr(), key.bits())?))
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
