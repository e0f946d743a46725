//! The mirror of the kernel's maps.
use crate::model::ObjectName;
use crate::op::{Dump, FrontendKey, Op};
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

/// A change that does not fit; nothing of it is applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{table:?} is full: service {service} would bring it to {needed} entries and it holds {limit}")]
pub struct TableFull {
    /// Which map.
    pub table: Table,
    /// Its size.
    pub limit: usize,
    /// How many it would have to hold.
    pub needed: usize,
    /// Whose change.
    pub service: ObjectName,
}

/// Mirrors the kernel's maps and numbers what is in them.
pub struct Tables {}

#[allow(unused_variables, clippy::unimplemented)]
impl Tables {
    /// For empty maps.
    pub fn new(limits: Limits) -> Self {
        unimplemented!()
    }
    /// For maps that hold `dump`: takes over its numbers and returns the writes that bring them to `wanted`, everything else
    /// deleted. Services that do not fit are reported and keep what they had.
    pub fn restore(limits: Limits, dump: &Dump, wanted: &[Change]) -> (Self, Vec<Op>, Vec<TableFull>) {
        unimplemented!()
    }
    /// The writes for one Service's change.
    pub fn apply(&mut self, change: &Change) -> Result<Vec<Op>, TableFull> {
        unimplemented!()
    }
    /// Which Service a frontend belongs to.
    pub fn owner(&self, key: &FrontendKey) -> Option<&ObjectName> {
        unimplemented!()
    }
    /// Entries in use, per map.
    pub fn usage(&self) -> Vec<(Table, usize)> {
        unimplemented!()
    }
}
