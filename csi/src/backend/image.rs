//! Volumes as files in the pool directory, attached as loop devices.
//!
//! An image is made without a name, filled, marked with its nonce and synced before it is linked: a crash leaves either
//! nothing or a whole image. It is only ever opened below the pool's descriptor, and what was opened is compared with
//! the record (inode, nonce, size) before it is used.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FlockOperation, XattrFlags, fallocate, fgetxattr, flock, fsetxattr};
use rustix::io::Errno;

use super::pool::Pool;
use super::{Attached, Backend, Locked, SETTLE};
use crate::error::{Context, Error, Result};
use crate::model::{Allocation, FsType, MountOptions, Nonce, Record, VolumeId};
use crate::sys::loopdev::{Binding, LoopDevice, wait_gone};
use crate::sys::mount::{self, Detached};
use crate::sys::{Dev, mkfs};

/// The nonce on an image. `trusted.` attributes are for privileged processes only.
const XATTR: &str = "trusted.keelway.nonce";
/// Bytes of the pool that are never promised: directories and extents need some too.
const MARGIN: u64 = 64 << 20;

/// The image backend.
#[derive(Clone, Debug)]
pub struct Images(Arc<Pool>);

impl Images {
    /// Opens the pool directory that belongs to a state directory; `fresh` marks a new one.
    ///
    /// # Errors
    /// [`Error::State`] when they do not belong together; [`Error::Io`].
    pub fn open(pool_dir: &Path, state_dir: &Path, fresh: &Nonce) -> Result<Self> {
        Pool::open(pool_dir, state_dir, fresh).map(|pool| Self(Arc::new(pool)))
    }

    fn verified(&self, record: &Record) -> Result<File> {
        let damaged =
            |what, expected: String, found: String| Error::Damaged { id: record.id.clone(), what, expected, found };
        let file = self.0.open_file(&name(&record.id))?;
        let file = file.ok_or_else(|| damaged("image", name(&record.id), "no such file in the pool".into()))?;
        let meta = file.metadata().context(|| format!("stat the image of {}", record.id))?;
        if !meta.is_file() || meta.ino() != record.inode {
            return Err(damaged("inode", record.inode.to_string(), meta.ino().to_string()));
        }
        if nonce_of(&file, &record.id)?.as_ref() != Some(&record.nonce) {
            return Err(damaged("nonce", "the record's".into(), "another one, or none".into()));
        }
        if meta.len() != record.size {
            return Err(damaged("size", record.size.to_string(), meta.len().to_string()));
        }
        Ok(file)
    }
}

fn name(id: &VolumeId) -> String {
    format!("{id}.img")
}

fn nonce_of(file: &File, id: &VolumeId) -> Result<Option<Nonce>> {
    let mut buffer = [0; 64];
    match fgetxattr(file, XATTR, &mut buffer) {
        Ok(length) => Ok(String::from_utf8_lossy(&buffer[..length]).into_owned().try_into().ok()),
        Err(Errno::NODATA | Errno::RANGE) => Ok(None),
        Err(error) => Err(Error::io(format!("read {XATTR} of the image of {id}"), error)),
    }
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

fn allocate(file: &File, size: u64, allocation: Allocation) -> Result<()> {
    file.set_len(size).context(|| "size an image")?;
    match allocation {
        Allocation::Full => fallocate(file, FallocateFlags::empty(), 0, size).context(|| "allocate an image"),
        Allocation::Sparse => Ok(()),
    }
}

impl Backend for Images {
    fn available(&self, records: &[Record]) -> Result<u64> {
        let mut free = self.0.free()?.saturating_sub(MARGIN);
        for record in records {
            // What a sparse image, or one with discarded blocks, may still come to need.
            if let Some(file) = self.0.open_file(&name(&record.id))? {
                let meta = file.metadata().context(|| format!("stat the image of {}", record.id))?;
                free = free.saturating_sub(record.size.saturating_sub(meta.blocks() * 512));
            }
        }
        Ok(free)
    }

    fn create(&self, id: &VolumeId, nonce: &Nonce, size: u64, allocation: Allocation) -> Result<u64> {
        let file = self.0.unnamed()?;
        allocate(&file, size, allocation)?;
        fsetxattr(&file, XATTR, nonce.as_str().as_bytes(), XattrFlags::CREATE)
            .context(|| format!("set {XATTR} on the image of {id}"))?;
        file.sync_all().context(|| format!("sync the image of {id}"))?;
        let inode = file.metadata().context(|| format!("stat the image of {id}"))?.ino();
        self.0.link(&file, &name(id))?;
        Ok(inode)
    }

    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool> {
        let Some(file) = self.0.open_file(&name(id))? else { return Ok(false) };
        if nonce_of(&file, id)?.as_ref() != Some(nonce) {
            let (expected, found) = ("the record's".into(), "another one, or none".into());
            return Err(Error::Damaged { id: id.clone(), what: "nonce", expected, found });
        }
        if let Some(device) = find(&file)? {
            return Err(Error::InUse { id: id.clone(), by: format!("{} is attached to it", device.path().display()) });
        }
        lock(&file, id)?;
        self.0.unlink(&name(id))?;
        Ok(true)
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
        let device = find(&self.verified(record)?)?;
        Ok(device.map(|device| Box::new(AttachedImage(device)) as Box<dyn Attached>))
    }

    fn detach(&self, record: &Record) -> Result<()> {
        let file = self.verified(record)?;
        let in_use = |device: &LoopDevice| Error::InUse {
            id: record.id.clone(),
            by: format!("{} is still open or mounted, perhaps in another mount namespace", device.path().display()),
        };
        // A filesystem's device goes by itself; a block volume's is told to.
        let meta = file.metadata().context(|| format!("stat the image of {}", record.id))?;
        if record.content == crate::model::Content::Raw
            && let Some(device) = find(&file)?
        {
            device.unbind(SETTLE)?;
        }
        if !wait_gone(meta.dev(), meta.ino(), SETTLE)?
            && let Some(device) = find(&file)?
        {
            return Err(in_use(&device));
        }
        Ok(())
    }

    fn strays(&self, records: &[Record]) -> Result<Vec<String>> {
        let known: std::collections::HashSet<String> = records.iter().map(|record| name(&record.id)).collect();
        Ok(self.0.names()?.into_iter().filter(|name| !known.contains(name)).collect())
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
        match find(&self.file)? {
            Some(device) => Ok(device),
            None => {
                // Opened once more, since the device keeps what it is given, and would keep the lock with it.
                let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                let file = File::options().read(true).write(true).open(path);
                let file = file.context(|| format!("open the image of {} again", self.record.id))?;
                LoopDevice::bind(&file, Binding { read_only, autoclear })
            }
        }
    }
}

impl Locked for LockedImage {
    fn wipe(&mut self) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, 0, self.record.size)
            .context(|| format!("wipe the image of {}", self.record.id))?;
        allocate(&self.file, self.record.size, self.record.parameters.allocation)?;
        self.file.sync_all().context(|| format!("sync the image of {}", self.record.id))
    }

    fn format(&mut self, fs: FsType) -> Result<()> {
        mkfs::run(&self.file, fs, &self.record.parameters, &self.record.id)?;
        self.file.sync_all().context(|| format!("sync the image of {}", self.record.id))
    }

    fn mount(&mut self, fs: FsType, options: &MountOptions, read_only: bool) -> Result<Detached> {
        let device = self.device(read_only, true)?;
        mount::filesystem(&device, fs, options, read_only)
    }

    fn attach(&mut self, read_only: bool) -> Result<()> {
        self.device(read_only, false).map(drop)
    }
}

struct AttachedImage(LoopDevice);

impl Attached for AttachedImage {
    fn dev(&self) -> Dev {
        self.0.dev()
    }

    fn root(&self) -> String {
        self.0.root()
    }

    fn node(&self) -> Result<Detached> {
        let path = self.0.path();
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
        let what = || format!("open {}", path.display());
        let node = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).context(what)?;
        let found = Dev::from_raw(rustix::fs::fstat(&node).context(what)?.st_rdev);
        if found != self.dev() {
            let (expected, found) = (format!("device {}", self.dev()), format!("device {found}"));
            return Err(Error::State { what: path.display().to_string(), expected, found });
        }
        mount::bind(&node, false, &path)
    }

    fn set_read_only(&self, read_only: bool) -> Result<()> {
        self.0.set_read_only(read_only)
    }

    fn read_only(&self) -> Result<bool> {
        self.0.read_only()
    }
}
