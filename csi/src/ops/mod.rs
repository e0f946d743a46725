//! What the driver does: operations on volumes, each written so that it can be repeated, and cut short anywhere.

mod expand;
mod group;
mod health;
mod hold;
mod inline;
mod probes;
mod provision;
mod publish;
mod recover;
mod snapshot;
mod stage;
mod stats;

pub use health::{Finding, Severity};
pub use probes::{PATIENCE, Probe, Probes, hung};
pub use recover::Report;
pub use stage::Staging;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::backend::{
    Attached, Backend, Devices, Directories, Features, Images, LogicalVolumes, LvmPlace, Pool, Subvolumes,
};
use crate::error::{Context, Error, Result};
use crate::model::{BackendKind, Nonce, Record, Snapshot, VolumeId};
use crate::request::TargetPath;
use crate::state::{Guard, Guards, Intent, Journal, Promises, Records, Store, Uses, lock_directory};
use crate::sys::mountinfo::{self, Mount};
use crate::sys::target::{Found, Target};

/// Where the driver keeps what.
#[derive(Clone, Debug)]
pub struct Places {
    /// Journal and records.
    pub state_dir: PathBuf,
    /// Storage of volumes.
    pub pool_dir: PathBuf,
    /// All targets lie below.
    pub kubelet_dir: PathBuf,
    /// The backends to serve.
    pub backends: Vec<BackendKind>,
    /// Whole devices for the raw backend.
    pub devices: Vec<PathBuf>,
    /// What the lvm backends work on.
    pub lvm: LvmPlace,
}

/// The volumes of one node, and everything that it takes to work on them. Its methods block.
pub struct Volumes {
    backends: BTreeMap<BackendKind, Box<dyn Backend>>,
    pool: Arc<Pool>,
    records: Records<Record>,
    snapshots: Records<Snapshot>,
    uses: Uses,
    promises: Promises,
    journal: Arc<Journal>,
    guards: Guards,
    /// Looks at volumes that are under way.
    pub probes: Probes,
    kubelet_dir: PathBuf,
    /// Held while this process is the one driver of the state directory.
    _lock: File,
}

impl Volumes {
    /// Opens state and pool, and returns the intents that an earlier run left open, for [`Volumes::recover`].
    ///
    /// # Errors
    /// Whatever makes it unsafe to go on: damaged state, the wrong pool, another driver.
    pub fn open(places: &Places) -> Result<(Self, Vec<Intent>)> {
        let state_dir = &places.state_dir;
        std::fs::create_dir_all(state_dir).context(|| format!("create {}", state_dir.display()))?;
        let lock = lock_directory(state_dir)?;
        let pool = Arc::new(Pool::open(&places.pool_dir, state_dir, &Nonce::new(random()?))?);
        let mut backends: BTreeMap<BackendKind, Box<dyn Backend>> = BTreeMap::new();
        for &kind in &places.backends {
            backends.insert(kind, open(kind, &pool, places)?);
        }
        let (records, snapshots) = (Records::open(state_dir)?, Records::open(state_dir)?);
        let uses = Uses::open(state_dir)?;
        let (journal, open) = Journal::open(state_dir)?;
        let volumes = Self {
            backends,
            pool,
            records,
            snapshots,
            uses,
            promises: Promises::default(),
            journal,
            guards: Guards::default(),
            probes: Probes::default(),
            kubelet_dir: places.kubelet_dir.clone(),
            _lock: lock,
        };
        Ok((volumes, open))
    }

    /// Begins to work on a volume.
    ///
    /// # Errors
    /// [`Error::Busy`] when somebody does.
    pub fn enter(&self, id: &VolumeId) -> Result<Guard> {
        self.guards.enter(id.as_str())
    }

    /// Begins to make something of this name.
    ///
    /// # Errors
    /// [`Error::Busy`] when somebody does.
    pub fn enter_name(&self, kind: &str, name: &str) -> Result<Guard> {
        self.guards.enter(&format!("{kind} {name}"))
    }

    /// How many operations are under way.
    pub fn under_way(&self) -> usize {
        self.guards.count()
    }

    /// Intents that have not ended.
    pub fn pending(&self) -> usize {
        self.journal.pending()
    }

    /// What at least one of the backends can do.
    pub fn features(&self) -> Features {
        self.backends.values().map(|backend| backend.features()).fold(Features::default(), |all, one| Features {
            snapshots: all.snapshots || one.snapshots,
            expand: all.expand || one.expand,
            modify: all.modify || one.modify,
            tracking: all.tracking || one.tracking,
        })
    }

    /// The backend of something that was made, which may not be served any more.
    fn backend(&self, kind: BackendKind) -> Result<&dyn Backend> {
        self.backends.get(&kind).map(Box::as_ref).ok_or_else(|| {
            let (what, expected) = (format!("the {} backend", kind.as_str()), "served by this driver".to_owned());
            Error::State { what, expected, found: self.named_backends() }
        })
    }

    /// The backend that a class asks for.
    fn wanted_backend(&self, kind: BackendKind) -> Result<&dyn Backend> {
        self.backends.get(&kind).map(Box::as_ref).ok_or_else(|| {
            let expected = format!("served by this driver; {}", self.named_backends());
            Error::Invalid { field: "parameters.backend", value: kind.as_str().into(), expected }
        })
    }

    fn named_backends(&self) -> String {
        let served: Vec<_> = self.backends.keys().map(|kind| kind.as_str()).collect();
        format!("--backends names {}", served.join(", "))
    }

    /// The backends that are served.
    pub fn kinds(&self) -> Vec<BackendKind> {
        self.backends.keys().copied().collect()
    }

    /// What volumes of a backend share the room of.
    pub fn store(&self, kind: BackendKind) -> Store {
        self.backends.get(&kind).map_or(Store::Pool, |backend| backend.store())
    }

    /// What a volume shares the room of.
    pub fn store_of(&self, id: &VolumeId) -> Store {
        self.records.find(id).map_or(Store::Pool, |record| self.store(record.parameters.backend))
    }

    /// Whether volumes of this backend can be made here.
    pub fn serves(&self, kind: BackendKind) -> bool {
        self.backends.contains_key(&kind)
    }

    fn backend_of(&self, record: &Record) -> Result<&dyn Backend> {
        self.backend(record.parameters.backend)
    }

    /// Bytes of a store that nothing known has a claim on.
    fn unclaimed(&self, store: Store) -> Result<u64> {
        let backends = || self.backends.values().filter(|backend| backend.store() == store);
        let Some(first) = backends().next() else { return Ok(0) };
        let mut free = first.free()?;
        for record in self.records.all() {
            if let Some(backend) = backends().find(|backend| backend.kind() == record.parameters.backend) {
                free = free.saturating_sub(backend.outstanding(&record)?);
            }
        }
        for snapshot in self.snapshots.all() {
            if let Some(backend) = backends().find(|backend| backend.kind() == snapshot.parameters.backend) {
                free = free.saturating_sub(backend.outstanding_of(&snapshot)?);
            }
        }
        Ok(free)
    }

    /// Where this process sees the volume, its device's node included.
    fn mounts(&self, device: &dyn Attached) -> Result<Vec<Mount>> {
        Ok(mountinfo::read()?.into_iter().filter(|mount| device.shows(mount)).collect())
    }

    /// Where this process sees the volume, but for its staging path.
    fn targets(&self, device: &dyn Attached, staging: &TargetPath) -> Result<Vec<PathBuf>> {
        let root = self.root()?;
        // Below the kubelet's directory as callers name it, by whatever links they reach it.
        let named = |target: PathBuf| match target.strip_prefix(&root) {
            Ok(below) => self.kubelet_dir.join(below),
            Err(_) => target,
        };
        let targets = self.mounts(device)?.into_iter().map(|mount| named(mount.target));
        let staging = self.kubelet_dir.join(staging.relative());
        Ok(targets.filter(|target| *target != staging).collect())
    }

    /// The kubelet's directory as the mount table shows it, with its links resolved.
    fn root(&self) -> Result<PathBuf> {
        self.kubelet_dir.canonicalize().context(|| format!("resolve {}", self.kubelet_dir.display()))
    }

    /// The root of the volume's filesystem, by one of its mounts below the kubelet's directory, a writable one if there
    /// is one. `None` when there is none.
    fn open_root(&self, device: &dyn Attached) -> Result<Option<File>> {
        let root = self.root()?;
        let mut seen = None;
        for mount in self.mounts(device)? {
            let Ok(path) = TargetPath::parse("mount", &mount.target.to_string_lossy(), &root) else { continue };
            let Some(target) = Target::open(&path)? else { continue };
            let found = target.look()?;
            if !device.is(&found) {
                continue;
            }
            if let Some(directory) = target.directory()? {
                if matches!(found, Found::Mounted { read_only: false, .. }) {
                    return Ok(Some(directory));
                }
                seen = Some(directory);
            }
        }
        Ok(seen)
    }

    /// Where the volume is staged but for this path: mounted below the kubelet's directory, and at no pod's target.
    fn staged_elsewhere(&self, device: &dyn Attached, staging: &TargetPath) -> Result<Option<PathBuf>> {
        let (root, pods) = (self.root()?, self.root()?.join("pods"));
        let mut others = self.targets(device, staging)?.into_iter();
        Ok(others.find(|target| target.starts_with(&root) && !target.starts_with(&pods)))
    }

    fn device(&self, record: &Record) -> Result<Option<Box<dyn Attached>>> {
        self.backend_of(record)?.attached(record)
    }

    /// As [`Volumes::device`], to take the volume down: that must go also when its storage is damaged or gone.
    fn remains(&self, record: &Record) -> Result<Option<Box<dyn Attached>>> {
        let backend = self.backend_of(record)?;
        match backend.attached(record) {
            Ok(None) => backend.remains(record, None),
            Err(damage @ Error::Damaged { .. }) => {
                tracing::warn!(%damage, "taken down all the same");
                backend.remains(record, Some(damage))
            }
            attached => attached,
        }
    }
}

fn open(kind: BackendKind, pool: &Arc<Pool>, places: &Places) -> Result<Box<dyn Backend>> {
    Ok(match kind {
        BackendKind::Image => Box::new(Images::new(pool.clone())?),
        BackendKind::Btrfs => Box::new(Subvolumes::new(pool.clone())?),
        BackendKind::Directory => Box::new(Directories::new(pool.clone())),
        BackendKind::Raw => Box::new(Devices::new(pool.clone(), places.devices.clone())),
        BackendKind::Lvm | BackendKind::LvmThin => {
            Box::new(LogicalVolumes::new(&places.lvm, &places.state_dir, kind == BackendKind::LvmThin)?)
        }
    })
}

fn random() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom(&mut bytes, GetRandomFlags::empty()).context(|| "get random bytes")?;
    Ok(bytes)
}
