//! The volumes and snapshots that there are: in memory for answers, on disk for good.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::durable::{sync_directory, write_durably};
use crate::error::{Context, Error, Result};
use crate::model::{Record, Snapshot, SnapshotId, VolumeId};

/// Something that is known durably, in a file of its own.
pub trait Entry: Clone + Serialize + std::fmt::Debug {
    /// Its id.
    type Id: Ord + Clone + Display + std::fmt::Debug;
    /// The directory below the state directory.
    const DIRECTORY: &str;
    /// Our name of it.
    fn id(&self) -> &Self::Id;
    /// The caller's name of it; no two have the same. None for what callers name by something else.
    fn name(&self) -> Option<&str>;
    /// Its place in lists.
    fn seq(&self) -> u64;
    /// Reads it from its file's text.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    fn parse(text: &str) -> std::result::Result<Self, String>;
    /// That there is none with this id.
    fn missing(id: &Self::Id) -> Error;
}

impl Entry for Record {
    type Id = VolumeId;
    const DIRECTORY: &str = "volumes";
    fn id(&self) -> &VolumeId {
        &self.id
    }
    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }
    fn seq(&self) -> u64 {
        self.seq
    }
    fn parse(text: &str) -> std::result::Result<Self, String> {
        Self::parse(text)
    }
    fn missing(id: &VolumeId) -> Error {
        Error::NoSuchVolume { id: id.to_string() }
    }
}

impl Entry for Snapshot {
    type Id = SnapshotId;
    const DIRECTORY: &str = "snapshots";
    fn id(&self) -> &SnapshotId {
        &self.id
    }
    fn name(&self) -> Option<&str> {
        // One of a group has its group's.
        self.group.is_none().then_some(self.name.as_str())
    }
    fn seq(&self) -> u64 {
        self.seq
    }
    fn parse(text: &str) -> std::result::Result<Self, String> {
        Self::parse(text)
    }
    fn missing(id: &SnapshotId) -> Error {
        Error::NoSuchSnapshot { id: id.to_string() }
    }
}

/// All entries of one kind of one state directory.
#[derive(Debug)]
pub struct Records<T: Entry> {
    directory: PathBuf,
    inner: Mutex<Inner<T>>,
}

#[derive(Debug)]
struct Inner<T: Entry> {
    by_id: BTreeMap<T::Id, T>,
    by_name: BTreeMap<String, T::Id>,
    by_seq: BTreeMap<u64, T::Id>,
    next: u64,
}

impl<T: Entry> Records<T> {
    /// Reads all records below the state directory.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] when one is not understood: a volume must not vanish silently.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let directory = state_dir.join(T::DIRECTORY);
        std::fs::create_dir_all(&directory).context(|| format!("create {}", directory.display()))?;
        let mut inner = Inner { by_id: BTreeMap::new(), by_name: BTreeMap::new(), by_seq: BTreeMap::new(), next: 1 };
        for entry in std::fs::read_dir(&directory).context(|| format!("list {}", directory.display()))? {
            let path = entry.context(|| format!("list {}", directory.display()))?.path();
            let corrupt = |why: String| Error::Corrupt { path: path.clone(), why };
            if path.extension().is_some_and(|extension| extension == "tmp") {
                // Written beside its name and never renamed: it never counted.
                std::fs::remove_file(&path).context(|| format!("remove {}", path.display()))?;
                continue;
            }
            let text = std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
            let record = T::parse(&text).map_err(corrupt)?;
            if path.file_name() != Some(file_name(record.id()).as_ref()) {
                return Err(corrupt(format!("it is the record of {}", record.id())));
            }
            if let Some(name) = inner.taken(&record) {
                return Err(corrupt(format!("another one has the name {name:?}")));
            }
            inner.insert(record);
        }
        sync_directory(state_dir)?;
        Ok(Self { directory, inner: Mutex::new(inner) })
    }

    /// The one with this id.
    ///
    /// # Errors
    /// [`Error::NoSuchVolume`] or [`Error::NoSuchSnapshot`].
    pub fn get(&self, id: &T::Id) -> Result<T> {
        self.find(id).ok_or_else(|| T::missing(id))
    }

    /// The one with this id, if there is one.
    pub fn find(&self, id: &T::Id) -> Option<T> {
        self.lock().by_id.get(id).cloned()
    }

    /// The one with this name, if there is one.
    pub fn named(&self, name: &str) -> Option<T> {
        let inner = self.lock();
        inner.by_id.get(inner.by_name.get(name)?).cloned()
    }

    /// Up to `most` for which `wanted` says yes, with a sequence number above `after`, in order, and whether more
    /// follow.
    pub fn page(&self, after: u64, most: usize, wanted: impl Fn(&T) -> bool) -> (Vec<T>, bool) {
        let inner = self.lock();
        let all = inner.by_seq.range(after.saturating_add(1)..).map(|(_, id)| &inner.by_id[id]);
        let mut rest = all.filter(|entry| wanted(entry)).cloned();
        let page = rest.by_ref().take(most).collect();
        (page, rest.next().is_some())
    }

    /// All of them.
    pub fn all(&self) -> Vec<T> {
        self.lock().by_id.values().cloned().collect()
    }

    /// A sequence number for a new one.
    pub fn next_seq(&self) -> u64 {
        let mut inner = self.lock();
        inner.next += 1;
        inner.next - 1
    }

    /// Writes one durably; it counts once this returns.
    ///
    /// # Errors
    /// [`Error::State`] when another one has its name, else [`Error::Io`].
    pub fn put(&self, record: T) -> Result<()> {
        if let Some(name) = self.lock().taken(&record) {
            let (what, expected) = (format!("the name {name:?}"), format!("free, or of {}", record.id()));
            return Err(Error::State { what, expected, found: "one that another has".into() });
        }
        let json = serde_json::to_vec_pretty(&record).expect("a record has only strings and numbers");
        write_durably(&self.directory, &file_name(record.id()), &json)?;
        self.lock().insert(record);
        Ok(())
    }

    /// Removes one durably.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self, id: &T::Id) -> Result<()> {
        let path = self.directory.join(file_name(id));
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", path.display()), error));
            }
            _ => sync_directory(&self.directory)?,
        }
        let mut inner = self.lock();
        if let Some(record) = inner.by_id.remove(id) {
            record.name().and_then(|name| inner.by_name.remove(name));
            inner.by_seq.remove(&record.seq());
        }
        Ok(())
    }

    /// Held for a moment only: never over a system call.
    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Entry> Inner<T> {
    /// The name of an entry, when another one has it.
    fn taken<'a>(&self, record: &'a T) -> Option<&'a str> {
        record.name().filter(|name| self.by_name.get(*name).is_some_and(|id| id != record.id()))
    }

    fn insert(&mut self, record: T) {
        self.next = self.next.max(record.seq() + 1);
        if let Some(name) = record.name() {
            self.by_name.insert(name.to_owned(), record.id().clone());
        }
        self.by_seq.insert(record.seq(), record.id().clone());
        self.by_id.insert(record.id().clone(), record);
    }
}

fn file_name(id: &impl Display) -> String {
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
        let records = Records::<Record>::open(dir.path()).unwrap();
        for (seq, name) in [(1, "a"), (2, "b"), (3, "c")] {
            records.put(record(seq, name)).unwrap();
        }
        records.remove(&record(2, "b").id).unwrap();
        std::fs::write(dir.path().join("volumes/x.json.tmp"), "{").unwrap();
        let records = Records::<Record>::open(dir.path()).unwrap();
        assert_eq!(records.named("a").unwrap(), record(1, "a"));
        assert_eq!(records.named("b"), None);
        assert_eq!(records.next_seq(), 4);
        let (page, more) = records.page(0, 1, |_| true);
        assert_eq!((page, more), (vec![record(1, "a")], true));
        assert_eq!(records.page(1, usize::MAX, |_| true), (vec![record(3, "c")], false));
    }

    #[test]
    fn a_damaged_record_stops_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::<Record>::open(dir.path()).unwrap();
        records.put(record(1, "a")).unwrap();
        let path = dir.path().join("volumes").join(file_name(&record(1, "a").id));
        let good = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &good[..good.len() - 3]).unwrap();
        assert!(matches!(Records::<Record>::open(dir.path()), Err(Error::Corrupt { .. })));
        std::fs::write(&path, good.replace("kwl-01", "kwl-02")).unwrap();
        assert!(matches!(Records::<Record>::open(dir.path()), Err(Error::Corrupt { .. })));
    }
}
