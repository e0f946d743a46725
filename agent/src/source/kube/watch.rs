//! The watch of one kind.

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use ::kube::runtime::watcher::{self, Event as Seen, InitialListStrategy};
use ::kube::{Api, Resource};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::source::convert::ConvertError;
use crate::source::{Event, Kind, Object, ObjectRef, Status};

/// Pauses between tries: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// When an API server is asked again for a kind that it does not have.
const LOOK_AGAIN: Duration = Duration::from_secs(300);

/// Where watches deliver.
#[derive(Clone)]
pub(super) struct Watch {
    pub(super) events: mpsc::Sender<Event>,
    pub(super) status: Status,
}

/// The receiver is gone.
struct Closed;

/// What is known of one kind.
struct State<Convert, Fallback> {
    watch: Watch,
    kind: Kind,
    convert: Convert,
    /// What to deliver for an object that cannot be converted; `None`: leave what was known.
    fallback: Fallback,
    /// Delivered and not deleted.
    known: HashSet<ObjectRef>,
    /// Those of the list that is being read, broken ones included, while one is.
    listed: Option<HashSet<ObjectRef>>,
    /// Objects that the status names as a problem.
    broken: HashSet<ObjectRef>,
}

impl Watch {
    /// Watches `kind` until the receiver is dropped.
    pub(super) async fn run<K>(
        self,
        kind: Kind,
        api: Api<K>,
        selector: &str,
        convert: impl FnMut(&K) -> Result<Option<Object>, ConvertError>,
        fallback: impl Fn(&K) -> Option<Object>,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let status = self.status.clone();
        let mut config = watcher::Config {
            label_selector: (!selector.is_empty()).then(|| selector.to_owned()),
            initial_list_strategy: InitialListStrategy::StreamingList,
            ..watcher::Config::default()
        };
        let mut state = State {
            watch: self.clone(),
            kind,
            convert,
            fallback,
            known: HashSet::new(),
            listed: None,
            broken: HashSet::new(),
        };
        let mut pause = FIRST_PAUSE;
        let mut last_error = Instant::now();
        loop {
            let mut stream = std::pin::pin!(watcher::watcher(api.clone(), config.clone()));
            loop {
                let seen = tokio::select! {
                    seen = stream.next() => seen,
                    () = self.events.closed() => return,
                };
                let error = match seen {
                    Some(Ok(event)) => {
                        if state.take(event).await.is_err() {
                            return;
                        }
                        continue;
                    }
                    Some(Err(error)) => error,
                    None => break,
                };
                if config.initial_list_strategy == InitialListStrategy::StreamingList && lacks_streaming(&error) {
                    tracing::info!(%kind, "the API server has no streaming lists; reading pages");
                    config.initial_list_strategy = InitialListStrategy::ListWatch;
                    break;
                }
                if kind.is_optional()
                    && let Some(code) = refusal(&error)
                {
                    // Nothing waits for it. A server that lacks it may be replaced by a newer one, a role be mended.
                    if state.is_without().await.is_err() {
                        return;
                    }
                    if code == 404 {
                        tracing::debug!(%kind, "the API server has no such kind");
                        tokio::select! {
                            () = tokio::time::sleep(spread(LOOK_AGAIN)) => continue,
                            () = self.events.closed() => return,
                        }
                    }
                }
                if status.problem(kind.as_str(), words(&error)) {
                    tracing::warn!(%kind, error = %words(&error), "watch failed; what is known stays in force");
                }
                if last_error.elapsed() > LONGEST_PAUSE * 2 {
                    pause = FIRST_PAUSE;
                }
                tokio::select! {
                    () = tokio::time::sleep(spread(pause)) => {}
                    () = self.events.closed() => return,
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
                last_error = Instant::now();
            }
        }
    }

    async fn send(&self, event: Event) -> Result<(), Closed> {
        self.events.send(event).await.map_err(|_| Closed)
    }
}

impl<Convert, Fallback> State<Convert, Fallback> {
    async fn take<K>(&mut self, event: Seen<K>) -> Result<(), Closed>
    where
        K: Resource,
        Convert: FnMut(&K) -> Result<Option<Object>, ConvertError>,
        Fallback: Fn(&K) -> Option<Object>,
    {
        match event {
            Seen::Init => self.listed = Some(HashSet::new()),
            Seen::InitApply(object) | Seen::Apply(object) => self.apply(&object).await?,
            Seen::Delete(object) => {
                let reference = self.reference(&object);
                self.forget(reference).await?;
            }
            Seen::InitDone => {
                let listed = self.listed.take().unwrap_or_default();
                let vanished: Vec<ObjectRef> = self.known.difference(&listed).cloned().collect();
                for reference in vanished {
                    self.forget(reference).await?;
                }
                // What went and was never understood is nobody's problem any more.
                self.broken.retain(|reference| {
                    let there = listed.contains(reference);
                    if !there {
                        self.watch.status.clear(&reference.to_string());
                    }
                    there
                });
                if !self.watch.status.kind(self.kind).synced {
                    self.watch.send(Event::Synced(self.kind)).await?;
                    self.watch.status.set_synced(self.kind);
                }
            }
        }
        self.watch.status.set_objects(self.kind, self.known.len());
        Ok(())
    }

    /// There is no list of this kind to be had.
    async fn is_without(&mut self) -> Result<(), Closed> {
        self.listed = None;
        let vanished: Vec<ObjectRef> = self.known.iter().cloned().collect();
        for reference in vanished {
            self.forget(reference).await?;
        }
        if !self.watch.status.kind(self.kind).synced {
            self.watch.send(Event::Synced(self.kind)).await?;
            self.watch.status.set_synced(self.kind);
        }
        Ok(())
    }

    async fn apply<K>(&mut self, object: &K) -> Result<(), Closed>
    where
        K: Resource,
        Convert: FnMut(&K) -> Result<Option<Object>, ConvertError>,
        Fallback: Fn(&K) -> Option<Object>,
    {
        let reference = self.reference(object);
        if let Some(listed) = &mut self.listed {
            listed.insert(reference.clone());
        }
        let converted = match (self.convert)(object) {
            Ok(converted) => {
                if self.broken.remove(&reference) {
                    self.watch.status.clear(&reference.to_string());
                }
                converted
            }
            Err(error) => {
                let about = reference.to_string();
                if self.watch.status.problem(&about, error.to_string()) {
                    tracing::warn!(object = %about, %error, "cannot be understood");
                }
                self.broken.insert(reference.clone());
                let fallback = (self.fallback)(object);
                if fallback.is_none() {
                    // It is there, and what was known of it stays.
                    return Ok(());
                }
                fallback
            }
        };
        match converted {
            Some(object) => {
                self.known.insert(reference);
                self.watch.send(Event::Upsert(object)).await
            }
            None => self.forget(reference).await,
        }
    }

    async fn forget(&mut self, reference: ObjectRef) -> Result<(), Closed> {
        if self.broken.remove(&reference) {
            self.watch.status.clear(&reference.to_string());
        }
        match self.known.remove(&reference) {
            true => self.watch.send(Event::Delete(reference)).await,
            false => Ok(()),
        }
    }

    fn reference<K: Resource>(&self, object: &K) -> ObjectRef {
        let metadata = object.meta();
        ObjectRef {
            kind: self.kind,
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
        }
    }
}

/// The code of an answer that the kind is not there or not for us.
fn refusal(error: &watcher::Error) -> Option<u16> {
    use watcher::Error::{InitialListFailed, WatchStartFailed};
    match error {
        InitialListFailed(::kube::Error::Api(status)) | WatchStartFailed(::kube::Error::Api(status)) => {
            Some(status.code).filter(|code| matches!(code, 403 | 404))
        }
        _ => None,
    }
}

/// Whether the server refuses `sendInitialEvents`.
fn lacks_streaming(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchStartFailed(::kube::Error::Api(status)) => matches!(status.code, 400 | 422),
        _ => false,
    }
}

/// The error with its causes, each once.
fn words(error: &watcher::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// From three quarters of the pause to the whole, so that nodes do not ask in step.
fn spread(pause: Duration) -> Duration {
    let random = RandomState::new().hash_one(0u8) % 256;
    pause * 3 / 4 + pause / 4 * random as u32 / 256
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Namespace;

    use super::*;
    use crate::source::convert;

    fn namespace(name: &str, broken: bool) -> Namespace {
        let mut namespace = Namespace::default();
        namespace.metadata.name = Some(name.to_owned());
        namespace.metadata.labels = broken.then(|| [("broken".to_owned(), String::new())].into());
        namespace
    }

    /// Cannot read what is labelled as broken.
    fn read(object: &Namespace) -> Result<Option<Object>, ConvertError> {
        match object.metadata.labels {
            Some(_) => Err(ConvertError { field: "f".into(), value: "v".into(), expected: "whole" }),
            None => convert::namespace(object).map(Object::Namespace).map(Some),
        }
    }

    #[tokio::test]
    async fn an_object_that_went_unseen_is_no_problem_any_more() {
        let (events, mut told) = mpsc::channel(64);
        let status = Status::default();
        let mut state = State {
            watch: Watch { events, status: status.clone() },
            kind: Kind::Namespace,
            convert: read,
            fallback: |_: &Namespace| None,
            known: HashSet::new(),
            listed: None,
            broken: HashSet::new(),
        };
        let mut take = async |seen| assert!(state.take(seen).await.is_ok());
        // `never` was never understood, `once` was before it broke.
        take(Seen::Init).await;
        for object in [namespace("never", true), namespace("once", false), namespace("stays", true)] {
            take(Seen::InitApply(object)).await;
        }
        take(Seen::InitDone).await;
        take(Seen::Apply(namespace("once", true))).await;
        assert_eq!(status.problems().len(), 3, "{:?}", status.problems());
        // The watch starts over, and two are gone.
        take(Seen::Init).await;
        take(Seen::InitApply(namespace("stays", true))).await;
        take(Seen::InitDone).await;
        let problems = status.problems();
        assert!(problems.len() == 1 && problems[0].starts_with("Namespace stays: "), "{problems:?}");
        let mut deleted = Vec::new();
        while let Ok(event) = told.try_recv() {
            if let Event::Delete(reference) = event {
                deleted.push(reference.name);
            }
        }
        assert_eq!(deleted, ["once"], "the only one that was delivered");
    }
}
