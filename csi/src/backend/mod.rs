//! Where volumes' bytes live. One trait, one file a backend; only images so far.

mod image;
mod pool;

pub use image::Images;

use std::time::Duration;

use crate::error::Result;
use crate::model::{Allocation, FsType, MountOptions, Nonce, Record, VolumeId};
use crate::sys::Dev;
use crate::sys::mount::Detached;

/// How long an unmounted device may take to go away before it counts as in use by someone else.
pub const SETTLE: Duration = Duration::from_secs(2);

/// A volume's storage, checked against its record and locked: no mkfs of anyone runs on it, and none can begin.
pub trait Locked: Send {
    /// Makes the storage blank again, after a mkfs that was cut short.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    fn wipe(&mut self) -> Result<()>;

    /// Makes a filesystem, durably. The caller has written down that it is about to.
    ///
    /// # Errors
    /// [`crate::error::Error::Mkfs`], [`crate::error::Error::Io`].
    fn format(&mut self, fs: FsType) -> Result<()>;

    /// Attaches the storage, where it is not yet, and makes a mount of its filesystem that nobody sees yet. The device
    /// goes by itself with the last mount.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`], with what the filesystem said.
    fn mount(&mut self, fs: FsType, options: &MountOptions, read_only: bool) -> Result<Detached>;

    /// Attaches the storage as a block device, where it is not yet. The device stays until [`Backend::detach`].
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    fn attach(&mut self, read_only: bool) -> Result<()>;
}

/// A volume's device on this node, held: it stays that volume's for as long as this lives.
pub trait Attached: Send {
    /// Its number.
    fn dev(&self) -> Dev;

    /// Its node, as mount tables show the root of a bind mount of it (`/loop3`).
    fn root(&self) -> String;

    /// Makes a mount of its node that nobody sees yet.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    fn node(&self) -> Result<Detached>;

    /// Makes the whole device refuse writes, or accept them.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    fn set_read_only(&self, read_only: bool) -> Result<()>;

    /// Whether the whole device refuses writes.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    fn read_only(&self) -> Result<bool>;
}

/// A kind of storage.
pub trait Backend: Send + Sync {
    /// Bytes that neither are in use nor have been promised to one of `records`.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    fn available(&self, records: &[Record]) -> Result<u64>;

    /// Makes blank storage of `size` bytes, durably, and returns its inode number.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`]; then nothing is left behind, or `erase` finds it.
    fn create(&self, id: &VolumeId, nonce: &Nonce, size: u64, allocation: Allocation) -> Result<u64>;

    /// Removes storage that `create` made with this nonce; storage with another one is left alone. `false` when there
    /// was none.
    ///
    /// # Errors
    /// [`crate::error::Error::Damaged`], [`crate::error::Error::InUse`], [`crate::error::Error::Io`].
    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool>;

    /// Checks that the storage is the one in the record.
    ///
    /// # Errors
    /// [`crate::error::Error::Damaged`], [`crate::error::Error::Io`].
    fn check(&self, record: &Record) -> Result<()>;

    /// Checks the storage against the record and locks it.
    ///
    /// # Errors
    /// [`crate::error::Error::Busy`] while a mkfs, perhaps of an earlier driver, still runs;
    /// [`crate::error::Error::Damaged`], [`crate::error::Error::Io`].
    fn lock(&self, record: &Record) -> Result<Box<dyn Locked>>;

    /// The volume's device, when it is attached.
    ///
    /// # Errors
    /// [`crate::error::Error::Damaged`], [`crate::error::Error::Io`].
    fn attached(&self, record: &Record) -> Result<Option<Box<dyn Attached>>>;

    /// Detaches the volume, where it is attached, and waits for it up to [`SETTLE`].
    ///
    /// # Errors
    /// [`crate::error::Error::InUse`] when something still holds the device, [`crate::error::Error::Io`].
    fn detach(&self, record: &Record) -> Result<()>;

    /// Names in the pool that belong to none of `records`: reported, never touched.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    fn strays(&self, records: &[Record]) -> Result<Vec<String>>;
}
