//! Looks at volumes and stores, which may never come back when a disk hangs: they are counted, so that a hung disk takes a
//! few threads and no more, and is known to hang.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long a look may take before what it looks at counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(8);
/// Looks at one thing at a time.
const MOST: usize = 4;

/// What is under way, by the name of what it is about.
#[derive(Clone, Debug, Default)]
pub struct Probes(Arc<Mutex<HashMap<String, UnderWay>>>);

#[derive(Debug, Default)]
struct UnderWay {
    next: u64,
    looks: Vec<(u64, Instant)>,
    notes: Vec<(u64, Instant)>,
}

/// Something that is under way until this is dropped.
#[derive(Debug)]
pub struct Probe {
    probes: Probes,
    what: String,
    number: u64,
}

impl Probes {
    /// Begins to look at something.
    ///
    /// # Errors
    /// [`Error::Hung`] when an earlier look has not come back, [`Error::Busy`] when there are many.
    pub fn begin(&self, what: &str) -> Result<Probe> {
        self.begin_at(what, Instant::now())
    }

    /// Notes that something else than a look waits for a volume, as its unmounting does. Neither that nor a look is held up.
    pub fn note(&self, what: &str) -> Probe {
        self.note_at(what, Instant::now())
    }

    fn begin_at(&self, what: &str, now: Instant) -> Result<Probe> {
        let mut all = self.lock();
        let under_way = all.entry(what.to_owned()).or_default();
        if let Some(age) = oldest(&under_way.looks, now) {
            return Err(hung(what, age));
        }
        if under_way.looks.len() >= MOST {
            return Err(Error::Busy { what: format!("{what} ({MOST} looks at it)") });
        }
        let number = under_way.number();
        under_way.looks.push((number, now));
        Ok(Probe { probes: self.clone(), what: what.to_owned(), number })
    }

    fn note_at(&self, what: &str, now: Instant) -> Probe {
        let mut all = self.lock();
        let under_way = all.entry(what.to_owned()).or_default();
        let number = under_way.number();
        under_way.notes.push((number, now));
        Probe { probes: self.clone(), what: what.to_owned(), number }
    }

    /// Says that what was noted goes on, however long it takes.
    pub fn goes_on(&self, what: &str) {
        if let Some(under_way) = self.lock().get_mut(what) {
            let now = Instant::now();
            under_way.notes.iter_mut().for_each(|(_, since)| *since = now);
        }
    }

    /// For how long a look has not come back, when that is too long.
    pub fn hung(&self, what: &str) -> Option<Duration> {
        oldest(&self.lock().get(what)?.looks, Instant::now())
    }

    /// For how long something that was noted has not gone on, when that is long: it may have much to do, or wait for a disk
    /// that hangs.
    pub fn waits(&self, what: &str) -> Option<Duration> {
        oldest(&self.lock().get(what)?.notes, Instant::now())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, UnderWay>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UnderWay {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

fn oldest(all: &[(u64, Instant)], now: Instant) -> Option<Duration> {
    let since = all.iter().map(|&(_, since)| since).min()?;
    Some(now.saturating_duration_since(since)).filter(|&age| age >= PATIENCE)
}

/// That something does not answer.
pub fn hung(what: &str, since: Duration) -> Error {
    Error::Hung { what: what.to_owned(), seconds: since.as_secs() }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let mut all = self.probes.lock();
        if let Some(under_way) = all.get_mut(&self.what) {
            let others = |&(number, _): &(u64, Instant)| number != self.number;
            under_way.looks.retain(others);
            under_way.notes.retain(others);
            if under_way.looks.is_empty() && under_way.notes.is_empty() {
                all.remove(&self.what);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_does_not_come_back_is_known() {
        let probes = Probes::default();
        let start = Instant::now();
        let stuck = probes.begin_at("a", start).unwrap();
        drop(probes.begin_at("a", start + Duration::from_secs(1)).unwrap());
        let refused = probes.begin_at("a", start + PATIENCE).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        probes.begin_at("b", start + PATIENCE).unwrap();
        drop(stuck);
        probes.begin_at("a", start + PATIENCE).unwrap();
    }

    #[test]
    fn they_are_few() {
        let probes = Probes::default();
        let looks: Vec<_> = (0..MOST).map(|_| probes.begin("a").unwrap()).collect();
        assert!(matches!(probes.begin("a"), Err(Error::Busy { .. })));
        drop(looks);
        assert!(probes.begin("a").is_ok() && probes.hung("a").is_none());
        assert!(probes.lock().is_empty());
    }

    #[test]
    fn what_takes_long_holds_up_no_look_and_may_go_on() {
        let probes = Probes::default();
        let Some(start) = Instant::now().checked_sub(PATIENCE) else { return };
        let noted = probes.note_at("a", start);
        assert!(probes.waits("a").is_some() && probes.hung("a").is_none());
        drop(probes.begin("a").unwrap());
        assert!(probes.waits("a").is_some(), "a look is not what was noted");
        probes.goes_on("a");
        assert!(probes.waits("a").is_none());
        drop(noted);
        assert!(probes.lock().is_empty());
    }
}
