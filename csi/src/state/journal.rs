//! The write-ahead journal: what is about to be done is on disk before anything of it is done.
//!
//! `begin` is synced before the operation starts. `end` is not: only a power cut loses it, and then nothing is mounted any
//! more, so that to resolve a finished intent once more changes nothing.
//!
//! The file has its room from the start, and beside it lies a spare one of the same size: neither what is appended nor the
//! exchange of the two, when one is full, needs a byte of the disk. So what gives room on a full disk is never refused for
//! want of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{CWD, IFlags, RenameFlags};
use rustix::io::Errno;

use super::durable::sync_directory;
use super::intent::Intent;
use super::lines::{END, Line, encode, replay};
use crate::error::{Context, Error, Result};

const NAME: &str = "journal";
/// Zeros, and as large as the journal.
const SPARE: &str = "journal.spare";
/// When there is more than this in the file, in bytes, the spare one takes its place, with the open intents only.
const COMPACT_AT: u64 = 256 << 10;
/// Bytes that each of the two files has. What is open is one intent a volume under way, and goes beyond it only by paths of
/// unusual length; then the file grows.
const ROOM: u64 = 512 << 10;

/// The journal of one state directory.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    inner: Mutex<Inner>,
    /// The number of the last intent that is known to be on disk. Held while syncing: whoever waits for it meanwhile is
    /// served by the next sync, all together.
    synced: Mutex<u64>,
}

#[derive(Debug)]
struct Inner {
    file: Arc<File>,
    /// Where the next line goes.
    length: u64,
    /// Bytes that the file has.
    room: u64,
    /// Bytes that are known to be on disk.
    known: u64,
    /// Whether all syncs of the file succeeded. The kernel tells of a lost page once: from then on only another file will do.
    sound: bool,
    spare: Option<Arc<File>>,
    next: u64,
    open: BTreeMap<u64, Intent>,
    /// What ended, but could not be written yet.
    unwritten: BTreeSet<u64>,
}

/// An intent that was begun. It ends when this is dropped: also after an error, for the caller hears of that and tries
/// again or goes back, while an intent is for callers who were never answered. It stays open when the thread panics.
#[derive(Debug)]
#[must_use]
pub struct Open {
    journal: Arc<Journal>,
    seq: u64,
    keep: bool,
}

impl Journal {
    /// Opens the journal in `directory` and returns the intents that did not end, in their order. On a full disk, too.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`].
    pub fn open(directory: &Path) -> Result<(Arc<Self>, Vec<Intent>)> {
        let path = directory.join(NAME);
        let what = || format!("read {}", path.display());
        let file = open(&path).context(what)?;
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).context(what)?;
        let read = replay(&bytes).map_err(|why| Error::Corrupt { path: path.clone(), why })?;
        // What was torn must stand neither among the lines nor before the next one.
        for place in &read.lost {
            tracing::warn!(?place, "a power cut left a part of the journal behind, which nobody had acted upon");
            file.write_all_at(&b"\n".repeat(place.len()), place.start as u64).context(what)?;
        }
        if let Some(last) = bytes[read.end..].iter().rposition(|&byte| byte != 0) {
            zero(&file, read.end as u64, (read.end + last + 1) as u64).context(what)?;
        }
        let room = bytes.len() as u64;
        if let Err(error) = zero(&file, room, ROOM) {
            tracing::warn!(%error, "no room for the journal to grow into; it takes it as it needs it");
        }
        // Before anybody acts upon what was read.
        file.sync_all().context(what)?;
        let room = file.metadata().context(what)?.len();
        let spare = match spare(directory) {
            Ok(spare) => Some(spare),
            Err(error) => {
                tracing::warn!(%error, "no room for a spare journal");
                None
            }
        };
        sync_directory(directory)?;
        let (length, intents) = (read.end as u64, read.open.values().cloned().collect());
        let (next, open, unwritten) = (read.next, read.open, BTreeSet::new());
        let file = Arc::new(file);
        let inner = Inner { file, length, room, known: length, sound: true, spare, next, open, unwritten };
        Ok((Arc::new(Self { directory: directory.to_owned(), inner: inner.into(), synced: Mutex::new(0) }), intents))
    }

    /// Writes down, durably, what is about to be done.
    ///
    /// # Errors
    /// [`Error::Io`]; then it must not be done.
    pub fn begin(self: &Arc<Self>, intent: Intent) -> Result<Open> {
        let seq = self.lock().begin(&self.directory, intent)?;
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        if *synced <= seq {
            *synced = self.sync(seq)?;
        }
        drop(synced);
        Ok(Open { journal: self.clone(), seq, keep: false })
    }

    /// Syncs, for all who began until now; returns the number of the next to begin.
    fn sync(&self, seq: u64) -> Result<u64> {
        let (file, next, length, sound) = {
            let inner = self.lock();
            (inner.file.clone(), inner.next, inner.length, inner.sound)
        };
        let done = if sound { file.sync_data() } else { Err(io::Error::other("an earlier sync failed")) };
        let mut inner = self.lock();
        match done {
            Ok(()) => {
                if Arc::ptr_eq(&file, &inner.file) {
                    inner.known = inner.known.max(length);
                }
                Ok(next)
            }
            Err(error) => {
                inner.sound = false;
                if let Err(again) = inner.renew(&self.directory) {
                    tracing::error!(%again, "nor can the journal be written anew");
                    // It was never acted upon, and no end of it says otherwise.
                    inner.open.remove(&seq);
                    return Err(Error::io("sync the journal", error));
                }
                Ok(inner.next)
            }
        }
    }

    /// Ends an intent of an earlier run, or one that was kept, that is dealt with.
    pub fn settle(&self, settled: &Intent) {
        let mut inner = self.lock();
        let seqs: Vec<u64> = inner.open.iter().filter(|(_, intent)| *intent == settled).map(|(&seq, _)| seq).collect();
        seqs.into_iter().for_each(|seq| inner.end(seq));
    }

    /// The intents that have not ended and of which `wanted` says yes.
    pub fn open_ones(&self, wanted: impl Fn(&Intent) -> bool) -> Vec<Intent> {
        self.lock().open.values().filter(|intent| wanted(intent)).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many intents have not ended.
    pub fn pending(&self) -> usize {
        self.lock().open.len()
    }
}

impl Open {
    /// Leaves the intent open for the next start of the driver: what was begun could not be undone.
    pub fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if !self.keep && !std::thread::panicking() {
            self.journal.lock().end(self.seq);
        }
    }
}

impl Inner {
    fn begin(&mut self, directory: &Path, intent: Intent) -> Result<u64> {
        let seq = self.next;
        let line = Line::Begin { seq, intent: intent.clone(), synced: self.known };
        let text = encode(&line);
        // Room for its end, and for all others': an end must not fail.
        let needed = text.len() as u64 + END * (self.open.len() + self.unwritten.len() + 1) as u64;
        if !self.sound {
            self.renew(directory)?;
        } else if self.length + needed > self.room.min(COMPACT_AT)
            && let Err(error) = self.renew(directory)
        {
            // There may be room yet.
            tracing::warn!(%error, "the journal could not be written anew");
        }
        if self.length + needed > self.room {
            let to = (self.length + needed).next_multiple_of(64 << 10);
            zero(&self.file, self.room, to).context(|| "make room in the journal")?;
            self.room = to;
        }
        self.write_ends().context(|| "write to the journal")?;
        // Encoded again where the file is another one by now.
        self.append(&Line::Begin { seq, intent: intent.clone(), synced: self.known })
            .context(|| "write to the journal")?;
        self.next += 1;
        self.open.insert(seq, intent);
        Ok(seq)
    }

    fn end(&mut self, seq: u64) {
        self.open.remove(&seq);
        self.unwritten.insert(seq);
        if let Err(error) = self.write_ends() {
            tracing::warn!(%error, seq, "the end of an intent could not be written; nothing begins before it is");
        }
    }

    fn write_ends(&mut self) -> io::Result<()> {
        while let Some(&seq) = self.unwritten.first() {
            self.append(&Line::End { seq, synced: self.known })?;
            self.unwritten.remove(&seq);
        }
        Ok(())
    }

    /// A line that is written in part has no end, and the next one begins where it does.
    fn append(&mut self, line: &Line) -> io::Result<()> {
        let text = encode(line);
        self.file.write_all_at(text.as_bytes(), self.length)?;
        self.length += text.len() as u64;
        self.room = self.room.max(self.length);
        Ok(())
    }

    /// Has the spare file take the journal's place, with what is open.
    fn renew(&mut self, directory: &Path) -> Result<()> {
        let what = || "write the journal anew".to_owned();
        if !self.sound {
            // The last exchange may not be on disk: the spare one must not be touched before it is.
            sync_directory(directory)?;
        }
        let new = match self.spare.take() {
            Some(spare) => spare,
            None => spare(directory).context(what)?,
        };
        let begin = |(&seq, intent): (&u64, &Intent)| encode(&Line::Begin { seq, intent: intent.clone(), synced: 0 });
        let text: String = self.open.iter().map(begin).collect();
        new.write_all_at(text.as_bytes(), 0).and_then(|()| new.sync_all()).context(what)?;
        let room = new.metadata().context(what)?.len();
        let (journal, spare) = (directory.join(NAME), directory.join(SPARE));
        let exchanged = match rustix::fs::renameat_with(CWD, &spare, CWD, &journal, RenameFlags::EXCHANGE) {
            // A filesystem that cannot: the old one goes, and a new spare one is made when there is need.
            Err(Errno::INVAL | Errno::NOSYS) => std::fs::rename(&spare, &journal).map(|()| false).context(what)?,
            other => other.map(|()| true).context(what)?,
        };
        let old = std::mem::replace(&mut self.file, new);
        (self.length, self.room, self.known, self.sound) = (text.len() as u64, room, 0, false);
        self.unwritten.clear();
        sync_directory(directory)?;
        (self.known, self.sound) = (self.length, true);
        self.spare = exchanged.then_some(old).filter(|old| blank(old).is_ok());
        Ok(())
    }
}

/// Opens a file of ours, or makes it.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path)?;
    if file.metadata()?.len() == 0 {
        // So that btrfs writes it in place; others do so anyway, and have no such flag.
        let _ = rustix::fs::ioctl_getflags(&file)
            .and_then(|flags| rustix::fs::ioctl_setflags(&file, flags | IFlags::NOCOW));
    }
    Ok(file)
}

/// Written, not only allocated: to write over it again takes nothing at all.
fn zero(file: &File, from: u64, to: u64) -> io::Result<()> {
    file.write_all_at(&vec![0; to.saturating_sub(from) as usize], from)
}

fn blank(file: &File) -> io::Result<()> {
    zero(file, 0, ROOM)?;
    file.set_len(ROOM)
}

fn spare(directory: &Path) -> io::Result<Arc<File>> {
    let file = open(&directory.join(SPARE))?;
    blank(&file)?;
    file.sync_all()?;
    Ok(Arc::new(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::VolumeId;

    fn id(n: u8) -> VolumeId {
        VolumeId::new([n; 16])
    }

    fn delete(n: u8) -> Intent {
        Intent::Delete { id: id(n) }
    }

    #[test]
    fn what_did_not_end_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, open) = Journal::open(dir.path()).unwrap();
        assert!(open.is_empty());
        let first = journal.begin(delete(1)).unwrap();
        let stage = Intent::Stage { id: id(2), path: "/a b/ü".into() };
        journal.begin(stage.clone()).unwrap().keep();
        drop(first);
        drop(journal);
        let (journal, open) = Journal::open(dir.path()).unwrap();
        assert_eq!(open, [stage]);
        journal.settle(&open[0]);
        assert_eq!(journal.pending(), 0);
        drop(journal);
        assert!(Journal::open(dir.path()).unwrap().1.is_empty());
    }

    #[test]
    fn many_at_once_are_all_there() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        std::thread::scope(|scope| {
            for n in 0..16 {
                let journal = &journal;
                scope.spawn(move || journal.begin(delete(n)).unwrap().keep());
            }
        });
        drop(journal);
        assert_eq!(Journal::open(dir.path()).unwrap().1.len(), 16);
    }

    #[test]
    fn it_does_not_grow() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let kept = journal.begin(delete(0)).unwrap();
        for _ in 0..5000 {
            drop(journal.begin(delete(1)).unwrap());
        }
        for name in [NAME, SPARE] {
            assert_eq!(std::fs::metadata(dir.path().join(name)).unwrap().len(), ROOM, "{name}");
        }
        kept.keep();
        drop(journal);
        assert_eq!(Journal::open(dir.path()).unwrap().1, [delete(0)]);
    }

    #[test]
    fn what_is_torn_is_gone_and_does_not_stand_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        journal.begin(delete(1)).unwrap().keep();
        let end = journal.lock().length;
        drop(journal);
        let file = OpenOptions::new().write(true).open(dir.path().join(NAME)).unwrap();
        // A line of which a block is missing, a whole one, and the beginning of a third.
        let line = encode(&Line::Begin { seq: 7, intent: delete(2), synced: end });
        let text = [&b"0123 {\0\0\0\0}\n"[..], line.as_bytes(), &line.as_bytes()[..20]].concat();
        file.write_all_at(&text, end).unwrap();
        for _ in 0..3 {
            let (journal, open) = Journal::open(dir.path()).unwrap();
            assert_eq!(open, [delete(1), delete(2)]);
            drop(journal.begin(delete(3)).unwrap());
            assert_eq!(journal.pending(), 2);
        }
    }

    /// A file that cannot be written to, as on a disk that fails.
    fn break_it(journal: &Journal) {
        let file = File::open(journal.directory.join(NAME)).unwrap();
        journal.lock().file = Arc::new(file);
    }

    #[test]
    fn an_end_that_cannot_be_written_is_written_before_anything_begins() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let first = journal.begin(delete(1)).unwrap();
        let good = journal.lock().file.clone();
        break_it(&journal);
        drop(first);
        assert_eq!(journal.pending(), 0, "it ended");
        assert!(journal.begin(delete(2)).is_err(), "its end comes first");
        journal.lock().file = good;
        journal.begin(delete(3)).unwrap().keep();
        drop(journal);
        assert_eq!(Journal::open(dir.path()).unwrap().1, [delete(3)]);
    }

    #[test]
    fn after_a_failed_sync_another_file_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let first = journal.begin(delete(1)).unwrap();
        // Written lines, of which nobody knows whether they are on disk.
        let before = journal.lock().file.clone();
        journal.lock().sound = false;
        journal.begin(delete(2)).unwrap().keep();
        assert!(!Arc::ptr_eq(&before, &journal.lock().file) && journal.lock().sound);
        first.keep();
        // Nor may it be trusted while there is no other one.
        journal.lock().sound = false;
        std::fs::rename(dir.path(), dir.path().with_extension("away")).unwrap();
        assert!(journal.begin(delete(3)).is_err());
        std::fs::rename(dir.path().with_extension("away"), dir.path()).unwrap();
        drop(journal.begin(delete(4)).unwrap());
        drop(journal);
        assert_eq!(Journal::open(dir.path()).unwrap().1, [delete(1), delete(2)]);
    }
}
