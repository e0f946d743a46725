//! Tables that are not the kernel's: one that behaves like it, and one that fails on demand.

use std::collections::BTreeMap;

use crate::error::TableError;
use crate::table::Table;

/// A table in memory. It refuses a new key when it is full, replaces an old one all the same, and does not mind the removal of
/// what is absent: `tests/fake.rs` holds each of these against the kernel.
pub struct FakeTable<K, V> {
    capacity: u32,
    entries: BTreeMap<K, V>,
}

impl<K: Ord, V> FakeTable<K, V> {
    /// With room for `capacity` entries.
    pub const fn new(capacity: u32) -> Self {
        Self { capacity, entries: BTreeMap::new() }
    }
}

impl<K: Ord + Clone + Send, V: Clone + Send> Table<K, V> for FakeTable<K, V> {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn capacity(&self) -> u32 {
        self.capacity
    }
    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        Ok(self.entries.get(key).cloned())
    }
    fn put(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        if !self.entries.contains_key(key) && self.entries.len() >= self.capacity as usize {
            return Err(TableError::Full { table: "fake", capacity: self.capacity });
        }
        self.entries.insert(key.clone(), value.clone());
        Ok(())
    }
    fn delete(&mut self, key: &K) -> Result<(), TableError> {
        self.entries.remove(key);
        Ok(())
    }
    fn dump(&self) -> Result<Vec<(K, V)>, TableError> {
        Ok(self.entries.iter().map(|(key, value)| (key.clone(), value.clone())).collect())
    }
    fn len(&self) -> Result<u64, TableError> {
        Ok(self.entries.len() as u64)
    }
}

/// A table whose writes fail when told so.
pub struct FaultyTable<T> {
    inner: T,
    /// Writes until the next failure; `None` for none.
    pub fail_after: Option<u32>,
}

impl<T> FaultyTable<T> {
    /// Never fails until [`Self::fail_after`] is set.
    pub const fn new(inner: T) -> Self {
        Self { inner, fail_after: None }
    }

    fn trip(&mut self) -> Result<(), TableError> {
        match &mut self.fail_after {
            Some(0) => {
                self.fail_after = None;
                Err(TableError::Busy { table: "faulty" })
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl<K, V, T: Table<K, V>> Table<K, V> for FaultyTable<T> {
    fn name(&self) -> &'static str {
        "faulty"
    }
    fn capacity(&self) -> u32 {
        self.inner.capacity()
    }
    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        self.inner.get(key)
    }
    fn put(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        self.trip()?;
        self.inner.put(key, value)
    }
    fn delete(&mut self, key: &K) -> Result<(), TableError> {
        self.trip()?;
        self.inner.delete(key)
    }
    fn dump(&self) -> Result<Vec<(K, V)>, TableError> {
        self.inner.dump()
    }
    fn len(&self) -> Result<u64, TableError> {
        self.inner.len()
    }
}
