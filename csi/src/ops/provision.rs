//! Making and removing volumes, and what is known of them.

use super::{Volumes, random};
use crate::error::{Error, Result};
use crate::model::{Nonce, Record, VolumeId};
use crate::request::{Create, List};
use crate::state::Intent;

impl Volumes {
    /// Makes a volume, or finds the one of that name.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::NoSpace`], [`Error::Damaged`], [`Error::Io`].
    pub fn create(&self, request: Create) -> Result<Record> {
        if let Some(record) = self.records.named(&request.name) {
            // It must not be removed between this answer and its making.
            let _guard = self.enter(&record.id)?;
            if self.records.find(&record.id).is_none() {
                return Err(Error::Busy { what: format!("volume {}", record.id) });
            }
            same(&record, &request)?;
            self.backend.check(&record)?;
            return Ok(record);
        }
        let (id, nonce) = (VolumeId::new(random()?), Nonce::new(random()?));
        let _reserved = self.records.reserve(request.size, |records| self.backend.available(records))?;
        let intent = self.journal.begin(Intent::Create { id: id.clone(), nonce: nonce.clone() })?;
        let made = self.backend.create(&id, &nonce, request.size, request.parameters.allocation).and_then(|inode| {
            let Create { name, size, content, parameters, .. } = request;
            let seq = self.records.next_seq();
            let record = Record::blank(seq, id.clone(), name, size, content, parameters, inode, nonce.clone());
            self.records.put(record.clone()).map(|()| record)
        });
        if made.is_err()
            && let Err(error) = self.records.remove(&id).and_then(|()| self.backend.erase(&id, &nonce))
        {
            tracing::error!(%id, %error, "a volume that could not be made could not be removed; the next start will try");
            intent.keep();
        }
        made
    }

    /// Removes a volume. One that is not there was removed before.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Busy`] while a mkfs runs, [`Error::Damaged`], [`Error::Io`].
    pub fn delete(&self, id: &VolumeId) -> Result<()> {
        let Some(record) = self.records.find(id) else { return Ok(()) };
        let _intent = self.journal.begin(Intent::Delete { id: id.clone() })?;
        self.backend.erase(id, &record.nonce)?;
        self.records.remove(id)
    }

    /// The volume with this id.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`].
    pub fn get(&self, id: &VolumeId) -> Result<Record> {
        self.records.get(id)
    }

    /// A page of volumes, and the token for the next one.
    pub fn list(&self, request: List) -> (Vec<Record>, Option<String>) {
        let (page, more) = self.records.page(request.after, request.most);
        let token = page.last().filter(|_| more).map(|last| List::token(last.seq));
        (page, token)
    }

    /// Bytes that a new volume could have.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn available(&self) -> Result<u64> {
        self.records.unpromised(|records| self.backend.available(records))
    }
}

/// Whether the volume of that name is the one that is asked for.
fn same(record: &Record, request: &Create) -> Result<()> {
    let exists = |has: String, asked: String| Err(Error::Exists { name: record.name.clone(), has, asked });
    if record.content != request.content {
        return exists(record.content.to_string(), request.content.to_string());
    }
    if !request.accepts_size(record.size) {
        let most = request.most.map_or("any".into(), |most| most.to_string());
        return exists(format!("{} bytes", record.size), format!("{} to {most} bytes", request.least));
    }
    if record.parameters != request.parameters {
        return exists(format!("{:?}", record.parameters), format!("{:?}", request.parameters));
    }
    Ok(())
}
