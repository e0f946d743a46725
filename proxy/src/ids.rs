//! Numbers that are not reused soon.

use std::collections::BTreeSet;

/// The last number: the bit above it tells member entries of SLOTS from slots.
pub const LAST: u32 = 0x7fff_ffff;

/// Hands out numbers from 1 to [`LAST`], each time the next free one after the last: a packet that still holds a number which was just
/// released must not find it given to something else.
#[derive(Clone, Debug, Default)]
pub struct Ids {
    used: BTreeSet<u32>,
    last: u32,
}

impl Ids {
    /// Marks a number as used, as found after a restart; numbers given out later come after it.
    pub fn take(&mut self, id: u32) {
        self.take_free(id);
    }

    /// The same, if it is free.
    pub fn take_free(&mut self, id: u32) -> bool {
        self.pass(id);
        self.used.insert(id)
    }

    /// Numbers given out later come after this one.
    pub fn pass(&mut self, id: u32) {
        self.last = self.last.max(id);
    }

    /// The next free number. Tables are far smaller than the range, so there always is one.
    pub fn next(&mut self) -> u32 {
        loop {
            self.last = if self.last >= LAST { 1 } else { self.last + 1 };
            if self.used.insert(self.last) {
                return self.last;
            }
        }
    }

    /// Gives a number back.
    pub fn release(&mut self, id: u32) {
        self.used.remove(&id);
    }
}
