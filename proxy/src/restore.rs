//! Taking over what the kernel holds after a restart.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::ids;
use crate::op::{AFFINITY_GROUP, Dump, Frontend, FrontendKey, Op, Origin, SlotKey};
use crate::tables::{BackendState, GroupState, Limits, State, TableFull, Tables};
use crate::tracker::Change;

impl Tables {
    /// For maps that hold `dump`: takes over its numbers and returns the writes that bring them to `wanted`, with
    /// everything else deleted. Services that do not fit are reported and keep what they had.
    ///
    /// The dump may be one that a crash left in the middle of a list of writes, or that someone damaged: every entry that
    /// does not fit with the rest is written again or deleted.
    pub fn restore(limits: Limits, dump: &Dump, wanted: &[Change]) -> (Self, Vec<Op>, Vec<TableFull>) {
        let mut tables = Self::new(limits);
        let mut ops = Vec::new();
        tables.load(dump);
        let keys: BTreeSet<FrontendKey> = wanted.iter().flat_map(|change| change.frontends.keys()).copied().collect();
        tables.delete_unwanted(dump, &keys, &mut ops);
        tables.found_idle = tables.idle.clone();

        // Who wins what is decided before anything is written: no frontend passes through a loser's hands.
        wanted.iter().for_each(|change| tables.claim(change));
        wanted.iter().for_each(|change| tables.take_over_groups(change));
        let mut postponed = Vec::new();
        for change in wanted {
            if tables.apply_keeping_idle(change, &mut ops).is_err() {
                postponed.push(change);
            }
        }
        tables.settle_idle(&mut ops);
        // By now others have shrunk and what nobody wants has gone.
        let mut errors = Vec::new();
        for change in postponed {
            if let Err(error) = tables.apply_keeping_idle(change, &mut ops) {
                tables.hold(change);
                errors.push(error);
            }
            tables.settle_idle(&mut ops);
        }
        tables.found_idle.clear();
        tables.forget_empty_groups();
        tables.sweep(dump, &mut ops);
        (tables, ops, errors)
    }

    fn load(&mut self, dump: &Dump) {
        for (id, backend, draining) in &dump.backends {
            self.backend_ids.take(*id);
            let state = BackendState { backend: *backend, refs: 0, held: 0, draining: *draining };
            self.backends.insert(*id, state);
            self.idle.insert(*id);
            if *id != 0 {
                self.backend_numbers.entry(*backend).or_insert(*id);
            }
        }
        let slots: BTreeMap<SlotKey, u32> = dump.slots.iter().copied().collect();
        let mut states: BTreeMap<u32, (FrontendKey, State)> = BTreeMap::new();
        for (key, value) in &dump.frontends {
            if key.is_any_port() {
                if value.id == 0 {
                    self.frontends.insert(*key, state(*value, Vec::new()));
                }
                continue;
            }
            // An id that two frontends have, or none, is nothing to build on: the frontend is made again.
            if value.id == 0 || value.id > ids::LAST || states.contains_key(&value.id) {
                continue;
            }
            self.frontend_ids.take(value.id);
            let found = |slot| slots.get(&SlotKey { frontend: value.id, slot }).copied();
            let usable =
                |id: &u32| self.backends.get(id).is_some_and(|s| self.backend_numbers.get(&s.backend) == Some(id));
            // A count that the slots do not bear out is cut where they end.
            let present: Vec<u32> =
                (0..value.count).map_while(found).map(|id| if usable(&id) { id } else { 0 }).collect();
            states.insert(value.id, (*key, state(*value, present)));
        }
        for ((frontend, backend), slot) in &dump.members {
            if let Some((_, state)) = states.get_mut(frontend) {
                state.members.insert(*backend, *slot);
                if *backend == AFFINITY_GROUP {
                    self.frontend_ids.pass(*slot);
                }
            }
        }
        for (frontend, net) in &dump.source_ranges {
            if let Some((_, state)) = states.get_mut(frontend) {
                state.ranges.push(*net);
            }
        }
        for (key, state) in states.into_values() {
            for id in state.distinct() {
                self.refer(id, 1, 0);
            }
            self.slot_total += state.slots.len() + state.members.len();
            self.range_total += state.ranges.len();
            self.frontends.insert(key, state);
        }
    }

    /// Deletes frontends that nobody wants, then what belongs to no frontend. An entry for clients outside stays for as long
    /// as another may lead to it.
    fn delete_unwanted(&mut self, dump: &Dump, wanted: &BTreeSet<FrontendKey>, ops: &mut Vec<Op>) {
        let unwanted = dump.frontends.iter().filter(|(key, _)| !wanted.contains(&key.seen_from(Origin::Anyone)));
        for (key, _) in unwanted {
            if self.frontends.contains_key(key) {
                self.remove(key, ops);
            }
        }
        let owned: BTreeMap<u32, u32> =
            self.frontends.values().map(|state| (state.value.id, state.slots.len() as u32)).collect();
        let is_owned = |id: &u32| *id != 0 && owned.contains_key(id);
        let done = Deleted::by(ops);
        let slots = dump.slots.iter().map(|(key, _)| *key).filter(|key| {
            let in_use = is_owned(&key.frontend) && key.slot < owned[&key.frontend];
            !in_use && !done.slots.contains(key)
        });
        ops.extend(slots.map(|key| Op::DeleteSlot { key }));
        let members = dump.members.iter().map(|(key, _)| *key);
        let members = members.filter(|member| !is_owned(&member.0) && !done.members.contains(member));
        ops.extend(members.map(|(frontend, backend)| Op::DeleteMember { frontend, backend }));
        let ranges = dump.source_ranges.iter().filter(|range| !is_owned(&range.0) && !done.ranges.contains(range));
        ops.extend(ranges.map(|(frontend, net)| Op::DeleteSourceRange { frontend: *frontend, net: *net }));
    }

    /// Names affinity groups as one of their frontends says, before new ones join them.
    fn take_over_groups(&mut self, change: &Change) {
        for (key, wanted) in &change.frontends {
            let Some(group) = wanted.affinity_group.as_ref().filter(|group| !self.groups.contains_key(*group)) else {
                continue;
            };
            if self.owner(key) != Some(&change.service) {
                continue;
            }
            let number = |key| self.frontends.get(&key)?.members.get(&AFFINITY_GROUP).copied();
            let numbers = [Origin::Anyone, Origin::Outside].map(|from| number(key.seen_from(from)));
            let _ = numbers.into_iter().flatten().any(|number| self.name_group(group, number));
        }
    }

    /// Of Services that did not fit.
    fn forget_empty_groups(&mut self) {
        let empty = |_: &_, group: &mut GroupState| group.frontends == 0;
        self.groups.extract_if(.., empty).for_each(|(_, group)| self.frontend_ids.release(group.number));
    }

    /// Notes that a Service which did not fit owns what it already had, so that its deletion finds it.
    fn hold(&mut self, change: &Change) {
        self.claim(&Change { service: change.service.clone(), frontends: BTreeMap::new() });
        let had = change.frontends.keys().filter(|key| self.frontends.contains_key(key)).copied();
        self.services.insert(change.service.clone(), had.collect());
    }

    /// Deletes frontends that were nothing to build on and that nobody has made again.
    fn sweep(&self, dump: &Dump, ops: &mut Vec<Op>) {
        let strays = dump.frontends.iter().map(|(key, _)| *key).filter(|key| !self.frontends.contains_key(key));
        let done = Deleted::by(ops);
        ops.extend(strays.filter(|key| !done.frontends.contains(key)).map(|key| Op::DeleteFrontend { key }));
    }
}

/// What a list of writes deletes.
#[derive(Default)]
struct Deleted {
    frontends: BTreeSet<FrontendKey>,
    slots: BTreeSet<SlotKey>,
    members: BTreeSet<(u32, u32)>,
    ranges: BTreeSet<(u32, IpNet)>,
}

impl Deleted {
    fn by(ops: &[Op]) -> Self {
        let mut deleted = Self::default();
        for op in ops {
            _ = match *op {
                Op::DeleteFrontend { key } => deleted.frontends.insert(key),
                Op::DeleteSlot { key } => deleted.slots.insert(key),
                Op::DeleteMember { frontend, backend } => deleted.members.insert((frontend, backend)),
                Op::DeleteSourceRange { frontend, net } => deleted.ranges.insert((frontend, net)),
                _ => false,
            };
        }
        deleted
    }
}

fn state(value: Frontend, slots: Vec<u32>) -> State {
    State {
        value,
        slots,
        members: BTreeMap::new(),
        group: None,
        ranges: Vec::new(),
        draining: Vec::new(),
        computed: false,
    }
}
