//! Pods, namespaces and policies turned into node-local identities, rules and the ordered writes that bring a table from one state to the next.
#![forbid(unsafe_code)]

pub mod model;
