use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use aya::maps::lpm_trie::Key as LpmKey;
use aya::maps::{HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuHashMap};
use zerocopy::{FromBytes, IntoBytes};

use keelway_layout::{Counter, CounterKey, Hook, Reason};

use crate::error::TableError;
use crate::raw::{Plain, Raw};
use crate::sys;

/// One map as a table of typed entries.
pub trait Table<K, V>: Send {
    /// The map's name.
    fn name(&self) -> &'static str;
    /// How many entries it can hold.
    fn capacity(&self) -> u32;
    /// The entry of exactly this key.
    ///
    /// # Errors
    /// When the kernel refuses; an absent entry is `None`.
    fn get(&self, key: &K) -> Result<Option<V>, TableError>;
    /// Inserts or replaces.
    ///
    /// # Errors
    /// [`TableError::Full`], [`TableError::Busy`] or what else the kernel says.
    fn put(&mut self, key: &K, value: &V) -> Result<(), TableError>;
    /// Inserts or replaces, one after another in this order, up to the first that fails.
    ///
    /// # Errors
    /// As [`Self::put`].
    fn put_all(&mut self, entries: &[(K, V)]) -> Result<(), TableError> {
        entries.iter().try_for_each(|(key, value)| self.put(key, value))
    }
    /// Removes; an absent entry is a success.
    ///
    /// # Errors
    /// What the kernel says.
    fn delete(&mut self, key: &K) -> Result<(), TableError>;
    /// All entries. Entries that change meanwhile may be missed or seen twice.
    ///
    /// # Errors
    /// What the kernel says.
    fn dump(&self) -> Result<Vec<(K, V)>, TableError>;
    /// How many entries there are.
    ///
    /// # Errors
    /// As [`Self::dump`].
    fn len(&self) -> Result<u64, TableError>;
    /// Whether there are none.
    ///
    /// # Errors
    /// As [`Self::dump`].
    fn is_empty(&self) -> Result<bool, TableError> {
        Ok(self.len()? == 0)
    }
}

/// How a key type is told to a longest-prefix table: its first four bytes are the prefix length.
pub trait PrefixKeyed: Plain {
    /// What follows the prefix length.
    type Data: Plain + Send + Sync;
}

impl PrefixKeyed for keelway_layout::PrefixKey {
    type Data = [u8; 16];
}
impl PrefixKeyed for keelway_layout::RuleKey {
    type Data = [u8; 12];
}
impl PrefixKeyed for keelway_layout::CidrKey {
    type Data = [u8; 24];
}

impl PrefixKeyed for keelway_layout::SourceRangeKey {
    type Data = [u8; 20];
}

fn to_lpm<K: PrefixKeyed>(key: &K) -> LpmKey<Raw<K::Data>> {
    let (len, data) = key.as_bytes().split_at(4);
    let len = u32::from_ne_bytes(len.try_into().expect("four bytes"));
    LpmKey::new(len, Raw(K::Data::read_from_bytes(data).expect("the rest of the key")))
}

fn from_lpm<K: PrefixKeyed>(key: &LpmKey<Raw<K::Data>>) -> K {
    let mut bytes = key.prefix_len().to_ne_bytes().to_vec();
    bytes.extend_from_slice(key.data().0.as_bytes());
    K::read_from_bytes(&bytes).expect("a prefix length and the rest of the key")
}

enum Kind<K: Plain, V: Plain> {
    /// And a descriptor of its own for counting in batches.
    Hash(HashMap<MapData, Raw<K>, Raw<V>>, OwnedFd),
    Prefix(Box<dyn PrefixTable<K, V>>),
}

/// A longest-prefix table with its key type taken apart.
trait PrefixTable<K, V>: Send + Sync {
    fn get(&self, key: &K) -> Result<V, MapError>;
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError>;
    fn delete(&mut self, key: &K) -> Result<(), MapError>;
    fn entries(&self) -> Vec<Result<(K, V), MapError>>;
}

struct Prefix<K: PrefixKeyed, V: Plain>(LpmTrie<MapData, Raw<K::Data>, Raw<V>>);

impl<K: PrefixKeyed + Send + Sync, V: Plain + Send + Sync> PrefixTable<K, V> for Prefix<K, V> {
    fn get(&self, key: &K) -> Result<V, MapError> {
        self.0.get(&to_lpm(key), 0).map(|raw| raw.0)
    }
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        self.0.insert(&to_lpm(key), Raw(*value), 0)
    }
    fn delete(&mut self, key: &K) -> Result<(), MapError> {
        self.0.remove(&to_lpm(key))
    }
    fn entries(&self) -> Vec<Result<(K, V), MapError>> {
        self.0.iter().map(|entry| entry.map(|(key, value)| (from_lpm(&key), value.0))).collect()
    }
}

/// A table that is a map of the kernel.
pub struct KernelTable<K: Plain, V: Plain> {
    name: &'static str,
    capacity: u32,
    kind: Kind<K, V>,
}

fn io_error(error: &MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error
            .io_error
            .raw_os_error()
            .map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error),
        other => io::Error::other(other.to_string()),
    }
}

fn is_absent(error: &MapError) -> bool {
    matches!(error, MapError::KeyNotFound) || io_error(error).raw_os_error() == Some(libc::ENOENT)
}

impl<K: Plain, V: Plain> KernelTable<K, V> {
    pub(crate) fn hash(name: &'static str, capacity: u32, map: Map) -> Result<Self, MapError> {
        let (Map::HashMap(data) | Map::LruHashMap(data)) = &map else {
            return Err(MapError::IoError(io::Error::other("not a hash map")));
        };
        let fd = data.fd().as_fd().try_clone_to_owned().map_err(MapError::IoError)?;
        Ok(Self { name, capacity, kind: Kind::Hash(HashMap::try_from(map)?, fd) })
    }

    fn error(&self, error: &MapError) -> TableError {
        TableError::from_io(self.name, self.capacity, &io_error(error))
    }
}

impl<K: PrefixKeyed + Send + Sync, V: Plain + Send + Sync> KernelTable<K, V> {
    pub(crate) fn prefix(name: &'static str, capacity: u32, map: Map) -> Result<Self, MapError> {
        Ok(Self { name, capacity, kind: Kind::Prefix(Box::new(Prefix::<K, V>(LpmTrie::try_from(map)?))) })
    }
}

impl<K: Plain + Send, V: Plain + Send> Table<K, V> for KernelTable<K, V> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn capacity(&self) -> u32 {
        self.capacity
    }

    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        let found = match &self.kind {
            Kind::Hash(map, _) => map.get(&Raw(*key), 0).map(|raw| raw.0),
            Kind::Prefix(map) => map.get(key),
        };
        match found {
            Ok(value) => Ok(Some(value)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(self.error(&error)),
        }
    }

    fn put(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        let done = match &mut self.kind {
            Kind::Hash(map, _) => map.insert(Raw(*key), Raw(*value), 0),
            Kind::Prefix(map) => map.put(key, value),
        };
        done.map_err(|error| self.error(&error))
    }

    fn put_all(&mut self, entries: &[(K, V)]) -> Result<(), TableError> {
        let Kind::Hash(_, fd) = &self.kind else {
            return entries.iter().try_for_each(|(key, value)| self.put(key, value));
        };
        for entries in entries.chunks(BATCH) {
            let keys: Vec<u8> = entries.iter().flat_map(|(key, _)| key.as_bytes()).copied().collect();
            let values: Vec<u8> = entries.iter().flat_map(|(_, value)| value.as_bytes()).copied().collect();
            sys::update_batch(fd.as_fd(), (&keys, size_of::<K>()), (&values, size_of::<V>()))
                .map_err(|error| TableError::from_io(self.name, self.capacity, &error))?;
        }
        Ok(())
    }

    fn delete(&mut self, key: &K) -> Result<(), TableError> {
        let done = match &mut self.kind {
            Kind::Hash(map, _) => map.remove(&Raw(*key)),
            Kind::Prefix(map) => map.delete(key),
        };
        match done {
            Err(error) if !is_absent(&error) => Err(self.error(&error)),
            _ => Ok(()),
        }
    }

    fn dump(&self) -> Result<Vec<(K, V)>, TableError> {
        let entries: Vec<_> = match &self.kind {
            Kind::Hash(map, _) => map.iter().map(|entry| entry.map(|(k, v)| (k.0, v.0))).collect(),
            Kind::Prefix(map) => map.entries(),
        };
        let mut found = Vec::with_capacity(entries.len());
        for entry in entries {
            match entry {
                Ok(entry) => found.push(entry),
                // Deleted between being named and being read.
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(self.error(&error)),
            }
        }
        Ok(found)
    }

    fn len(&self) -> Result<u64, TableError> {
        match &self.kind {
            Kind::Hash(_, fd) => count(fd.as_fd(), size_of::<K>(), size_of::<V>())
                .map_err(|error| TableError::from_io(self.name, self.capacity, &error)),
            Kind::Prefix(map) => Ok(map.entries().iter().filter(|entry| entry.is_ok()).count() as u64),
        }
    }
}

/// Entries read or written in one call.
const BATCH: usize = 4096;

/// How many entries a hash map holds.
fn count(map: BorrowedFd<'_>, key_size: usize, value_size: usize) -> io::Result<u64> {
    let (mut keys, mut values) = (vec![0; BATCH * key_size], vec![0; BATCH * value_size]);
    let (mut cursor, mut entries) = (None, 0);
    loop {
        entries += sys::lookup_batch(map, &mut cursor, (&mut keys, key_size), (&mut values, value_size))? as u64;
        if cursor.is_none() {
            return Ok(entries);
        }
    }
}

/// The counters, summed over CPUs.
pub struct CounterTable {
    pub(crate) by_hook: PerCpuArray<MapData, Raw<Counter>>,
    pub(crate) by_endpoint: PerCpuHashMap<MapData, Raw<keelway_layout::EndpointDropKey>, Raw<Counter>>,
}

impl CounterTable {
    /// Packets and bytes since the maps were made.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn get(&self, hook: Hook, reason: Reason) -> Result<Counter, TableError> {
        let values = self.by_hook.get(&CounterKey::index(hook, reason), 0).map_err(|error| {
            TableError::from_io(keelway_layout::maps::COUNTERS, keelway_layout::maps::MAX_COUNTERS, &io_error(&error))
        })?;
        Ok(values.iter().fold(Counter::default(), |sum, one| Counter {
            packets: sum.packets + one.0.packets,
            bytes: sum.bytes + one.0.bytes,
        }))
    }

    /// Every counter that is not zero.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn all(&self) -> Result<Vec<(Hook, Reason, Counter)>, TableError> {
        let mut found = Vec::new();
        for hook in Hook::ALL {
            for reason in Reason::ALL {
                let counter = self.get(*hook, *reason)?;
                if counter.packets != 0 {
                    found.push((*hook, *reason, counter));
                }
            }
        }
        Ok(found)
    }

    /// Drops by endpoint.
    pub fn by_endpoint(&self) -> Vec<(keelway_layout::EndpointDropKey, Counter)> {
        self.by_endpoint
            .iter()
            .flatten()
            .map(|(key, values)| {
                let sum = values.iter().fold(Counter::default(), |sum, one| Counter {
                    packets: sum.packets + one.0.packets,
                    bytes: sum.bytes + one.0.bytes,
                });
                (key.0, sum)
            })
            .collect()
    }
}
