//! The kernel's Service tables in memory, with the datapath's look-up.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::op::{Backend, Dump, Frontend, FrontendKey, Op, SlotKey, flags};

/// What a packet or a connect meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not an address of a Service: left alone.
    NotAService,
    /// Refused at once: ECONNREFUSED, or an ICMP port unreachable.
    Refuse,
    /// Dropped: endpoints exist, but not where the traffic policy looks.
    Drop,
    /// Goes to one of these.
    Backends(BTreeSet<Backend>),
}

/// The maps. Fields are public so that a test can break them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Simulated {
    /// FRONTENDS.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// SLOTS.
    pub slots: BTreeMap<SlotKey, u32>,
    /// BACKENDS.
    pub backends: BTreeMap<u32, Backend>,
    /// REVNAT.
    pub revnat: BTreeMap<u32, FrontendKey>,
}

impl Simulated {
    /// Executes one write.
    pub fn execute(&mut self, op: &Op) {
        match *op {
            Op::PutBackend { id, backend } => {
                self.backends.insert(id, backend);
            }
            Op::PutSlot { key, backend } => {
                self.slots.insert(key, backend);
            }
            Op::PutRevNat { frontend, key } => {
                self.revnat.insert(frontend, key);
            }
            Op::PutFrontend { key, frontend } => {
                self.frontends.insert(key, frontend);
            }
            Op::DeleteFrontend { key } => {
                self.frontends.remove(&key);
            }
            Op::DeleteRevNat { frontend } => {
                self.revnat.remove(&frontend);
            }
            Op::DeleteSlot { key } => {
                self.slots.remove(&key);
            }
            Op::DeleteBackend { id } => {
                self.backends.remove(&id);
            }
        }
    }

    /// All entries.
    pub fn dump(&self) -> Dump {
        Dump {
            frontends: self.frontends.iter().map(|(k, v)| (*k, *v)).collect(),
            slots: self.slots.iter().map(|(k, v)| (*k, *v)).collect(),
            backends: self.backends.iter().map(|(k, v)| (*k, *v)).collect(),
            revnat: self.revnat.iter().map(|(k, v)| (*k, *v)).collect(),
        }
    }

    /// Every backend that the datapath could pick. The error names the entry that it would miss.
    pub fn verdict(&self, addr: IpAddr, port: u16, proto: u8) -> Result<Verdict, String> {
        let addr = addr.to_canonical();
        let key = FrontendKey { addr, port, proto };
        let Some(frontend) = self.frontends.get(&key) else {
            let other_port = self.frontends.contains_key(&FrontendKey::any_port(addr));
            return Ok(if other_port { Verdict::Refuse } else { Verdict::NotAService });
        };
        if frontend.count == 0 {
            let drop = frontend.flags & flags::DROP_WHEN_EMPTY != 0;
            return Ok(if drop { Verdict::Drop } else { Verdict::Refuse });
        }
        if self.revnat.get(&frontend.id) != Some(&key) {
            return Err(format!("frontend {key} (id {}) has no reverse entry of its own", frontend.id));
        }
        let mut backends = BTreeSet::new();
        for slot in 0..frontend.count {
            let id = self.slots.get(&SlotKey { frontend: frontend.id, slot });
            let id = id.ok_or_else(|| format!("frontend {key} (id {}) has no slot {slot}", frontend.id))?;
            let backend =
                self.backends.get(id).ok_or_else(|| format!("slot {slot} of {key} names no backend: {id}"))?;
            backends.insert(*backend);
        }
        Ok(Verdict::Backends(backends))
    }
}
