//! What a source knows about itself, for `keelway status`, health and metrics.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Kind;

/// One kind's state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindStatus {
    /// Its first full list has been delivered.
    pub synced: bool,
    /// Objects known now.
    pub objects: u64,
}

#[derive(Debug, Default)]
struct Inner {
    description: String,
    kinds: BTreeMap<Kind, KindStatus>,
    /// By what they are about: a kind, a file.
    problems: BTreeMap<String, String>,
    errors: u64,
}

/// A handle on the state of a source: the source writes, everybody else reads.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<Inner>>);

impl Status {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each write is one assignment: what a panicking writer left is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For people: `kubernetes https://...` or `manifests DIR`.
    pub fn description(&self) -> String {
        self.lock().description.clone()
    }

    /// The state of `kind`.
    pub fn kind(&self, kind: Kind) -> KindStatus {
        self.lock().kinds.get(&kind).cloned().unwrap_or_default()
    }

    /// Whether every kind has delivered its first full list.
    pub fn synced(&self) -> bool {
        let inner = self.lock();
        Kind::ALL.iter().all(|kind| inner.kinds.get(kind).is_some_and(|status| status.synced))
    }

    /// What is wrong now, in words; empty when all is well.
    pub fn problems(&self) -> Vec<String> {
        self.lock().problems.iter().map(|(about, problem)| format!("{about}: {problem}")).collect()
    }

    /// How many errors there were since the start.
    pub fn errors(&self) -> u64 {
        self.lock().errors
    }

    /// Says what the source is.
    pub fn describe(&self, description: String) {
        self.lock().description = description;
    }

    /// Says how many objects of `kind` are known; `synced` is never taken back.
    pub fn set_objects(&self, kind: Kind, objects: usize) {
        self.lock().kinds.entry(kind).or_default().objects = objects as u64;
    }

    /// The first full list of `kind` has been delivered.
    pub fn set_synced(&self, kind: Kind) {
        self.lock().kinds.entry(kind).or_default().synced = true;
    }

    /// Something went wrong with `about`. Whether that was not known yet in these words.
    pub fn problem(&self, about: &str, problem: String) -> bool {
        let mut inner = self.lock();
        inner.errors += 1;
        inner.problems.insert(about.to_owned(), problem.clone()) != Some(problem)
    }

    /// All is well with `about`. Whether it was not before.
    pub fn clear(&self, about: &str) -> bool {
        self.lock().problems.remove(about).is_some()
    }
}
