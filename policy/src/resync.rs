//! Reading the maps back, when a write failed and the mirror may not be what they hold.

use crate::kernel::Kernel;
use crate::op::Dump;
use crate::state::Model;

impl Model {
    /// Takes `dump` for what the maps hold, and has the next `take_changes` compare all of it with what is wanted. The objects
    /// and their numbers stay.
    pub fn resync(&mut self, dump: &Dump) {
        let before = std::mem::replace(&mut self.kernel, Kernel::load(dump));
        self.claims.changed.extend(before.identities.into_keys());
        self.claims.changed.extend(dump.identities.iter().map(|(prefix, _)| *prefix));
        self.dirty.subjects.extend(before.rules.into_keys());
        self.dirty.subjects.extend(before.cidrs.into_keys().map(|(subject, _)| subject));
        self.dirty.subjects.extend(self.subjects.keys());
        self.dirty.subjects.extend(dump.rules.iter().map(|(key, _)| key.subject));
        self.dirty.subjects.extend(dump.cidrs.iter().map(|(key, _)| key.subject));
        self.dirty.endpoints.extend(before.endpoints.into_keys());
        self.dirty.endpoints.extend(dump.endpoints.iter().map(|endpoint| endpoint.uid.clone()));
    }
}
