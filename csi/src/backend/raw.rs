//! Volumes as whole devices that the driver was given.
//!
//! A device is taken by a *claim*, a file in the pool that names it, its identity and its size; it is made whole before
//! it has a name, as an image is. A device counts as free only while nothing claims it and its first and its last MiB are
//! zeros: what may hold somebody's data is never handed out, and that is looked at again before it is written to at first. A volume that goes is zeroed before its claim does.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::device::{Device, DeviceVolume, HEAD, is_taken, release};
use super::pool::{Pool, nonce_of, set_nonce};
use super::{Attached, Backend, Features, GoOn, Locked, Made, New, Origin, damaged, inode_of};
use crate::error::{Context, Error, Result};
use crate::model::{BackendKind, Nonce, Record, State, VolumeId};
use crate::state::Store;
use crate::sys::block;

/// The raw backend.
#[derive(Debug)]
pub struct Devices {
    pool: Arc<Pool>,
    /// As the driver was given them.
    paths: Vec<PathBuf>,
    /// Held while a device is chosen.
    choosing: Mutex<()>,
    /// Held while devices are looked at.
    looking: Mutex<()>,
    /// Those at which a look has not come back.
    silent: Arc<Mutex<BTreeSet<PathBuf>>>,
}

/// How long devices may take to be looked at, all at once. One that takes longer counts as not free.
const LOOK: Duration = Duration::from_secs(4);

/// What a claim says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claim {
    path: PathBuf,
    identity: String,
    size: u64,
}

/// Opens a device, and says what a claim on it says.
fn open(path: &Path, exclusive: bool) -> Result<(Device, Claim)> {
    let device = Device::open(path, exclusive)?;
    let identity = block::identity(device.dev).ok_or_else(|| Error::State {
        what: path.display().to_string(),
        expected: "a block device with an identifier of its own".into(),
        found: "one without".into(),
    })?;
    let claim = Claim { path: path.to_owned(), identity, size: device.size };
    Ok((device, claim))
}

fn is_blank(device: &Device) -> Result<bool> {
    let mut part = vec![0; HEAD.min(device.size) as usize];
    for at in [0, device.size.saturating_sub(HEAD)] {
        device.file.read_exact_at(&mut part, at).context(|| format!("read {}", device.node.display()))?;
        if part.iter().any(|&byte| byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What a claim on a device would say, and whether it is blank.
fn look(path: &Path) -> Result<(Claim, bool)> {
    let (device, claim) = open(path, true)?;
    is_blank(&device).map(|blank| (claim, blank))
}

impl Devices {
    /// Devices whose claims are in this pool.
    pub fn new(pool: Arc<Pool>, paths: Vec<PathBuf>) -> Self {
        Self { pool, paths, choosing: Mutex::default(), looking: Mutex::default(), silent: Arc::default() }
    }

    fn claimed(&self) -> Result<Vec<Claim>> {
        let names = self.pool.names()?.into_iter().filter(|name| name.ends_with(".dev"));
        names.filter_map(|name| self.read(&name).transpose()).collect()
    }

    fn read(&self, name: &str) -> Result<Option<Claim>> {
        let Some(mut file) = self.pool.open_file(name)? else { return Ok(None) };
        let mut text = String::new();
        file.read_to_string(&mut text).context(|| format!("read {name}"))?;
        let corrupt = |error: serde_json::Error| Error::Corrupt { path: name.into(), why: error.to_string() };
        serde_json::from_str(&text).map_err(corrupt).map(Some)
    }

    /// Devices that nothing claims, nobody uses and that are blank.
    fn unclaimed(&self) -> Result<Vec<Claim>> {
        let _looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        let claimed = self.claimed()?;
        let (told, tell) = std::sync::mpsc::channel();
        for path in self.paths.iter().filter(|path| !claimed.iter().any(|claim| claim.path == **path)) {
            if !self.silent.lock().unwrap_or_else(PoisonError::into_inner).insert(path.clone()) {
                tracing::warn!(path = %path.display(), "not free: an earlier look at it has not come back");
                continue;
            }
            // A thread of its own: one that hangs holds up no other.
            let (path, silent, told) = (path.clone(), self.silent.clone(), told.clone());
            let look = move || {
                let outcome = look(&path);
                silent.lock().unwrap_or_else(PoisonError::into_inner).remove(&path);
                // Who asked may have left.
                let _ = told.send((path, outcome));
            };
            std::thread::Builder::new().spawn(look).context(|| "look at a device")?;
        }
        drop(told);
        let (mut free, end) = (Vec::new(), Instant::now() + LOOK);
        while let Ok((path, outcome)) = tell.recv_timeout(end.saturating_duration_since(Instant::now())) {
            match outcome {
                Ok((found, _)) if claimed.iter().any(|claim| claim.identity == found.identity) => {}
                Ok((found, true)) => free.push(found),
                Ok(_) => tracing::warn!(path = %path.display(), "not blank: wipe it to have it used"),
                // In use, or not there.
                Err(error) => tracing::debug!(%error, "not free"),
            }
        }
        free.sort_by_key(|claim| self.paths.iter().position(|path| *path == claim.path));
        Ok(free)
    }

    fn verified(&self, record: &Record) -> Result<Device> {
        let (id, name) = (&record.id, name(&record.id));
        let file = self.pool.open_file(&name)?;
        let file = file.ok_or_else(|| damaged(id, "claim", &name, "no such file in the pool"))?;
        let inode = inode_of(&file, &name)?;
        if inode != record.inode {
            return Err(damaged(id, "inode", record.inode, inode));
        }
        self.claimed_device(id, &record.nonce, false)
    }

    /// Whether a device that was claimed blank is so still: days may have gone by, in which somebody else took it.
    fn still_blank(&self, record: &Record) -> Result<()> {
        let device = match self.claimed_device(&record.id, &record.nonce, true) {
            Err(error) if is_taken(&error) => {
                let by = "somebody mounted its device, or took it, before it was ever used".into();
                return Err(Error::InUse { id: record.id.clone(), by });
            }
            other => other?,
        };
        if is_blank(&device)? {
            return Ok(());
        }
        Err(Error::State {
            what: format!("{}, the device of volume {}", device.node.display(), record.id),
            expected: "blank, as it was when it was taken".into(),
            found: "data of somebody else; wipe it, or delete the volume".into(),
        })
    }

    fn claimed_device(&self, id: &VolumeId, nonce: &Nonce, exclusive: bool) -> Result<Device> {
        let name = name(id);
        let file = self.pool.open_file(&name)?;
        let file = file.ok_or_else(|| damaged(id, "claim", &name, "no such file in the pool"))?;
        if nonce_of(&file, &name)?.as_ref() != Some(nonce) {
            return Err(damaged(id, "nonce", "the record's", "another one, or none"));
        }
        let claim = self.read(&name)?.ok_or_else(|| damaged(id, "claim", &name, "none"))?;
        let (device, found) = open(&claim.path, exclusive)?;
        if found != claim {
            return Err(damaged(id, "device", format!("{claim:?}"), format!("{found:?}")));
        }
        Ok(device)
    }
}

fn name(id: &VolumeId) -> String {
    format!("{id}.dev")
}

impl Backend for Devices {
    fn kind(&self) -> BackendKind {
        BackendKind::Raw
    }

    fn store(&self) -> Store {
        Store::Devices
    }

    fn features(&self) -> Features {
        Features { snapshots: false, expand: false, modify: true, tracking: false }
    }

    fn free(&self) -> Result<u64> {
        Ok(self.unclaimed()?.iter().map(|claim| claim.size).sum())
    }

    fn largest(&self) -> Result<Option<u64>> {
        Ok(Some(self.unclaimed()?.iter().map(|claim| claim.size).max().unwrap_or(0)))
    }

    fn outstanding(&self, _: &Record) -> Result<u64> {
        // A claimed device is not counted as free.
        Ok(0)
    }

    fn create(&self, new: New<'_>, _: Option<Origin<'_>>, _: GoOn<'_>) -> Result<Made> {
        let _choosing = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |size: u64| size >= new.size && new.most.is_none_or(|most| size <= most);
        let mut free = self.unclaimed()?;
        let available = free.iter().map(|claim| claim.size).max().unwrap_or(0);
        free.retain(|claim| fits(claim.size));
        let Some(claim) = free.into_iter().min_by_key(|claim| claim.size) else {
            return Err(Error::NoSpace { wanted: new.size, available });
        };
        let name = name(new.id);
        let mut file = self.pool.unnamed()?;
        let text = serde_json::to_vec(&claim).expect("a claim has only strings and numbers");
        file.write_all(&text).context(|| format!("write {name}"))?;
        set_nonce(&file, new.nonce, &name)?;
        file.sync_all().context(|| format!("sync {name}"))?;
        let inode = inode_of(&file, &name)?;
        self.pool.link(&file, &name)?;
        Ok(Made { inode, size: claim.size })
    }

    /// Of a device that was never handed out only the claim goes: what is on it since is somebody else's.
    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool> {
        let name = name(id);
        let Some(file) = self.pool.open_file(&name)? else { return Ok(false) };
        if nonce_of(&file, &name)?.as_ref() != Some(nonce) {
            return Err(damaged(id, "nonce", "the record's", "another one, or none"));
        }
        self.pool.unlink(&name)?;
        Ok(true)
    }

    fn discard(&self, record: &Record) -> Result<()> {
        let (id, nonce) = (&record.id, &record.nonce);
        if record.state() != State::Blank && self.pool.open_file(&name(id))?.is_some() {
            let device = match self.claimed_device(id, nonce, true) {
                Err(error) if is_taken(&error) => {
                    let by = "its device is mounted or taken by somebody".into();
                    return Err(Error::InUse { id: id.clone(), by });
                }
                other => other?,
            };
            device.lock(id)?;
            // A device that stayed read-only would be so for the next volume.
            if block::read_only(&device.file)? {
                block::set_read_only(&device.file, false)?;
            }
            device.zero(device.size)?;
        }
        self.erase(id, nonce).map(drop)
    }

    fn check(&self, record: &Record) -> Result<()> {
        self.verified(record).map(drop)
    }

    fn lock(&self, record: &Record) -> Result<Box<dyn Locked>> {
        let device = self.verified(record)?;
        device.lock(&record.id)?;
        if record.state() == State::Blank {
            self.still_blank(record)?;
        }
        Ok(Box::new(DeviceVolume { device, record: record.clone() }))
    }

    fn attached(&self, record: &Record) -> Result<Option<Box<dyn Attached>>> {
        if self.pool.open_file(&name(&record.id))?.is_none() {
            return Ok(None);
        }
        let device = self.verified(record)?;
        Ok(Some(Box::new(DeviceVolume { device, record: record.clone() })))
    }

    fn detach(&self, record: &Record) -> Result<()> {
        release(record, || self.claimed_device(&record.id, &record.nonce, true))
    }

    fn name(&self, id: &VolumeId) -> Option<String> {
        Some(name(id))
    }
}
