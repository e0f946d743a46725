//! Which version of each NetworkPolicy is in force, and who waits for which.
//!
//! Versions are compared for equality only. Three sets are held against each other: what was in force *before* the API was
//! asked, what it *listed*, and what is in force *now*. The list is no older than what was in force before it was made, so
//! a policy that stands as it did before and is not as listed will still change: that is worth waiting for. A policy
//! that is neither as before nor as listed has moved on; only a new list can tell how far.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::oneshot;

use crate::source::Version;

/// Policies of one namespace by name.
pub type Versions = BTreeMap<String, Version>;

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
pub fn progress(before: &Versions, listed: &Versions, now: &Versions) -> Progress {
    let names: BTreeSet<&String> = before.keys().chain(listed.keys()).chain(now.keys()).collect();
    let mut behind = Vec::new();
    for name in names {
        let (before, listed, now) = (before.get(name), listed.get(name), now.get(name));
        if now == listed {
            continue;
        }
        if now != before {
            return Progress::Moved;
        }
        behind.push(name.clone());
    }
    if behind.is_empty() { Progress::InStep } else { Progress::Behind(behind) }
}

struct Waiting {
    namespace: String,
    before: Versions,
    listed: Versions,
    reply: oneshot::Sender<Progress>,
}

/// The engine's part of it.
#[derive(Default)]
pub struct Gate {
    known: BTreeMap<String, Versions>,
    waiting: Vec<Waiting>,
}

impl Gate {
    pub fn policy_changed(&mut self, namespace: &str, name: &str, version: Version) {
        self.known.entry(namespace.to_owned()).or_default().insert(name.to_owned(), version);
    }

    pub fn policy_gone(&mut self, namespace: &str, name: &str) {
        if let Some(versions) = self.known.get_mut(namespace) {
            versions.remove(name);
            if versions.is_empty() {
                self.known.remove(namespace);
            }
        }
    }

    /// The policies of `namespace` that the model knows.
    pub fn known(&self, namespace: &str) -> Versions {
        self.known.get(namespace).cloned().unwrap_or_default()
    }

    pub fn wait(&mut self, namespace: String, before: Versions, listed: Versions, reply: oneshot::Sender<Progress>) {
        self.waiting.push(Waiting { namespace, before, listed, reply });
    }

    /// Answers those who need not wait any longer; to be called when what is known is in the tables.
    pub fn answer(&mut self) {
        let none = Versions::new();
        for one in std::mem::take(&mut self.waiting) {
            let now = self.known.get(&one.namespace).unwrap_or(&none);
            match progress(&one.before, &one.listed, now) {
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

    #[track_caller]
    fn check(before: &[(&str, &str)], listed: &[(&str, &str)], now: &[(&str, &str)], expected: Progress) {
        assert_eq!(progress(&versions(before), &versions(listed), &versions(now)), expected);
    }

    fn behind(names: &[&str]) -> Progress {
        Progress::Behind(names.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn what_is_not_yet_as_listed_is_waited_for() {
        check(&[], &[], &[], Progress::InStep);
        check(&[], &[("a", "1")], &[], behind(&["a"]));
        check(&[("a", "1")], &[("a", "2")], &[("a", "1")], behind(&["a"]));
        check(&[], &[("a", "2")], &[("a", "2")], Progress::InStep);
        // A deletion that has not come yet counts as well: the policy may allow what is no longer allowed.
        check(&[("a", "1")], &[], &[("a", "1")], behind(&["a"]));
        check(&[("a", "1")], &[], &[], Progress::InStep);
        check(&[], &[("a", "1"), ("b", "1")], &[("a", "1")], behind(&["b"]));
    }

    #[test]
    fn what_went_another_way_asks_for_a_new_list() {
        // Newer than the list, or an older step on the way to it: equality cannot tell.
        check(&[], &[("a", "1")], &[("a", "2")], Progress::Moved);
        // Deleted after the list: it will never be as listed.
        check(&[("a", "1")], &[("a", "2")], &[], Progress::Moved);
        // Made after the list.
        check(&[], &[], &[("a", "3")], Progress::Moved);
        check(&[], &[("b", "1")], &[("a", "3")], Progress::Moved);
    }

    #[test]
    fn answers_come_when_they_are_due_and_to_those_who_still_wait() {
        let mut gate = Gate::default();
        let (reply, mut answer) = oneshot::channel();
        gate.wait("ns".into(), Versions::new(), versions(&[("a", "1")]), reply);
        gate.answer();
        assert!(answer.try_recv().is_err(), "it is not there yet");
        gate.policy_changed("other", "a", "1".into());
        gate.answer();
        assert!(answer.try_recv().is_err(), "that was another namespace's");
        gate.policy_changed("ns", "a", "1".into());
        gate.answer();
        assert_eq!(answer.try_recv(), Ok(Progress::InStep));
        gate.policy_gone("ns", "a");
        assert_eq!(gate.known("ns"), Versions::new());
        let (reply, answer) = oneshot::channel();
        gate.wait("ns".into(), Versions::new(), versions(&[("b", "1")]), reply);
        drop(answer);
        gate.tidy();
        assert!(gate.waiting.is_empty());
    }
}
