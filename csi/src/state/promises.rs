//! Bytes that are promised to what is under way, so that no byte is promised twice.
//!
//! How many there are is asked without a lock, since it may take long: a promise that ends meanwhile may or may not be in
//! the answer, and is counted once more. Only who would be refused for that asks again while nothing else can be promised.

use std::sync::{Mutex, MutexGuard, PoisonError};

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

impl Store {
    /// How many there are.
    pub const COUNT: usize = 4;
}

/// What is promised, of each store. A store that hangs holds up nobody but its own.
#[derive(Debug, Default)]
pub struct Promises([Mutex<Books>; Store::COUNT]);

#[derive(Debug, Default)]
struct Books {
    promised: u64,
    /// Counts what begins and what ends.
    clock: u64,
    /// When those began who ask now how many bytes there are.
    asking: Vec<u64>,
    /// When promises ended while somebody asked, and how many bytes they were.
    ended: Vec<(u64, u64)>,
}

/// Bytes of a store that are promised to something under way, until this is dropped.
#[derive(Debug)]
pub struct Promise<'a> {
    of: &'a Mutex<Books>,
    bytes: u64,
}

/// Somebody asks how many bytes there are, until this is dropped.
struct Asking<'a> {
    of: &'a Mutex<Books>,
    began: u64,
}

fn lock(of: &Mutex<Books>) -> MutexGuard<'_, Books> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Books {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

impl<'a> Asking<'a> {
    fn begin(of: &'a Mutex<Books>) -> Self {
        let mut books = lock(of);
        let began = books.tick();
        books.asking.push(began);
        Self { of, began }
    }

    /// What of the answer can be promised.
    fn left(&self, books: &Books, available: u64) -> u64 {
        let late: u64 = books.ended.iter().filter(|&&(at, _)| at > self.began).map(|&(_, bytes)| bytes).sum();
        available.saturating_sub(books.promised).saturating_sub(late)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut books = lock(self.of);
        books.asking.retain(|&began| began != self.began);
        let first = books.asking.iter().copied().min();
        books.ended.retain(|&(at, _)| first.is_some_and(|first| at > first));
    }
}

impl Promises {
    fn of(&self, store: Store) -> &Mutex<Books> {
        &self.0[store as usize]
    }

    /// Promises `bytes`. `available` says how many there are that nothing known has a claim on.
    ///
    /// # Errors
    /// [`Error::NoSpace`], or what `available` says.
    pub fn reserve(&self, store: Store, bytes: u64, available: impl Fn() -> Result<u64>) -> Result<Promise<'_>> {
        let of = self.of(store);
        {
            let asking = Asking::begin(of);
            let found = available()?;
            let mut books = lock(of);
            if bytes <= asking.left(&books, found) {
                books.promised += bytes;
                drop(books);
                return Ok(Promise { of, bytes });
            }
        }
        let mut books = lock(of);
        let available = available()?.saturating_sub(books.promised);
        if bytes > available {
            return Err(Error::NoSpace { wanted: bytes, available });
        }
        books.promised += bytes;
        drop(books);
        Ok(Promise { of, bytes })
    }

    /// How many bytes could be promised now.
    ///
    /// # Errors
    /// What `available` says.
    pub fn unpromised(&self, store: Store, available: impl FnOnce() -> Result<u64>) -> Result<u64> {
        let of = self.of(store);
        let asking = Asking::begin(of);
        let found = available()?;
        let left = asking.left(&lock(of), found);
        Ok(left)
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        let mut books = lock(self.of);
        books.promised -= self.bytes;
        if !books.asking.is_empty() {
            let at = books.tick();
            books.ended.push((at, self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

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

    #[test]
    fn who_asks_waits_for_nobody_who_asks() {
        let (promises, both) = (Promises::default(), Barrier::new(2));
        // Neither comes back before the other one asks.
        let ask = || {
            both.wait();
            Ok(100)
        };
        let made = std::thread::scope(|scope| {
            let one = scope.spawn(|| promises.reserve(Store::Pool, 50, ask).map(std::mem::forget));
            let other = scope.spawn(|| promises.reserve(Store::Pool, 50, ask).map(std::mem::forget));
            one.join().unwrap().is_ok() && other.join().unwrap().is_ok()
        });
        assert!(made);
        assert_eq!(promises.unpromised(Store::Pool, || Ok(100)).unwrap(), 0);
    }

    #[test]
    fn what_ends_while_somebody_asks_is_counted_still() {
        let promises = Promises::default();
        let mut first = Some(promises.reserve(Store::Pool, 60, || Ok(100)).unwrap());
        // The first one's storage was not there when this was read, and its promise ended before the answer was used.
        let left = promises.unpromised(Store::Pool, || {
            drop(first.take());
            Ok(100)
        });
        assert_eq!(left.unwrap(), 40);
        assert_eq!(promises.unpromised(Store::Pool, || Ok(40)).unwrap(), 40);
        assert!(lock(promises.of(Store::Pool)).ended.is_empty());
        // Who would be refused for that alone asks again.
        let first = Mutex::new(Some(promises.reserve(Store::Pool, 20, || Ok(40)).unwrap()));
        let second = promises.reserve(Store::Pool, 20, || {
            drop(first.lock().unwrap().take());
            Ok(20)
        });
        second.unwrap();
    }
}
