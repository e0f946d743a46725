//! Numbers that are not reused soon.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// The last number: the bit above it tells member entries of SLOTS from slots.
pub const LAST: u32 = 0x7fff_ffff;

/// Hands out numbers from 1 to [`LAST`], each time the next free one after the last: a packet that still holds a number which was just
/// released must not find it given to something else.
#[derive(Clone, Debug, Default)]
pub struct Ids {
    /// With how many have it.
    used: BTreeMap<u32, u32>,
    last: u32,
}

impl Ids {
    /// Marks a number as used, as found after a restart or by one more; numbers given out later come after it.
    pub fn take(&mut self, id: u32) {
        *self.used.entry(id).or_default() += 1;
        self.pass(id);
    }

    /// Numbers given out later come after this one.
    pub fn pass(&mut self, id: u32) {
        self.last = self.last.max(id);
    }

    /// The next free number. Tables are far smaller than the range, so there always is one.
    pub fn next(&mut self) -> u32 {
        loop {
            self.last = if self.last >= LAST { 1 } else { self.last + 1 };
            if let Entry::Vacant(free) = self.used.entry(self.last) {
                free.insert(1);
                return self.last;
            }
        }
    }

    /// Gives a number back, which is free when the last one has.
    pub fn release(&mut self, id: u32) {
        if let Entry::Occupied(mut used) = self.used.entry(id) {
            *used.get_mut() -= 1;
            if *used.get() == 0 {
                used.remove();
            }
        }
    }
}
