//! Label selectors.

use crate::model::{Labels, Operator, Requirement, Selector};

impl Selector {
    /// Whether all requirements hold; an empty selector matches everything.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|requirement| requirement.holds(labels))
    }
}

impl Requirement {
    /// Whether it holds of these labels.
    pub fn holds(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// Which namespaces a peer selector looks in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Namespaces {
    /// One, by name: the policy's own.
    Named(String),
    /// Those with these labels.
    Labelled(Selector),
}

/// Pods by namespace and label, as a peer of a rule names them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PeerSelector {
    pub namespaces: Namespaces,
    pub pods: Selector,
}

impl PeerSelector {
    /// Every pod of the cluster.
    pub fn all() -> Self {
        Self { namespaces: Namespaces::Labelled(Selector::default()), pods: Selector::default() }
    }

    pub fn matches(&self, namespace: &str, namespace_labels: &Labels, labels: &Labels) -> bool {
        let inside = match &self.namespaces {
            Namespaces::Named(name) => name == namespace,
            Namespaces::Labelled(selector) => selector.matches(namespace_labels),
        };
        inside && self.pods.matches(labels)
    }
}
