//! From what changed to writes: works out the wanted entries of just that, and the difference to the mirror.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::kernel::{Batch, Kernel};
use crate::model::ObjectName;
use crate::op::{CidrKey, Direction, Dump, Op, PortPrefix, RuleKey, Scope, identity};
use crate::ports::Ports;
use crate::state::{Config, Model};
use crate::wanted::Wanted;

/// A kernel map of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Prefix to identity.
    Identities,
    /// Subject, direction, peer, port to rule.
    Rules,
    /// Subject, direction, prefix to CIDR peer.
    Cidrs,
}

/// What could not be had in full.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Entries were left out, so that less is allowed than the policies say. They are tried again at each change.
    #[error("{table:?} is full: {left_out} entries do not fit in {limit}; what they would allow is denied")]
    Full {
        /// Which map.
        table: Table,
        /// Its size.
        limit: usize,
        /// How many are missing.
        left_out: usize,
    },
    /// A persisted line does not read as one.
    #[error("line {line} of the persisted numbers: {text:?} is not `+i|-i|+r|-r <number> <name>`")]
    BadNumberLine {
        /// From 1.
        line: usize,
        /// What it says.
        text: String,
    },
}

/// What `take_changes` returns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Lines to append to the persisted numbers, durably, before any op runs.
    pub numbers: Vec<String>,
    /// Writes, in their order.
    pub ops: Vec<Op>,
    /// What did not fit. The same error comes again with each change until it is gone.
    pub errors: Vec<PolicyError>,
}

/// One pass over what is dirty.
struct Round {
    batch: Batch,
    /// Entries that each map can still take; what the round deletes counts for the next one.
    room: BTreeMap<Table, usize>,
    left_out: BTreeMap<Table, usize>,
    bumps: BTreeSet<Scope>,
}

impl Round {
    fn take_room(&mut self, table: Table, wanted: usize) -> bool {
        let room = self.room.entry(table).or_default();
        if *room < wanted {
            *self.left_out.entry(table).or_default() += wanted;
            return false;
        }
        *room -= wanted;
        true
    }

    fn freed_room(&self) -> bool {
        let Batch { delete_rules, delete_cidrs, delete_identities, .. } = &self.batch;
        let freed = |table: &Table| match table {
            Table::Identities => !delete_identities.is_empty(),
            Table::Rules => !delete_rules.is_empty(),
            Table::Cidrs => !delete_cidrs.is_empty(),
        };
        self.left_out.keys().any(freed)
    }
}

impl Model {
    /// For maps that hold `dump`, numbered by `numbers` (all lines persisted so far, oldest first; see [`Changes::numbers`]
    /// and [`Model::numbers`]). The first `take_changes` has to come after the first full lists: it deletes what they do
    /// not name.
    pub fn restore<'a>(
        config: Config,
        numbers: impl IntoIterator<Item = &'a str>,
        dump: &Dump,
    ) -> Result<Self, PolicyError> {
        let mut model = Self::new(config);
        for (text, line) in numbers.into_iter().zip(1..) {
            let read = model.identities.replay(text).zip(model.rules.replay(text));
            if !read.is_some_and(|(identity, rule)| identity || rule) {
                return Err(PolicyError::BadNumberLine { line, text: text.to_owned() });
            }
        }
        dump.identities.iter().for_each(|(_, id)| model.identities.seen(*id));
        for (key, rule) in &dump.rules {
            model.identities.seen(key.subject);
            model.identities.seen(key.peer);
            model.rules.seen(*rule);
        }
        dump.cidrs.iter().for_each(|(key, _)| model.identities.seen(key.subject));
        dump.endpoints.iter().for_each(|endpoint| model.identities.seen(endpoint.subject));
        model.claims.changed.extend(dump.identities.iter().map(|(prefix, _)| *prefix));
        model.dirty.subjects.extend(dump.rules.iter().map(|(key, _)| key.subject));
        model.dirty.subjects.extend(dump.cidrs.iter().map(|(key, _)| key.subject));
        model.dirty.endpoints.extend(dump.endpoints.iter().map(|endpoint| endpoint.uid.clone()));
        model.kernel = Kernel::load(dump);
        Ok(model)
    }

    /// All numbers as lines, to replace the persisted ones by a shorter list.
    pub fn numbers(&self) -> Vec<String> {
        self.identities.lines().chain(self.rules.lines()).collect()
    }

    /// Works out what changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        let mut changes = Changes::default();
        let mut bumps = BTreeSet::new();
        // The first round knows what goes as well as what comes, so that an endpoint which changes its identity together
        // with its peers (their namespace got other labels) has rules for both of theirs. The second one takes away what
        // has gone. A third takes the room that this freed; what a fourth would find can wait for the next change.
        for number in 1.. {
            if number == 2 {
                self.forget_unused();
            }
            let mut round = self.round();
            bumps.append(&mut round.bumps);
            let again = number == 1 || (number == 2 && round.freed_room());
            changes.ops.extend(round.batch.ops());
            if !again {
                let limit = |table| match table {
                    Table::Identities => self.config.limits.identities,
                    Table::Rules => self.config.limits.rules,
                    Table::Cidrs => self.config.limits.cidrs,
                };
                let full = |(table, left_out)| PolicyError::Full { table, limit: limit(table), left_out };
                changes.errors = round.left_out.into_iter().map(full).collect();
                break;
            }
        }
        if bumps.contains(&Scope::All) {
            bumps = BTreeSet::from([Scope::All]);
        }
        changes.ops.extend(bumps.into_iter().map(Op::Bump));
        changes.numbers = self.identities.take_journal();
        changes.numbers.append(&mut self.rules.take_journal());
        changes
    }

    /// Entries in use and the size, per map.
    pub fn usage(&self) -> [(Table, usize, usize); 3] {
        let limits = self.config.limits;
        [
            (Table::Identities, self.kernel.identities.len(), limits.identities),
            (Table::Rules, self.kernel.rule_count, limits.rules),
            (Table::Cidrs, self.kernel.cidr_count, limits.cidrs),
        ]
    }

    fn round(&mut self) -> Round {
        let room = self.usage().into_iter().map(|(table, used, limit)| (table, limit.saturating_sub(used))).collect();
        let mut round = Round { batch: Batch::default(), room, left_out: BTreeMap::new(), bumps: BTreeSet::new() };
        let dirty = std::mem::take(&mut self.dirty);
        for subject in &dirty.subjects {
            self.flush_subject(*subject, &mut round);
        }
        for (subject, peer) in dirty.peers.iter().filter(|(subject, _)| !dirty.subjects.contains(subject)) {
            for direction in Direction::BOTH {
                let ports = self.wanted(*subject, |wanted| wanted.ports(direction, *peer)).unwrap_or_default();
                self.flush_ports(*subject, direction, *peer, &ports, &mut round);
            }
        }
        for prefix in std::mem::take(&mut self.claims.changed) {
            self.flush_identity(prefix, &mut round);
        }
        for uid in dirty.endpoints {
            self.flush_endpoint(uid, &mut round);
        }
        round.batch.delete_rules.iter().for_each(|key| self.kernel.delete_rule(key));
        round.batch.delete_cidrs.iter().for_each(|key| self.kernel.delete_cidr(key));
        round
    }

    /// Identities and rules that nothing uses any more lose their numbers.
    fn forget_unused(&mut self) {
        for id in self.identities.sweep() {
            self.touch_peer(id);
            self.index.remove_identity(id);
        }
        for id in self.rules.sweep() {
            self.rule_names.remove(&id);
        }
    }

    fn wanted<T>(&self, subject: u32, ask: impl FnOnce(Wanted<'_>) -> T) -> Option<T> {
        let isolated_by: &BTreeSet<ObjectName> = &self.subjects.get(&subject)?.isolated_by;
        Some(ask(Wanted { index: &self.index, policies: &self.policies, isolated_by, subject }))
    }

    fn flush_subject(&mut self, subject: u32, round: &mut Round) {
        for direction in Direction::BOTH {
            let peers = self.wanted(subject, |wanted| {
                let ports = |peer| (peer, wanted.ports(direction, peer));
                wanted.peers(direction).into_iter().map(ports).collect::<BTreeMap<u32, Ports>>()
            });
            let mut peers = peers.unwrap_or_default();
            let cidrs = self.wanted(subject, |wanted| wanted.cidrs(direction)).unwrap_or_default();
            let prefixes = self.number_cidrs(subject, direction, cidrs, &mut peers);
            let had = self.kernel.peers(subject, direction);
            peers.retain(|_, ports| !ports.is_empty());
            for (peer, ports) in &peers {
                self.flush_ports(subject, direction, *peer, ports, round);
            }
            for peer in had.iter().filter(|peer| !peers.contains_key(peer)) {
                self.flush_ports(subject, direction, *peer, &Ports::new(), round);
            }
            self.flush_cidrs(subject, direction, prefixes, round);
        }
    }

    /// Gives each distinct set of ports a CIDR peer, the one that has it already where there is one; what a number means
    /// never changes while a prefix leads to it.
    fn number_cidrs(
        &mut self,
        subject: u32,
        direction: Direction,
        cidrs: BTreeMap<IpNet, Ports>,
        peers: &mut BTreeMap<u32, Ports>,
    ) -> BTreeMap<IpNet, u32> {
        let mut known: BTreeMap<Ports, u32> = BTreeMap::new();
        for peer in self.kernel.peers(subject, direction).into_iter().filter(|peer| peer & identity::CIDR_BIT != 0) {
            if let Some(ports) = self.kernel.ports(subject, direction, peer) {
                known.entry(ports.clone()).or_insert(peer);
            }
        }
        let mut prefixes = BTreeMap::new();
        for (prefix, ports) in cidrs {
            let peer = match known.get(&ports) {
                _ if ports.is_empty() => 0,
                Some(peer) => *peer,
                None => self.kernel.next_cidr_peer(subject, direction),
            };
            prefixes.insert(prefix, peer);
            if peer != 0 {
                known.insert(ports.clone(), peer);
                peers.insert(peer, ports);
            }
        }
        prefixes
    }

    /// The difference for one subject, direction and peer. A rule that does not fit is left out: less is allowed.
    fn flush_ports(&mut self, subject: u32, direction: Direction, peer: u32, ports: &Ports, round: &mut Round) {
        let had = self.kernel.ports(subject, direction, peer).cloned().unwrap_or_default();
        if had == *ports {
            return;
        }
        let key = |port: PortPrefix| RuleKey { subject, direction, peer, port };
        let (kept, added): (Vec<_>, Vec<_>) = ports.iter().partition(|(port, _)| had.contains_key(port));
        // A CIDR peer is known again by its whole set of ports, so half of one would be of no use.
        let whole = peer & identity::CIDR_BIT != 0;
        let fits = !whole || added.is_empty() || round.take_room(Table::Rules, added.len());
        for (port, rule) in added {
            if (whole && !fits) || (!whole && !round.take_room(Table::Rules, 1)) {
                self.dirty.subjects.insert(subject);
                continue;
            }
            self.kernel.put_rule(key(*port), *rule);
            round.batch.put_rules.push((key(*port), *rule));
        }
        for (port, rule) in kept.into_iter().filter(|(port, rule)| had.get(port) != Some(rule)) {
            self.kernel.put_rule(key(*port), *rule);
            round.batch.put_rules.push((key(*port), *rule));
        }
        let gone = had.keys().filter(|port| !ports.contains_key(port));
        round.batch.delete_rules.extend(gone.map(|port| key(*port)));
        self.bump_subject(subject, round);
    }

    /// The difference for one subject and direction. All of it fits or none of it is there: with a few prefixes missing,
    /// a wider one would allow what they are to except.
    fn flush_cidrs(
        &mut self,
        subject: u32,
        direction: Direction,
        mut prefixes: BTreeMap<IpNet, u32>,
        round: &mut Round,
    ) {
        let had = self.kernel.cidrs.get(&(subject, direction)).cloned().unwrap_or_default();
        if had == prefixes {
            return;
        }
        let added = prefixes.keys().filter(|prefix| !had.contains_key(prefix)).count();
        if added > 0 && !round.take_room(Table::Cidrs, added) {
            self.dirty.subjects.insert(subject);
            prefixes.clear();
        }
        for (prefix, peer) in prefixes.iter().filter(|(prefix, peer)| had.get(prefix) != Some(peer)) {
            let key = CidrKey { subject, direction, prefix: *prefix };
            self.kernel.put_cidr(key, *peer);
            round.batch.put_cidrs.push((key, *peer));
        }
        let gone = had.keys().filter(|prefix| !prefixes.contains_key(prefix));
        round.batch.delete_cidrs.extend(gone.map(|prefix| CidrKey { subject, direction, prefix: *prefix }));
        self.bump_subject(subject, round);
    }

    fn bump_subject(&self, subject: u32, round: &mut Round) {
        if self.subjects.contains_key(&subject) {
            round.bumps.insert(Scope::Subject(subject));
        }
    }

    fn flush_identity(&mut self, prefix: IpNet, round: &mut Round) {
        let had = self.kernel.identities.get(&prefix).copied();
        let wanted = self.claims.identity(&prefix);
        if had == wanted {
            return;
        }
        match wanted {
            Some(_) if had.is_none() && !round.take_room(Table::Identities, 1) => {
                self.claims.changed.insert(prefix);
                return;
            }
            Some(id) => {
                self.kernel.identities.insert(prefix, id);
                round.batch.put_identities.push((prefix, id));
            }
            None => {
                self.kernel.identities.remove(&prefix);
                round.batch.delete_identities.push(prefix);
            }
        }
        // Only these identities allow more than any other address has: with them goes what they allowed.
        if had.is_some_and(|id| id == identity::HOST || id >= identity::FIRST_POD) {
            round.bumps.insert(Scope::All);
        }
    }

    fn flush_endpoint(&mut self, uid: String, round: &mut Round) {
        let wanted = self.endpoint_policy(&uid);
        if self.kernel.endpoints.get(&uid) == wanted.as_ref() {
            return;
        }
        match wanted {
            Some(policy) => {
                let old = self.kernel.endpoints.insert(uid, policy.clone());
                match old.filter(|old| old.subject != policy.subject) {
                    Some(old) => round.batch.move_endpoint(&old, policy),
                    None => round.batch.put_endpoints.push(policy),
                }
            }
            None => {
                self.kernel.endpoints.remove(&uid);
                round.batch.delete_endpoints.push(uid);
            }
        }
    }
}
