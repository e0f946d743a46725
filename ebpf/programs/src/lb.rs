//! From a Service's address to a backend: the one choice that sockets and packets share.

use keelway_layout::{
    AFFINITY_GROUP, Addr, Affinity, AffinityKey, Backend, CtEntry, CtKey, From, Frontend, FrontendKey, MEMBER_BIT,
    NO_SLOT, Port, Reason, SlotKey, SourceRangeKey, backend_flags, ct_flags, frontend_flags, node_flags, scope,
};

use crate::ct::{self, Flow, Way, lifetime};
use crate::dsr;
use crate::kernel::{lpm_get, random};
use crate::maps::{AFFINITY, BACKENDS, FRONTENDS, NODE, SLOTS, SOURCE_RANGES};
use crate::parse::{Packet, SCTP, TCP, UDP};

const SECOND: u64 = 1_000_000_000;
/// A service entry must not die before the flow that it leads to: it lives as the longest of them.
const LEASE: u64 = 8_000 * SECOND;
/// For how long the stack knows a datagram flow at the least (`nf_conntrack_udp_timeout`).
const STACK_UDP: u64 = 30 * SECOND;

/// Who dials.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// A process in the node's own network namespace.
    Host,
    /// A pod of this node.
    Pod,
    /// Anyone else, pods of other nodes too.
    Outside,
}

/// A backend and where it was found.
#[derive(Clone, Copy)]
pub struct Choice {
    pub backend: &'static Backend,
    pub id: u32,
    pub slot: u32,
}

#[inline(always)]
fn frontend(key: FrontendKey) -> Option<&'static Frontend> {
    // SAFETY: a frontend that is replaced meanwhile is read as the old or the new one, word by word.
    unsafe { FRONTENDS.get(key) }
}

/// The address that stands for all of the node's of a family.
#[inline(always)]
pub fn any_of_family(addr: &Addr) -> Addr {
    if addr.is_v4() { Addr::from_v4_word(0) } else { Addr::UNSPECIFIED }
}

/// Looks up what is dialled: `None` if it is no Service's, an entry that [`refuses`] if it is another port of a Service's address.
///
/// Nothing but a pointer, since Linux 6.1's verifier forgets what a tag in memory says of the pointer beside it.
#[inline(never)]
pub fn dial(addr: &Addr, port: Port, proto: u8, client: Client) -> Option<&'static Frontend> {
    if !matches!(proto, TCP | UDP | SCTP) {
        // A Service's address has nothing but ports: an echo request is refused like a port that nobody serves.
        return frontend(FrontendKey::new(*addr, Port::NONE, 0)).filter(|found| refuses(found));
    }
    // Who dials no address in particular dials itself.
    let addr = match (*addr == any_of_family(addr), addr.is_v4()) {
        (false, _) => addr,
        (true, true) => &Addr::LOOPBACK_V4,
        (true, false) => &Addr::LOOPBACK_V6,
    };
    let mut key = FrontendKey::new(*addr, port, proto);
    let mut found = frontend(key);
    if found.is_none() {
        let Some(other_port) = frontend(FrontendKey::new(*addr, Port::NONE, 0)) else { return None };
        if other_port.flags & frontend_flags::NODE_ADDRESS == 0 {
            return if refuses(other_port) { Some(other_port) } else { None };
        }
        if other_port.flags & frontend_flags::HOST_ONLY != 0 && client != Client::Host {
            return None;
        }
        key = FrontendKey::new(any_of_family(addr), port, proto);
        found = frontend(key);
    }
    if client == Client::Outside && found.is_some_and(|found| found.flags & frontend_flags::OUTSIDE_DIFFERS != 0) {
        found = frontend(key.seen_from(From::Outside));
    }
    found
}

/// Whether it stands for the ports of a Service's address that nobody serves.
#[inline(always)]
pub fn refuses(frontend: &Frontend) -> bool {
    frontend.flags & frontend_flags::REFUSE != 0
}

/// Whether a frontend without backends is as if it were not there: others have some, and nobody here may be behind it.
#[inline(always)]
pub fn drops_when_empty(frontend: &Frontend) -> bool {
    frontend.flags & frontend_flags::DROP_WHEN_EMPTY != 0
}

/// Whether the frontend serves a client with this address.
#[inline(always)]
pub fn serves(frontend: &Frontend, client: &Addr) -> bool {
    frontend.flags & frontend_flags::SOURCE_RANGES == 0
        || lpm_get(&SOURCE_RANGES, &SourceRangeKey::new(frontend.id, *client, 128)).is_some()
}

/// Whether the choice depends on who the client is.
#[inline(always)]
pub fn minds_client(frontend: &Frontend) -> bool {
    frontend.affinity_seconds != 0 || frontend.flags & frontend_flags::SOURCE_RANGES != 0
}

/// The backend in a slot, if the slot has one.
#[inline(always)]
pub fn in_slot(frontend: &Frontend, slot: u32) -> Option<Choice> {
    // SAFETY: the id is copied out at once; a backend never changes its address, and stays readable for this run of the program.
    unsafe {
        let id = *SLOTS.get(SlotKey { frontend: frontend.id, slot })?;
        let backend = BACKENDS.get(id)?;
        Some(Choice { backend, id, slot })
    }
}

/// The backend that a datagram socket keeps, for as long as the Service has it serving.
#[inline(always)]
pub fn kept_by_socket(frontend: &Frontend, backend: u32) -> Option<Choice> {
    if !is_member(frontend, backend) {
        return None;
    }
    // SAFETY: a backend never changes its address, and stays readable for this run of the program.
    unsafe { BACKENDS.get(backend) }.map(|found| Choice { backend: found, id: backend, slot: NO_SLOT })
}

/// A backend for a new flow: `seed` picks the slot.
#[inline(always)]
pub fn choose(frontend: &Frontend, seed: u32) -> Option<Choice> {
    // The table may shrink between the reads; slot 0 is the last to go.
    in_slot(frontend, seed % frontend.count.max(1)).or_else(|| in_slot(frontend, 0))
}

/// The number of the frontend's affinity group, and so of the entries that it shares.
#[inline(always)]
fn group_of(frontend: &Frontend) -> u32 {
    // SAFETY: copied out at once.
    let group = unsafe { SLOTS.get(SlotKey { frontend: frontend.id | MEMBER_BIT, slot: AFFINITY_GROUP }) };
    group.copied().unwrap_or(frontend.id)
}

#[inline(always)]
fn is_over(entry: &Affinity, frontend: &Frontend, now: u64) -> bool {
    now > entry.seen + u64::from(frontend.affinity_seconds) * SECOND
}

/// The slot of the backend that a client is to stay with, if it has one that still serves; else [`NO_SLOT`].
#[inline(always)]
pub fn kept_for(frontend: &Frontend, client: &Addr, now: u64) -> u32 {
    if frontend.affinity_seconds == 0 {
        return NO_SLOT;
    }
    let slot = kept_by(frontend, client, now, true);
    if slot == NO_SLOT { kept_by(frontend, client, now, false) } else { slot }
}

/// By the entry that the frontend shares with its group, or by one of its own.
#[inline(never)]
fn kept_by(frontend: &Frontend, client: &Addr, now: u64, shared: bool) -> u32 {
    let group = if shared { group_of(frontend) } else { frontend.id };
    let key = AffinityKey { client: *client, group, reserved: 0 };
    let Some(entry) = AFFINITY.get_ptr_mut(&key) else { return NO_SLOT };
    // SAFETY: found by this lookup; single words.
    let backend = unsafe { (*entry).backend };
    // SAFETY: as above.
    if is_over(unsafe { &*entry }, frontend, now) {
        return NO_SLOT;
    }
    // SAFETY: copied out at once.
    let member = unsafe { SLOTS.get(SlotKey { frontend: frontend.id | MEMBER_BIT, slot: backend }) };
    let Some(slot) = member.copied() else { return NO_SLOT };
    if in_slot(frontend, slot).is_none_or(|choice| choice.id != backend) {
        return NO_SLOT;
    }
    // SAFETY: as above.
    unsafe { (*entry).seen = now };
    slot
}

/// Remembers whom a client was given. What the frontend's group has for it stays if that only is not this frontend's to choose.
#[inline(never)]
pub fn keep_for(frontend: &Frontend, client: &Addr, backend: u32, now: u64) {
    if frontend.affinity_seconds == 0 {
        return;
    }
    let mut key = AffinityKey { client: *client, group: group_of(frontend), reserved: 0 };
    // SAFETY: read at once.
    if let Some(entry) = unsafe { AFFINITY.get(key) }
        && entry.backend != backend
        && !is_over(entry, frontend, now)
        // SAFETY: read at once.
        && unsafe { BACKENDS.get(entry.backend) }.is_some_and(|had| had.flags & backend_flags::DRAINING == 0)
    {
        key.group = frontend.id;
    }
    let _ = AFFINITY.insert(key, Affinity { seen: now, backend, reserved: 0 }, 0);
}

/// What becomes of a packet that was dialled to a Service.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was not.
    Other,
    /// Nobody is behind it.
    Refused,
    /// It goes to a backend.
    Translated,
}

/// Who asks for a backend, and the backend that it gets.
pub struct Asked {
    pub client: Client,
    /// The local pod's; 0 for other clients.
    pub incarnation: u32,
    /// Meaningful after [`Outcome::Translated`].
    pub backend: (Addr, Port),
    /// Then also: the packet is for the backend's node to translate.
    pub dsr: bool,
}

impl Asked {
    #[inline(always)]
    pub const fn by(client: Client, incarnation: u32) -> Self {
        Self { client, incarnation, backend: (Addr::UNSPECIFIED, Port::NONE), dsr: false }
    }
}

/// The backend of a flow that reached the packet path untranslated: the one it has, or a new one.
#[inline(never)]
pub fn for_packet(packet: &Packet, asked: &mut Asked, now: u64) -> Result<Outcome, Reason> {
    let tuple = &packet.tuple;
    let dialled = dial(&tuple.dst, tuple.dport, tuple.proto, asked.client);
    // Before the Service's present state counts: a connection lives on to its end where new ones are no longer let in, and where
    // there is no Service any more.
    if (dialled.is_some() || under_way(packet))
        && let Some(flow) = ct::find_of(tuple, scope::SERVICE, Way::Forward, asked.incarnation, now)
        && goes_on(packet, dialled, flow, asked, now)
    {
        if flow.entry().flags & ct_flags::STACK != 0 {
            flow.keep(now + if tuple.proto == UDP { STACK_UDP } else { LEASE });
            return Ok(Outcome::Other);
        }
        asked.dsr = flow.entry().flags & ct_flags::DSR != 0;
        flow.keep(now + lease(tuple.proto));
        return Ok(Outcome::Translated);
    }
    let Some(frontend) = dialled else { return Ok(Outcome::Other) };
    if asked.incarnation == 0 && under_way(packet) && adopting() {
        return Ok(Outcome::Other);
    }
    if is_own(packet, frontend, asked.client) {
        return Ok(Outcome::Other);
    }
    if refuses(frontend) {
        return Ok(Outcome::Refused);
    }
    if !serves(frontend, &tuple.src) {
        return Err(Reason::SourceRange);
    }
    if frontend.count == 0 {
        return if drops_when_empty(frontend) { Err(Reason::NoBackend) } else { Ok(Outcome::Refused) };
    }
    pick(packet, frontend, asked, now).map(|()| Outcome::Translated)
}

#[inline(always)]
fn lease(proto: u8) -> u64 {
    // A datagram flow that is quiet for as long is a new one, for every table.
    if proto == UDP { lifetime(UDP, ct_flags::REPLIED) } else { LEASE }
}

/// Whether a packet is of a connection that it does not open.
#[inline(always)]
fn under_way(packet: &Packet) -> bool {
    packet.tuple.proto != UDP && !packet.opens()
}

/// Whether a packet that nobody knows belongs to a connection that the node itself opened, from a port that is a Service's as well.
/// Where all nodes choose alike it may be another node's.
#[inline(always)]
fn is_own(packet: &Packet, frontend: &Frontend, client: Client) -> bool {
    client == Client::Outside
        && under_way(packet)
        && frontend.flags & (frontend_flags::NODE_PORT | frontend_flags::HASHED) == frontend_flags::NODE_PORT
}

#[inline(always)]
fn adopting() -> bool {
    NODE.get(0).is_some_and(|node| node.flags & node_flags::ADOPTING != 0)
}

/// Whether a known flow stays with the backend that it has, which it is then given.
#[inline(always)]
fn goes_on(packet: &Packet, dialled: Option<&Frontend>, flow: Flow, asked: &mut Asked, now: u64) -> bool {
    let entry = flow.entry();
    let datagram = packet.tuple.proto == UDP;
    if entry.flags & ct_flags::STACK != 0 && !datagram {
        // Whoever it was given to, its tracking knows; it begins nothing new.
        return under_way(packet);
    }
    let opens = !under_way(packet);
    if opens && entry.flags & ct_flags::DSR != 0 && !dsr::is_taken_by_node_of(&entry.nat_addr) {
        return false;
    }
    // SAFETY: read at once.
    let backend = unsafe { BACKENDS.get(entry.backend) };
    let stays = match backend.filter(|backend| backend.addr == entry.nat_addr && backend.port == entry.nat_port) {
        // It may be another Service's, and no longer this one's; and while this one has it serving, a flow may stay though new ones
        // go elsewhere.
        Some(_) if datagram => dialled.is_some_and(|frontend| {
            frontend.flags & (frontend_flags::INDEXED | frontend_flags::REFUSE) == 0
                || is_member(frontend, entry.backend)
        }),
        Some(backend) => backend.flags & backend_flags::DRAINING == 0 || !opens,
        // It left the Service altogether. A connection is for its two ends to end; nobody else knows it.
        None => !opens,
    };
    if !stays {
        return false;
    }
    asked.backend = (entry.nat_addr, entry.nat_port);
    // A port that a client takes again begins a new connection. One that nobody has answered yet asks on where it asked.
    datagram || !opens || is_up(&packet.tuple, &asked.backend, asked.incarnation, now)
}

/// Whether a frontend with an index has the backend, in a slot or for the flows that it has.
#[inline(always)]
fn is_member(frontend: &Frontend, backend: u32) -> bool {
    // SAFETY: only asked whether it is there.
    unsafe { SLOTS.get(SlotKey { frontend: frontend.id | MEMBER_BIT, slot: backend }) }.is_some()
}

/// Picks a backend for a new flow and remembers it.
#[inline(never)]
fn pick(packet: &Packet, frontend: &Frontend, asked: &mut Asked, now: u64) -> Result<(), Reason> {
    let tuple = &packet.tuple;
    let kept = kept_for(frontend, &tuple.src, now);
    let start = if frontend.flags & frontend_flags::HASHED != 0 { hash(tuple) } else { random() };
    // One backend behind two frontends would give two connections of one client the same translated flow.
    for attempt in 0..4 {
        let seed = if kept == NO_SLOT { start.wrapping_add(attempt) } else { kept };
        let choice = choose(frontend, seed).ok_or(Reason::NoBackend)?;
        asked.backend = (choice.backend.addr, choice.backend.port);
        // A datagram flow rather takes over another's ports than to have no backend: that one has most likely ended unseen.
        let last = attempt == 3 || kept != NO_SLOT;
        if (last && tuple.proto == UDP) || !taken(tuple, &asked.backend, asked.incarnation, now) {
            keep_for(frontend, &tuple.src, choice.id, now);
            asked.dsr = asked.client == Client::Outside && dsr::applies(tuple, &asked.backend.0);
            return remember(tuple, asked, choice.id, now);
        }
        if kept != NO_SLOT {
            break;
        }
    }
    Err(Reason::NatExhausted)
}

#[inline(never)]
fn remember(tuple: &CtKey, asked: &Asked, backend: u32, now: u64) -> Result<(), Reason> {
    let draft = ct::draft(tuple, scope::SERVICE)?;
    let entry = &mut draft.entry;
    entry.expires = now + lease(tuple.proto);
    entry.nat_addr = asked.backend.0;
    entry.nat_port = asked.backend.1;
    entry.backend = backend;
    entry.flags = if asked.dsr { ct_flags::DSR } else { 0 };
    entry.incarnation = asked.incarnation;
    ct::insert(&draft.key, &draft.entry)
}

/// Of the flow, the same on every node.
#[inline(always)]
fn hash(tuple: &CtKey) -> u32 {
    let (src, dst) = (tuple.src.words(), tuple.dst.words());
    let ports = u32::from(tuple.sport.be()) << 16 | u32::from(tuple.dport.be());
    let words = [src[0], src[1], src[2], src[3], dst[0], dst[1], dst[2], dst[3], ports, tuple.proto.into()];
    let mut hash = 0x811c_9dc5_u32;
    let mut i = 0;
    while i < words.len() {
        // Murmur3's mixing, a word at a time.
        let mut word = words[i].wrapping_mul(0xcc9e_2d51);
        word = word.rotate_left(15).wrapping_mul(0x1b87_3593);
        hash = (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
        i += 1;
    }
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// Whether the client's flow to that backend is already one that was dialled otherwise.
#[inline(never)]
fn taken(tuple: &CtKey, backend: &(Addr, Port), incarnation: u32, now: u64) -> bool {
    let Some(flow) = translated(tuple, backend, incarnation, now) else { return false };
    let here = flow.flags & ct_flags::TRANSLATED != 0 && (flow.nat_addr, flow.nat_port) == (tuple.dst, tuple.dport);
    !here && !ct::is_over(flow, tuple.proto, now)
}

/// Whether the client's flow to that backend has not ended.
#[inline(never)]
fn is_up(tuple: &CtKey, backend: &(Addr, Port), incarnation: u32, now: u64) -> bool {
    translated(tuple, backend, incarnation, now).is_some_and(|flow| !ct::is_over(flow, tuple.proto, now))
}

/// The client's flow to that backend, whatever was dialled.
#[inline(always)]
fn translated(tuple: &CtKey, backend: &(Addr, Port), incarnation: u32, now: u64) -> Option<&'static CtEntry> {
    let scope = if incarnation == 0 { scope::LB } else { scope::OUT };
    let draft = ct::draft_key(tuple, scope).ok()?;
    if incarnation != 0 && backend.0 == tuple.src {
        draft.key.scope = scope::HAIRPIN;
        draft.key.src = crate::pod::itself(!backend.0.is_v4());
    }
    draft.key.dst = backend.0;
    draft.key.dport = backend.1;
    ct::find_drafted(draft, incarnation, now).map(Flow::entry)
}
