//! How a frontend's slots move from one set of backends to the next with the fewest writes.

use std::collections::BTreeSet;

/// The new slots, and which of them have to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Backend ids by slot.
    pub slots: Vec<u32>,
    /// Slots that get a backend which had none: to be written before the count grows past them.
    pub written: Vec<u32>,
    /// Slots that get the backend of one past the new end: to be written before the count shrinks.
    pub moved: Vec<u32>,
}

/// Keeps every wanted backend where it is, puts new ones into the slots of those that go, then at the end, and fills what
/// is still empty from the end. Both lists hold ids without duplicates; 0 in `old` is nothing that can be kept.
pub fn fill(old: &[u32], wanted: &[u32]) -> Fill {
    let wanted_set: BTreeSet<u32> = wanted.iter().copied().collect();
    let mut kept = BTreeSet::new();
    let mut slots: Vec<Option<u32>> =
        old.iter().map(|id| (*id != 0 && wanted_set.contains(id) && kept.insert(*id)).then_some(*id)).collect();
    let mut new = wanted.iter().copied().filter(|id| !kept.contains(id));
    let mut written = Vec::new();
    for (slot, entry) in slots.iter_mut().enumerate().filter(|(_, entry)| entry.is_none()) {
        let Some(id) = new.next() else { break };
        *entry = Some(id);
        written.push(slot as u32);
    }
    for id in new {
        written.push(slots.len() as u32);
        slots.push(Some(id));
    }
    let mut moved = Vec::new();
    let mut first_hole = 0;
    while let Some(last) = slots.pop() {
        let Some(id) = last else { continue };
        match slots[first_hole..].iter().position(Option::is_none) {
            Some(offset) => {
                first_hole += offset;
                slots[first_hole] = Some(id);
                moved.push(first_hole as u32);
            }
            None => {
                slots.push(last);
                break;
            }
        }
    }
    Fill { slots: slots.into_iter().flatten().collect(), written, moved }
}
