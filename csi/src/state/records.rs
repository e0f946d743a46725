//! The volumes that there are: in memory for answers, on disk for good.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::durable::{sync_directory, write_durably};
use crate::error::{Context, Error, Result};
use crate::model::{Record, VolumeId};

/// All records of one state directory.
#[derive(Debug)]
pub struct Records {
    directory: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    by_id: BTreeMap<VolumeId, Record>,
    by_name: BTreeMap<String, VolumeId>,
    by_seq: BTreeMap<u64, VolumeId>,
    next: u64,
    /// Bytes promised to volumes that have no record yet.
    reserved: u64,
}

/// Bytes of the pool that are promised to a volume under way.
#[derive(Debug)]
pub struct Reservation<'a> {
    records: &'a Records,
    bytes: u64,
}

impl Records {
    /// Reads all records below the state directory.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] when one is not understood: a volume must not vanish silently.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let directory = state_dir.join("volumes");
        std::fs::create_dir_all(&directory).context(|| format!("create {}", directory.display()))?;
        let mut inner = Inner { next: 1, ..Inner::default() };
        for entry in std::fs::read_dir(&directory).context(|| format!("list {}", directory.display()))? {
            let path = entry.context(|| format!("list {}", directory.display()))?.path();
            let corrupt = |why: String| Error::Corrupt { path: path.clone(), why };
            if path.extension().is_some_and(|extension| extension == "tmp") {
                // Written beside its name and never renamed: it never counted.
                std::fs::remove_file(&path).context(|| format!("remove {}", path.display()))?;
                continue;
            }
            let text = std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
            let record = Record::parse(&text).map_err(corrupt)?;
            if path.file_name() != Some(file_name(&record.id).as_ref()) {
                return Err(corrupt(format!("it is the record of volume {}", record.id)));
            }
            if inner.by_name.contains_key(&record.name) {
                return Err(corrupt(format!("another volume has the name {:?}", record.name)));
            }
            inner.insert(record);
        }
        sync_directory(state_dir)?;
        Ok(Self { directory, inner: Mutex::new(inner) })
    }

    /// The volume with this id.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`].
    pub fn get(&self, id: &VolumeId) -> Result<Record> {
        self.find(id).ok_or_else(|| Error::NoSuchVolume { id: id.to_string() })
    }

    /// The volume with this id, if there is one.
    pub fn find(&self, id: &VolumeId) -> Option<Record> {
        self.lock().by_id.get(id).cloned()
    }

    /// The volume with this name, if there is one.
    pub fn named(&self, name: &str) -> Option<Record> {
        let inner = self.lock();
        inner.by_id.get(inner.by_name.get(name)?).cloned()
    }

    /// Up to `most` volumes with a sequence number above `after`, in order, and whether more follow.
    pub fn page(&self, after: u64, most: usize) -> (Vec<Record>, bool) {
        let inner = self.lock();
        let mut rest = inner.by_seq.range(after.saturating_add(1)..).map(|(_, id)| inner.by_id[id].clone());
        let page = rest.by_ref().take(most).collect();
        (page, rest.next().is_some())
    }

    /// All volumes.
    pub fn all(&self) -> Vec<Record> {
        self.lock().by_id.values().cloned().collect()
    }

    /// A sequence number for a new volume.
    pub fn next_seq(&self) -> u64 {
        let mut inner = self.lock();
        inner.next += 1;
        inner.next - 1
    }

    /// Writes a record durably; it counts once this returns.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put(&self, record: Record) -> Result<()> {
        let json = serde_json::to_vec_pretty(&record).expect("a record has only strings and numbers");
        write_durably(&self.directory, &file_name(&record.id), &json)?;
        self.lock().insert(record);
        Ok(())
    }

    /// Removes a record durably.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self, id: &VolumeId) -> Result<()> {
        let path = self.directory.join(file_name(id));
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", path.display()), error));
            }
            _ => sync_directory(&self.directory)?,
        }
        let mut inner = self.lock();
        if let Some(record) = inner.by_id.remove(id) {
            inner.by_name.remove(&record.name);
            inner.by_seq.remove(&record.seq);
        }
        Ok(())
    }

    /// Promises `bytes` to a volume under way. `available` says how many there are that no record has a claim on;
    /// no other promise is made meanwhile.
    ///
    /// # Errors
    /// [`Error::NoSpace`], or what `available` says.
    pub fn reserve(&self, bytes: u64, available: impl FnOnce(&[Record]) -> Result<u64>) -> Result<Reservation<'_>> {
        let mut inner = self.lock();
        let available = inner.unpromised(available)?;
        if bytes > available {
            return Err(Error::NoSpace { wanted: bytes, available });
        }
        inner.reserved += bytes;
        Ok(Reservation { records: self, bytes })
    }

    /// How many bytes could be promised now.
    ///
    /// # Errors
    /// What `available` says.
    pub fn unpromised(&self, available: impl FnOnce(&[Record]) -> Result<u64>) -> Result<u64> {
        self.lock().unpromised(available)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn insert(&mut self, record: Record) {
        self.next = self.next.max(record.seq + 1);
        self.by_name.insert(record.name.clone(), record.id.clone());
        self.by_seq.insert(record.seq, record.id.clone());
        self.by_id.insert(record.id.clone(), record);
    }

    fn unpromised(&self, available: impl FnOnce(&[Record]) -> Result<u64>) -> Result<u64> {
        let records: Vec<Record> = self.by_id.values().cloned().collect();
        Ok(available(&records)?.saturating_sub(self.reserved))
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.records.lock().reserved -= self.bytes;
    }
}

fn file_name(id: &VolumeId) -> String {
    format!("{id}.json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Content, Nonce, Parameters};

    fn record(seq: u64, name: &str) -> Record {
        let id = VolumeId::new([seq as u8; 16]);
        Record::blank(seq, id, name.into(), 4096, Content::Raw, Parameters::default(), seq, Nonce::new([9; 16]))
    }

    #[test]
    fn records_survive() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        for (seq, name) in [(1, "a"), (2, "b"), (3, "c")] {
            records.put(record(seq, name)).unwrap();
        }
        records.remove(&record(2, "b").id).unwrap();
        std::fs::write(dir.path().join("volumes/x.json.tmp"), "{").unwrap();
        let records = Records::open(dir.path()).unwrap();
        assert_eq!(records.named("a").unwrap(), record(1, "a"));
        assert_eq!(records.named("b"), None);
        assert_eq!(records.next_seq(), 4);
        let (page, more) = records.page(0, 1);
        assert_eq!((page, more), (vec![record(1, "a")], true));
        assert_eq!(records.page(1, usize::MAX), (vec![record(3, "c")], false));
    }

    #[test]
    fn a_damaged_record_stops_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        records.put(record(1, "a")).unwrap();
        let path = dir.path().join("volumes").join(file_name(&record(1, "a").id));
        let good = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &good[..good.len() - 3]).unwrap();
        assert!(matches!(Records::open(dir.path()), Err(Error::Corrupt { .. })));
        std::fs::write(&path, good.replace("kwl-01", "kwl-02")).unwrap();
        assert!(matches!(Records::open(dir.path()), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn no_byte_is_promised_twice() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let first = records.reserve(60, |_| Ok(100)).unwrap();
        let refused = records.reserve(41, |_| Ok(100)).unwrap_err();
        assert!(matches!(refused, Error::NoSpace { wanted: 41, available: 40 }));
        let second = records.reserve(40, |_| Ok(100)).unwrap();
        assert_eq!(records.unpromised(|_| Ok(100)).unwrap(), 0);
        drop((first, second));
        assert_eq!(records.unpromised(|_| Ok(100)).unwrap(), 100);
    }
}
