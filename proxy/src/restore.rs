//! Taking over what the kernel holds after a restart.

use std::collections::{BTreeMap, BTreeSet};

use crate::op::{Dump, FrontendKey, Op, SlotKey};
use crate::tables::{BackendState, Limits, State, TableFull, Tables};
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
        tables.repair_revnat(dump, &mut ops);

        let mut postponed = Vec::new();
        for change in wanted {
            if tables.apply_keeping_idle(change, &mut ops).is_err() {
                postponed.push(change);
            }
        }
        tables.delete_idle(&mut ops);
        // By now others have shrunk and what nobody wants has gone.
        let mut errors = Vec::new();
        for change in postponed {
            if let Err(error) = tables.apply_keeping_idle(change, &mut ops) {
                tables.hold(change);
                errors.push(error);
            }
            tables.delete_idle(&mut ops);
        }
        (tables, ops, errors)
    }

    fn load(&mut self, dump: &Dump) {
        for (id, backend) in &dump.backends {
            self.backend_ids.take(*id);
            self.backends.insert(*id, BackendState { backend: *backend, refs: 0 });
            self.idle.insert(*id);
            if *id != 0 {
                self.backend_numbers.entry(*backend).or_insert(*id);
            }
        }
        let slots: BTreeMap<SlotKey, u32> = dump.slots.iter().copied().collect();
        let mut ids = BTreeSet::new();
        for (key, value) in &dump.frontends {
            if key.is_any_port() {
                if value.id == 0 {
                    self.frontends.insert(*key, State { value: *value, slots: Vec::new() });
                }
                continue;
            }
            // An id that two frontends have, or none, is nothing to build on: the frontend is made again.
            if value.id == 0 || !ids.insert(value.id) {
                continue;
            }
            self.frontend_ids.take(value.id);
            let found = |slot| slots.get(&SlotKey { frontend: value.id, slot }).copied();
            let usable =
                |id: &u32| self.backends.get(id).is_some_and(|s| self.backend_numbers.get(&s.backend) == Some(id));
            // A count that the slots do not bear out is cut where they end.
            let present: Vec<u32> =
                (0..value.count).map_while(found).map(|id| if usable(&id) { id } else { 0 }).collect();
            for id in &present {
                if let Some(state) = self.backends.get_mut(id) {
                    state.refs += 1;
                    self.idle.remove(id);
                }
            }
            self.slot_total += present.len();
            self.frontends.insert(*key, State { value: *value, slots: present });
        }
    }

    /// Deletes frontends that nobody wants, then slots and reverse entries that belong to no frontend.
    fn delete_unwanted(&mut self, dump: &Dump, wanted: &BTreeSet<FrontendKey>, ops: &mut Vec<Op>) {
        let mut deleted = BTreeSet::new();
        for (key, _) in dump.frontends.iter().filter(|(key, _)| !wanted.contains(key)) {
            match self.frontends.contains_key(key) {
                true => self.remove(key, &mut *ops),
                false => ops.push(Op::DeleteFrontend { key: *key }),
            }
        }
        for op in ops.iter() {
            if let Op::DeleteSlot { key } = op {
                deleted.insert(*key);
            }
        }
        let counts: BTreeMap<u32, usize> = self
            .frontends
            .values()
            .map(|state| (state.value.id, state.slots.len()))
            .filter(|(id, _)| *id != 0)
            .collect();
        for (key, _) in &dump.slots {
            let in_use = counts.get(&key.frontend).is_some_and(|count| (key.slot as usize) < *count);
            if !in_use && !deleted.contains(key) {
                ops.push(Op::DeleteSlot { key: *key });
            }
        }
        let reverse: BTreeSet<u32> = ops
            .iter()
            .filter_map(|op| if let Op::DeleteRevNat { frontend } = op { Some(*frontend) } else { None })
            .collect();
        for (id, _) in dump.revnat.iter().filter(|(id, _)| !counts.contains_key(id) && !reverse.contains(id)) {
            ops.push(Op::DeleteRevNat { frontend: *id });
        }
    }

    fn repair_revnat(&self, dump: &Dump, ops: &mut Vec<Op>) {
        let reverse: BTreeMap<u32, FrontendKey> = dump.revnat.iter().copied().collect();
        for (key, state) in self.frontends.iter().filter(|(key, _)| !key.is_any_port()) {
            if reverse.get(&state.value.id) != Some(key) {
                ops.push(Op::PutRevNat { frontend: state.value.id, key: *key });
            }
        }
    }

    /// Notes that a Service which did not fit owns what it already had, so that its deletion finds it.
    fn hold(&mut self, change: &Change) {
        let had = change.frontends.keys().filter(|key| self.frontends.contains_key(key)).copied();
        self.services.insert(change.service.clone(), had.collect());
    }
}
