//! What the driver does: operations on volumes, each written so that it can be repeated, and cut short anywhere.

mod provision;
mod publish;
mod recover;
mod stage;
mod stats;

pub use recover::Report;
pub use stage::Staging;
pub use stats::Usage;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::backend::{Attached, Backend, Images};
use crate::error::{Context, Result};
use crate::model::{Nonce, Record, VolumeId};
use crate::request::TargetPath;
use crate::state::{Guard, Guards, Intent, Journal, Records, lock_directory};
use crate::sys::mountinfo;

/// The volumes of one node, and everything that it takes to work on them. Its methods block.
pub struct Volumes {
    backend: Box<dyn Backend>,
    records: Records,
    journal: Arc<Journal>,
    guards: Guards,
    kubelet_dir: PathBuf,
    /// Held while this process is the one driver of the state directory.
    _lock: std::fs::File,
}

impl Volumes {
    /// Opens state and pool, and returns the intents that an earlier run left open, for [`Volumes::recover`].
    ///
    /// # Errors
    /// Whatever makes it unsafe to go on: damaged state, the wrong pool, another driver.
    pub fn open(state_dir: &Path, pool_dir: &Path, kubelet_dir: &Path) -> Result<(Self, Vec<Intent>)> {
        std::fs::create_dir_all(state_dir).context(|| format!("create {}", state_dir.display()))?;
        let lock = lock_directory(state_dir)?;
        let backend = Box::new(Images::open(pool_dir, state_dir, &Nonce::new(random()?))?);
        let records = Records::open(state_dir)?;
        let (journal, open) = Journal::open(state_dir)?;
        let kubelet_dir = kubelet_dir.to_owned();
        Ok((Self { backend, records, journal, guards: Guards::default(), kubelet_dir, _lock: lock }, open))
    }

    /// Begins to work on a volume.
    ///
    /// # Errors
    /// [`crate::error::Error::Busy`] when somebody does.
    pub fn enter(&self, id: &VolumeId) -> Result<Guard> {
        self.guards.enter(id.as_str())
    }

    /// Begins to make a volume of this name.
    ///
    /// # Errors
    /// [`crate::error::Error::Busy`] when somebody does.
    pub fn enter_name(&self, name: &str) -> Result<Guard> {
        self.guards.enter(&format!("name {name}"))
    }

    /// How many operations are under way.
    pub fn under_way(&self) -> usize {
        self.guards.count()
    }

    /// Intents that have not ended.
    pub fn pending(&self) -> usize {
        self.journal.pending()
    }

    /// Where this process sees the volume's device mounted, but for its staging path.
    fn targets(&self, device: &dyn Attached, staging: &TargetPath) -> Result<Vec<PathBuf>> {
        // The mount table shows the kubelet's directory with its links resolved.
        let root = self.kubelet_dir.canonicalize().context(|| format!("resolve {}", self.kubelet_dir.display()))?;
        let staging = root.join(staging.relative());
        let node = device.root();
        let of_volume = |mount: &mountinfo::Mount| mount.dev == device.dev() || mount.is_node(&node);
        let mounts = mountinfo::read()?.into_iter().filter(of_volume).map(|mount| mount.target);
        Ok(mounts.filter(|target| *target != staging).collect())
    }

    fn device(&self, record: &Record) -> Result<Option<Box<dyn Attached>>> {
        self.backend.attached(record)
    }
}

fn random() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom(&mut bytes, GetRandomFlags::empty()).context(|| "get random bytes")?;
    Ok(bytes)
}
