//! The mirror of the kernel's maps: who claims which frontend, what a change makes of it, and whether that fits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use crate::frontends::{AffinityGroup, Choice, FrontendKind, Wanted};
use crate::ids::Ids;
use crate::maglev;
use crate::model::ObjectName;
use crate::op::{Backend, Frontend, FrontendKey, Op, Origin, flags};
use crate::put::{Phases, UDP, is_indexed};
use crate::tracker::Change;

/// How many entries each kernel map can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// FRONTENDS.
    pub frontends: usize,
    /// SLOTS.
    pub slots: usize,
    /// BACKENDS.
    pub backends: usize,
    /// SOURCE_RANGES.
    pub source_ranges: usize,
    /// Sizes of tables that are picked from by hash, rising: [`maglev::SIZES`].
    pub maglev: &'static [usize],
}

/// A kernel map of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Address and port to frontend.
    Frontends,
    /// Frontend and slot to backend id, and back for frontends with affinity.
    Slots,
    /// Backend id to address and port.
    Backends,
    /// Who may use which frontend.
    SourceRanges,
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

/// Two Services want one frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Which.
    pub key: FrontendKey,
    /// Who has it.
    pub winner: ObjectName,
    /// Who does not, and what it would have been.
    pub losers: Vec<(ObjectName, FrontendKind)>,
}

/// A frontend for people to look at.
#[derive(Clone, Debug)]
pub struct Listed<'a> {
    /// Which.
    pub key: FrontendKey,
    /// Whose, and what it is there; unknown for what did not fit after a restart.
    pub owner: Option<(&'a ObjectName, FrontendKind)>,
    /// What the kernel has.
    pub frontend: Frontend,
    /// Who may, with [`flags::SOURCE_RANGES`].
    pub source_ranges: &'a [IpNet],
    /// Backends with their ids, those in slots first: whether each is draining.
    pub backends: Vec<(u32, Backend, bool)>,
}

/// A frontend as the kernel has it.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub value: Frontend,
    /// Backend ids by slot. 0 stands for one that has to be written again (seen only after a restart).
    pub slots: Vec<u32>,
    /// Slots by backend id, or [`NO_SLOT`](crate::NO_SLOT), and the number of the affinity group; empty where there is no index.
    pub members: BTreeMap<u32, u32>,
    /// Its affinity group, once that is counted.
    pub group: Option<Arc<AffinityGroup>>,
    /// Who may, if not everybody; sorted.
    pub ranges: Vec<IpNet>,
    /// Backends that were in the slots and are still known.
    pub draining: Vec<u32>,
    /// The slots were worked out here, not read back.
    pub computed: bool,
}

impl State {
    /// The backends in the slots, each once.
    pub fn distinct(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.slots.iter().copied().filter(|id| *id != 0).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// All that its clients may still have.
    pub fn given(&self) -> impl Iterator<Item = u32> {
        self.distinct().into_iter().chain(self.draining.iter().copied()).chain(self.members.keys().copied())
    }
}

#[derive(Clone, Debug)]
pub(crate) struct GroupState {
    /// In the kernel's member entries; no frontend's id.
    pub number: u32,
    /// How many frontends it has.
    pub frontends: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct BackendState {
    pub backend: Backend,
    /// Frontends whose slots name it.
    pub refs: u32,
    /// Frontends for which it drains.
    pub held: u32,
    /// What the kernel's flag says.
    pub draining: bool,
}

/// One wish for a frontend.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub kind: FrontendKind,
    pub service: ObjectName,
    pub wanted: Wanted,
}

/// What one key is to become.
pub(crate) struct Target {
    /// `None` removes it.
    pub wanted: Option<Wanted>,
    /// It goes from one Service to another: clients change over at once instead of slot by slot.
    pub passes: bool,
}

/// Mirrors the kernel's maps and numbers what is in them.
#[derive(Clone, Debug)]
pub struct Tables {
    pub(crate) limits: Limits,
    pub(crate) frontends: BTreeMap<FrontendKey, State>,
    /// Of frontends and of affinity groups.
    pub(crate) frontend_ids: Ids,
    pub(crate) groups: BTreeMap<Arc<AffinityGroup>, GroupState>,
    pub(crate) slot_total: usize,
    pub(crate) range_total: usize,
    pub(crate) backends: BTreeMap<u32, BackendState>,
    pub(crate) backend_numbers: BTreeMap<Backend, u32>,
    pub(crate) backend_ids: Ids,
    /// Backends without a slot, to be deleted or flagged at the end of the change.
    pub(crate) idle: BTreeSet<u32>,
    /// While restoring: backends that no slot named. A frontend that knows one drains it.
    pub(crate) found_idle: BTreeSet<u32>,
    /// By key, the first is the one that gets it.
    pub(crate) claims: BTreeMap<FrontendKey, Vec<Claim>>,
    contested: BTreeSet<FrontendKey>,
    pub(crate) services: BTreeMap<ObjectName, Box<[FrontendKey]>>,
}

impl Tables {
    /// For empty maps.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            frontends: BTreeMap::new(),
            frontend_ids: Ids::default(),
            groups: BTreeMap::new(),
            slot_total: 0,
            range_total: 0,
            backends: BTreeMap::new(),
            backend_numbers: BTreeMap::new(),
            backend_ids: Ids::default(),
            idle: BTreeSet::new(),
            found_idle: BTreeSet::new(),
            claims: BTreeMap::new(),
            contested: BTreeSet::new(),
            services: BTreeMap::new(),
        }
    }

    /// The writes for one Service's change. The cost is in proportion to the Service, the writes to the change.
    pub fn apply(&mut self, change: &Change) -> Result<Vec<Op>, TableFull> {
        let mut ops = Vec::new();
        self.apply_keeping_idle(change, &mut ops)?;
        self.settle_idle(&mut ops);
        Ok(ops)
    }

    /// Which Service a frontend belongs to.
    pub fn owner(&self, key: &FrontendKey) -> Option<&ObjectName> {
        Some(&self.claims.get(&key.seen_from(Origin::Anyone))?.first()?.service)
    }

    /// The number of a backend that the maps hold.
    pub fn number_of(&self, backend: &Backend) -> Option<u32> {
        self.backend_numbers.get(backend).copied()
    }

    /// Frontends that more than one Service wants.
    pub fn conflicts(&self) -> Vec<Conflict> {
        let conflict = |key: &FrontendKey| {
            let (winner, losers) = self.claims.get(key)?.split_first()?;
            let losers = losers.iter().map(|claim| (claim.service.clone(), claim.kind)).collect();
            Some(Conflict { key: *key, winner: winner.service.clone(), losers })
        };
        self.contested.iter().filter_map(conflict).collect()
    }

    /// All frontends as the kernel has them.
    pub fn list(&self) -> impl Iterator<Item = Listed<'_>> {
        self.frontends.iter().map(|(key, state)| {
            let claim = self.claims.get(&key.seen_from(Origin::Anyone)).and_then(|claims| claims.first());
            let chosen = state.distinct().into_iter().map(|id| (id, false));
            let all = chosen.chain(state.draining.iter().map(|id| (*id, true)));
            let backends = all.filter_map(|(id, draining)| Some((id, self.backends.get(&id)?.backend, draining)));
            Listed {
                key: *key,
                owner: claim.map(|claim| (&claim.service, claim.kind)),
                frontend: state.value,
                source_ranges: &state.ranges,
                backends: backends.collect(),
            }
        })
    }

    /// Entries in use and the size, per map.
    pub fn usage(&self) -> [(Table, usize, usize); 4] {
        [
            (Table::Frontends, self.frontends.len(), self.limits.frontends),
            (Table::Slots, self.slot_total, self.limits.slots),
            (Table::Backends, self.backends.len(), self.limits.backends),
            (Table::SourceRanges, self.range_total, self.limits.source_ranges),
        ]
    }

    /// As [`apply`](Self::apply), but leaves backends that are no longer named.
    pub(crate) fn apply_keeping_idle(&mut self, change: &Change, ops: &mut Vec<Op>) -> Result<(), TableFull> {
        let targets = self.targets(change);
        self.check_room(change, &targets)?;
        self.claim(change);
        let mut phases = Phases::default();
        // "Any other port" refuses, so it comes after the ports that are served and goes before them (it sorts first).
        let (any_ports, ports): (Vec<_>, Vec<_>) = targets.iter().partition(|(key, _)| key.is_any_port());
        for (key, target) in ports.into_iter().chain(any_ports) {
            if let Some(wanted) = &target.wanted {
                self.put(*key, wanted, target.passes, &mut phases);
            }
        }
        for (key, _) in targets.iter().filter(|(_, target)| target.wanted.is_none()) {
            self.remove(key, &mut phases.gone);
        }
        phases.append_to(ops);
        Ok(())
    }

    /// What the change makes of every key that the Service had or is to have, other Services' claims considered.
    fn targets(&self, change: &Change) -> BTreeMap<FrontendKey, Target> {
        let had = self.services.get(&change.service).into_iter().flatten();
        let keys: BTreeSet<FrontendKey> = had.chain(change.frontends.keys()).copied().collect();
        let target = |key: &FrontendKey| {
            let claims = self.claims.get(key).map(Vec::as_slice).unwrap_or_default();
            let other = claims.iter().find(|claim| claim.service != change.service);
            let other = other.map(|claim| (claim.kind, &claim.service, &claim.wanted));
            let own = change.frontends.get(key).map(|wanted| (wanted.kind, &change.service, wanted));
            let next = other.into_iter().chain(own).min_by_key(|(kind, service, _)| (*kind, *service));
            let passes = match (claims.first(), &next) {
                (Some(now), Some((kind, service, _))) => (now.kind, &now.service) != (*kind, *service),
                _ => false,
            };
            Target { wanted: next.map(|(_, _, wanted)| self.keep_last(key, wanted)), passes }
        };
        keys.iter().map(|key| (*key, target(key))).collect()
    }

    /// Honours [`Wanted::keep_last`].
    fn keep_last(&self, key: &FrontendKey, wanted: &Wanted) -> Wanted {
        let mut wanted = wanted.clone();
        if wanted.keep_last && wanted.anyone.backends.is_empty() {
            let ids = self.frontends.get(key).map(State::distinct).unwrap_or_default();
            let mut kept: Vec<Backend> = ids.iter().filter_map(|id| Some(self.backends.get(id)?.backend)).collect();
            kept.sort_unstable();
            kept.dedup();
            wanted.anyone.backends = Arc::from(kept);
        }
        wanted
    }

    /// The entries of a frontend: the one that another leads to comes first.
    pub(crate) fn entries<'a>(
        key: &FrontendKey,
        wanted: &'a Wanted,
    ) -> impl Iterator<Item = (FrontendKey, &'a Choice)> {
        let outside = wanted.outside.as_ref().map(|choice| (key.seen_from(Origin::Outside), choice));
        outside.into_iter().chain([(*key, &wanted.anyone)])
    }

    /// How many slots a choice takes.
    pub(crate) fn slots_of(&self, choice: &Choice) -> usize {
        let backends = choice.backends.len();
        if choice.flags & flags::HASHED == 0 { backends } else { maglev::size(self.limits.maglev, backends) }
    }

    /// Whether an entry cannot become what is wanted step by step, but needs slots of its own under a new id: the meaning of
    /// its slots changes, or who sees it.
    pub(crate) fn starts_anew(&self, old: &State, choice: &Choice, passes: bool) -> bool {
        let changed = (old.value.flags ^ choice.flags) & (flags::HASHED | flags::OUTSIDE_DIFFERS) != 0;
        let hashed = choice.flags & flags::HASHED != 0;
        let resized = hashed && ![0, old.slots.len()].contains(&self.slots_of(choice)) && !old.slots.is_empty();
        old.value.id != 0 && (passes || changed || resized)
    }

    fn check_room(&self, change: &Change, targets: &BTreeMap<FrontendKey, Target>) -> Result<(), TableFull> {
        let (mut frontends, mut slots, mut ranges) = (0, 0, 0);
        let mut backends: BTreeSet<Backend> = BTreeSet::new();
        for (key, target) in targets {
            let Some(wanted) = &target.wanted else { continue };
            for (key, choice) in Self::entries(key, wanted) {
                let had = self.frontends.get(&key);
                frontends += usize::from(had.is_none());
                let kept = had.filter(|old| !self.starts_anew(old, choice, target.passes));
                let members = if is_indexed(&key, wanted) { choice.backends.len() } else { 0 };
                let members = members + usize::from(wanted.affinity_group.is_some());
                let members = members + if key.proto == UDP { self.draining(&key, choice, wanted).len() } else { 0 };
                let (old_slots, old_members) = kept.map_or((0, 0), |old| (old.slots.len(), old.members.len()));
                slots += self.slots_of(choice).saturating_sub(old_slots) + members.saturating_sub(old_members);
                let old_ranges = kept.map(|old| old.ranges.as_slice()).unwrap_or_default();
                ranges += wanted.source_ranges.iter().filter(|net| !old_ranges.contains(net)).count();
                backends.extend(choice.backends.iter().filter(|b| !self.backend_numbers.contains_key(b)));
            }
        }
        for ((table, used, limit), added) in self.usage().into_iter().zip([frontends, slots, backends.len(), ranges]) {
            if added > 0 && used + added > limit {
                return Err(TableFull { table, limit, needed: used + added, service: change.service.clone() });
            }
        }
        Ok(())
    }

    pub(crate) fn claim(&mut self, change: &Change) {
        let had = self.services.remove(&change.service).unwrap_or_default();
        let keys: Box<[FrontendKey]> = change.frontends.keys().copied().collect();
        for key in &had {
            if let Some(claims) = self.claims.get_mut(key) {
                claims.retain(|claim| claim.service != change.service);
            }
        }
        for (key, wanted) in &change.frontends {
            let claim = Claim { kind: wanted.kind, service: change.service.clone(), wanted: wanted.clone() };
            let claims = self.claims.entry(*key).or_insert_with(|| Vec::with_capacity(1));
            let at = claims.partition_point(|other| (other.kind, &other.service) < (claim.kind, &claim.service));
            claims.insert(at, claim);
        }
        for key in had.iter().chain(&keys) {
            let count = self.claims.get(key).map_or(0, Vec::len);
            if count == 0 {
                self.claims.remove(key);
            }
            // That two refuse what neither serves is no conflict.
            if count > 1 && !key.is_any_port() {
                self.contested.insert(*key);
            } else {
                self.contested.remove(key);
            }
        }
        if !keys.is_empty() {
            self.services.insert(change.service.clone(), keys);
        }
    }
}
