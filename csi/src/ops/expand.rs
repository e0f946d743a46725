//! Volumes made larger: first their storage, then their device, then what is on it.

use super::Volumes;
use super::provision::coarse;
use crate::backend::Attached;
use crate::error::{Context, Error, Result};
use crate::model::{Record, VolumeId};
use crate::request::{Expand, NodeExpand, TargetPath};
use crate::state::Intent;
use crate::sys::grow;
use crate::sys::target::Target;

impl Volumes {
    /// Makes a volume's storage larger, in use or not, and says whether the node has to do its part.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::Invalid`], [`Error::OutOfRange`], [`Error::NoSpace`], [`Error::Io`].
    pub fn expand(&self, request: &Expand) -> Result<(u64, bool)> {
        let record = self.records.get(&request.id)?;
        if let Some(usage) = &request.usage {
            usage.fits(record.content, &record.id)?;
        }
        let to = request.size(record.size, record.content)?;
        let record = self.enlarge(record, to, request.most)?;
        let node = match self.device(&record)? {
            Some(device) => device.size()?.is_some_and(|size| size < record.size),
            None => false,
        };
        Ok((record.size, node || record.filled.is_some()))
    }

    fn enlarge(&self, record: Record, to: u64, most: Option<u64>) -> Result<Record> {
        if to <= record.size {
            return Ok(record);
        }
        let backend = self.backend_of(&record)?;
        if !backend.features().expand {
            // Not FAILED_PRECONDITION, by which callers would take it that it can grow when it is not in use.
            let why =
                format!("volumes of the {} backend keep the size that they were made with", backend.kind().as_str());
            return Err(Error::OutOfRange { wanted: to, why });
        }
        let to = to.next_multiple_of(backend.granule());
        if most.is_some_and(|most| to > most) {
            return Err(coarse(backend, to));
        }
        backend.check(&record)?;
        let more = to - record.growing.unwrap_or(record.size).min(to);
        let _reserved = self.promises.reserve(backend.store(), more, || self.unclaimed(backend.store()))?;
        let intent = self.journal.begin(Intent::Expand { id: record.id.clone() })?;
        match self.enlarge_to(&record, to) {
            Ok(record) => Ok(record),
            Err(error) => {
                // Nobody has seen the new end: the device has the size that it had.
                let undone = backend
                    .resize(&record.growing(to), record.size)
                    .and_then(|()| self.records.put(record.grown(record.size)));
                if let Err(undo) = undone {
                    tracing::error!(id = %record.id, %undo, "growth could not be undone; the next start goes on with it");
                    intent.keep();
                }
                Err(error)
            }
        }
    }

    fn enlarge_to(&self, record: &Record, to: u64) -> Result<Record> {
        // From here on it may have any size between the two.
        let growing = record.growing(to.max(record.growing.unwrap_or(0)));
        self.records.put(growing.clone())?;
        self.backend_of(record)?.resize(&growing, to)?;
        let grown = record.grown(to);
        self.records.put(grown.clone())?;
        Ok(grown)
    }

    /// Goes on with growth that was cut short.
    pub(super) fn resume_growth(&self, id: &VolumeId) -> Result<()> {
        let record = self.records.get(id)?;
        record.growing.map_or(Ok(()), |to| self.enlarge_to(&record, to).map(drop))
    }

    /// Makes the device and the filesystem as large as the storage is, or as the caller asks.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`], [`Error::NotFound`] when the volume is not at the path, and as [`Volumes::expand`].
    pub fn node_expand(&self, request: &NodeExpand) -> Result<u64> {
        let record = self.records.get(&request.id)?;
        if let Some(usage) = &request.usage {
            usage.fits(record.content, &record.id)?;
        }
        let missing = || Error::NotFound { what: "the volume at", path: request.path.absolute() };
        let device = self.device(&record)?.ok_or_else(missing)?;
        // Nothing is at a block volume's staging path, which is as good a name for it as its target.
        let staged = |path: &TargetPath| self.is_staged_block(&record, path);
        if !staged(&request.path) && !request.staging.as_ref().is_some_and(staged) {
            let found = Target::open(&request.path)?.ok_or_else(missing)?.look()?;
            if !device.is(&found) {
                return Err(missing());
            }
        }
        let wanted = Expand { id: request.id.clone(), least: request.least, most: request.most, usage: None };
        let to = wanted.size(record.size, record.content)?;
        let record = self.enlarge(record, to, request.most)?;
        // From here on it waits for the volume's own disk.
        let _noted = self.probes.note(record.id.as_str());
        if device.size()?.is_some_and(|size| size < record.size) {
            device.take_size()?;
        }
        if let Some(root) = self.behind(&record, device.as_ref())? {
            self.fill(&record, &root)?;
        }
        Ok(record.size)
    }

    /// The root of a filesystem that does not fill its device.
    fn behind(&self, record: &Record, device: &dyn Attached) -> Result<Option<std::fs::File>> {
        if record.filled.is_none() {
            return Ok(None);
        }
        let root = self.open_root(device)?;
        root.map(Some).ok_or_else(|| Error::State {
            what: format!("volume {}", record.id),
            expected: "mounted, so that its filesystem can grow".into(),
            found: "no mount of it below the kubelet's directory".into(),
        })
    }

    /// Makes a filesystem fill its device, and writes down that it does.
    pub(super) fn fill(&self, record: &Record, root: &std::fs::File) -> Result<()> {
        if let Some(fs) = record.content.filesystem() {
            if !grow::allowed(fs) {
                let (what, expected) = (format!("volume {}", record.id), "CAP_SYS_RESOURCE, to grow it in use".into());
                let found = "a driver without it; it grows when it is staged next".into();
                return Err(Error::State { what, expected, found });
            }
            grow::filesystem(root, fs, record.size)?;
            root.sync_all().context(|| format!("sync volume {}", record.id))?;
        }
        self.records.put(record.filled())
    }
}
