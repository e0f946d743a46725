//! The writes that make one frontend what it is to be.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use ipnet::IpNet;

use crate::frontends::{AffinityGroup, Choice, Wanted};
use crate::ids;
use crate::maglev;
use crate::model::Protocol;
use crate::op::{AFFINITY_GROUP, Backend, Frontend, FrontendKey, NO_SLOT, Op, Origin, SlotKey, flags};
use crate::slots::{Fill, fill};
use crate::tables::{BackendState, GroupState, State, Tables};

/// A change's writes in three parts: what grows or changes in place comes first, what shrinks next, what goes last. A
/// Service that moves from one frontend to another is never without.
#[derive(Default)]
pub(crate) struct Phases {
    pub grown: Vec<Op>,
    pub shrunk: Vec<Op>,
    pub gone: Vec<Op>,
}

impl Phases {
    pub fn append_to(mut self, ops: &mut Vec<Op>) {
        ops.append(&mut self.grown);
        ops.append(&mut self.shrunk);
        ops.append(&mut self.gone);
    }
}

impl Tables {
    /// Both entries of a frontend. That for clients outside is there before the other leads to it, and for as long.
    pub(crate) fn put(&mut self, key: FrontendKey, wanted: &Wanted, passes: bool, phases: &mut Phases) {
        for (key, choice) in Self::entries(&key, wanted) {
            self.put_entry(key, choice, wanted, passes, phases);
        }
        if wanted.outside.is_none() {
            self.remove_entry(&key.seen_from(Origin::Outside), &mut phases.gone);
        }
    }

    fn put_entry(&mut self, key: FrontendKey, choice: &Choice, wanted: &Wanted, passes: bool, phases: &mut Phases) {
        let draining = self.draining(&key, choice, wanted);
        let ids: Vec<u32> = choice.backends.iter().map(|b| self.backend_id(*b, &mut phases.grown)).collect();
        let known = self.frontends.remove(&key);
        let anew = known.as_ref().is_some_and(|old| self.starts_anew(old, choice, passes));
        let (old, retired) = if anew { (None, known) } else { (known, None) };
        let old_value = old.as_ref().map(|old| old.value);
        let id = match old_value {
            Some(value) => value.id,
            None if key.is_any_port() => 0,
            None => self.frontend_ids.next(),
        };
        let group = wanted.affinity_group.clone();
        let group_number = group.as_ref().map(|group| self.group_number(group));
        let new = old.is_none();
        let old = old.unwrap_or_else(|| State {
            value: Frontend { id, count: 0, affinity_seconds: 0, flags: 0 },
            slots: Vec::new(),
            members: BTreeMap::new(),
            group: None,
            ranges: Vec::new(),
            draining: Vec::new(),
            computed: false,
        });

        let Fill { slots, written, moved } = self.fill(&old, choice, &ids);
        let indexed = is_indexed(&key, wanted);
        let mut members = if indexed { members(&slots, &old) } else { BTreeMap::new() };
        if key.proto == UDP {
            members.extend(draining.iter().map(|id| (*id, NO_SLOT)));
        }
        members.extend(group_number.map(|number| (AFFINITY_GROUP, number)));
        let flags = if indexed { choice.flags | flags::INDEXED } else { choice.flags };
        let value = Frontend { id, count: slots.len() as u32, affinity_seconds: wanted.affinity_seconds, flags };
        let ranges = wanted.source_ranges.to_vec();
        let state = State { value, slots, members, group, ranges, draining, computed: true };
        self.count(&state, &old);

        let put_slot = |slot: &u32| Op::PutSlot {
            key: SlotKey { frontend: id, slot: *slot },
            backend: state.slots[*slot as usize],
        };
        let shrinks = state.slots.len() < old.slots.len();
        let changed = state.members.iter().filter(|(backend, slot)| old.members.get(backend) != Some(slot));
        let (held, placed): (Vec<_>, Vec<_>) =
            changed.partition(|(backend, slot)| old.slots.get(**slot as usize) == Some(backend));
        let (late, placed): (Vec<_>, Vec<_>) = placed.into_iter().partition(|(_, slot)| moved.contains(slot));
        let put_member = |(backend, slot): (&u32, &u32)| Op::PutMember { frontend: id, backend: *backend, slot: *slot };

        let ranges = state.ranges.iter().filter(|net| !old.ranges.contains(net));
        phases.grown.extend(ranges.map(|net| Op::PutSourceRange { frontend: id, net: *net }));
        // An index entry that is to point at another slot of the same backend does so before its slot goes.
        phases.grown.extend(held.into_iter().map(put_member));
        phases.grown.extend(written.iter().map(put_slot));
        phases.grown.extend(placed.into_iter().map(put_member));

        let later = if shrinks { &mut phases.shrunk } else { &mut phases.grown };
        later.extend(moved.iter().map(put_slot));
        later.extend(late.into_iter().map(put_member));
        if new || old.value != value {
            later.push(Op::PutFrontend { key, frontend: value });
        }
        let members = old.members.keys().filter(|backend| !state.members.contains_key(backend));
        later.extend(members.map(|backend| Op::DeleteMember { frontend: id, backend: *backend }));
        let gone = value.count..old.slots.len() as u32;
        later.extend(gone.rev().map(|slot| Op::DeleteSlot { key: SlotKey { frontend: id, slot } }));
        let ranges = old.ranges.iter().filter(|net| !state.ranges.contains(net));
        phases.gone.extend(ranges.map(|net| Op::DeleteSourceRange { frontend: id, net: *net }));

        self.frontends.insert(key, state);
        if let Some(retired) = retired {
            self.retire(&retired, &mut phases.gone);
        }
    }

    fn fill(&self, old: &State, choice: &Choice, ids: &[u32]) -> Fill {
        if choice.flags & flags::HASHED == 0 {
            return fill(&old.slots, ids);
        }
        let size = self.slots_of(choice);
        let table = if old.computed && old.slots.len() == size {
            // Only rivals that are new, and slots that lost their backend, have to be looked at.
            let indexes: BTreeMap<u32, u32> = ids.iter().zip(0..).map(|(id, index)| (*id, index)).collect();
            let kept: Vec<Option<u32>> = old.slots.iter().map(|id| indexes.get(id).copied()).collect();
            let had = old.distinct();
            let added = indexes.iter().filter(|(id, _)| had.binary_search(id).is_err());
            let added: Vec<u32> = added.map(|(_, index)| *index).collect();
            maglev::table(&choice.backends, size, Some((&kept, &added)))
        } else {
            maglev::table(&choice.backends, size, None)
        };
        let slots: Vec<u32> = table.into_iter().map(|index| ids[index as usize]).collect();
        let differs = |slot: &u32| old.slots.get(*slot as usize) != slots.get(*slot as usize);
        let written = (0..slots.len() as u32).filter(differs).collect();
        Fill { slots, written, moved: Vec::new() }
    }

    /// Those that the frontend's clients may have and that keep them, but are no longer chosen.
    pub(crate) fn draining(&self, key: &FrontendKey, choice: &Choice, wanted: &Wanted) -> Vec<u32> {
        let own = self.frontends.get(key);
        // Datagram flows find their backend among the members of the entry that serves them now, whichever did before.
        let other = match key.from {
            _ if key.proto != UDP => None,
            Origin::Outside if own.is_none() => self.frontends.get(&key.seen_from(Origin::Anyone)),
            Origin::Anyone if wanted.outside.is_none() => self.frontends.get(&key.seen_from(Origin::Outside)),
            _ => None,
        };
        let mut draining: Vec<u32> = own.into_iter().chain(other).flat_map(State::given).collect();
        if key.proto != UDP && !self.found_idle.is_empty() {
            let found = wanted.known.iter().filter_map(|backend| self.backend_numbers.get(backend));
            draining.extend(found.filter(|id| self.found_idle.contains(id)));
        }
        draining.retain(|id| {
            self.backends.get(id).is_some_and(|BackendState { backend, .. }| {
                self.backend_numbers.get(backend) == Some(id)
                    && wanted.known.binary_search(backend).is_ok()
                    && choice.backends.binary_search(backend).is_err()
            })
        });
        draining.sort_unstable();
        draining.dedup();
        draining
    }

    /// Removes a frontend with all that is its own.
    pub(crate) fn remove(&mut self, key: &FrontendKey, ops: &mut Vec<Op>) {
        self.remove_entry(key, ops);
        self.remove_entry(&key.seen_from(Origin::Outside), ops);
    }

    fn remove_entry(&mut self, key: &FrontendKey, ops: &mut Vec<Op>) {
        if let Some(state) = self.frontends.remove(key) {
            ops.push(Op::DeleteFrontend { key: *key });
            self.retire(&state, ops);
        }
    }

    /// Deletes what only this id had.
    fn retire(&mut self, state: &State, ops: &mut Vec<Op>) {
        let frontend = state.value.id;
        if frontend == 0 {
            return;
        }
        ops.extend(state.members.keys().map(|backend| Op::DeleteMember { frontend, backend: *backend }));
        let slots = 0..state.slots.len() as u32;
        ops.extend(slots.map(|slot| Op::DeleteSlot { key: SlotKey { frontend, slot } }));
        let delete = |net: &IpNet| Op::DeleteSourceRange { frontend, net: *net };
        ops.extend(state.ranges.iter().map(delete));
        let nothing = State {
            value: state.value,
            slots: Vec::new(),
            members: BTreeMap::new(),
            group: None,
            ranges: Vec::new(),
            draining: Vec::new(),
            computed: true,
        };
        self.count(&nothing, state);
        self.frontend_ids.release(frontend);
    }

    /// The number of a group, which no frontend has.
    fn group_number(&mut self, group: &Arc<AffinityGroup>) -> u32 {
        let ids = &mut self.frontend_ids;
        let new = || GroupState { number: ids.next(), frontends: 0 };
        self.groups.entry(group.clone()).or_insert_with(new).number
    }

    /// Gives a group a number, if nobody has it.
    pub(crate) fn name_group(&mut self, group: &Arc<AffinityGroup>, number: u32) -> bool {
        let is_free = (1..=ids::LAST).contains(&number) && self.frontend_ids.take_free(number);
        if is_free {
            self.groups.insert(group.clone(), GroupState { number, frontends: 0 });
        }
        is_free
    }

    /// Counts what `new` has and `old` had.
    fn count(&mut self, new: &State, old: &State) {
        if let Some(group) = new.group.as_ref().and_then(|group| self.groups.get_mut(group)) {
            group.frontends += 1;
        }
        if let Some(Entry::Occupied(mut group)) = old.group.clone().map(|group| self.groups.entry(group)) {
            group.get_mut().frontends -= 1;
            if group.get().frontends == 0 {
                self.frontend_ids.release(group.remove().number);
            }
        }
        for id in new.distinct() {
            self.refer(id, 1, 0);
        }
        for id in &new.draining {
            self.refer(*id, 0, 1);
        }
        for id in old.distinct() {
            self.refer(id, -1, 0);
        }
        for id in &old.draining {
            self.refer(*id, 0, -1);
        }
        self.slot_total += new.slots.len() + new.members.len();
        self.slot_total -= old.slots.len() + old.members.len();
        self.range_total += new.ranges.len();
        self.range_total -= old.ranges.len();
    }

    pub(crate) fn refer(&mut self, id: u32, refs: i32, held: i32) {
        if let Some(state) = self.backends.get_mut(&id) {
            state.refs = state.refs.saturating_add_signed(refs);
            state.held = state.held.saturating_add_signed(held);
            if state.refs == 0 {
                self.idle.insert(id);
            } else {
                self.idle.remove(&id);
            }
        }
    }

    fn backend_id(&mut self, backend: Backend, ops: &mut Vec<Op>) -> u32 {
        if let Some(id) = self.backend_numbers.get(&backend) {
            if let Some(state) = self.backends.get_mut(id).filter(|state| state.draining) {
                state.draining = false;
                ops.push(Op::PutBackend { id: *id, backend, draining: false });
            }
            return *id;
        }
        let id = self.backend_ids.next();
        self.backend_numbers.insert(backend, id);
        self.backends.insert(id, BackendState { backend, refs: 0, held: 0, draining: false });
        ops.push(Op::PutBackend { id, backend, draining: false });
        id
    }

    /// Flags the backends that no slot names but some frontend still knows, and deletes the others.
    pub(crate) fn settle_idle(&mut self, ops: &mut Vec<Op>) {
        for id in std::mem::take(&mut self.idle) {
            let Some(state) = self.backends.get_mut(&id) else { continue };
            let backend = state.backend;
            if state.held > 0 {
                if !std::mem::replace(&mut state.draining, true) {
                    ops.push(Op::PutBackend { id, backend, draining: true });
                }
                continue;
            }
            self.backends.remove(&id);
            if self.backend_numbers.get(&backend) == Some(&id) {
                self.backend_numbers.remove(&backend);
            }
            self.backend_ids.release(id);
            ops.push(Op::DeleteBackend { id });
        }
    }
}

/// IANA's number.
pub(crate) const UDP: u8 = Protocol::Udp.number();

/// Whether it is asked which backends are a frontend's: of those that clients stay with, and of datagrams, of which none says that
/// it begins a flow.
pub(crate) fn is_indexed(key: &FrontendKey, wanted: &Wanted) -> bool {
    wanted.affinity_seconds > 0 || key.proto == UDP
}

/// Where the index finds each backend: where it did, if that is still right; else where it is and was; else where it is first.
fn members(slots: &[u32], old: &State) -> BTreeMap<u32, u32> {
    let mut found: BTreeMap<u32, u32> = BTreeMap::new();
    let mut settled = std::collections::BTreeSet::new();
    for (slot, id) in slots.iter().enumerate() {
        if found.contains_key(id) && settled.contains(id) {
            continue;
        }
        let stays = old.members.get(id).is_some_and(|slot| slots.get(*slot as usize) == Some(id));
        if stays {
            found.insert(*id, old.members[id]);
            settled.insert(*id);
        } else if old.slots.get(slot) == Some(id) {
            found.insert(*id, slot as u32);
            settled.insert(*id);
        } else {
            found.entry(*id).or_insert(slot as u32);
        }
    }
    found
}
