//! Looks at volumes, which may never come back when a disk hangs: they are counted, so that a hung disk takes a few
//! threads and no more, and is known to hang.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::model::VolumeId;

/// How long a look may take before the volume counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(8);
/// Looks at one volume at a time.
const MOST: usize = 4;

/// The looks that are under way.
#[derive(Clone, Debug, Default)]
pub struct Probes(Arc<Mutex<HashMap<VolumeId, Vec<Instant>>>>);

/// A look that is under way until this is dropped.
#[derive(Debug)]
pub struct Probe {
    probes: Probes,
    id: VolumeId,
    since: Instant,
}

impl Probes {
    /// Begins to look at a volume.
    ///
    /// # Errors
    /// [`Error::Hung`] when an earlier look has not come back, [`Error::Busy`] when there are many.
    pub fn begin(&self, id: &VolumeId) -> Result<Probe> {
        self.begin_at(id, Instant::now())
    }

    /// Notes that something else than a look waits for the volume, as its unmounting does. It is not held up.
    pub fn note(&self, id: &VolumeId) -> Probe {
        let now = Instant::now();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(id.clone()).or_default().push(now);
        Probe { probes: self.clone(), id: id.clone(), since: now }
    }

    fn begin_at(&self, id: &VolumeId, now: Instant) -> Result<Probe> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let looks = all.entry(id.clone()).or_default();
        if let Some(seconds) = looks.first().map(|&first| now - first).filter(|&age| age >= PATIENCE) {
            return Err(hung(id, seconds));
        }
        if looks.len() >= MOST {
            return Err(Error::Busy { what: format!("volume {id} ({MOST} looks at it)") });
        }
        looks.push(now);
        Ok(Probe { probes: self.clone(), id: id.clone(), since: now })
    }

    /// For how long a look at the volume has not come back, when that is too long.
    pub fn hung(&self, id: &VolumeId) -> Option<Duration> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(id).and_then(|looks| looks.first()).map(Instant::elapsed).filter(|&age| age >= PATIENCE)
    }
}

/// That a volume does not answer.
pub fn hung(id: &VolumeId, since: Duration) -> Error {
    Error::Hung { id: id.clone(), what: "a call has waited for it", seconds: since.as_secs() }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let mut all = self.probes.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(looks) = all.get_mut(&self.id) {
            if let Some(at) = looks.iter().position(|&since| since == self.since) {
                looks.remove(at);
            }
            if looks.is_empty() {
                all.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_does_not_come_back_is_known() {
        let (probes, id) = (Probes::default(), VolumeId::new([1; 16]));
        let start = Instant::now();
        let stuck = probes.begin_at(&id, start).unwrap();
        drop(probes.begin_at(&id, start + Duration::from_secs(1)).unwrap());
        let refused = probes.begin_at(&id, start + PATIENCE).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        probes.begin_at(&VolumeId::new([2; 16]), start + PATIENCE).unwrap();
        drop(stuck);
        probes.begin_at(&id, start + PATIENCE).unwrap();
    }

    #[test]
    fn they_are_few() {
        let (probes, id) = (Probes::default(), VolumeId::new([1; 16]));
        let looks: Vec<_> = (0..MOST).map(|_| probes.begin(&id).unwrap()).collect();
        assert!(matches!(probes.begin(&id), Err(Error::Busy { .. })));
        drop(looks);
        assert!(probes.begin(&id).is_ok() && probes.hung(&id).is_none());
    }
}
