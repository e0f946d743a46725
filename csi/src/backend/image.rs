//! Volumes as files in the pool directory, attached as loop devices.
//!
//! An image is made without a name, filled, marked with its nonce and synced before it is linked: a crash leaves either
//! nothing or a whole image. It is only ever opened below the pool's descriptor, and what was opened is compared with
//! the record (inode, nonce, size) before it is used. Snapshots are files of the same kind. They share blocks with the
//! image where the pool's filesystem can (XFS, btrfs), and are copies where it cannot.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, IFlags, fallocate, flock};
use rustix::io::Errno;

use super::pool::{MARGIN, Pool, nonce_of, set_nonce};
use super::{Attached, Backend, Features, GoOn, Locked, Made, New, Origin, SETTLE, damaged, inode_of};
use crate::error::{Context, Error, Result};
use crate::model::{
    Allocation, BackendKind, Content, Extent, FsType, MountOptions, Mutable, Nonce, Record, Snapshot, SnapshotId,
    VolumeId,
};
use crate::state::Store;
use crate::sys::loopdev::{Binding, LoopDevice};
use crate::sys::mount::{self, Detached};
use crate::sys::mountinfo::{self, Mount};
use crate::sys::target::Found;
use crate::sys::{Dev, block, copy, mkfs};

/// The image backend.
#[derive(Clone, Debug)]
pub struct Images {
    pool: Arc<Pool>,
    /// Whether files of the pool can share blocks.
    shares: bool,
    /// How much a file shares, and until when that is known.
    sharing: Arc<Mutex<BTreeMap<String, (Instant, u64)>>>,
}

/// How long it is known how much a file shares, at least, and how many times as long as it took to ask: that takes as long as the
/// file has extents. What it shares only becomes less with time: it is counted too high meanwhile, never too low, for whatever comes to share its blocks is a new file.
const KNOWN: (Duration, u32) = (Duration::from_secs(30), 100);

impl Images {
    /// Images in this pool. What its filesystem can is tried out.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(pool: Arc<Pool>) -> Result<Self> {
        let tried = || {
            let (from, to) = (pool.unnamed()?, pool.unnamed()?);
            from.set_len(4096).and_then(|()| copy::share(&from, &to)).context(|| "try out whether blocks can be shared")
        };
        let shares = match tried() {
            Err(error) if error.code() == tonic::Code::ResourceExhausted => {
                // What takes volumes down must go on, and new ones there cannot be.
                tracing::warn!(%error, "the pool is full: whether it can share blocks the next start will tell");
                false
            }
            tried => tried?,
        };
        Ok(Self { pool, shares, sharing: Arc::default() })
    }

    fn verified(&self, record: &Record) -> Result<File> {
        let id = &record.id;
        let file = self.open(&name(id), id, record.inode, &record.nonce)?;
        let length = file.metadata().context(|| format!("stat the image of {id}"))?.len();
        if !(record.size..=record.growing.unwrap_or(record.size)).contains(&length) {
            return Err(damaged(id, "size", record.size, length));
        }
        Ok(file)
    }

    fn verified_snapshot(&self, snapshot: &Snapshot) -> Result<File> {
        self.open(&snapshot_name(&snapshot.id), &snapshot.volume, snapshot.inode, &snapshot.nonce)
    }

    fn open(&self, name: &str, id: &VolumeId, inode: u64, nonce: &Nonce) -> Result<File> {
        let file = self.pool.open_file(name)?;
        let file = file.ok_or_else(|| damaged(id, "image", name, "no such file in the pool"))?;
        let meta = file.metadata().context(|| format!("stat {name}"))?;
        if !meta.is_file() || meta.ino() != inode {
            return Err(damaged(id, "inode", inode, meta.ino()));
        }
        if nonce_of(&file, name)?.as_ref() != Some(nonce) {
            return Err(damaged(id, "nonce", "the record's", "another one, or none"));
        }
        Ok(file)
    }

    /// Makes a file of the pool, whole and durable before it has a name.
    fn make(&self, name: &str, nonce: &Nonce, fill: impl FnOnce(&File) -> Result<()>) -> Result<u64> {
        let file = self.pool.unnamed()?;
        if self.pool.is_btrfs() {
            // Blocks that are written to again and again in place, and that fallocate keeps.
            let flags = rustix::fs::ioctl_getflags(&file).context(|| format!("look at {name}"))?;
            rustix::fs::ioctl_setflags(&file, flags | IFlags::NOCOW).context(|| format!("set flags of {name}"))?;
        }
        fill(&file)?;
        set_nonce(&file, nonce, name)?;
        file.sync_all().context(|| format!("sync {name}"))?;
        let inode = inode_of(&file, name)?;
        self.pool.link(&file, name)?;
        Ok(inode)
    }

    fn fill(&self, from: &File, to: &File, name: &str, go_on: GoOn<'_>) -> Result<()> {
        let length = from.metadata().context(|| format!("stat what {name} is made from"))?.len();
        if self.shares && copy::share(from, to).context(|| format!("share blocks with {name}"))? {
            return Ok(());
        }
        to.set_len(length).context(|| format!("size {name}"))?;
        copy::copy(from, to, length, go_on).context(|| format!("copy to {name}"))
    }

    fn remove(&self, name: &str, id: &VolumeId, nonce: &Nonce) -> Result<bool> {
        let Some(file) = self.pool.open_file(name)? else { return Ok(false) };
        if nonce_of(&file, name)?.as_ref() != Some(nonce) {
            return Err(damaged(id, "nonce", "the record's", "another one, or none"));
        }
        if let Some(device) = find(&file)? {
            return Err(Error::InUse { id: id.clone(), by: format!("{} is attached to it", device.path().display()) });
        }
        lock(&file, id)?;
        self.pool.unlink(name)?;
        Ok(true)
    }

    /// The device that is bound to a volume's image, whatever became of that.
    fn bound(&self, record: &Record) -> Result<Option<LoopDevice>> {
        let damage = match self.verified(record) {
            Ok(file) => return find(&file),
            Err(damage @ Error::Damaged { .. }) => damage,
            Err(error) => return Err(error),
        };
        // No other file gets the number of one that a device is bound to; but one that was removed may have lost it before.
        let pool = rustix::fs::fstat(self.pool.directory()).context(|| "stat the pool")?;
        match LoopDevice::find(pool.st_dev, record.inode)? {
            Some(device) if device.file_name() == Some(name(&record.id)) => Ok(Some(device)),
            // The image under another name, or another file.
            Some(_) => Err(damage),
            None => Ok(None),
        }
    }

    fn attachment(record: &Record, device: LoopDevice) -> Box<dyn Attached> {
        let btrfs = record.content == Content::Filesystem(FsType::Btrfs);
        Box::new(AttachedImage { device, btrfs })
    }

    fn shared(&self, file: &File, name: &str) -> Result<u64> {
        if !self.shares {
            return Ok(0);
        }
        let sharing = || self.sharing.lock().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now();
        if let Some(&(until, bytes)) = sharing().get(name)
            && start < until
        {
            return Ok(bytes);
        }
        let bytes = copy::shared_bytes(file).context(|| format!("ask what {name} shares"))?;
        let mut sharing = sharing();
        sharing.retain(|_, &mut (until, _)| start < until);
        sharing.insert(name.to_owned(), (Instant::now() + KNOWN.0.max(start.elapsed() * KNOWN.1), bytes));
        Ok(bytes)
    }
}

fn name(id: &VolumeId) -> String {
    format!("{id}.img")
}

fn snapshot_name(id: &SnapshotId) -> String {
    format!("{id}.snap")
}

fn lock(file: &File, id: &VolumeId) -> Result<()> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(Error::Busy { what: format!("the image of volume {id} (mkfs still runs)") }),
        Err(error) => Err(Error::io(format!("lock the image of {id}"), error)),
    }
}

fn find(file: &File) -> Result<Option<LoopDevice>> {
    let meta = file.metadata().context(|| "stat an image")?;
    LoopDevice::find(meta.dev(), meta.ino())
}

/// Brings a file to a size; what it has keeps.
fn allocate(file: &File, size: u64, allocation: Allocation) -> Result<()> {
    if allocation == Allocation::Full {
        fallocate(file, FallocateFlags::empty(), 0, size).context(|| "allocate an image")?;
    }
    file.set_len(size).context(|| "size an image")
}

impl Backend for Images {
    fn kind(&self) -> BackendKind {
        BackendKind::Image
    }

    fn store(&self) -> Store {
        Store::Pool
    }

    fn features(&self) -> Features {
        Features { snapshots: true, expand: true, modify: true, tracking: self.shares }
    }

    fn free(&self) -> Result<u64> {
        Ok(self.pool.free()?.saturating_sub(MARGIN))
    }

    fn outstanding(&self, record: &Record) -> Result<u64> {
        let name = name(&record.id);
        let Some(file) = self.pool.open_file(&name)? else { return Ok(0) };
        let meta = file.metadata().context(|| format!("stat {name}"))?;
        // What a sparse image, or one with discarded blocks, may still come to need.
        let missing = record.growing.unwrap_or(record.size).saturating_sub(meta.blocks() * 512);
        let shared = if record.source.is_some() { self.shared(&file, &name)? } else { 0 };
        Ok(missing + shared)
    }

    fn outstanding_of(&self, snapshot: &Snapshot) -> Result<u64> {
        // It never changes; but what it shares with an image, that may have to be copied.
        let name = snapshot_name(&snapshot.id);
        match self.pool.open_file(&name)? {
            Some(file) => self.shared(&file, &name),
            None => Ok(0),
        }
    }

    fn create(&self, new: New<'_>, origin: Option<Origin<'_>>, go_on: GoOn<'_>) -> Result<Made> {
        let name = name(new.id);
        let inode = self.make(&name, new.nonce, |file| {
            match origin {
                Some(Origin::Snapshot(snapshot)) => {
                    self.fill(&self.verified_snapshot(snapshot)?, file, &name, go_on)?;
                }
                Some(Origin::Volume(record)) => self.fill(&self.verified(record)?, file, &name, go_on)?,
                None => {}
            }
            allocate(file, new.size, new.parameters.allocation)
        })?;
        Ok(Made { inode, size: new.size })
    }

    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool> {
        self.remove(&name(id), id, nonce)
    }

    fn check(&self, record: &Record) -> Result<()> {
        self.verified(record).map(drop)
    }

    fn lock(&self, record: &Record) -> Result<Box<dyn Locked>> {
        let file = self.verified(record)?;
        lock(&file, &record.id)?;
        Ok(Box::new(LockedImage { file, record: record.clone() }))
    }

    fn attached(&self, record: &Record) -> Result<Option<Box<dyn Attached>>> {
        Ok(find(&self.verified(record)?)?.map(|device| Self::attachment(record, device)))
    }

    fn remains(&self, record: &Record, _: Option<Error>) -> Result<Option<Box<dyn Attached>>> {
        Ok(self.bound(record)?.map(|device| Self::attachment(record, device)))
    }

    fn detach(&self, record: &Record) -> Result<()> {
        let in_use = |device: &LoopDevice| Error::InUse {
            id: record.id.clone(),
            by: format!("{} is still open or mounted, perhaps in another mount namespace", device.path().display()),
        };
        // A filesystem's device goes by itself; a block volume's is told to.
        if record.content == Content::Raw
            && let Some(device) = self.bound(record)?
        {
            device.unbind(SETTLE)?;
        }
        let start = Instant::now();
        while let Some(device) = self.bound(record)? {
            if start.elapsed() > SETTLE {
                return Err(in_use(&device));
            }
            drop(device);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn resize(&self, record: &Record, to: u64) -> Result<()> {
        let file = self.verified(record)?;
        allocate(&file, to, record.parameters.allocation)?;
        file.sync_all().context(|| format!("sync the image of {}", record.id))
    }

    fn snapshots_at_once(&self) -> bool {
        self.shares
    }

    fn snapshot(&self, record: &Record, id: &SnapshotId, nonce: &Nonce, go_on: GoOn<'_>) -> Result<u64> {
        let (from, name) = (self.verified(record)?, snapshot_name(id));
        self.make(&name, nonce, |file| self.fill(&from, file, &name, go_on))
    }

    fn erase_snapshot(&self, id: &SnapshotId, nonce: &Nonce) -> Result<bool> {
        let name = snapshot_name(id);
        let Some(file) = self.pool.open_file(&name)? else { return Ok(false) };
        if nonce_of(&file, &name)?.as_ref() != Some(nonce) {
            let (expected, found) = ("the record's".to_owned(), "another one, or none".to_owned());
            return Err(Error::State { what: format!("the nonce of {name}"), expected, found });
        }
        self.pool.unlink(&name)?;
        Ok(true)
    }

    fn check_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let file = self.verified_snapshot(snapshot)?;
        let length = file.metadata().context(|| format!("stat snapshot {}", snapshot.id))?.len();
        if length < snapshot.size {
            return Err(damaged(&snapshot.volume, "size of a snapshot", snapshot.size, length));
        }
        Ok(())
    }

    fn extents(&self, snapshot: &Snapshot) -> Result<Vec<Extent>> {
        if !self.shares {
            return Err(super::unsupported(
                self.kind(),
                "snapshot metadata",
                "its pool's filesystem cannot share blocks",
            ));
        }
        copy::extents(&self.verified_snapshot(snapshot)?).context(|| format!("ask where snapshot {} is", snapshot.id))
    }

    fn name(&self, id: &VolumeId) -> Option<String> {
        Some(name(id))
    }

    fn snapshot_name(&self, id: &SnapshotId) -> Option<String> {
        Some(snapshot_name(id))
    }
}

/// An image whose lock (flock) is held by this open file description: a mkfs that inherits it holds the lock as well.
struct LockedImage {
    file: File,
    record: Record,
}

impl LockedImage {
    fn device(&self, read_only: bool, autoclear: bool) -> Result<LoopDevice> {
        // One that is bound already must be used: two devices on one image would each have a cache of its own.
        let device = match find(&self.file)? {
            Some(device) => device,
            None => {
                // Opened once more, since the device keeps what it is given, and would keep the lock with it.
                let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                let file = File::options().read(true).write(true).open(path);
                let file = file.context(|| format!("open the image of {} again", self.record.id))?;
                LoopDevice::bind(&file, Binding { read_only, autoclear })?
            }
        };
        tune(&device, &self.record.mutable)?;
        Ok(device)
    }
}

fn tune(device: &LoopDevice, mutable: &Mutable) -> Result<()> {
    mutable.read_ahead_kib.map_or(Ok(()), |kib| device.read_ahead(kib))
}

impl Locked for LockedImage {
    fn wipe(&mut self) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, 0, self.record.size)
            .context(|| format!("wipe the image of {}", self.record.id))?;
        allocate(&self.file, self.record.size, self.record.parameters.allocation)?;
        self.file.sync_all().context(|| format!("sync the image of {}", self.record.id))
    }

    fn format(&mut self) -> Result<()> {
        if let Some(fs) = self.record.content.filesystem() {
            mkfs::run(&self.file, fs, &self.record.parameters, &self.record.id)?;
        }
        self.file.sync_all().context(|| format!("sync the image of {}", self.record.id))
    }

    fn grow(&mut self) -> Result<()> {
        if let Some(device) = find(&self.file)? {
            let by = format!("{} is attached to it", device.path().display());
            return Err(Error::InUse { id: self.record.id.clone(), by });
        }
        mkfs::grow_ext4(&self.file, &self.record.id)?;
        self.file.sync_all().context(|| format!("sync the image of {}", self.record.id))
    }

    fn mount(&mut self, options: &MountOptions, read_only: bool) -> Result<Detached> {
        let Some(fs) = self.record.content.filesystem() else {
            let (what, expected) = (format!("volume {}", self.record.id), "a filesystem".into());
            return Err(Error::State { what, expected, found: self.record.content.to_string() });
        };
        let device = self.device(read_only, true)?;
        mount::filesystem(&device.path(), device.dev(), fs, options, read_only)
    }

    fn attach(&mut self, read_only: bool) -> Result<()> {
        self.device(read_only, false).map(drop)
    }
}

struct AttachedImage {
    device: LoopDevice,
    /// A btrfs has a device number of its own, so that its mounts are known by their source.
    btrfs: bool,
}

impl AttachedImage {
    fn is_source(&self, mount: &Mount) -> bool {
        self.btrfs && mount.fs_type == "btrfs" && Path::new(&mount.source) == self.device.path()
    }
}

impl Attached for AttachedImage {
    fn is(&self, found: &Found) -> bool {
        let Found::Mounted { fs, node, id, .. } = found else { return false };
        let dev = self.device.dev();
        let of_btrfs = || mountinfo::read().is_ok_and(|mounts| mounts.iter().any(|m| m.id == *id && self.is_source(m)));
        *fs == dev || *node == dev || (self.btrfs && of_btrfs())
    }

    fn shows(&self, mount: &Mount) -> bool {
        mount.dev == self.device.dev() || mount.is_node(&self.device.root()) || self.is_source(mount)
    }

    fn dev(&self) -> Option<Dev> {
        Some(self.device.dev())
    }

    fn size(&self) -> Result<Option<u64>> {
        self.device.size().map(Some)
    }

    fn take_size(&self) -> Result<()> {
        self.device.take_size()
    }

    fn flush(&self) -> Result<()> {
        self.device.flush()
    }

    fn tune(&self, mutable: &Mutable) -> Result<()> {
        tune(&self.device, mutable)
    }

    fn errors(&self) -> u64 {
        block::ext4_errors(self.device.root().as_ref())
    }

    fn node(&self) -> Result<Detached> {
        mount::node(&self.device.path(), self.device.dev())
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        self.device.set_read_only(read_only)
    }

    fn read_only(&self) -> Result<bool> {
        self.device.read_only()
    }
}
