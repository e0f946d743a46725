//! The table of flows: what is known of a packet's flow, and how long it stays known.

use keelway_layout::{Addr, CtEntry, CtKey, Endpoint, NodeState, Port, Reason, ct_flags};

use crate::claim;
use crate::maps::{CONNTRACK, DRAFT, STATE};
use crate::parse::{FIN, Packet, RST, SCTP, TCP, UDP};

const SECOND: u64 = 1_000_000_000;

/// Which way a packet goes in its flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As the packet that opened it.
    Forward,
    /// Back.
    Reverse,
}

/// A live entry. The kernel's programs on other CPUs write to it too; each word is read and written whole.
#[derive(Clone, Copy)]
pub struct Flow(&'static CtEntry, *mut CtEntry);

impl Flow {
    /// What is remembered of it.
    #[inline(always)]
    pub fn entry(self) -> &'static CtEntry {
        self.0
    }

    /// The frontend that its opener dialled.
    #[inline(always)]
    pub fn dialled(self) -> Option<(Addr, Port)> {
        (self.0.flags & ct_flags::TRANSLATED != 0).then_some((self.0.nat_addr, self.0.nat_port))
    }

    /// See [`is_over`].
    #[inline(always)]
    pub fn is_over(self, proto: u8, now: u64) -> bool {
        is_over(self.0, proto, now)
    }

    /// Records that the flow was admitted under today's rules.
    #[inline(always)]
    pub fn admitted(self, endpoint: &Endpoint, peer: u32, rule: u32) {
        // SAFETY: made from a lookup of this run of the program; single words.
        unsafe {
            (*self.1).policy_generation = endpoint.policy_generation;
            (*self.1).epoch = epoch();
            (*self.1).peer = peer;
            (*self.1).rule = rule;
        }
    }

    /// Keeps the entry until `expires`.
    #[inline(always)]
    pub fn keep(self, expires: u64) {
        if expires > self.0.expires + SECOND {
            // SAFETY: as above.
            unsafe { (*self.1).expires = expires };
        }
    }

    /// Keeps the flow alive.
    #[inline(always)]
    pub fn touch(self, packet: &Packet, way: Way, now: u64) {
        let before = self.0.flags;
        let flags = next_flags(before, packet, way);
        let expires = now + lifetime(packet.tuple.proto, flags);
        // Writing at every packet would bounce the line between CPUs for nothing.
        if flags != before || expires > self.0.expires + SECOND {
            // SAFETY: as above.
            unsafe {
                (*self.1).flags = flags;
                (*self.1).expires = expires;
            }
        }
    }
}

/// Whether a flow's ports are free for another: both sides have ended it, or, where there is no end to see, it is quiet. A client's
/// port is one socket's, so that one that dials elsewhere is most likely a new one.
#[inline(always)]
pub fn is_over(entry: &CtEntry, proto: u8, now: u64) -> bool {
    const CLOSED: u32 = ct_flags::FIN_FORWARD | ct_flags::FIN_REVERSE;
    const QUIET: u64 = 2 * SECOND;
    if matches!(proto, TCP | SCTP) {
        return entry.flags & ct_flags::RESET != 0 || entry.flags & CLOSED == CLOSED;
    }
    now + lifetime(proto, entry.flags) > entry.expires + QUIET
}

/// The value that flows are admitted under, beside their endpoint's generation.
#[inline(always)]
pub fn epoch() -> u32 {
    STATE.get(0).map_or(0, |state: &NodeState| state.epoch)
}

#[inline(always)]
fn next_flags(flags: u32, packet: &Packet, way: Way) -> u32 {
    let mut flags = flags;
    let forward = way == Way::Forward;
    if packet.opens() && forward {
        flags &= !(ct_flags::FIN_FORWARD | ct_flags::FIN_REVERSE | ct_flags::RESET);
    }
    if packet.flags & FIN != 0 {
        flags |= if forward { ct_flags::FIN_FORWARD } else { ct_flags::FIN_REVERSE };
    }
    if packet.flags & RST != 0 {
        flags |= ct_flags::RESET;
    }
    if forward { flags } else { flags | ct_flags::REPLIED }
}

/// Nanoseconds that a flow is remembered after its last packet.
#[inline(always)]
pub fn lifetime(proto: u8, flags: u32) -> u64 {
    const CLOSED: u32 = ct_flags::FIN_FORWARD | ct_flags::FIN_REVERSE;
    let replied = flags & ct_flags::REPLIED != 0;
    SECOND
        * match proto {
            TCP | SCTP if flags & ct_flags::RESET != 0 || flags & CLOSED == CLOSED => 10,
            // Linux probes an idle connection after tcp_keepalive_time, two hours, at the earliest.
            TCP if replied => 8_000,
            TCP => 60,
            UDP if replied => 180,
            // A heartbeat comes every 30 seconds (RFC 9260 section 16), and some may be lost.
            SCTP if replied => 300,
            _ => 30,
        }
}

/// The live flow of a tuple in a scope: as it stands, or of the packet that it answers.
#[inline(never)]
pub fn find(tuple: &CtKey, scope: u8, way: Way, incarnation: u32, now: u64) -> Option<&'static mut CtEntry> {
    let key = if way == Way::Reverse { tuple.reversed(scope) } else { CtKey { scope, ..*tuple } };
    // SAFETY: found by this lookup; see [`Flow`] for who else writes.
    let entry = unsafe { &mut *CONNTRACK.get_ptr_mut(&key)? };
    (entry.expires > now && entry.incarnation == incarnation).then_some(entry)
}

/// The live flow of a key that is kept elsewhere than on the stack, of which there is little.
#[inline(always)]
pub fn find_drafted(draft: &Draft, incarnation: u32, now: u64) -> Option<Flow> {
    let entry: *mut CtEntry = CONNTRACK.get_ptr_mut(&draft.key)?;
    // SAFETY: found by this lookup; see [`Flow`] for who else writes.
    let found = unsafe { &*entry };
    (found.expires > now && found.incarnation == incarnation).then_some(Flow(found, entry))
}

/// As [`find`], as a [`Flow`].
#[inline(always)]
pub fn find_of(tuple: &CtKey, scope: u8, way: Way, incarnation: u32, now: u64) -> Option<Flow> {
    let entry: *mut CtEntry = find(tuple, scope, way, incarnation, now)?;
    // SAFETY: as above.
    Some(Flow(unsafe { &*entry }, entry))
}

/// The live flow of a pod's packet, if it was opened by or to this very owner of the address.
#[inline(always)]
pub fn find_for(tuple: &CtKey, scope: u8, way: Way, endpoint: &Endpoint, now: u64) -> Option<Flow> {
    find_of(tuple, scope, way, endpoint.incarnation, now)
}

/// Remembers a flow that was admitted just now. `dialled` is the frontend that its opener dialled.
#[inline(never)]
pub fn open(packet: &Packet, scope: u8, endpoint: &Endpoint, admitted: &Admission, now: u64) -> Result<(), Reason> {
    let flags = next_flags(0, packet, Way::Forward);
    let dialled = !admitted.dialled.0.is_unspecified();
    let draft = draft(&packet.tuple, scope)?;
    let entry = &mut draft.entry;
    entry.incarnation = endpoint.incarnation;
    entry.policy_generation = endpoint.policy_generation;
    entry.epoch = epoch();
    entry.peer = admitted.peer;
    entry.rule = admitted.rule;
    entry.nat_addr = admitted.dialled.0;
    entry.nat_port = admitted.dialled.1;
    entry.flags = if dialled { flags | ct_flags::TRANSLATED } else { flags };
    entry.expires = now + lifetime(packet.tuple.proto, flags);
    insert(&draft.key, &draft.entry)
}

/// An entry in the making.
pub struct Draft {
    pub key: CtKey,
    pub entry: CtEntry,
}

/// An empty entry for `tuple` in `scope`. There is one on each CPU: it is to be written before another is asked for.
#[inline(always)]
pub fn draft(tuple: &CtKey, scope: u8) -> Result<&'static mut Draft, Reason> {
    let draft = draft_key(tuple, scope)?;
    draft.entry = CtEntry::default();
    Ok(draft)
}

/// As [`draft`], to look something up: what is in the entry is nobody's.
#[inline(always)]
pub fn draft_key(tuple: &CtKey, scope: u8) -> Result<&'static mut Draft, Reason> {
    let draft = DRAFT.get_ptr_mut(0).ok_or(Reason::Helper)?;
    // SAFETY: a per-CPU value, and no two tc programs run on one CPU at a time (softirqs are off around each).
    let draft = unsafe { &mut *draft };
    draft.key = *tuple;
    draft.key.scope = scope;
    Ok(draft)
}

/// Remembers the frontend behind a translated flow, in a scope that keeps nothing else.
#[inline(never)]
pub fn open_dialled(
    packet: &Packet,
    scope: u8,
    incarnation: u32,
    dialled: &(Addr, Port),
    now: u64,
) -> Result<(), Reason> {
    let draft = draft(&packet.tuple, scope)?;
    let entry = &mut draft.entry;
    entry.expires = now + lifetime(packet.tuple.proto, 0);
    entry.nat_addr = dialled.0;
    entry.nat_port = dialled.1;
    entry.flags = ct_flags::TRANSLATED;
    entry.incarnation = incarnation;
    insert(&draft.key, &draft.entry)
}

/// What is to be remembered of the admission of a flow.
#[derive(Default)]
pub struct Admission {
    pub peer: u32,
    pub rule: u32,
    /// The frontend that was dialled; unspecified without.
    pub dialled: (Addr, Port),
}

/// Writes an entry: a new one, or in place of one that the caller found to be past its time or another's.
#[inline(never)]
pub fn insert(key: &CtKey, entry: &CtEntry) -> Result<(), Reason> {
    const BPF_NOEXIST: u64 = 1;
    if CONNTRACK.insert(key, entry, BPF_NOEXIST).is_ok() {
        return Ok(());
    }
    // The sweep may be about to remove what is there, and would remove this instead.
    if !claim::take(key) {
        return Err(Reason::FlowTableFull);
    }
    let done = CONNTRACK.insert(key, entry, 0);
    claim::release(key);
    done.map_err(|_| Reason::FlowTableFull)
}

/// Forgets a flow.
#[inline(never)]
pub fn forget(tuple: &CtKey, scope: u8, way: Way) {
    let key = if way == Way::Reverse { tuple.reversed(scope) } else { CtKey { scope, ..*tuple } };
    let _ = CONNTRACK.remove(key);
}
