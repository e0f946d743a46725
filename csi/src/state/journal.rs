//! The write-ahead journal: what is about to be done is on disk before anything of it is done.
//!
//! A line is `<8 hex digits> <JSON>\n`, the digits being the start of the JSON's SHA-256. `{"begin":{"seq":N,...}}` is
//! synced before the operation starts; `{"end":{"seq":N}}` is not, for to carry out a finished intent once more changes
//! nothing. A last line that was cut short was never acted upon and is dropped; damage anywhere else stops the driver.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::durable::write_durably;
use crate::error::{Context, Error, Result};
use crate::model::{BackendKind, GroupId, Nonce, SnapshotId, VolumeId, hex};

const NAME: &str = "journal";
/// When the file is longer than this, in bytes, it is written anew with the open intents only. It cannot grow beyond
/// this plus what is open, and that is one intent a volume under way.
const COMPACT_AT: u64 = 256 << 10;

/// What is about to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "op", deny_unknown_fields)]
pub enum Intent {
    /// Make a volume's storage and record. Undone when there is no record.
    Create {
        /// The volume to be.
        id: VolumeId,
        /// What is on its storage.
        nonce: Nonce,
        /// Where that is.
        #[serde(default)]
        backend: BackendKind,
        /// A volume that is held still meanwhile.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<VolumeId>,
    },
    /// Remove storage and record. Carried on with.
    Delete {
        /// The volume.
        id: VolumeId,
    },
    /// Bring a volume's storage to the size that its record names. Carried on with.
    Expand {
        /// The volume.
        id: VolumeId,
    },
    /// Take a snapshot. Undone when there is no record of it; the volume's filesystem is thawed in any case.
    Snapshot {
        /// The snapshot to be.
        id: SnapshotId,
        /// What is on its storage.
        nonce: Nonce,
        /// Where that is.
        backend: BackendKind,
        /// The volume that it is of.
        volume: VolumeId,
    },
    /// Take snapshots of several volumes. All are undone unless all are there.
    Group {
        /// The group to be.
        id: GroupId,
        /// How many there will be.
        members: usize,
    },
    /// Remove a group's snapshots. Carried on with.
    DeleteGroup {
        /// The group.
        id: GroupId,
    },
    /// Remove a snapshot's storage and record. Carried on with.
    DeleteSnapshot {
        /// The snapshot.
        id: SnapshotId,
    },
    /// Format where needed, attach, mount. Undone.
    Stage {
        /// The volume.
        id: VolumeId,
        /// The path to mount at.
        path: PathBuf,
    },
    /// Unmount, detach. Carried on with.
    Unstage {
        /// The volume.
        id: VolumeId,
        /// The path it is mounted at.
        path: PathBuf,
    },
    /// Mount at a pod's target. Undone.
    Publish {
        /// The volume.
        id: VolumeId,
        /// The target.
        path: PathBuf,
    },
    /// Unmount from a pod's target. Carried on with.
    Unpublish {
        /// The volume.
        id: VolumeId,
        /// The target.
        path: PathBuf,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Line {
    Begin { seq: u64, intent: Intent },
    End { seq: u64 },
}

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
    length: u64,
    next: u64,
    open: BTreeMap<u64, Intent>,
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
    /// Opens the journal in `directory` and returns the intents that did not end, in their order.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`].
    pub fn open(directory: &Path) -> Result<(Arc<Self>, Vec<Intent>)> {
        let path = directory.join(NAME);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::io(format!("read {}", path.display()), error)),
        };
        let (open, next) = replay(&bytes).map_err(|why| Error::Corrupt { path, why })?;
        let (file, length) = rewrite(directory, &open)?;
        let intents = open.values().cloned().collect();
        let inner = Mutex::new(Inner { file: Arc::new(file), length, next, open });
        Ok((Arc::new(Self { directory: directory.to_owned(), inner, synced: Mutex::new(0) }), intents))
    }

    /// Writes down, durably, what is about to be done.
    ///
    /// # Errors
    /// [`Error::Io`]; then it must not be done.
    pub fn begin(self: &Arc<Self>, intent: Intent) -> Result<Open> {
        let seq = {
            let mut inner = self.lock();
            if inner.length > COMPACT_AT {
                let (file, length) = rewrite(&self.directory, &inner.open)?;
                (inner.file, inner.length) = (Arc::new(file), length);
            }
            let seq = inner.next;
            inner.next += 1;
            inner.append(&Line::Begin { seq, intent: intent.clone() })?;
            inner.open.insert(seq, intent);
            seq
        };
        let open = Open { journal: self.clone(), seq, keep: false };
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        if *synced < seq + 1 {
            let (file, next) = {
                let inner = self.lock();
                (inner.file.clone(), inner.next)
            };
            file.sync_data().context(|| "sync the journal")?;
            *synced = next;
        }
        drop(synced);
        Ok(open)
    }

    /// Ends an intent of an earlier run that recovery has dealt with.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn settle(&self, settled: &Intent) -> Result<()> {
        let mut inner = self.lock();
        let seqs: Vec<u64> = inner.open.iter().filter(|(_, intent)| *intent == settled).map(|(&seq, _)| seq).collect();
        seqs.into_iter().try_for_each(|seq| inner.end(seq))
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
        if self.keep || std::thread::panicking() {
            return;
        }
        if let Err(error) = self.journal.lock().end(self.seq) {
            // It will be carried out once more at the next start, which changes nothing.
            tracing::warn!(%error, seq = self.seq, "an intent could not be ended in the journal");
        }
    }
}

impl Inner {
    fn end(&mut self, seq: u64) -> Result<()> {
        self.append(&Line::End { seq })?;
        self.open.remove(&seq);
        Ok(())
    }

    fn append(&mut self, line: &Line) -> Result<()> {
        let text = encode(line);
        if let Err(error) = (&*self.file).write_all(text.as_bytes()) {
            // A part of a line must not stand before the next one.
            self.file.set_len(self.length).context(|| "cut the journal back")?;
            return Err(Error::io("append to the journal", error));
        }
        self.length += text.len() as u64;
        Ok(())
    }
}

fn rewrite(directory: &Path, open: &BTreeMap<u64, Intent>) -> Result<(File, u64)> {
    let text: String = open.iter().map(|(&seq, intent)| encode(&Line::Begin { seq, intent: intent.clone() })).collect();
    write_durably(directory, NAME, text.as_bytes())?;
    let path = directory.join(NAME);
    let file = OpenOptions::new().append(true).custom_flags(libc::O_NOFOLLOW).open(&path);
    Ok((file.context(|| format!("open {}", path.display()))?, text.len() as u64))
}

fn digest(json: &str) -> String {
    hex(&Sha256::digest(json)[..4])
}

fn encode(line: &Line) -> String {
    let json = serde_json::to_string(line).expect("a line has only strings, numbers and UTF-8 paths");
    format!("{} {json}\n", digest(&json))
}

fn decode(line: &[u8]) -> Option<Line> {
    let (sum, json) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    if sum == digest(json) { serde_json::from_str(json).ok() } else { None }
}

fn replay(bytes: &[u8]) -> std::result::Result<(BTreeMap<u64, Intent>, u64), String> {
    let (mut open, mut next) = (BTreeMap::new(), 0);
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let lines: Vec<&[u8]> = bytes[..whole].split_inclusive(|&byte| byte == b'\n').collect();
    for (at, line) in lines.iter().enumerate() {
        match decode(&line[..line.len() - 1]) {
            Some(Line::Begin { seq, intent }) => {
                next = next.max(seq + 1);
                open.insert(seq, intent);
            }
            Some(Line::End { seq }) => {
                open.remove(&seq);
            }
            // Blocks of a torn write may reach the disk out of order, so that its end is there and its middle is not.
            None if at + 1 == lines.len() => {}
            None => return Err(format!("line {} is damaged, and lines follow it", at + 1)),
        }
    }
    Ok((open, next))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        journal.settle(&open[0]).unwrap();
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
    fn it_does_not_grow_without_bound() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let kept = journal.begin(delete(0)).unwrap();
        for _ in 0..3000 {
            drop(journal.begin(delete(1)).unwrap());
        }
        let length = std::fs::metadata(dir.path().join(NAME)).unwrap().len();
        assert!(length < COMPACT_AT + 4096, "{length}");
        kept.keep();
        drop(journal);
        assert_eq!(Journal::open(dir.path()).unwrap().1, [delete(0)]);
    }

    fn text(count: u8) -> String {
        (0..count).map(|n| encode(&Line::Begin { seq: n.into(), intent: delete(n) })).collect()
    }

    proptest! {
        /// A cut anywhere loses at most the line that it is in, which nobody has acted upon.
        #[test]
        fn a_cut_anywhere_is_survived(cut in 0usize..700) {
            let text = text(5);
            let cut = cut.min(text.len());
            let whole = text[..cut].matches('\n').count();
            prop_assert_eq!(replay(&text.as_bytes()[..cut]).unwrap().0.len(), whole);
        }

        /// A flipped bit is noticed: in the last line it counts as torn, elsewhere it stops the driver.
        #[test]
        fn a_flipped_bit_is_noticed(at in 0usize..700, bit in 0u8..8) {
            let mut bytes = text(5).into_bytes();
            let at = at.min(bytes.len() - 1);
            let last = bytes[..bytes.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
            bytes[at] ^= 1 << bit;
            match replay(&bytes) {
                Ok((open, _)) => prop_assert!(at >= last - 1 && open.len() >= 3, "{} {}", at, open.len()),
                Err(why) => prop_assert!(why.contains("damaged")),
            }
        }
    }
}
