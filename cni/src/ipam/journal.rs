//! The store of leases on disk: one append-only file, shortened now and then by writing it anew beside itself.
//!
//! ```text
//! keelway-leases 1
//! <first 16 hex digits of the SHA-256 of the record> <record as JSON>
//! ```
//!
//! A record counts once its line is complete and synced. What follows the last complete line was never acknowledged
//! (the process or the machine died while writing it) and is cut off on opening; [`Journal::torn_bytes`] says how much.
//! Any other damage is [`StoreError::Corrupt`]. A lock on `<file>.lock` keeps a second process out.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::{LeaseStore, Record, StoreError};
use crate::install::write_atomically;

const HEADER: &str = "keelway-leases 1\n";

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Bytes that are known to be good and synced.
    good: u64,
    records: usize,
    torn: u64,
    broken: bool,
    _lock: Flock<File>,
}

impl Journal {
    /// Opens the journal at `path`, making it (and its directory) when there is none.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process has it, [`StoreError::Io`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let path = path.into();
        let directory = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory).map_err(|e| io(&path, "create its directory", e))?;
        let mut lock_path = path.clone().into_os_string();
        lock_path.push(".lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(lock_path);
        let lock = lock.map_err(|e| io(&path, "open its lock", e))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EAGAIN => StoreError::Locked { path: path.clone() },
            errno => io(&path, "lock", errno.into()),
        })?;
        if !path.try_exists().map_err(|e| io(&path, "look for it", e))? {
            write_atomically(&path, HEADER.as_bytes(), 0o600).map_err(|e| io(&path, "create", e))?;
        }
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|e| io(&path, "open", e))?;
        Ok(Self { path, file, good: 0, records: 0, torn: 0, broken: false, _lock: lock })
    }

    /// Bytes of an unfinished last record that [`LeaseStore::load`] cut off.
    #[must_use]
    pub fn torn_bytes(&self) -> u64 {
        self.torn
    }

    /// Goes on in the file that now has the path, when that is another one.
    fn follow(&mut self, length: u64, records: usize) -> std::io::Result<()> {
        let now = OpenOptions::new().read(true).write(true).open(&self.path)?;
        if now.metadata()?.ino() != self.file.metadata()?.ino() {
            (self.file, self.good, self.records) = (now, length, records);
        }
        Ok(())
    }

    fn io(&self, doing: &'static str) -> impl FnOnce(std::io::Error) -> StoreError {
        let path = self.path.clone();
        move |source| StoreError::Io { path, doing, source }
    }
}

impl LeaseStore for Journal {
    fn load(&mut self) -> Result<Vec<Record>, StoreError> {
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(0)).map_err(self.io("read"))?;
        self.file.read_to_end(&mut bytes).map_err(self.io("read"))?;
        let Parsed { records, good } =
            parse(&bytes).map_err(|(line, reason)| StoreError::Corrupt { path: self.path.clone(), line, reason })?;
        self.torn = (bytes.len() - good) as u64;
        self.good = good as u64;
        self.records = records.len();
        if self.torn > 0 {
            self.file.set_len(self.good).map_err(self.io("cut off an unfinished record"))?;
            self.file.sync_all().map_err(self.io("sync"))?;
        }
        Ok(records)
    }

    fn append(&mut self, record: &Record) -> Result<(), StoreError> {
        if self.broken {
            return Err(StoreError::Broken { path: self.path.clone() });
        }
        let line = encode(record);
        let written = self
            .file
            .seek(SeekFrom::Start(self.good))
            .and_then(|_| self.file.write_all(line.as_bytes()))
            .and_then(|()| self.file.sync_data());
        if let Err(e) = written {
            self.broken = self.file.set_len(self.good).and_then(|()| self.file.sync_all()).is_err();
            return Err(self.io("append")(e));
        }
        self.good += line.len() as u64;
        self.records += 1;
        Ok(())
    }

    fn rewrite(&mut self, records: &[Record]) -> Result<(), StoreError> {
        let text: String = std::iter::once(HEADER.to_owned()).chain(records.iter().map(encode)).collect();
        let written = write_atomically(&self.path, text.as_bytes(), 0o600);
        // It may have failed before or after the new file took the old one's place.
        if self.follow(text.len() as u64, records.len()).is_err() {
            self.broken = true;
        }
        written.map_err(self.io("rewrite"))
    }

    fn len(&self) -> usize {
        self.records
    }
}

fn io(path: &Path, doing: &'static str, source: std::io::Error) -> StoreError {
    StoreError::Io { path: path.to_owned(), doing, source }
}

fn digest(json: &str) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(json).iter().take(8).map(|b| format!("{b:02x}")).collect()
}

fn encode(record: &Record) -> String {
    let json = serde_json::to_string(record).expect("records have string keys only");
    format!("{} {json}\n", digest(&json))
}

#[derive(Debug)]
struct Parsed {
    records: Vec<Record>,
    /// Length of what is complete.
    good: usize,
}

/// The records, or the line (from 1) that is damaged and why.
fn parse(bytes: &[u8]) -> Result<Parsed, (usize, String)> {
    let mut records = Vec::new();
    let mut good = 0;
    for (index, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
        let number = index + 1;
        if index == 0 {
            // The header is written with the file in one atomic step, so it is never torn.
            if line != HEADER.as_bytes() {
                return Err((number, format!("expected the header {:?}", HEADER.trim_end())));
            }
        } else if line.ends_with(b"\n") {
            records.push(decode(&line[..line.len() - 1]).map_err(|reason| (number, reason))?);
        } else {
            break;
        }
        good += line.len();
    }
    if good == 0 { Err((1, "the file is empty".into())) } else { Ok(Parsed { records, good }) }
}

fn decode(line: &[u8]) -> Result<Record, String> {
    let text = std::str::from_utf8(line).map_err(|e| e.to_string())?;
    let (sum, json) = text.split_once(' ').ok_or("expected a checksum and a record")?;
    let actual = digest(json);
    if sum != actual {
        return Err(format!("checksum {sum:?}, but the record has {actual}"));
    }
    serde_json::from_str(json).map_err(|e| e.to_string())
}
