//! Which version of each NetworkPolicy is in force, and who waits for which.
//!
//! Versions are compared for equality only. Three sets are held against each other: what was in force *before* the API was
//! asked, what it *listed*, and what is in force *now*. The list is no older than what was in force before it was made, so
//! while nothing has changed since, what is not as listed will still change: that is worth waiting for. Once something has,
//! only a new list can tell how far things have moved on. That a policy stands as it did before does not say that it has not
//! changed, for it may have come and gone: changes are numbered.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::oneshot;

use crate::source::Version;

/// Policies of one namespace by name.
pub type Versions = BTreeMap<String, Version>;

/// The policies of one namespace as the model has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Which they are.
    pub versions: Versions,
    /// Number of the last change; another one when something changed in between.
    change: u64,
}

/// How the policies in force stand to a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// They are those of the list.
    InStep,
    /// These are not yet as listed.
    Behind(Vec<String>),
    /// They changed otherwise since: ask for a new list.
    Moved,
}

/// Holds `now` against `listed`; see the module's header.
pub fn progress(before: &Known, listed: &Versions, now: &Known) -> Progress {
    if now.versions == *listed {
        return Progress::InStep;
    }
    if now.change != before.change {
        return Progress::Moved;
    }
    let names: BTreeSet<&String> = listed.keys().chain(now.versions.keys()).collect();
    let differs = |name: &&&String| now.versions.get(**name) != listed.get(**name);
    Progress::Behind(names.iter().filter(differs).map(|name| (*name).clone()).collect())
}

struct Waiting {
    namespace: String,
    before: Known,
    listed: Versions,
    reply: oneshot::Sender<Progress>,
}

/// The engine's part of it.
#[derive(Default)]
pub struct Gate {
    known: BTreeMap<String, Known>,
    /// What namespaces without policies answer; only its number counts up, whichever of them lost its last one.
    none: Known,
    changes: u64,
    waiting: Vec<Waiting>,
}

impl Gate {
    pub fn policy_changed(&mut self, namespace: &str, name: &str, version: Version) {
        self.changes += 1;
        let known = self.known.entry(namespace.to_owned()).or_default();
        known.change = self.changes;
        known.versions.insert(name.to_owned(), version);
    }

    pub fn policy_gone(&mut self, namespace: &str, name: &str) {
        let Some(known) = self.known.get_mut(namespace) else { return };
        self.changes += 1;
        known.change = self.changes;
        known.versions.remove(name);
        if known.versions.is_empty() {
            self.known.remove(namespace);
            self.none.change = self.changes;
        }
    }

    /// The policies of `namespace` that the model knows.
    pub fn known(&self, namespace: &str) -> &Known {
        self.known.get(namespace).unwrap_or(&self.none)
    }

    pub fn wait(&mut self, namespace: String, before: Known, listed: Versions, reply: oneshot::Sender<Progress>) {
        self.waiting.push(Waiting { namespace, before, listed, reply });
    }

    /// Answers those who need not wait any longer; to be called when what is known is in the tables.
    pub fn answer(&mut self) {
        for one in std::mem::take(&mut self.waiting) {
            match progress(&one.before, &one.listed, self.known(&one.namespace)) {
                Progress::Behind(_) if one.reply.is_closed() => {}
                Progress::Behind(_) => self.waiting.push(one),
                done => drop(one.reply.send(done)),
            }
        }
    }

    /// Forgets those who gave up.
    pub fn tidy(&mut self) {
        self.waiting.retain(|one| !one.reply.is_closed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(pairs: &[(&str, &str)]) -> Versions {
        pairs.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect()
    }

    fn known(pairs: &[(&str, &str)], change: u64) -> Known {
        Known { versions: versions(pairs), change }
    }

    #[test]
    fn what_is_not_yet_as_listed_is_waited_for() {
        let none = known(&[], 0);
        assert_eq!(progress(&none, &versions(&[]), &none), Progress::InStep);
        let behind = |names: &[&str]| Progress::Behind(names.iter().map(ToString::to_string).collect());
        assert_eq!(progress(&none, &versions(&[("a", "1")]), &none), behind(&["a"]));
        let one = known(&[("a", "1"), ("b", "1")], 7);
        assert_eq!(progress(&one, &versions(&[("a", "2"), ("b", "1")]), &one), behind(&["a"]));
        // A deletion that has not come yet counts as well: the policy may allow what is no longer allowed.
        assert_eq!(progress(&one, &versions(&[("c", "1")]), &one), behind(&["a", "b", "c"]));
        assert_eq!(progress(&one, &versions(&[("a", "2")]), &known(&[("a", "2")], 9)), Progress::InStep);
    }

    #[test]
    fn what_changed_otherwise_asks_for_a_new_list() {
        // Newer than the list, or an older step on the way to it: equality cannot tell.
        let listed = versions(&[("a", "2"), ("b", "1")]);
        assert_eq!(progress(&known(&[], 0), &listed, &known(&[("a", "1")], 1)), Progress::Moved);
        // Made and deleted, both before anybody looked: it will never be as listed.
        assert_eq!(progress(&known(&[], 0), &listed, &known(&[], 2)), Progress::Moved);
    }

    #[test]
    fn a_policy_that_came_and_went_is_not_waited_for() {
        for others in [false, true] {
            let mut gate = Gate::default();
            if others {
                gate.policy_changed("ns", "other", "1".into());
            }
            let before = gate.known("ns").clone();
            let mut listed = before.versions.clone();
            listed.insert("a".into(), "1".into());
            let (reply, mut answer) = oneshot::channel();
            gate.policy_changed("ns", "a", "1".into());
            gate.policy_gone("ns", "a");
            gate.wait("ns".into(), before, listed, reply);
            gate.answer();
            assert_eq!(answer.try_recv(), Ok(Progress::Moved), "others: {others}");
        }
    }

    #[test]
    fn answers_come_when_they_are_due_and_to_those_who_still_wait() {
        let mut gate = Gate::default();
        let (reply, mut answer) = oneshot::channel();
        gate.wait("ns".into(), Known::default(), versions(&[("a", "1")]), reply);
        gate.answer();
        assert!(answer.try_recv().is_err(), "it is not there yet");
        gate.policy_changed("other", "a", "1".into());
        gate.answer();
        assert!(answer.try_recv().is_err(), "that was another namespace's");
        gate.policy_changed("ns", "a", "1".into());
        gate.answer();
        assert_eq!(answer.try_recv(), Ok(Progress::InStep));
        gate.policy_gone("ns", "a");
        assert_eq!(gate.known("ns").versions, Versions::new());
        let before = gate.known("ns").clone();
        let (reply, answer) = oneshot::channel();
        gate.wait("ns".into(), before, versions(&[("b", "1")]), reply);
        drop(answer);
        gate.tidy();
        assert!(gate.waiting.is_empty());
    }
}
