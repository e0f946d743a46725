//! Volumes as whole devices that the driver was given.
//!
//! A device is taken by a *claim*, a file in the pool that names it, its identity and its size; it is made whole before
//! it has a name, as an image is. A device counts as free only while nothing claims it and its first MiB is zeros: what
//! may hold somebody's data is never handed out. A volume that goes is zeroed before its claim does.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::pool::{Pool, nonce_of, set_nonce};
use super::{Attached, Backend, Features, GoOn, Locked, Made, New, Origin, SETTLE, damaged, inode_of};
use crate::error::{Context, Error, Result};
use crate::model::{BackendKind, Content, FsType, MountOptions, Mutable, Nonce, Record, VolumeId};
use crate::state::Store;
use crate::sys::mount::{self, Detached};
use crate::sys::mountinfo::{self, Mount};
use crate::sys::target::Found;
use crate::sys::{Dev, block, mkfs};

/// What of a free device has to be zeros: all signatures that there are begin here.
const HEAD: u64 = 1 << 20;

/// The raw backend.
#[derive(Debug)]
pub struct Devices {
    pool: Arc<Pool>,
    /// As the driver was given them.
    paths: Vec<PathBuf>,
    /// Held while a device is chosen.
    choosing: Mutex<()>,
}

/// What a claim says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claim {
    path: PathBuf,
    identity: String,
    size: u64,
}

/// A device, held open, and what it is.
struct Device {
    file: File,
    dev: Dev,
    node: PathBuf,
    claim: Claim,
}

impl Device {
    fn open(path: &Path, exclusive: bool) -> Result<Self> {
        let what = || format!("open {}", path.display());
        let flags = if exclusive { libc::O_EXCL } else { 0 };
        let file = File::options().read(true).write(true).custom_flags(flags).open(path).context(what)?;
        let meta = file.metadata().context(what)?;
        let unfit = |found: &str| Error::State {
            what: path.display().to_string(),
            expected: "a block device with an identifier of its own".into(),
            found: found.into(),
        };
        if !meta.file_type().is_block_device() {
            return Err(unfit("something else"));
        }
        let dev = Dev::from_raw(meta.rdev());
        let identity = block::identity(dev).ok_or_else(|| unfit("one without"))?;
        let node = block::node(dev).ok_or_else(|| unfit("one without a node"))?;
        let claim = Claim { path: path.to_owned(), identity, size: block::size(&file)? };
        Ok(Self { file, dev, node, claim })
    }

    fn is_blank(&self) -> Result<bool> {
        let mut head = vec![0; HEAD.min(self.claim.size) as usize];
        self.file.read_exact_at(&mut head, 0).context(|| format!("read {}", self.node.display()))?;
        Ok(head.iter().all(|&byte| byte == 0))
    }
}

impl Devices {
    /// Devices whose claims are in this pool.
    pub fn new(pool: Arc<Pool>, paths: Vec<PathBuf>) -> Self {
        Self { pool, paths, choosing: Mutex::new(()) }
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
    fn unclaimed(&self) -> Result<Vec<Device>> {
        let claimed = self.claimed()?;
        let mut free = Vec::new();
        for path in &self.paths {
            match Device::open(path, true) {
                Ok(device) if claimed.iter().any(|claim| claim.identity == device.claim.identity) => {}
                Ok(device) if device.is_blank()? => free.push(device),
                Ok(_) => tracing::warn!(path = %path.display(), "not blank: wipe it to have it used"),
                // In use, or not there.
                Err(error) => tracing::debug!(%error, "not free"),
            }
        }
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

    fn claimed_device(&self, id: &VolumeId, nonce: &Nonce, exclusive: bool) -> Result<Device> {
        let name = name(id);
        let file = self.pool.open_file(&name)?;
        let file = file.ok_or_else(|| damaged(id, "claim", &name, "no such file in the pool"))?;
        if nonce_of(&file, &name)?.as_ref() != Some(nonce) {
            return Err(damaged(id, "nonce", "the record's", "another one, or none"));
        }
        let claim = self.read(&name)?.ok_or_else(|| damaged(id, "claim", &name, "none"))?;
        let device = Device::open(&claim.path, exclusive)?;
        if device.claim != claim {
            return Err(damaged(id, "device", format!("{claim:?}"), format!("{:?}", device.claim)));
        }
        Ok(device)
    }
}

fn name(id: &VolumeId) -> String {
    format!("{id}.dev")
}

fn lock(file: &File, id: &VolumeId) -> Result<()> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(Error::Busy { what: format!("the device of volume {id} (mkfs still runs)") }),
        Err(error) => Err(Error::io(format!("lock the device of {id}"), error)),
    }
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
        Ok(self.unclaimed()?.iter().map(|device| device.claim.size).sum())
    }

    fn largest(&self) -> Result<Option<u64>> {
        Ok(Some(self.unclaimed()?.iter().map(|device| device.claim.size).max().unwrap_or(0)))
    }

    fn outstanding(&self, _: &Record) -> Result<u64> {
        // A claimed device is not counted as free.
        Ok(0)
    }

    fn create(&self, new: New<'_>, _: Option<Origin<'_>>, _: GoOn<'_>) -> Result<Made> {
        let _choosing = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |size: u64| size >= new.size && new.most.is_none_or(|most| size <= most);
        let mut free = self.unclaimed()?;
        let available = free.iter().map(|device| device.claim.size).max().unwrap_or(0);
        free.retain(|device| fits(device.claim.size));
        let Some(device) = free.into_iter().min_by_key(|device| device.claim.size) else {
            return Err(Error::NoSpace { wanted: new.size, available });
        };
        let name = name(new.id);
        let mut file = self.pool.unnamed()?;
        let text = serde_json::to_vec(&device.claim).expect("a claim has only strings and numbers");
        file.write_all(&text).context(|| format!("write {name}"))?;
        set_nonce(&file, new.nonce, &name)?;
        file.sync_all().context(|| format!("sync {name}"))?;
        let inode = inode_of(&file, &name)?;
        self.pool.link(&file, &name)?;
        Ok(Made { inode, size: device.claim.size })
    }

    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool> {
        let name = name(id);
        if self.pool.open_file(&name)?.is_none() {
            return Ok(false);
        }
        let device = match self.claimed_device(id, nonce, true) {
            Err(Error::Io { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                return Err(Error::InUse { id: id.clone(), by: "its device is mounted or taken by somebody".into() });
            }
            other => other?,
        };
        lock(&device.file, id)?;
        // A device that stayed read-only would be so for the next volume.
        if block::read_only(&device.file)? {
            block::set_read_only(&device.file, false)?;
        }
        block::zero(&device.file, 0, device.claim.size)?;
        device.file.sync_all().context(|| format!("sync {}", device.node.display()))?;
        self.pool.unlink(&name)?;
        Ok(true)
    }

    fn check(&self, record: &Record) -> Result<()> {
        self.verified(record).map(drop)
    }

    fn lock(&self, record: &Record) -> Result<Box<dyn Locked>> {
        let device = self.verified(record)?;
        lock(&device.file, &record.id)?;
        Ok(Box::new(RawVolume { device, record: record.clone() }))
    }

    fn attached(&self, record: &Record) -> Result<Option<Box<dyn Attached>>> {
        if self.pool.open_file(&name(&record.id))?.is_none() {
            return Ok(None);
        }
        let device = self.verified(record)?;
        Ok(Some(Box::new(RawVolume { device, record: record.clone() })))
    }

    fn detach(&self, record: &Record) -> Result<()> {
        // Whoever has it mounted, in whatever namespace, has it to himself.
        let start = Instant::now();
        loop {
            match self.claimed_device(&record.id, &record.nonce, true) {
                Err(Error::Io { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                    if start.elapsed() > SETTLE {
                        let by = "its device is still mounted, perhaps in another mount namespace".into();
                        return Err(Error::InUse { id: record.id.clone(), by });
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(device) if record.content == Content::Raw && block::read_only(&device.file)? => {
                    return block::set_read_only(&device.file, false);
                }
                other => return other.map(drop),
            }
        }
    }

    fn name(&self, id: &VolumeId) -> Option<String> {
        Some(name(id))
    }
}

/// A device with its volume.
struct RawVolume {
    device: Device,
    record: Record,
}

impl RawVolume {
    fn tune(&self, mutable: &Mutable) -> Result<()> {
        mutable.read_ahead_kib.map_or(Ok(()), |kib| block::set_read_ahead(&self.device.file, kib))
    }

    fn is_source(&self, mount: &Mount) -> bool {
        let btrfs = self.record.content == Content::Filesystem(FsType::Btrfs) && mount.fs_type == "btrfs";
        btrfs && Path::new(&mount.source) == self.device.node
    }
}

impl Locked for RawVolume {
    fn wipe(&mut self) -> Result<()> {
        // Where filesystems have what they are known by; mkfs writes over the rest.
        let (file, size) = (&self.device.file, self.device.claim.size);
        block::zero(file, 0, HEAD.min(size))?;
        file.sync_all().context(|| format!("sync {}", self.device.node.display()))
    }

    fn format(&mut self) -> Result<()> {
        if let Some(fs) = self.record.content.filesystem() {
            mkfs::run(&self.device.file, fs, &self.record.parameters, &self.record.id)?;
        }
        self.device.file.sync_all().context(|| format!("sync {}", self.device.node.display()))
    }

    fn mount(&mut self, options: &MountOptions, read_only: bool) -> Result<Detached> {
        self.tune(&self.record.mutable)?;
        let Some(fs) = self.record.content.filesystem() else {
            let (what, expected) = (format!("volume {}", self.record.id), "a filesystem".into());
            return Err(Error::State { what, expected, found: self.record.content.to_string() });
        };
        mount::filesystem(&self.device.node, self.device.dev, fs, options, read_only)
    }

    fn attach(&mut self, read_only: bool) -> Result<()> {
        self.tune(&self.record.mutable)?;
        if block::read_only(&self.device.file)? != read_only {
            block::set_read_only(&self.device.file, read_only)?;
        }
        Ok(())
    }
}

impl Attached for RawVolume {
    fn is(&self, found: &Found) -> bool {
        let Found::Mounted { fs, node, id, .. } = found else { return false };
        let of_btrfs = || mountinfo::read().is_ok_and(|all| all.iter().any(|m| m.id == *id && self.is_source(m)));
        *fs == self.device.dev || *node == self.device.dev || of_btrfs()
    }

    fn shows(&self, mount: &Mount) -> bool {
        let root = self.device.node.strip_prefix("/dev").map(|name| Path::new("/").join(name)).unwrap_or_default();
        mount.dev == self.device.dev || mount.is_node(&root.to_string_lossy()) || self.is_source(mount)
    }

    fn flush(&self) -> Result<()> {
        self.device.file.sync_all().context(|| format!("sync {}", self.device.node.display()))
    }

    fn tune(&self, mutable: &Mutable) -> Result<()> {
        Self::tune(self, mutable)
    }

    fn node(&self) -> Result<Detached> {
        mount::node(&self.device.node, self.device.dev)
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        block::set_read_only(&self.device.file, read_only)
    }

    fn read_only(&self) -> Result<bool> {
        block::read_only(&self.device.file)
    }
}
