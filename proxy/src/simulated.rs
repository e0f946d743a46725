//! The kernel's Service tables in memory, with the datapath's look-up.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::op::{AFFINITY_GROUP, Backend, Dump, Frontend, FrontendKey, NO_SLOT, Op, Origin, SlotKey, flags};
use crate::put::UDP;

/// Where a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// A process in this node's own network namespace.
    Host,
    /// A pod of this node.
    Pod,
    /// Anywhere else.
    Outside,
}

/// What a client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Packet {
    /// Where the client is.
    pub place: Place,
    /// Its address.
    pub client: IpAddr,
    /// The address dialled.
    pub addr: IpAddr,
    /// The port dialled, host byte order.
    pub port: u16,
    /// IANA protocol number.
    pub proto: u8,
}

/// What a packet or a connect meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not an address of a Service: left alone.
    NotAService,
    /// Refused at once: ECONNREFUSED, or an ICMP port unreachable.
    Refuse,
    /// Dropped: endpoints exist, but not where the traffic policy looks.
    Drop,
    /// Dropped: the client is in none of the source ranges.
    Forbidden,
    /// Goes to a backend.
    Forward(Forward),
}

/// See [`Verdict::Forward`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// To one of these.
    pub backends: BTreeSet<Backend>,
    /// And for so long always to the same; 0 without.
    pub affinity_seconds: u32,
    /// Under the client's own address.
    pub keep_source: bool,
}

/// The maps. Fields are public so that a test can break them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Simulated {
    /// FRONTENDS.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// SLOTS.
    pub slots: BTreeMap<SlotKey, u32>,
    /// BACKENDS, with whether each is draining.
    pub backends: BTreeMap<u32, (Backend, bool)>,
    /// Frontend id and backend id to slot.
    pub members: BTreeMap<(u32, u32), u32>,
    /// SOURCE_RANGES.
    pub source_ranges: BTreeSet<(u32, IpNet)>,
}

impl Simulated {
    /// Executes one write.
    pub fn execute(&mut self, op: &Op) {
        match *op {
            Op::PutBackend { id, backend, draining } => _ = self.backends.insert(id, (backend, draining)),
            Op::PutSlot { key, backend } => _ = self.slots.insert(key, backend),
            Op::PutMember { frontend, backend, slot } => _ = self.members.insert((frontend, backend), slot),
            Op::PutSourceRange { frontend, net } => _ = self.source_ranges.insert((frontend, net)),
            Op::PutFrontend { key, frontend } => _ = self.frontends.insert(key, frontend),
            Op::DeleteFrontend { key } => _ = self.frontends.remove(&key),
            Op::DeleteSourceRange { frontend, net } => _ = self.source_ranges.remove(&(frontend, net)),
            Op::DeleteMember { frontend, backend } => _ = self.members.remove(&(frontend, backend)),
            Op::DeleteSlot { key } => _ = self.slots.remove(&key),
            Op::DeleteBackend { id } => _ = self.backends.remove(&id),
        }
    }

    /// All entries.
    pub fn dump(&self) -> Dump {
        Dump {
            frontends: self.frontends.iter().map(|(k, v)| (*k, *v)).collect(),
            slots: self.slots.iter().map(|(k, v)| (*k, *v)).collect(),
            backends: self.backends.iter().map(|(id, (backend, draining))| (*id, *backend, *draining)).collect(),
            members: self.members.iter().map(|(k, v)| (*k, *v)).collect(),
            source_ranges: self.source_ranges.iter().copied().collect(),
        }
    }

    /// Whether the datapath lets a datagram flow of these clients to this address stay with a backend.
    pub fn keeps(&self, packet: &Packet, backend: &Backend) -> Result<bool, String> {
        let Ok((_, frontend)) = self.frontend(packet)? else { return Ok(false) };
        let is_it = |id: &u32| self.backends.get(id).is_some_and(|(found, _)| found == backend);
        Ok(self.members.keys().any(|(id, member)| *id == frontend.id && is_it(member)))
    }

    /// Every backend that the datapath could pick. The error names the entry that it would miss.
    pub fn verdict(&self, packet: &Packet) -> Result<Verdict, String> {
        let found = match self.frontend(packet)? {
            Ok(found) => found,
            Err(verdict) => return Ok(verdict),
        };
        let (key, frontend) = found;
        let admitted = |(id, net): &(u32, IpNet)| *id == frontend.id && net.contains(&packet.client.to_canonical());
        if frontend.flags & flags::SOURCE_RANGES != 0 && !self.source_ranges.iter().any(admitted) {
            return Ok(Verdict::Forbidden);
        }
        if frontend.count == 0 {
            let drop = frontend.flags & flags::DROP_WHEN_EMPTY != 0;
            return Ok(if drop { Verdict::Drop } else { Verdict::Refuse });
        }
        let mut backends = BTreeSet::new();
        for slot in 0..frontend.count {
            let id = self.slots.get(&SlotKey { frontend: frontend.id, slot });
            let id = id.ok_or_else(|| format!("frontend {key} (id {}) has no slot {slot}", frontend.id))?;
            let (backend, draining) =
                self.backends.get(id).ok_or_else(|| format!("slot {slot} of {key} names no backend: {id}"))?;
            if *draining {
                return Err(format!("slot {slot} of {key} names a draining backend: {id}"));
            }
            backends.insert(*backend);
        }
        let keep_source = frontend.flags & flags::KEEP_SOURCE != 0;
        Ok(Verdict::Forward(Forward { backends, affinity_seconds: frontend.affinity_seconds, keep_source }))
    }

    /// The entry that decides, or what is decided without one.
    fn frontend(&self, packet: &Packet) -> Result<Result<(FrontendKey, Frontend), Verdict>, String> {
        // To dial the unspecified address is to dial oneself; in FRONTENDS it stands for node ports.
        let addr = match packet.addr.to_canonical() {
            IpAddr::V4(addr) if addr.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(addr) if addr.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            addr => addr,
        };
        let mut key = FrontendKey { addr, port: packet.port, proto: packet.proto, from: Origin::Anyone };
        let mut entry = self.frontends.get(&key);
        if entry.is_none() {
            let flags = self.frontends.get(&FrontendKey::any_port(addr)).map_or(0, |any| any.flags);
            if flags & flags::NODE_ADDRESS == 0 {
                let refuse = flags & flags::ANY_PORT != 0;
                return Ok(Err(if refuse { Verdict::Refuse } else { Verdict::NotAService }));
            }
            if flags & flags::HOST_ONLY == 0 || packet.place == Place::Host {
                let any: IpAddr =
                    if addr.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
                key = FrontendKey { addr: any, ..key };
                entry = self.frontends.get(&key);
            }
        }
        let Some(mut frontend) = entry else { return Ok(Err(Verdict::NotAService)) };
        if frontend.flags & flags::OUTSIDE_DIFFERS != 0 && packet.place == Place::Outside {
            key = key.seen_from(Origin::Outside);
            frontend = self.frontends.get(&key).ok_or_else(|| format!("frontend {key} is missing"))?;
        }
        Ok(Ok((key, *frontend)))
    }

    /// What holds once all writes of a change are done: nothing is there that nothing names, and every member entry is right.
    pub fn check(&self) -> Result<(), String> {
        let by_id: BTreeMap<u32, &Frontend> = self.frontends.values().map(|f| (f.id, f)).collect();
        let named: BTreeSet<u32> = self.slots.values().copied().collect();
        for (key, backend) in &self.slots {
            let frontend = by_id.get(&key.frontend).filter(|f| key.slot < f.count);
            let frontend = frontend.ok_or_else(|| format!("{key:?} belongs to no frontend"))?;
            let member = self.members.get(&(key.frontend, *backend));
            if member.is_some() != (frontend.flags & flags::INDEXED != 0) {
                return Err(format!("{key:?} of {backend} has the member entry {member:?}: {frontend:?}"));
            }
        }
        let grouped = |id: &u32| self.members.contains_key(&(*id, AFFINITY_GROUP));
        if let Some((key, _)) = self.frontends.iter().find(|(_, f)| (f.affinity_seconds > 0) != grouped(&f.id)) {
            return Err(format!("{key} is of no affinity group, or of one in spite of having none"));
        }
        for ((frontend, backend), slot) in &self.members {
            if *backend == AFFINITY_GROUP {
                continue;
            }
            if *slot == NO_SLOT {
                let is_datagrams = self.backends.get(backend).is_some_and(|(backend, _)| backend.proto == UDP);
                let in_slot = |key: &SlotKey| key.frontend == *frontend && self.slots[key] == *backend;
                if !is_datagrams || !by_id.contains_key(frontend) || self.slots.keys().any(in_slot) {
                    return Err(format!("member {backend} of frontend {frontend} is in no slot"));
                }
                continue;
            }
            if self.slots.get(&SlotKey { frontend: *frontend, slot: *slot }) != Some(backend) {
                return Err(format!("member {backend} of frontend {frontend} is not in slot {slot}"));
            }
        }
        for (id, (backend, draining)) in &self.backends {
            if *draining == named.contains(id) {
                return Err(format!("backend {id}, {backend}: draining is {draining}"));
            }
        }
        for (id, net) in &self.source_ranges {
            if by_id.get(id).is_none_or(|f| f.flags & flags::SOURCE_RANGES == 0) {
                return Err(format!("{net} belongs to no restricted frontend: {id}"));
            }
        }
        let outside = self.frontends.keys().filter(|key| key.from == Origin::Outside);
        for key in outside {
            let anyone = self.frontends.get(&key.seen_from(Origin::Anyone));
            if anyone.is_none_or(|f| f.flags & flags::OUTSIDE_DIFFERS == 0) {
                return Err(format!("nothing leads to {key}"));
            }
        }
        Ok(())
    }
}
