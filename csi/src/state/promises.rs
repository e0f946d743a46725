//! Bytes that are promised to what is under way, so that no byte is promised twice.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// What volumes share the room of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// The pool directory's filesystem.
    Pool,
    /// The whole devices that the driver was given.
    Devices,
    /// A volume group.
    Group,
    /// A thin pool of it.
    ThinPool,
}

/// What is promised, of each store. A store that hangs holds up nobody but its own.
#[derive(Debug, Default)]
pub struct Promises([Mutex<u64>; 4]);

/// Bytes of a store that are promised to something under way, until this is dropped.
#[derive(Debug)]
pub struct Promise<'a> {
    of: &'a Mutex<u64>,
    bytes: u64,
}

impl Promises {
    fn of(&self, store: Store) -> &Mutex<u64> {
        &self.0[store as usize]
    }

    /// Promises `bytes`. `available` says how many there are that nothing known has a claim on; no other promise is
    /// made meanwhile.
    ///
    /// # Errors
    /// [`Error::NoSpace`], or what `available` says.
    pub fn reserve(&self, store: Store, bytes: u64, available: impl FnOnce() -> Result<u64>) -> Result<Promise<'_>> {
        let mut promised = self.of(store).lock().unwrap_or_else(PoisonError::into_inner);
        let available = available()?.saturating_sub(*promised);
        if bytes > available {
            return Err(Error::NoSpace { wanted: bytes, available });
        }
        *promised += bytes;
        Ok(Promise { of: self.of(store), bytes })
    }

    /// How many bytes could be promised now.
    ///
    /// # Errors
    /// What `available` says.
    pub fn unpromised(&self, store: Store, available: impl FnOnce() -> Result<u64>) -> Result<u64> {
        let promised = self.of(store).lock().unwrap_or_else(PoisonError::into_inner);
        Ok(available()?.saturating_sub(*promised))
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        *self.of.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_byte_is_promised_twice() {
        let promises = Promises::default();
        let first = promises.reserve(Store::Pool, 60, || Ok(100)).unwrap();
        let refused = promises.reserve(Store::Pool, 41, || Ok(100)).unwrap_err();
        assert!(matches!(refused, Error::NoSpace { wanted: 41, available: 40 }));
        let second = promises.reserve(Store::Pool, 40, || Ok(100)).unwrap();
        assert_eq!(promises.unpromised(Store::Pool, || Ok(100)).unwrap(), 0);
        assert_eq!(promises.unpromised(Store::Devices, || Ok(100)).unwrap(), 100);
        drop((first, second));
        assert_eq!(promises.unpromised(Store::Pool, || Ok(100)).unwrap(), 100);
    }
}
