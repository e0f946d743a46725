//! One operation a volume at a time.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};

/// The volumes, by id or by name, on which something is under way.
#[derive(Clone, Debug, Default)]
pub struct Guards(Arc<Mutex<HashSet<String>>>);

/// Something is under way on a volume until this is dropped.
#[derive(Debug)]
pub struct Guard {
    guards: Guards,
    key: String,
}

impl Guards {
    /// Begins something on `key`.
    ///
    /// # Errors
    /// [`Error::Busy`] when something is under way.
    pub fn enter(&self, key: &str) -> Result<Guard> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.insert(key.to_owned()) {
            return Ok(Guard { guards: self.clone(), key: key.to_owned() });
        }
        Err(Error::Busy { what: format!("volume {key}") })
    }

    /// How many operations are under way.
    pub fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.guards.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let guards = Guards::default();
        let first = guards.enter("a").unwrap();
        assert_eq!(guards.enter("a").unwrap_err().code(), tonic::Code::Aborted);
        let other = guards.enter("b").unwrap();
        assert_eq!(guards.count(), 2);
        drop(first);
        guards.enter("a").unwrap();
        drop(other);
        assert_eq!(guards.count(), 0);
    }
}
