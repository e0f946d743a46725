//! Making and removing volumes, and what is known of them.

use super::hold::Hold;
use super::{Volumes, random};
use crate::backend::{Backend, Made, New, Origin};
use crate::error::{Error, Result};
use crate::model::{BackendKind, Content, Mutable, Nonce, Record, Snapshot, Source, State, VolumeId};
use crate::request::{Create, List, Modify};
use crate::state::{Guard, Intent};

/// What a volume is made from, as it is.
enum Held {
    Nothing,
    Snapshot(Box<Snapshot>),
    Volume(Box<Record>, Guard, Hold),
}

impl Held {
    fn origin(&self) -> Option<Origin<'_>> {
        match self {
            Self::Nothing => None,
            Self::Snapshot(snapshot) => Some(Origin::Snapshot(snapshot)),
            Self::Volume(record, ..) => Some(Origin::Volume(record)),
        }
    }

    /// Its size; whether there is data in it, and how far its filesystem reaches.
    fn content(&self) -> (u64, bool, u64) {
        match self {
            Self::Nothing => (0, false, 0),
            Self::Snapshot(snapshot) => (snapshot.size, snapshot.formatted, snapshot.filled),
            Self::Volume(record, ..) => {
                (record.size, record.state() == State::Formatted, record.filled.unwrap_or(record.size))
            }
        }
    }

    fn go_on(&self) -> std::io::Result<()> {
        if let Self::Volume(_, _, hold) = self { hold.go_on() } else { Ok(()) }
    }

    fn release(self) -> Result<()> {
        if let Self::Volume(_, _guard, hold) = self { hold.release() } else { Ok(()) }
    }
}

impl Volumes {
    /// Makes a volume, or finds the one of that name.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::NoSpace`], [`Error::NoSuchSnapshot`], [`Error::NoSuchVolume`],
    /// [`Error::SourceElsewhere`], [`Error::Damaged`], [`Error::Io`].
    pub fn create(&self, request: Create) -> Result<Record> {
        if let Some(record) = self.records.named(&request.name) {
            // It must not be removed between this answer and its making.
            let _guard = self.enter(&record.id)?;
            if self.records.find(&record.id).is_none() {
                return Err(Error::Busy { what: format!("volume {}", record.id) });
            }
            same(&record, &request)?;
            self.backend_of(&record)?.check(&record)?;
            return Ok(record);
        }
        let backend = self.wanted_backend(request.parameters.backend)?;
        backend.admit(&request.parameters)?;
        if request.mutable != Mutable::default() && !backend.features().modify {
            return Err(fixed(backend));
        }
        // Reserved before anybody is made to wait for it; a source is known in size already.
        let floor = self.source_size(&request, backend)?;
        let size = request.size(floor)?.next_multiple_of(backend.granule());
        if !request.accepts_size(size) {
            return Err(coarse(backend, size));
        }
        let _reserved = self.promises.reserve(backend.store(), size, || self.unclaimed(backend.store()))?;
        let (id, nonce) = (VolumeId::new(random()?), Nonce::new(random()?));
        let from = match &request.source {
            Some(Source::Volume(id)) => Some(id.clone()),
            _ => None,
        };
        let intent = Intent::Create { id: id.clone(), nonce: nonce.clone(), backend: backend.kind(), from };
        let intent = self.journal.begin(intent)?;
        let made = self.source(&request, backend).and_then(|held| {
            let new = New {
                id: &id,
                nonce: &nonce,
                size,
                most: request.most,
                content: request.content,
                parameters: &request.parameters,
            };
            let Made { inode, size } = backend.create(new, held.origin(), &|| held.go_on())?;
            let (_, formatted, filled) = held.content();
            held.release()?;
            let Create { name, content, parameters, source, mutable, ephemeral, claim, .. } = request;
            let seq = self.records.next_seq();
            let mut record = Record::blank(seq, id.clone(), name, size, content, parameters, inode, nonce.clone());
            (record.mutable, record.ephemeral, record.claim) = (mutable, ephemeral, claim);
            let record = match source {
                Some(source) => record.from_source(source, formatted, filled),
                None => record,
            };
            self.records.put(record.clone()).map(|()| record)
        });
        if made.is_err()
            && let Err(error) = self.records.remove(&id).and_then(|()| backend.erase(&id, &nonce))
        {
            tracing::error!(%id, %error, "a volume that could not be made could not be removed; the next start will try");
            intent.keep();
        }
        made
    }

    fn source_size(&self, request: &Create, backend: &dyn Backend) -> Result<u64> {
        // An id that we issue, on another node perhaps.
        let missing = |what, id: String, error| match request.placed {
            true => Error::SourceElsewhere { what, id },
            false => error,
        };
        match &request.source {
            None => Ok(0),
            Some(Source::Snapshot(id)) => match self.snapshots.get(id) {
                Ok(it) => fits(request, backend, it.parameters.backend, it.content).map(|()| it.size),
                Err(error) => Err(missing("snapshot", id.to_string(), error)),
            },
            Some(Source::Volume(id)) => match self.records.get(id) {
                Ok(it) => fits(request, backend, it.parameters.backend, it.content).map(|()| it.size),
                Err(error) => Err(missing("volume", id.to_string(), error)),
            },
        }
    }

    /// Finds what a volume is to be made from, and sees to it that it does not change meanwhile.
    fn source(&self, request: &Create, backend: &dyn Backend) -> Result<Held> {
        match &request.source {
            None => Ok(Held::Nothing),
            Some(Source::Snapshot(id)) => {
                let snapshot = self.snapshots.get(id)?;
                backend.check_snapshot(&snapshot)?;
                Ok(Held::Snapshot(Box::new(snapshot)))
            }
            Some(Source::Volume(id)) => {
                let guard = self.enter(id)?;
                let record = self.records.get(id)?;
                let hold = self.hold(&record, backend, true)?;
                Ok(Held::Volume(Box::new(record), guard, hold))
            }
        }
    }

    /// Removes a volume. One that is not there was removed before.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Busy`] while a mkfs runs, [`Error::Damaged`], [`Error::Io`].
    pub fn delete(&self, id: &VolumeId) -> Result<()> {
        let Some(record) = self.records.find(id) else { return Ok(()) };
        let backend = self.backend_of(&record)?;
        // Of a block device that is staged, nothing is mounted.
        if record.content == Content::Raw
            && let Some(used) = self.uses.of(id).first()
        {
            let by = format!("it is staged or published at {}", used.path.display());
            return Err(Error::InUse { id: id.clone(), by });
        }
        // An image knows that a device is attached to it; what has none of its own is in use where it is mounted.
        if backend.kind() != BackendKind::Image
            && let Some(tree) = backend.attached(&record)?
            && let Some(mount) = self.mounts(tree.as_ref())?.first()
        {
            let by = format!("it is mounted at {}", mount.target.display());
            return Err(Error::InUse { id: id.clone(), by });
        }
        let _intent = self.journal.begin(Intent::Delete { id: id.clone() })?;
        backend.discard(&record)?;
        self.records.remove(id)?;
        self.uses.forget(id);
        Ok(())
    }

    /// Changes what of a volume can change.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::Invalid`], [`Error::Io`].
    pub fn modify(&self, request: &Modify) -> Result<()> {
        let record = self.records.get(&request.id)?;
        let mutable = record.mutable.with(&request.parameters)?;
        let backend = self.backend_of(&record)?;
        if !backend.features().modify {
            return Err(fixed(backend));
        }
        if mutable != record.mutable {
            let mut changed = record.clone();
            changed.mutable = mutable;
            self.records.put(changed)?;
        }
        // Whatever was said before: what is attached is to have it now. A staging puts it into effect, too.
        backend.attached(&record)?.map_or(Ok(()), |device| device.tune(&mutable))
    }

    /// The volume with this id.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`].
    pub fn get(&self, id: &VolumeId) -> Result<Record> {
        self.records.get(id)
    }

    /// A page of volumes, and the token for the next one. Inline volumes are their pods' and not listed.
    pub fn list(&self, request: List) -> (Vec<Record>, Option<String>) {
        let (page, more) = self.records.page(request.after, request.most, |record| !record.ephemeral);
        let token = page.last().filter(|_| more).map(|last| List::token(last.seq));
        (page, token)
    }

    /// Bytes that new volumes of this backend could have, and that one of them could. Without a name it is the one that
    /// a class without a name has; where that is not served, the first that is.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a backend that is not served, [`Error::Io`].
    pub fn available(&self, kind: Option<BackendKind>) -> Result<(u64, u64)> {
        let usual = BackendKind::default();
        let first = || self.backends.keys().find(|&&kind| kind == usual).or(self.backends.keys().next());
        let backend = self.wanted_backend(kind.or_else(|| first().copied()).unwrap_or(usual))?;
        let all = self.promises.unpromised(backend.store(), || self.unclaimed(backend.store()))?;
        Ok((all, backend.largest()?.unwrap_or(all).min(all)))
    }
}

/// No size of the backend's lies within what is asked for.
pub(super) fn coarse(backend: &dyn Backend, wanted: u64) -> Error {
    let why =
        format!("limit_bytes is less; sizes of {} are multiples of {}", backend.kind().as_str(), backend.granule());
    Error::OutOfRange { wanted, why }
}

/// Nothing of the backend's volumes can be changed.
fn fixed(backend: &dyn Backend) -> Error {
    let expected = "that of a volume with a device of its own; others have no mutable parameters".into();
    Error::Invalid { field: "mutable_parameters", value: backend.kind().as_str().into(), expected }
}

/// Whether a volume like this one can be made from another of that backend and content.
fn fits(request: &Create, backend: &dyn Backend, kind: BackendKind, content: Content) -> Result<()> {
    let field = "volume_content_source";
    let wrong = |has: String, asked: String| {
        let expected = format!("{asked}, as the new volume's class and capability say");
        Err(Error::Invalid { field, value: has, expected })
    };
    if kind != backend.kind() {
        return wrong(kind.as_str().into(), backend.kind().as_str().into());
    }
    if content != request.content {
        return wrong(content.to_string(), request.content.to_string());
    }
    if !backend.features().snapshots {
        let expected = "of a backend that can make volumes from others: image, btrfs or lvm-thin".into();
        return Err(Error::Invalid { field, value: kind.as_str().into(), expected });
    }
    Ok(())
}

/// Whether the volume of that name is the one that is asked for.
fn same(record: &Record, request: &Create) -> Result<()> {
    let exists = |has: String, asked: String| Err(Error::Exists { name: record.name.clone(), has, asked });
    if record.ephemeral != request.ephemeral {
        let kind = |inline| if inline { "an inline volume" } else { "a claim's volume" }.to_owned();
        return exists(kind(record.ephemeral), kind(request.ephemeral));
    }
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
    if record.source != request.source {
        return exists(format!("{:?}", record.source), format!("{:?}", request.source));
    }
    Ok(())
}
