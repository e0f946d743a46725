//! When to look at the directory again, and which of its files are being written right now.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind, RenameMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

use super::scan;

/// A file that nobody wrote to for this long is read although nobody closed it: a link, or a writer that hangs.
const ABANDONED: Duration = Duration::from_secs(2);
/// Changes come in groups (a rename is two): how long to wait for the rest of one.
const GROUP: Duration = Duration::from_millis(5);

/// A file that was written to in place so shortly ago may be written to further, and the event that says so be under way.
const FRESH: Duration = Duration::from_millis(30);

#[derive(Debug, Default)]
struct Files {
    /// Files that are being written to, and until when that is believed without more news.
    busy: HashMap<String, Instant>,
    /// Files that were renamed into place: whole however young.
    whole: HashSet<String>,
}

#[derive(Debug, Default)]
struct Shared {
    files: Mutex<Files>,
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
        let next = self.shared.files().busy.values().min().copied();
        let wait = next.map_or(at_most, |until| until.saturating_duration_since(Instant::now()));
        if tokio::time::timeout(wait.min(at_most), self.shared.wake.notified()).await.is_ok() {
            tokio::time::sleep(GROUP).await;
        }
        self.shared.files().busy.retain(|_, until| *until > Instant::now());
    }

    /// Whether nobody is writing to the file now, as far as is known; it is to be read then. `age`: since it was last
    /// written to.
    pub(super) fn is_settled(&self, file: &str, age: Duration) -> bool {
        let mut files = self.shared.files();
        if files.busy.contains_key(file) {
            return false;
        }
        if files.whole.remove(file) || age >= FRESH {
            return true;
        }
        files.busy.insert(file.to_owned(), Instant::now() + FRESH);
        false
    }
}

impl Shared {
    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
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
        let closed = matches!(event.kind, EventKind::Access(AccessKind::Close(AccessMode::Write)));
        let renamed = matches!(event.kind, EventKind::Modify(ModifyKind::Name(RenameMode::To)));
        for path in &event.paths {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if !scan::counts(name) {
                continue;
            }
            let mut files = self.files();
            if writing {
                files.busy.insert(name.to_owned(), Instant::now() + ABANDONED);
            } else if closed || renamed || event.kind.is_remove() {
                files.busy.remove(name);
            }
            if renamed {
                files.whole.insert(name.to_owned());
            } else if writing || event.kind.is_remove() {
                files.whole.remove(name);
            }
        }
        // Reading is an event, too, and our own reading must not wake us.
        if closed || event.need_rescan() || !event.kind.is_access() {
            self.wake.notify_one();
        }
    }
}
