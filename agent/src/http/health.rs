//! Whether this node can take traffic and whether the agent lives, in the terms of kube-proxy's health server.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// A change that is not in the kernel after this time says that the agent hangs.
pub const PENDING_LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug)]
struct Inner {
    synced: bool,
    /// An earlier run's tables were in force at the start.
    served: bool,
    eligible: bool,
    /// When the oldest change that no sync has picked up yet was queued; none before everything is there to sync.
    pending: Option<Instant>,
    /// When the oldest change of the running sync was queued.
    in_flight: Option<Instant>,
    /// The last successful sync.
    updated: Option<SystemTime>,
    problems: Vec<String>,
}

/// A handle on the agent's health: the agent writes, the HTTP server reads.
#[derive(Clone, Debug)]
pub struct Health(Arc<Mutex<Inner>>);

impl Default for Health {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Inner {
            synced: false,
            served: false,
            // As in kube-proxy: eligible until the Node object says otherwise.
            eligible: true,
            pending: None,
            in_flight: None,
            updated: None,
            problems: Vec::new(),
        })))
    }
}

/// Health at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The kernel has had the first full state of every kind.
    pub synced: bool,
    /// Or it has had one before this start, which is still in force.
    pub served: bool,
    /// The Node object allows traffic from load balancers.
    pub eligible: bool,
    /// Age of the oldest change that the kernel does not have yet.
    pub pending: Option<Duration>,
    /// When the kernel was last brought up to date.
    pub last_updated: Option<SystemTime>,
    /// When this was found.
    pub current: SystemTime,
    /// What else is wrong, in words. Does not change the verdicts.
    pub problems: Vec<String>,
}

impl Health {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Writers assign; what a panicking one left is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first full state of every kind is in the kernel. Never taken back.
    pub fn set_synced(&self) {
        self.lock().synced = true;
    }

    /// The tables of an earlier run are in force: the node takes traffic before the first sync.
    pub fn set_served(&self) {
        self.lock().served = true;
    }

    /// What the Node object says of traffic from load balancers ([`crate::source::Node::eligible`]).
    pub fn set_eligible(&self, eligible: bool) {
        self.lock().eligible = eligible;
    }

    /// What else is wrong, in words.
    pub fn set_problems(&self, problems: Vec<String>) {
        self.lock().problems = problems;
    }

    /// A change waits for the next sync.
    pub fn change_queued(&self) {
        self.change_queued_at(Instant::now());
    }

    fn change_queued_at(&self, now: Instant) {
        self.lock().pending.get_or_insert(now);
    }

    /// A sync has picked up every change queued so far.
    pub fn sync_started(&self) {
        let mut inner = self.lock();
        inner.in_flight = inner.in_flight.into_iter().chain(inner.pending).min();
        inner.pending = None;
    }

    /// The sync has brought its changes to the kernel.
    pub fn sync_succeeded(&self) {
        let mut inner = self.lock();
        inner.in_flight = None;
        inner.updated = Some(SystemTime::now());
    }

    /// The sync failed; its changes wait again, as old as they are.
    pub fn sync_failed(&self) {
        let mut inner = self.lock();
        inner.pending = inner.in_flight.take().into_iter().chain(inner.pending).min();
    }

    /// Health now.
    pub fn report(&self) -> Report {
        self.report_at(Instant::now(), SystemTime::now())
    }

    fn report_at(&self, now: Instant, current: SystemTime) -> Report {
        let inner = self.lock();
        let oldest = inner.pending.into_iter().chain(inner.in_flight).min();
        let pending = oldest.map(|oldest| now.saturating_duration_since(oldest));
        Report {
            synced: inner.synced,
            served: inner.served,
            eligible: inner.eligible,
            pending,
            last_updated: inner.updated,
            current,
            problems: inner.problems.clone(),
        }
    }
}

impl Report {
    /// Whether the agent lives: nothing waits for longer than [`PENDING_LIMIT`]. Neither the API server nor the Node object
    /// has a say in it.
    pub fn live(&self) -> bool {
        self.pending.is_none_or(|age| age < PENDING_LIMIT)
    }

    /// Whether load balancers may send to this node. A kube-proxy says so from its start on; here a node that never had any
    /// Services in its kernel has to have them first.
    pub fn takes_traffic(&self) -> bool {
        (self.synced || self.served) && self.eligible && self.live()
    }

    /// Whether this agent has done its first work.
    pub fn ready(&self) -> bool {
        self.synced && self.live()
    }

    /// kube-proxy's body (`ProxyHealth` in kubernetes/kubernetes, pkg/proxy/healthcheck/proxy_health.go), and what led to the
    /// verdict. `verdict` is the answer's: with a good one `lastUpdated` is now. Only `/healthz` tells of the Node object.
    pub fn to_json(&self, verdict: bool, node: bool) -> String {
        let updated = rfc3339(self.last_updated.unwrap_or(SystemTime::UNIX_EPOCH));
        let family = serde_json::json!({"lastUpdated": updated, "healthy": self.live()});
        let mut body = serde_json::json!({
            "lastUpdated": if verdict { rfc3339(self.current) } else { updated },
            "currentTime": rfc3339(self.current),
            "healthy": self.live(),
            "synced": self.synced,
            "pendingSeconds": self.pending.map(|age| age.as_secs()),
            "problems": self.problems,
        });
        if self.last_updated.is_some() {
            body["status"] = serde_json::json!({"IPv4": family, "IPv6": family});
        }
        if node {
            body["nodeEligible"] = self.eligible.into();
        }
        body.to_string()
    }
}

/// UTC, to the microsecond.
fn rfc3339(time: SystemTime) -> String {
    // Only times outside of the years -9999 to 9999 have no such form.
    k8s_openapi::jiff::Timestamp::try_from(time).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_ready_before_the_first_sync_but_alive() {
        let health = Health::default();
        let report = health.report();
        assert!(report.live() && !report.takes_traffic() && !report.ready());
        // A restart where an earlier run's tables serve: the node takes traffic, the agent is not ready.
        health.set_served();
        let report = health.report();
        assert!(report.live() && report.takes_traffic() && !report.ready());
    }

    #[test]
    fn a_change_that_waits_two_minutes_fails_both() {
        let health = Health::default();
        health.set_synced();
        let start = Instant::now();
        health.change_queued_at(start);
        let at = |seconds| health.report_at(start + Duration::from_secs(seconds), SystemTime::now());
        assert!(at(119).takes_traffic());
        assert!(!at(120).takes_traffic() && !at(120).live());
        health.sync_started();
        assert!(!at(120).live(), "a sync that hangs is no better");
        health.sync_failed();
        assert!(!at(120).live(), "nor one that failed");
        health.sync_started();
        health.sync_succeeded();
        assert!(at(120).takes_traffic());
    }

    #[test]
    fn a_change_queued_during_a_sync_is_not_forgotten() {
        let health = Health::default();
        let start = Instant::now();
        health.change_queued_at(start);
        health.sync_started();
        health.change_queued_at(start + Duration::from_secs(10));
        health.sync_succeeded();
        let report = health.report_at(start + Duration::from_secs(30), SystemTime::now());
        assert_eq!(report.pending, Some(Duration::from_secs(20)));
    }

    #[test]
    fn an_ineligible_node_is_alive_but_not_ready() {
        let health = Health::default();
        health.set_synced();
        health.set_eligible(false);
        let report = health.report();
        assert!(report.live() && report.ready() && !report.takes_traffic());
        let body: serde_json::Value = serde_json::from_str(&report.to_json(false, true)).unwrap();
        assert_eq!((&body["nodeEligible"], &body["healthy"]), (&false.into(), &true.into()), "{body}");
        let body: serde_json::Value = serde_json::from_str(&report.to_json(true, false)).unwrap();
        assert_eq!((body.get("nodeEligible"), &body["lastUpdated"]), (None, &body["currentTime"]), "{body}");
    }
}
