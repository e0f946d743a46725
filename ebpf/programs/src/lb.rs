//! From a Service's address to a backend: the one choice that sockets and packets share.

use keelway_layout::{
    Addr, Backend, CtEntry, CtKey, Endpoint, Frontend, FrontendKey, Port, Reason, SlotKey, frontend_flags, scope,
};

use crate::ct::{self, Way};
use crate::kernel::random;
use crate::maps::{BACKENDS, FRONTENDS, SLOTS};
use crate::parse::{SCTP, TCP, UDP};

/// A service entry must not die before the flow that it leads to: it lives as the longest of them.
const LEASE: u64 = 8_000 * 1_000_000_000;

/// What a dialled address turns out to be.
pub enum Dial {
    /// No Service's.
    Other,
    /// A Service's, and nobody is behind it.
    Refused,
    /// A Service's, and nobody here may be behind it: as if it were not there.
    Dropped,
    /// A Service's.
    Service(&'static Frontend),
}

/// A backend and where it was found.
#[derive(Clone, Copy)]
pub struct Choice {
    pub backend: Backend,
    pub id: u32,
    pub slot: u32,
}

/// Looks up what is dialled.
#[inline(always)]
pub fn dial(addr: Addr, port: Port, proto: u8) -> Dial {
    if !matches!(proto, TCP | UDP | SCTP) {
        return Dial::Other;
    }
    // SAFETY: a frontend that is replaced meanwhile is read as the old or the new one, word by word.
    if let Some(frontend) = unsafe { FRONTENDS.get(FrontendKey::new(addr, port, proto)) } {
        return match frontend.count {
            0 if frontend.flags & frontend_flags::DROP_WHEN_EMPTY != 0 => Dial::Dropped,
            0 => Dial::Refused,
            _ => Dial::Service(frontend),
        };
    }
    // SAFETY: as above.
    match unsafe { FRONTENDS.get(FrontendKey::new(addr, Port::NONE, 0)) } {
        Some(frontend) if frontend.flags & frontend_flags::REFUSE != 0 => Dial::Refused,
        _ => Dial::Other,
    }
}

/// The backend in a slot, if the slot has one.
#[inline(always)]
pub fn in_slot(frontend: &Frontend, slot: u32) -> Option<Choice> {
    // SAFETY: both values are copied out at once.
    unsafe {
        let id = *SLOTS.get(SlotKey { frontend: frontend.id, slot })?;
        let backend = *BACKENDS.get(id)?;
        Some(Choice { backend, id, slot })
    }
}

/// A backend at random.
#[inline(always)]
pub fn choose(frontend: &Frontend) -> Option<Choice> {
    // The table may shrink between the reads; slot 0 is the last to go.
    in_slot(frontend, random() % frontend.count.max(1)).or_else(|| in_slot(frontend, 0))
}

/// The backend of a flow that reached the packet path untranslated: the one it has, or a new one.
///
/// `into` receives its address and port.
#[inline(never)]
pub fn for_packet(
    tuple: &CtKey,
    frontend: &Frontend,
    endpoint: &Endpoint,
    now: u64,
    into: &mut (Addr, Port),
) -> Result<(), Reason> {
    if let Some(flow) = ct::find_for(tuple, scope::SERVICE, Way::Forward, endpoint, now) {
        let entry = flow.entry();
        // SAFETY: read at once.
        if let Some(backend) = unsafe { BACKENDS.get(entry.backend) }
            && backend.addr == entry.nat_addr
            && backend.port == entry.nat_port
        {
            *into = (backend.addr, backend.port);
            flow.keep(now + LEASE);
            return Ok(());
        }
    }
    // One backend behind two frontends would give two connections of one client the same translated flow.
    let start = random();
    for attempt in 0..4 {
        let slot = start.wrapping_add(attempt) % frontend.count.max(1);
        let choice = in_slot(frontend, slot).or_else(|| in_slot(frontend, 0)).ok_or(Reason::NoBackend)?;
        *into = (choice.backend.addr, choice.backend.port);
        if !taken(tuple, into, endpoint, now) {
            let entry = CtEntry {
                expires: now + LEASE,
                nat_addr: into.0,
                nat_port: into.1,
                backend: choice.id,
                incarnation: endpoint.incarnation,
                ..CtEntry::default()
            };
            return ct::insert(&CtKey { scope: scope::SERVICE, ..*tuple }, &entry);
        }
    }
    Err(Reason::NatExhausted)
}

/// Whether the pod's flow to that backend is already one that was dialled otherwise.
#[inline(never)]
fn taken(tuple: &CtKey, backend: &(Addr, Port), endpoint: &Endpoint, now: u64) -> bool {
    let translated = CtKey { dst: backend.0, dport: backend.1, ..*tuple };
    ct::find_for(&translated, scope::OUT, Way::Forward, endpoint, now)
        .is_some_and(|flow| !flow.is_over() && flow.dialled() != Some((tuple.dst, tuple.dport)))
}
