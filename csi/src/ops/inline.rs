//! Inline volumes: made, formatted and mounted by one publication, gone with the unpublication.

use super::Volumes;
use crate::error::Result;
use crate::model::Record;
use crate::request::{Inline, Stage, TargetPath};
use crate::state::Guard;
use crate::sys::target::Target;

impl Volumes {
    /// Makes the volume, or finds it, and says how it is to be staged: at the pod's own target. The caller has the
    /// name's guard; the volume's is returned, and whether it was made.
    ///
    /// # Errors
    /// As [`Volumes::create`].
    pub fn inline(&self, request: Inline) -> Result<(Stage, Guard, bool)> {
        let made = self.records.named(&request.create.name).is_none();
        let record = self.create(request.create)?;
        let guard = self.enter(&record.id)?;
        let Inline { target, usage, read_only, .. } = request;
        Ok((Stage { id: record.id, staging: target, usage, read_only }, guard, made))
    }

    /// The inline volume of this name.
    pub fn named(&self, name: &str) -> Option<Record> {
        self.records.named(name).filter(|record| record.ephemeral)
    }

    /// Takes an inline volume from its pod and removes it. The caller has the name's guard.
    ///
    /// # Errors
    /// As [`Volumes::unstage`] and [`Volumes::delete`].
    pub fn end_inline(&self, name: &str, target: &TargetPath) -> Result<()> {
        if let Some(record) = self.named(name) {
            let _guard = self.enter(&record.id)?;
            let unstage = crate::request::Unstage { id: record.id.clone(), staging: target.clone() };
            self.unstage(&unstage)?;
            self.delete(&record.id)?;
        }
        Target::open(target)?.map_or(Ok(()), |target| target.remove())
    }
}
