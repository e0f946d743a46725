//! Several files, seen as one set of objects: who holds what, and what a changed file changes. Costs are in proportion to
//! the file, not to the directory.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::source::{Event, Kind, Object, ObjectRef};

/// The objects of all files.
#[derive(Debug, Default)]
pub struct Merged {
    files: BTreeMap<String, BTreeSet<ObjectRef>>,
    /// By object, then by file: the first file's is in force.
    holders: HashMap<ObjectRef, BTreeMap<String, Object>>,
    /// Objects that several files hold.
    contested: BTreeSet<ObjectRef>,
    counts: BTreeMap<Kind, usize>,
}

impl Merged {
    /// Replaces what `file` says; the events are what that changes.
    pub fn replace(&mut self, file: &str, objects: BTreeMap<ObjectRef, Object>) -> Vec<Event> {
        let mut touched = self.files.remove(file).unwrap_or_default();
        touched.extend(objects.keys().cloned());
        if !objects.is_empty() {
            self.files.insert(file.to_owned(), objects.keys().cloned().collect());
        }
        let mut objects = objects;
        let mut events = Vec::new();
        for reference in touched {
            let object = objects.remove(&reference);
            events.extend(self.replace_one(file, reference, object));
        }
        events
    }

    fn replace_one(&mut self, file: &str, reference: ObjectRef, object: Option<Object>) -> Option<Event> {
        let holders = self.holders.entry(reference.clone()).or_default();
        let before = holders.first_key_value().map(|(file, object)| (file.clone(), object.clone()));
        match object {
            Some(object) => holders.insert(file.to_owned(), object),
            None => holders.remove(file),
        };
        let after = holders.values().next().cloned();
        match holders.len() > 1 {
            true => self.contested.insert(reference.clone()),
            false => self.contested.remove(&reference),
        };
        let count = self.counts.entry(reference.kind).or_default();
        match (before, after) {
            (None, Some(after)) => {
                *count += 1;
                Some(Event::Upsert(after))
            }
            (Some((_, before)), Some(after)) => (before != after).then_some(Event::Upsert(after)),
            (before, None) => {
                self.holders.remove(&reference);
                before.map(|_| {
                    *count -= 1;
                    Event::Delete(reference)
                })
            }
        }
    }

    /// Objects of `kind`.
    pub fn count(&self, kind: Kind) -> usize {
        self.counts.get(&kind).copied().unwrap_or_default()
    }

    /// Objects that several files hold, with those files; the first is in force.
    pub fn contested(&self) -> impl Iterator<Item = (&ObjectRef, Vec<&str>)> {
        let files =
            |reference| self.holders.get(reference).into_iter().flatten().map(|(file, _)| file.as_str()).collect();
        self.contested.iter().map(move |reference| (reference, files(reference)))
    }

    /// Every object in force.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        self.holders.values().filter_map(|holders| holders.values().next())
    }
}
