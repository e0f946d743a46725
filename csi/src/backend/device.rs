//! What volumes have in common that are block devices of their own, by whichever name they are found.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Attached, Locked, SETTLE};
use crate::error::{Context, Error, Result};
use crate::model::{Content, FsType, MountOptions, Mutable, Record, VolumeId};
use crate::sys::mount::{self, Detached};
use crate::sys::mountinfo::{self, Mount};
use crate::sys::target::Found;
use crate::sys::{Dev, block, mkfs};

/// Signatures that filesystems and others are known by begin in as much from the start, or, as a RAID's and the second copy of
/// a partition table, in as much to the end.
pub const HEAD: u64 = 1 << 20;

/// A block device, held open.
pub struct Device {
    /// The descriptor that everything is asked of.
    pub file: File,
    /// Its number.
    pub dev: Dev,
    /// Its node, by the name that the kernel gave it.
    pub node: PathBuf,
    /// Bytes.
    pub size: u64,
}

impl Device {
    /// Opens the device at a path; when `exclusive`, only if nobody has it mounted or to himself.
    ///
    /// # Errors
    /// [`Error::State`] for what is no block device, [`Error::Io`].
    pub fn open(path: &Path, exclusive: bool) -> Result<Self> {
        let what = || format!("open {}", path.display());
        let flags = if exclusive { libc::O_EXCL } else { 0 };
        let file = File::options().read(true).write(true).custom_flags(flags).open(path).context(what)?;
        let meta = file.metadata().context(what)?;
        let unfit = |found: &str| Error::State {
            what: path.display().to_string(),
            expected: "a block device".into(),
            found: found.into(),
        };
        if !meta.file_type().is_block_device() {
            return Err(unfit("something else"));
        }
        let dev = Dev::from_raw(meta.rdev());
        let node = block::node(dev).ok_or_else(|| unfit("one without a node"))?;
        let size = block::size(&file)?;
        Ok(Self { file, dev, node, size })
    }

    /// Locks the device: its mkfs has ended, and no other begins.
    ///
    /// # Errors
    /// [`Error::Busy`] while a mkfs runs, [`Error::Io`].
    pub fn lock(&self, id: &VolumeId) -> Result<()> {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) => Err(Error::Busy { what: format!("the device of volume {id} (mkfs still runs)") }),
            Err(error) => Err(Error::io(format!("lock the device of {id}"), error)),
        }
    }

    /// Zeros from the start on, durably.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn zero(&self, length: u64) -> Result<()> {
        block::zero(&self.file, 0, length.min(self.size))?;
        self.sync()
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_all().context(|| format!("sync {}", self.node.display()))
    }
}

/// Whether an exclusive open was refused because somebody has the device.
pub fn is_taken(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.raw_os_error() == Some(libc::EBUSY))
}

/// Waits up to [`SETTLE`] until nobody has a volume's device any more, in whatever mount namespace, and leaves it writable.
/// `open` opens it for itself alone.
///
/// # Errors
/// [`Error::InUse`], or what `open` says.
pub fn release(record: &Record, open: impl Fn() -> Result<Device>) -> Result<()> {
    let start = Instant::now();
    loop {
        match open() {
            Err(error) if is_taken(&error) => {
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

/// A device with its volume.
pub struct DeviceVolume {
    /// The device.
    pub device: Device,
    /// The volume.
    pub record: Record,
}

impl DeviceVolume {
    fn tune(&self, mutable: &Mutable) -> Result<()> {
        mutable.read_ahead_kib.map_or(Ok(()), |kib| block::set_read_ahead(&self.device.file, kib))
    }

    fn is_source(&self, mount: &Mount) -> bool {
        let btrfs = self.record.content == Content::Filesystem(FsType::Btrfs) && mount.fs_type == "btrfs";
        btrfs && Path::new(&mount.source) == self.device.node
    }

    /// The node's name below /dev, with a slash.
    fn root(&self) -> PathBuf {
        self.device.node.strip_prefix("/dev").map(|name| Path::new("/").join(name)).unwrap_or_default()
    }
}

impl Locked for DeviceVolume {
    fn wipe(&mut self) -> Result<()> {
        // Where filesystems have what they are known by; mkfs writes over the rest.
        self.device.zero(HEAD)
    }

    fn format(&mut self) -> Result<()> {
        if let Some(fs) = self.record.content.filesystem() {
            mkfs::run(&self.device.file, fs, &self.record.parameters, &self.record.id)?;
        }
        self.device.sync()
    }

    fn grow(&mut self) -> Result<()> {
        mkfs::grow_ext4(&self.device.file, &self.record.id)?;
        self.device.sync()
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

impl Attached for DeviceVolume {
    fn is(&self, found: &Found) -> bool {
        let Found::Mounted { fs, node, id, .. } = found else { return false };
        let of_btrfs = || mountinfo::read().is_ok_and(|all| all.iter().any(|m| m.id == *id && self.is_source(m)));
        *fs == self.device.dev || *node == self.device.dev || of_btrfs()
    }

    fn shows(&self, mount: &Mount) -> bool {
        mount.dev == self.device.dev || mount.is_node(&self.root().to_string_lossy()) || self.is_source(mount)
    }

    fn dev(&self) -> Option<Dev> {
        Some(self.device.dev)
    }

    fn size(&self) -> Result<Option<u64>> {
        block::size(&self.device.file).map(Some)
    }

    fn flush(&self) -> Result<()> {
        self.device.sync()
    }

    fn tune(&self, mutable: &Mutable) -> Result<()> {
        Self::tune(self, mutable)
    }

    fn errors(&self) -> u64 {
        block::ext4_errors(&self.root())
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
