//! The mirror of the kernel's maps: gives numbers, and turns a Service's change into ordered writes.

use std::collections::{BTreeMap, BTreeSet};

use crate::frontends::{FrontendKind, Wanted};
use crate::ids::Ids;
use crate::model::ObjectName;
use crate::op::{Backend, Frontend, FrontendKey, Op, SlotKey};
use crate::slots::{Fill, fill};
use crate::tracker::Change;

/// How many entries each kernel map can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// FRONTENDS (REVNAT is as large).
    pub frontends: usize,
    /// SLOTS.
    pub slots: usize,
    /// BACKENDS.
    pub backends: usize,
}

/// A kernel map of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Address and port to frontend.
    Frontends,
    /// Frontend and slot to backend id.
    Slots,
    /// Backend id to address and port.
    Backends,
}

/// A change that does not fit; nothing of it is applied, and the Service stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{table:?} is full: service {service} would bring it to {needed} entries and it holds {limit}")]
pub struct TableFull {
    /// Which map.
    pub table: Table,
    /// Its size.
    pub limit: usize,
    /// How many it would have to hold at once; new entries are written before old ones go.
    pub needed: usize,
    /// Whose change.
    pub service: ObjectName,
}

/// A frontend as the kernel has it.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub value: Frontend,
    /// Backend ids by slot. 0 stands for one that has to be written again (seen only after a restart).
    pub slots: Vec<u32>,
}

#[derive(Clone, Debug)]
pub(crate) struct BackendState {
    pub backend: Backend,
    /// Slots that name it.
    pub refs: usize,
}

/// Who wants a frontend; the first is the one that gets it.
type Claims = BTreeMap<(FrontendKind, ObjectName), Wanted>;

/// Mirrors the kernel's maps and numbers what is in them.
#[derive(Clone, Debug)]
pub struct Tables {
    pub(crate) limits: Limits,
    pub(crate) frontends: BTreeMap<FrontendKey, State>,
    pub(crate) frontend_ids: Ids,
    pub(crate) slot_total: usize,
    pub(crate) backends: BTreeMap<u32, BackendState>,
    pub(crate) backend_numbers: BTreeMap<Backend, u32>,
    pub(crate) backend_ids: Ids,
    /// Backends without a slot, to be deleted at the end of the change.
    pub(crate) idle: BTreeSet<u32>,
    pub(crate) claims: BTreeMap<FrontendKey, Claims>,
    pub(crate) services: BTreeMap<ObjectName, BTreeSet<FrontendKey>>,
}

/// What one key is to become; `None` removes it.
type Targets = BTreeMap<FrontendKey, Option<Wanted>>;

impl Tables {
    /// For empty maps.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            frontends: BTreeMap::new(),
            frontend_ids: Ids::default(),
            slot_total: 0,
            backends: BTreeMap::new(),
            backend_numbers: BTreeMap::new(),
            backend_ids: Ids::default(),
            idle: BTreeSet::new(),
            claims: BTreeMap::new(),
            services: BTreeMap::new(),
        }
    }

    /// The writes for one Service's change. The cost is in proportion to the Service, the writes to the change.
    pub fn apply(&mut self, change: &Change) -> Result<Vec<Op>, TableFull> {
        let mut ops = Vec::new();
        self.apply_keeping_idle(change, &mut ops)?;
        self.delete_idle(&mut ops);
        Ok(ops)
    }

    /// Which Service a frontend belongs to.
    pub fn owner(&self, key: &FrontendKey) -> Option<&ObjectName> {
        self.claims.get(key)?.keys().next().map(|(_, service)| service)
    }

    /// Entries in use and the size, per map.
    pub fn usage(&self) -> [(Table, usize, usize); 3] {
        [
            (Table::Frontends, self.frontends.len(), self.limits.frontends),
            (Table::Slots, self.slot_total, self.limits.slots),
            (Table::Backends, self.backends.len(), self.limits.backends),
        ]
    }

    /// As [`apply`](Self::apply), but leaves backends that are no longer named.
    pub(crate) fn apply_keeping_idle(&mut self, change: &Change, ops: &mut Vec<Op>) -> Result<(), TableFull> {
        let targets = self.targets(change);
        self.check_room(change, &targets)?;
        self.claim(change);
        // What grows or changes in place comes first, what shrinks next, what goes last: a Service that moves from one
        // frontend to another is never without.
        let mut shrinking = Vec::new();
        // "Any other port" refuses, so it comes after the ports that are served and goes before them (it sorts first).
        let (any_ports, ports): (Vec<_>, Vec<_>) = targets.iter().partition(|(key, _)| key.is_any_port());
        for (key, wanted) in ports.into_iter().chain(any_ports) {
            if let Some(wanted) = wanted {
                self.put(*key, wanted, ops, &mut shrinking);
            }
        }
        ops.append(&mut shrinking);
        for key in targets.iter().filter(|(_, wanted)| wanted.is_none()).map(|(key, _)| key) {
            self.remove(key, ops);
        }
        Ok(())
    }

    /// What the change makes of every key that the Service had or is to have, other Services' claims considered.
    fn targets(&self, change: &Change) -> Targets {
        let had = self.services.get(&change.service).into_iter().flatten();
        let keys: BTreeSet<FrontendKey> = had.chain(change.frontends.keys()).copied().collect();
        let target = |key: &FrontendKey| {
            let others = self.claims.get(key).into_iter().flatten();
            let others = others.filter(|((_, service), _)| *service != change.service);
            let own = change.frontends.get(key).map(|wanted| (wanted.kind, &change.service, wanted));
            let first = others.map(|((kind, service), wanted)| (*kind, service, wanted)).chain(own);
            first.min_by_key(|(kind, service, _)| (*kind, *service)).map(|(_, _, wanted)| self.keep_last(key, wanted))
        };
        keys.iter().map(|key| (*key, target(key))).collect()
    }

    /// Honours [`Wanted::keep_last`].
    fn keep_last(&self, key: &FrontendKey, wanted: &Wanted) -> Wanted {
        let mut wanted = wanted.clone();
        if wanted.keep_last && wanted.backends.is_empty() {
            let slots = self.frontends.get(key).map(|state| state.slots.as_slice()).unwrap_or_default();
            wanted.backends = slots.iter().filter_map(|id| Some(self.backends.get(id)?.backend)).collect();
            wanted.backends.sort_unstable();
            wanted.backends.dedup();
        }
        wanted
    }

    fn check_room(&self, change: &Change, targets: &Targets) -> Result<(), TableFull> {
        let mut frontends = 0;
        let mut slots = 0;
        let mut backends: BTreeSet<Backend> = BTreeSet::new();
        for (key, wanted) in targets {
            let Some(wanted) = wanted else { continue };
            let had = self.frontends.get(key).map(|state| state.slots.len());
            frontends += usize::from(had.is_none());
            slots += wanted.backends.len().saturating_sub(had.unwrap_or(0));
            backends.extend(wanted.backends.iter().copied().filter(|b| !self.backend_numbers.contains_key(b)));
        }
        let tables = self.usage();
        for ((table, used, limit), added) in tables.into_iter().zip([frontends, slots, backends.len()]) {
            if added > 0 && used + added > limit {
                return Err(TableFull { table, limit, needed: used + added, service: change.service.clone() });
            }
        }
        Ok(())
    }

    fn claim(&mut self, change: &Change) {
        for key in self.services.remove(&change.service).unwrap_or_default() {
            if let Some(claims) = self.claims.get_mut(&key) {
                claims.retain(|(_, service), _| *service != change.service);
                if claims.is_empty() {
                    self.claims.remove(&key);
                }
            }
        }
        for (key, wanted) in &change.frontends {
            let claimant = (wanted.kind, change.service.clone());
            self.claims.entry(*key).or_default().insert(claimant, wanted.clone());
        }
        if !change.frontends.is_empty() {
            self.services.insert(change.service.clone(), change.frontends.keys().copied().collect());
        }
    }

    fn put(&mut self, key: FrontendKey, wanted: &Wanted, ops: &mut Vec<Op>, shrinking: &mut Vec<Op>) {
        let ids: Vec<u32> = wanted.backends.iter().map(|backend| self.backend_id(*backend, ops)).collect();
        let known = self.frontends.remove(&key);
        let old_value = known.as_ref().map(|state| state.value);
        let old_slots = known.map(|state| state.slots).unwrap_or_default();
        let id = match old_value {
            Some(value) => value.id,
            None if key.is_any_port() => 0,
            None => self.frontend_ids.next(),
        };
        let Fill { slots, written, moved } = fill(&old_slots, &ids);

        for id in &slots {
            self.refer(*id);
        }
        for id in &old_slots {
            self.unrefer(*id);
        }
        self.slot_total = self.slot_total + slots.len() - old_slots.len();

        let put_slot = |slot: u32, slots: &[u32]| Op::PutSlot {
            key: SlotKey { frontend: id, slot },
            backend: slots[slot as usize],
        };
        ops.extend(written.iter().map(|slot| put_slot(*slot, &slots)));
        if old_value.is_none() && !key.is_any_port() {
            ops.push(Op::PutRevNat { frontend: id, key });
        }
        let count = slots.len() as u32;
        let value = Frontend { id, count, affinity_seconds: wanted.affinity_seconds, flags: wanted.flags };
        let shrinks = slots.len() < old_slots.len();
        let later = if shrinks { shrinking } else { ops };
        later.extend(moved.iter().map(|slot| put_slot(*slot, &slots)));
        if old_value != Some(value) {
            later.push(Op::PutFrontend { key, frontend: value });
        }
        let gone = count..old_slots.len() as u32;
        later.extend(gone.rev().map(|slot| Op::DeleteSlot { key: SlotKey { frontend: id, slot } }));
        self.frontends.insert(key, State { value, slots });
    }

    /// Removes a frontend with all that is its own.
    pub(crate) fn remove(&mut self, key: &FrontendKey, ops: &mut Vec<Op>) {
        let Some(State { value, slots }) = self.frontends.remove(key) else { return };
        ops.push(Op::DeleteFrontend { key: *key });
        if key.is_any_port() {
            return;
        }
        ops.push(Op::DeleteRevNat { frontend: value.id });
        for (slot, backend) in slots.iter().enumerate() {
            ops.push(Op::DeleteSlot { key: SlotKey { frontend: value.id, slot: slot as u32 } });
            self.unrefer(*backend);
        }
        self.slot_total -= slots.len();
        self.frontend_ids.release(value.id);
    }

    fn backend_id(&mut self, backend: Backend, ops: &mut Vec<Op>) -> u32 {
        if let Some(id) = self.backend_numbers.get(&backend) {
            return *id;
        }
        let id = self.backend_ids.next();
        self.backend_numbers.insert(backend, id);
        self.backends.insert(id, BackendState { backend, refs: 0 });
        ops.push(Op::PutBackend { id, backend });
        id
    }

    fn refer(&mut self, id: u32) {
        if let Some(state) = self.backends.get_mut(&id) {
            state.refs += 1;
            self.idle.remove(&id);
        }
    }

    fn unrefer(&mut self, id: u32) {
        if let Some(state) = self.backends.get_mut(&id) {
            state.refs -= 1;
            if state.refs == 0 {
                self.idle.insert(id);
            }
        }
    }

    pub(crate) fn delete_idle(&mut self, ops: &mut Vec<Op>) {
        for id in std::mem::take(&mut self.idle) {
            if let Some(state) = self.backends.remove(&id)
                && self.backend_numbers.get(&state.backend) == Some(&id)
            {
                self.backend_numbers.remove(&state.backend);
            }
            self.backend_ids.release(id);
            ops.push(Op::DeleteBackend { id });
        }
    }
}
