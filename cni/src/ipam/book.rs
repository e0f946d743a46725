//! The pool and its history, in step.

use ipnet::IpNet;

use super::{IpamError, LeaseStore, Pool, Record};
use crate::lease::{Lease, LeaseKey, LeaseRequest};

/// The history is shortened when it is longer than this and than [`SLACK`] times what a snapshot needs.
const COMPACT_ABOVE: usize = 4096;
const SLACK: usize = 4;

/// Leases that survive restarts. Its writing methods wait for the disk: call them where blocking is allowed.
#[derive(Debug)]
pub struct Book<S> {
    pool: Pool,
    store: S,
}

impl<S: LeaseStore> Book<S> {
    /// Reads the history.
    ///
    /// # Errors
    /// [`IpamError::Store`] when it cannot be read, and those of [`Pool::restore`].
    pub fn open(mut store: S, cidrs: &[IpNet]) -> Result<Self, IpamError> {
        let pool = Pool::restore(cidrs, store.load()?)?;
        Ok(Self { pool, store })
    }

    /// The pool, to look at.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The store, to look at.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// The store, for tests that make it fail. Writing to it behind the book's back breaks the book.
    pub fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    /// The lease of `request`: the existing one with its addresses, brought up to date, or a new one.
    ///
    /// # Errors
    /// [`IpamError::Exhausted`]; [`IpamError::Store`], and then nothing was leased.
    pub fn allocate(&mut self, request: &LeaseRequest) -> Result<Lease, IpamError> {
        let lease = self.pool.propose(request)?;
        if self.pool.get(&request.key) == Some(&lease) {
            return Ok(lease);
        }
        self.store.append(&Record::Put { lease: lease.clone() })?;
        self.pool.insert(lease.clone())?;
        self.compact();
        Ok(lease)
    }

    /// Gives a lease up; `None` when there was none.
    ///
    /// # Errors
    /// [`IpamError::Store`], and then it is still leased.
    pub fn release(&mut self, key: &LeaseKey) -> Result<Option<Lease>, IpamError> {
        let Some(lease) = self.pool.get(key) else { return Ok(None) };
        self.store.append(&Record::Del { key: key.clone(), addresses: lease.addresses.clone() })?;
        let lease = self.pool.remove(key);
        self.compact();
        Ok(lease)
    }

    fn compact(&mut self) {
        let length = self.store.len();
        if length > COMPACT_ABOVE {
            let snapshot = self.pool.snapshot();
            if length > SLACK * snapshot.len() {
                // A history that stays long is no reason to fail: the next change tries again.
                let _ = self.store.rewrite(&snapshot);
            }
        }
    }
}
