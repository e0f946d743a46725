//! When to look at the directory again, and which of its files are being written right now.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

use super::scan;

/// A file that nobody wrote to for this long is read although nobody closed it: a link, or a writer that hangs.
const ABANDONED: Duration = Duration::from_secs(2);
/// Changes come in groups (a rename is two): how long to wait for the rest of one.
const GROUP: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
struct Shared {
    /// When each file that is open for writing was last written to.
    writing: Mutex<HashMap<String, Instant>>,
    wake: Notify,
}

/// A watch on a directory. Where the kernel gives none, the slow look every so often is what remains.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    watcher: Option<RecommendedWatcher>,
    identity: Option<(u64, u64)>,
}

impl Watch {
    pub(super) fn start(dir: &Path) -> Self {
        let mut this = Self { shared: Arc::default(), watcher: None, identity: None };
        this.renew(dir);
        this
    }

    /// Watches the directory that is there now, where it is another one than before.
    pub(super) fn renew(&mut self, dir: &Path) {
        let identity = scan::identity(dir);
        if self.watcher.is_some() && identity == self.identity {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let watcher = notify::recommended_watcher(move |event| shared.note(event)).and_then(|mut watcher| {
            watcher.watch(dir, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        self.identity = identity;
        self.watcher = watcher
            .inspect_err(|error| tracing::warn!(dir = %dir.display(), %error, "cannot watch; changes are seen late"))
            .ok();
    }

    /// Returns when something may have changed: told so, or after `at_most`.
    pub(super) async fn changed(&self, at_most: Duration) {
        let oldest = self.shared.writing().values().min().copied();
        let wait = oldest.map_or(at_most, |since| (since + ABANDONED).saturating_duration_since(Instant::now()));
        if tokio::time::timeout(wait.min(at_most), self.shared.wake.notified()).await.is_ok() {
            tokio::time::sleep(GROUP).await;
        }
        self.shared.writing().retain(|_, since| since.elapsed() < ABANDONED);
    }

    /// Whether nobody is writing to the file now, as far as is known.
    pub(super) fn is_settled(&self, file: &str) -> bool {
        !self.shared.writing().contains_key(file)
    }
}

impl Shared {
    fn writing(&self) -> std::sync::MutexGuard<'_, HashMap<String, Instant>> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, event: notify::Result<notify::Event>) {
        let Ok(event) = event else {
            self.wake.notify_one();
            return;
        };
        let writing = matches!(
            event.kind,
            EventKind::Create(CreateKind::File) | EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any)
        );
        let done = matches!(
            event.kind,
            EventKind::Access(AccessKind::Close(AccessMode::Write)) | EventKind::Modify(ModifyKind::Name(_))
        ) || event.kind.is_remove();
        for path in &event.paths {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if !scan::counts(name) {
                continue;
            }
            if writing {
                self.writing().insert(name.to_owned(), Instant::now());
            } else if done {
                self.writing().remove(name);
            }
        }
        // Reading is an event, too, and our own reading must not wake us.
        if writing || done || event.need_rescan() || !event.kind.is_access() {
            self.wake.notify_one();
        }
    }
}
