//! Removing flows that are past their time, a slice at a time.
//!
//! User space reads entries in batches and hands the keys of those past their time to the program `sweep`, which looks again
//! under each key's claim (`ebpf/programs/src/claim.rs`): an entry that came to life meanwhile stays. A key that is removed by
//! name from here could be that of a flow which began a moment before.

use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};

use aya::maps::MapData;
use keelway_layout::{CtEntry, CtKey, NatEntry, SWEEP_GRACE, SWEEP_HEADER, SWEEP_KEYS, maps as m};
use nix::time::{ClockId, clock_gettime};
use zerocopy::{FromBytes, IntoBytes};

use crate::error::TableError;
use crate::sys;

/// Entries in one read: so long a bucket's lock may be wanted at a time, and so much memory is taken.
const BATCH: usize = 512;

// Of either kind of entry, the first word is when it ends.
const _: () = assert!(offset_of!(CtEntry, expires) == 0 && offset_of!(NatEntry, expires) == 0);

/// What the last whole pass over a table of flows found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swept {
    /// The map's name.
    pub name: &'static str,
    /// Entries within their time.
    pub live: u64,
    /// Entries past it, those removed by the pass included.
    pub expired: u64,
    /// Entries removed since this was opened, of the pass under way too.
    pub removed: u64,
    /// Passes that were completed since this was opened.
    pub passes: u64,
}

struct Pass {
    map: OwnedFd,
    value_size: usize,
    cursor: Option<u32>,
    live: u64,
    expired: u64,
    last: Swept,
}

/// The tables of flows and the program that removes from them.
pub struct Sweep {
    program: OwnedFd,
    passes: [Pass; 2],
    next: usize,
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl Sweep {
    pub(crate) fn new(program: OwnedFd, conntrack: &MapData, nat: &MapData) -> std::io::Result<Self> {
        let pass = |map: &MapData, name, value_size| {
            Ok::<_, std::io::Error>(Pass {
                map: map.fd().as_fd().try_clone_to_owned()?,
                value_size,
                cursor: None,
                live: 0,
                expired: 0,
                last: Swept { name, live: 0, expired: 0, removed: 0, passes: 0 },
            })
        };
        Ok(Self {
            program,
            passes: [pass(conntrack, m::CONNTRACK, size_of::<CtEntry>())?, pass(nat, m::NAT, size_of::<NatEntry>())?],
            next: 0,
            keys: vec![0; BATCH * size_of::<CtKey>()],
            values: vec![0; BATCH * size_of::<CtEntry>()],
        })
    }

    /// Goes on from where it stopped, for at most about `entries` entries or to the end of one table.
    ///
    /// # Errors
    /// What the kernel says; the next call begins the table anew.
    pub fn step(&mut self, entries: usize) -> Result<(), TableError> {
        let mut seen = 0;
        while seen < entries {
            let (batch, ended) = self.batch()?;
            seen += batch;
            if ended {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Goes over all tables once, from their beginnings.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn pass(&mut self) -> Result<(), TableError> {
        for number in 0..self.passes.len() {
            self.passes[number].rewind();
            self.next = number;
            while !self.batch()?.1 {}
        }
        Ok(())
    }

    /// What was found, by table.
    pub fn found(&self) -> [Swept; 2] {
        [self.passes[0].last, self.passes[1].last]
    }

    /// One read, and whether the table ended with it.
    fn batch(&mut self) -> Result<(usize, bool), TableError> {
        let pass = &mut self.passes[self.next];
        let done = pass.batch(&mut self.keys, &mut self.values, &self.program);
        let ended = match &done {
            Ok((_, ended)) => *ended,
            Err(_) => {
                pass.rewind();
                true
            }
        };
        if ended {
            self.next = (self.next + 1) % self.passes.len();
        }
        done.map_err(|error| TableError::Other { table: self.passes[self.next].last.name, reason: error.to_string() })
    }
}

impl Pass {
    fn rewind(&mut self) {
        (self.cursor, self.live, self.expired) = (None, 0, 0);
    }

    fn batch(&mut self, keys: &mut [u8], values: &mut [u8], program: &OwnedFd) -> std::io::Result<(usize, bool)> {
        let key_size = size_of::<CtKey>();
        let count = sys::lookup_batch(
            self.map.as_fd(),
            &mut self.cursor,
            (&mut *keys, key_size),
            (&mut *values, self.value_size),
        )?;
        let now = now()?;
        let mut over = Vec::new();
        for (key, value) in keys.chunks_exact(key_size).zip(values.chunks_exact(self.value_size)).take(count) {
            let (expires, _) = u64::read_from_prefix(value).expect("a value is longer than a word");
            if expires > now {
                self.live += 1;
                continue;
            }
            self.expired += 1;
            if expires.saturating_add(SWEEP_GRACE) <= now {
                over.push(CtKey::read_from_bytes(key).expect("a chunk is a key"));
            }
        }
        for keys in over.chunks(SWEEP_KEYS as usize) {
            self.last.removed += remove(program, keys)?;
        }
        let ended = self.cursor.is_none();
        if ended {
            (self.last.live, self.last.expired) = (self.live, self.expired);
            self.last.passes += 1;
            self.rewind();
        }
        Ok((count, ended))
    }
}

/// How many of these the program removed.
fn remove(program: &OwnedFd, keys: &[CtKey]) -> std::io::Result<u64> {
    let mut packet = vec![0; SWEEP_HEADER as usize];
    packet.extend_from_slice(keys.as_bytes());
    let mut out = vec![0; packet.len()];
    Ok(sys::test_run(program.as_fd(), &packet, &mut out, 1, None)?.verdict.into())
}

/// Nanoseconds of the clock that the programs read.
fn now() -> std::io::Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(std::time::Duration::from(now).as_nanos()).unwrap_or(u64::MAX))
}
