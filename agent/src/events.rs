//! Events of Services with which something is wrong, for those who ask `kubectl describe service`: `events.k8s.io/v1`.
//!
//! What is wrong is told when it begins to be, once for each node; repetitions within six minutes are counted in one Event. No
//! node writes more than [`BURST`] at once and then one in [`REFILL`], so that a broken cluster is not broken by its Events.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use keelway_proxy::ObjectName;
use kube::Api;
use kube::api::ListParams;
use kube::runtime::events::{Event, EventType, Reporter};
use tokio::sync::{mpsc, watch};

/// As the API's `reportingController`.
pub const CONTROLLER: &str = "keelway-agent";
/// Events that may be written at once.
pub const BURST: u32 = 25;
/// After those, one in this time.
pub const REFILL: Duration = Duration::from_secs(10);
/// Events that may wait; more are in the log only.
const QUEUE: usize = 256;
/// Until problems that come and go in between are not worth an Event.
const SETTLE: Duration = Duration::from_secs(1);
/// The API's limit of a note, in bytes.
const NOTE_LIMIT: usize = 1024;

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Note {
    /// The port of the health check is taken. (Reason and action are kube-proxy's.)
    HealthCheckPort,
    /// An address and port that another Service has.
    Conflict,
    /// The kernel's tables are full.
    LeftOut,
    /// Something of the object cannot be understood.
    Invalid,
}

impl Note {
    const fn reason(self) -> &'static str {
        match self {
            Self::HealthCheckPort => "FailedToStartServiceHealthcheck",
            Self::Conflict => "ServiceAddressConflict",
            Self::LeftOut => "ServiceDoesNotFit",
            Self::Invalid => "ServiceNotWhollyInForce",
        }
    }

    const fn action(self) -> &'static str {
        match self {
            Self::HealthCheckPort => "Listen",
            Self::Conflict | Self::LeftOut | Self::Invalid => "Program",
        }
    }
}

/// Something wrong with a Service, in words.
pub type Complaint = (ObjectName, Note, String);

/// A handle that takes Events; they are written by a task of their own.
#[derive(Clone, Debug)]
pub struct Recorder(Option<mpsc::Sender<Complaint>>);

impl Recorder {
    /// Writes nothing: where there is no API, the log has to do.
    pub const fn none() -> Self {
        Self(None)
    }

    /// Writes to the API that `client` reaches, as `node`.
    pub fn start(client: kube::Client, node: String) -> Self {
        let (sender, inbox) = mpsc::channel(QUEUE);
        tokio::spawn(write(client, node, inbox));
        Self(Some(sender))
    }

    /// Tells of something wrong with `service`. Never waits.
    pub fn warn(&self, service: &ObjectName, note: Note, words: &str) {
        let Some(sender) = &self.0 else { return };
        if sender.try_send((service.clone(), note, words.to_owned())).is_err() {
            tracing::debug!(%service, "too many events wait; this one is in the log only");
        }
    }
}

/// Tells of what is new in a set of complaints, when it has lasted for a moment.
pub async fn follow(mut complaints: watch::Receiver<BTreeSet<Complaint>>, recorder: Recorder) {
    let mut known = BTreeSet::new();
    loop {
        let now = complaints.borrow_and_update().clone();
        for (service, note, words) in now.difference(&known) {
            tracing::warn!(%service, "{words}");
            recorder.warn(service, *note, words);
        }
        known = now;
        if complaints.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(SETTLE).await;
    }
}

async fn write(client: kube::Client, node: String, mut inbox: mpsc::Receiver<Complaint>) {
    let reporter = Reporter { controller: CONTROLLER.into(), instance: Some(node.clone()) };
    let recorder = kube::runtime::events::Recorder::new(client.clone(), reporter);
    let mut bucket = Bucket::new(Instant::now());
    while let Some((service, note, words)) = inbox.recv().await {
        if !bucket.take(Instant::now()) {
            tracing::debug!(%service, "too many events; this one is in the log only");
            continue;
        }
        let mut words = format!("node {node}: {words}");
        words.truncate(words.floor_char_boundary(NOTE_LIMIT));
        let event = Event {
            type_: EventType::Warning,
            reason: note.reason().into(),
            note: Some(words),
            action: note.action().into(),
            secondary: None,
        };
        if let Err(error) = publish(&client, &recorder, &service, &event).await {
            tracing::debug!(%service, %error, "an event cannot be written");
        }
    }
}

async fn publish(
    client: &kube::Client,
    recorder: &kube::runtime::events::Recorder,
    service: &ObjectName,
    event: &Event,
) -> kube::Result<()> {
    // `kubectl describe` finds Events by the object's uid, which nothing else here needs; `list` is a verb that the agent has.
    let services: Api<Service> = Api::namespaced(client.clone(), &service.namespace);
    let named = ListParams::default().fields(&format!("metadata.name={}", service.name));
    let found = services.list_metadata(&named).await?.items.into_iter().next();
    let Some(uid) = found.and_then(|found| found.metadata.uid) else { return Ok(()) };
    let regarding = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Service".into()),
        namespace: Some(service.namespace.clone()),
        name: Some(service.name.clone()),
        uid: Some(uid),
        ..ObjectReference::default()
    };
    recorder.publish(event, &regarding).await
}

/// How many Events may be written.
struct Bucket {
    left: u32,
    filled: Instant,
}

impl Bucket {
    const fn new(now: Instant) -> Self {
        Self { left: BURST, filled: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let more = (now.saturating_duration_since(self.filled).as_secs() / REFILL.as_secs()) as u32;
        self.filled += REFILL * more;
        self.left = self.left.saturating_add(more).min(BURST);
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_few_whatever_happens() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let taken = (0..1000).filter(|_| bucket.take(start)).count();
        assert_eq!(taken, BURST as usize);
        assert!(!bucket.take(start + REFILL / 2));
        assert!(bucket.take(start + REFILL) && !bucket.take(start + REFILL));
        let later = (0..1000).filter(|_| bucket.take(start + REFILL * 1000)).count();
        assert_eq!(later, BURST as usize, "what was not used does not add up");
    }

    #[tokio::test]
    async fn only_what_is_new_is_told() {
        let (sender, mut told) = mpsc::channel(QUEUE);
        let one = |name: &str, words: &str| (ObjectName::new("default", name), Note::Conflict, words.to_owned());
        let (complaints, receiver) = watch::channel(BTreeSet::from([one("a", "x")]));
        tokio::spawn(follow(receiver, Recorder(Some(sender))));
        assert_eq!(told.recv().await, Some(one("a", "x")));
        complaints.send_replace(BTreeSet::from([one("a", "x"), one("b", "y")]));
        assert_eq!(told.recv().await, Some(one("b", "y")));
        // Gone and back: new again.
        complaints.send_replace(BTreeSet::from([one("b", "y")]));
        tokio::time::sleep(SETTLE * 2).await;
        complaints.send_replace(BTreeSet::from([one("a", "x"), one("b", "y")]));
        assert_eq!(told.recv().await, Some(one("a", "x")));
    }
}
