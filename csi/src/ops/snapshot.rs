//! Taking, finding and removing snapshots.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{Volumes, random};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::{Group, Nonce, Range, Record, Snapshot, SnapshotId, Taken, allocated, changed};
use crate::request::{List, ListSnapshots, Take};
use crate::state::Intent;

impl Volumes {
    /// Takes a snapshot of a volume, or finds the one of that name. The caller has the name's guard.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::NoSuchVolume`], [`Error::Busy`], [`Error::Unsupported`], [`Error::NoSpace`],
    /// [`Error::InUse`], [`Error::Io`].
    pub fn take(&self, request: &Take) -> Result<Snapshot> {
        if let Some(snapshot) = self.snapshots.named(&request.name) {
            if snapshot.volume != request.volume {
                let (has, asked) = (snapshot.volume.to_string(), request.volume.to_string());
                return Err(Error::Exists { name: snapshot.name, has, asked });
            }
            self.backend(snapshot.parameters.backend)?.check_snapshot(&snapshot)?;
            return Ok(snapshot);
        }
        let _guard = self.enter(&request.volume)?;
        let record = self.records.get(&request.volume)?;
        let backend = self.snapshotting(&record)?;
        let (id, nonce) = (SnapshotId::new(random()?), Nonce::new(random()?));
        let _reserved = self.promises.reserve(backend.store(), record.size, || self.unclaimed(backend.store()))?;
        let intent = self.journal.begin(intent(&id, &nonce, &record))?;
        let taken = self.hold(&record, backend, true).and_then(|hold| {
            let at = now();
            let inode = backend.snapshot(&record, &id, &nonce, &|| hold.go_on())?;
            hold.release()?;
            self.keep(&record, Picture { id: id.clone(), nonce: nonce.clone(), inode }, request.name.clone(), at, None)
        });
        if taken.is_err()
            && let Err(error) = self.undo_take(backend, &id, &nonce)
        {
            tracing::error!(%id, %error, "a snapshot that failed could not be removed; the next start will try");
            intent.keep();
        }
        taken
    }

    /// The backend of a volume that a snapshot can be taken of.
    pub(super) fn snapshotting(&self, record: &Record) -> Result<&dyn Backend> {
        let backend = self.backend_of(record)?;
        if !backend.features().snapshots {
            let why = "image, btrfs and lvm-thin can".into();
            return Err(Error::Unsupported { what: "snapshot", backend: backend.kind().as_str(), why });
        }
        backend.check(record)?;
        Ok(backend)
    }

    /// Writes the record of a snapshot whose storage is made.
    pub(super) fn keep(
        &self,
        record: &Record,
        picture: Picture,
        name: String,
        created_ns: u64,
        group: Option<Group>,
    ) -> Result<Snapshot> {
        let Picture { id, nonce, inode } = picture;
        let seq = self.snapshots.next_seq();
        let snapshot = Snapshot::of(record, Taken { seq, id, name, inode, nonce, created_ns, group });
        self.snapshots.put(snapshot.clone()).map(|()| snapshot)
    }

    pub(super) fn undo_take(&self, backend: &dyn Backend, id: &SnapshotId, nonce: &Nonce) -> Result<()> {
        self.snapshots.remove(id)?;
        backend.erase_snapshot(id, nonce).map(drop)
    }

    /// Removes a snapshot. One that is not there was removed before.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Invalid`] for one of a group, [`Error::Io`].
    pub fn drop_snapshot(&self, id: &SnapshotId) -> Result<()> {
        let Some(snapshot) = self.snapshots.find(id) else { return Ok(()) };
        if let Some(group) = &snapshot.group {
            let expected = format!("a snapshot of no group; it goes with group {}", group.id);
            return Err(Error::Invalid { field: "snapshot_id", value: id.to_string(), expected });
        }
        self.remove_snapshot(&snapshot)
    }

    pub(super) fn remove_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let _guard = self.guards.enter(snapshot.id.as_str())?;
        let _intent = self.journal.begin(Intent::DeleteSnapshot { id: snapshot.id.clone() })?;
        self.backend(snapshot.parameters.backend)?.erase_snapshot(&snapshot.id, &snapshot.nonce)?;
        self.snapshots.remove(&snapshot.id)
    }

    /// The snapshot with this id.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`].
    pub fn snapshot(&self, id: &SnapshotId) -> Result<Snapshot> {
        self.snapshots.get(id)
    }

    /// Where there is data in a snapshot, from `start` on, and its size.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`], [`Error::OutOfRange`], [`Error::Unsupported`], [`Error::Io`].
    pub fn allocated(&self, id: &SnapshotId, start: u64) -> Result<(u64, Vec<Range>)> {
        let snapshot = self.snapshots.get(id)?;
        within(&snapshot, start)?;
        let extents = self.backend(snapshot.parameters.backend)?.extents(&snapshot)?;
        Ok((snapshot.size, allocated(&extents, start)))
    }

    /// Where two snapshots of a volume may differ, from `start` on, and the target's size.
    ///
    /// # Errors
    /// As [`Volumes::allocated`], and [`Error::Invalid`] for snapshots of different volumes.
    pub fn changed(&self, base: &SnapshotId, target: &SnapshotId, start: u64) -> Result<(u64, Vec<Range>)> {
        let (base, target) = (self.snapshots.get(base)?, self.snapshots.get(target)?);
        if base.volume != target.volume {
            let expected = format!("of volume {}, as the target is", target.volume);
            return Err(Error::Invalid { field: "base_snapshot_id", value: base.id.to_string(), expected });
        }
        within(&target, start)?;
        let backend = self.backend(target.parameters.backend)?;
        Ok((target.size, changed(&backend.extents(&base)?, &backend.extents(&target)?, start)))
    }

    /// A page of snapshots, and the token for the next one.
    pub fn snapshots(&self, request: &ListSnapshots) -> (Vec<Snapshot>, Option<String>) {
        let wanted = |snapshot: &Snapshot| {
            request.volume.as_ref().is_none_or(|id| id.as_ref() == Ok(&snapshot.volume))
                && request.id.as_ref().is_none_or(|id| id.as_ref() == Ok(&snapshot.id))
        };
        let (page, more) = self.snapshots.page(request.page.after, request.page.most, wanted);
        let token = page.last().filter(|_| more).map(|last| List::token(last.seq));
        (page, token)
    }
}

fn within(snapshot: &Snapshot, start: u64) -> Result<()> {
    if start < snapshot.size {
        return Ok(());
    }
    Err(Error::OutOfRange { wanted: start, why: format!("starting_offset: the snapshot has {} bytes", snapshot.size) })
}

/// A snapshot's storage.
pub(super) struct Picture {
    pub id: SnapshotId,
    pub nonce: Nonce,
    pub inode: u64,
}

pub(super) fn intent(id: &SnapshotId, nonce: &Nonce, record: &Record) -> Intent {
    let (id, nonce, volume) = (id.clone(), nonce.clone(), record.id.clone());
    Intent::Snapshot { id, nonce, backend: record.parameters.backend, volume }
}

/// Nanoseconds since 1970; a clock that stands before that says 0.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos().try_into().unwrap_or(u64::MAX))
}
