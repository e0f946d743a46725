//! Identities and the peer selectors of the policies in use, each knowing which of the others match.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Labels, NamedPort, ObjectName};
use crate::numbering::escape;
use crate::selector::{Namespaces, PeerSelector};

/// What makes two pods the same to every policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IdentityKey {
    pub namespace: String,
    pub namespace_labels: Labels,
    pub labels: Labels,
    pub named_ports: Vec<NamedPort>,
}

impl IdentityKey {
    /// One word for all of it: `namespace;namespace labels;labels;named ports`.
    pub fn name(&self) -> String {
        let labels = |labels: &Labels| {
            let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{}={}", escape(k), escape(v))).collect();
            pairs.join(",")
        };
        let mut ports: Vec<&NamedPort> = self.named_ports.iter().collect();
        ports.sort_unstable();
        ports.dedup();
        let ports: Vec<String> =
            ports.iter().map(|p| format!("{}:{}:{}", escape(&p.name), p.protocol.number(), p.port)).collect();
        let namespace = escape(&self.namespace);
        format!("{namespace};{};{};{}", labels(&self.namespace_labels), labels(&self.labels), ports.join(","))
    }
}

#[derive(Clone, Debug)]
struct ActiveIdentity {
    key: IdentityKey,
    matched_by: BTreeSet<u32>,
}

#[derive(Clone, Debug)]
struct ActiveSelector {
    selector: PeerSelector,
    matches: BTreeSet<u32>,
    users: BTreeMap<ObjectName, usize>,
}

/// Which selector matches which identity. Selectors are shared by the rules that say the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    identities: BTreeMap<u32, ActiveIdentity>,
    by_namespace: BTreeMap<String, BTreeSet<u32>>,
    selectors: BTreeMap<u32, ActiveSelector>,
    numbers: BTreeMap<PeerSelector, u32>,
    /// Selectors of one namespace by its name; `None` for those that go by namespace labels.
    selectors_by_namespace: BTreeMap<Option<String>, BTreeSet<u32>>,
    last_selector: u32,
}

fn home(selector: &PeerSelector) -> Option<String> {
    match &selector.namespaces {
        Namespaces::Named(name) => Some(name.clone()),
        Namespaces::Labelled(_) => None,
    }
}

impl Index {
    pub fn identity(&self, id: u32) -> Option<&IdentityKey> {
        self.identities.get(&id).map(|identity| &identity.key)
    }

    pub fn is_active(&self, id: u32) -> bool {
        self.identities.contains_key(&id)
    }

    /// The identities of a namespace.
    pub fn identities_in(&self, namespace: &str) -> impl Iterator<Item = (u32, &IdentityKey)> {
        let ids = self.by_namespace.get(namespace).into_iter().flatten();
        ids.filter_map(|id| Some((*id, &self.identities.get(id)?.key)))
    }

    /// A new identity: every selector that can see its namespace is asked once.
    pub fn add_identity(&mut self, id: u32, key: IdentityKey) {
        let own = self.selectors_by_namespace.get(&Some(key.namespace.clone())).into_iter().flatten();
        let wide = self.selectors_by_namespace.get(&None).into_iter().flatten();
        let mut matched_by = BTreeSet::new();
        for number in own.chain(wide) {
            if let Some(active) = self.selectors.get_mut(number)
                && active.selector.matches(&key.namespace, &key.namespace_labels, &key.labels)
            {
                active.matches.insert(id);
                matched_by.insert(*number);
            }
        }
        self.by_namespace.entry(key.namespace.clone()).or_default().insert(id);
        self.identities.insert(id, ActiveIdentity { key, matched_by });
    }

    pub fn remove_identity(&mut self, id: u32) {
        let Some(identity) = self.identities.remove(&id) else { return };
        for number in identity.matched_by {
            if let Some(active) = self.selectors.get_mut(&number) {
                active.matches.remove(&id);
            }
        }
        if let Some(ids) = self.by_namespace.get_mut(&identity.key.namespace) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_namespace.remove(&identity.key.namespace);
            }
        }
    }

    /// The policies that name this identity as a peer.
    pub fn policies_naming(&self, id: u32) -> BTreeSet<ObjectName> {
        let numbers = self.identities.get(&id).into_iter().flat_map(|identity| &identity.matched_by);
        let selectors = numbers.filter_map(|number| self.selectors.get(number));
        selectors.flat_map(|active| active.users.keys().cloned()).collect()
    }

    /// A rule of `user` names this peer; to be matched by [`release`](Self::release).
    pub fn acquire(&mut self, selector: PeerSelector, user: &ObjectName) -> u32 {
        let number = match self.numbers.get(&selector) {
            Some(number) => *number,
            None => self.add_selector(selector),
        };
        if let Some(active) = self.selectors.get_mut(&number) {
            *active.users.entry(user.clone()).or_default() += 1;
        }
        number
    }

    fn add_selector(&mut self, selector: PeerSelector) -> u32 {
        self.last_selector += 1;
        let number = self.last_selector;
        let candidates: Vec<u32> = match &selector.namespaces {
            Namespaces::Named(name) => self.by_namespace.get(name).into_iter().flatten().copied().collect(),
            Namespaces::Labelled(_) => self.identities.keys().copied().collect(),
        };
        let mut matches = BTreeSet::new();
        for id in candidates {
            if let Some(identity) = self.identities.get_mut(&id) {
                let key = &identity.key;
                if selector.matches(&key.namespace, &key.namespace_labels, &key.labels) {
                    identity.matched_by.insert(number);
                    matches.insert(id);
                }
            }
        }
        self.selectors_by_namespace.entry(home(&selector)).or_default().insert(number);
        self.numbers.insert(selector.clone(), number);
        self.selectors.insert(number, ActiveSelector { selector, matches, users: BTreeMap::new() });
        number
    }

    pub fn release(&mut self, number: u32, user: &ObjectName) {
        let Some(active) = self.selectors.get_mut(&number) else { return };
        if let Some(uses) = active.users.get_mut(user) {
            *uses -= 1;
            if *uses == 0 {
                active.users.remove(user);
            }
        }
        if !active.users.is_empty() {
            return;
        }
        let Some(active) = self.selectors.remove(&number) else { return };
        for id in active.matches {
            if let Some(identity) = self.identities.get_mut(&id) {
                identity.matched_by.remove(&number);
            }
        }
        let home = home(&active.selector);
        if let Some(numbers) = self.selectors_by_namespace.get_mut(&home) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.selectors_by_namespace.remove(&home);
            }
        }
        self.numbers.remove(&active.selector);
    }

    pub fn matches(&self, selector: u32) -> impl Iterator<Item = u32> {
        self.selectors.get(&selector).into_iter().flat_map(|active| active.matches.iter().copied())
    }

    pub fn selects(&self, selector: u32, id: u32) -> bool {
        self.selectors.get(&selector).is_some_and(|active| active.matches.contains(&id))
    }
}
