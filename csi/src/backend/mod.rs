//! Where volumes' bytes live. One trait, one file a backend.

mod btrfs;
mod device;
mod directory;
mod image;
mod lvm;
mod pool;
mod raw;
mod tree;

pub use btrfs::Subvolumes;
pub use directory::Directories;
pub use image::Images;
pub use lvm::{LogicalVolumes, LvmPlace, OURS as LVM_TAG};
pub use pool::Pool;
pub use raw::Devices;

use std::fs::File;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::model::{
    BackendKind, Content, Extent, MountOptions, Mutable, Nonce, Parameters, Record, Snapshot, SnapshotId, VolumeId,
};
use crate::state::Store;
use crate::sys::Dev;
use crate::sys::mount::Detached;
use crate::sys::mountinfo::Mount;
use crate::sys::target::Found;

/// How long an unmounted device may take to go away before it counts as in use by someone else.
pub const SETTLE: Duration = Duration::from_secs(2);

/// How much of something there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// What can still be had by an ordinary user.
    pub available: u64,
    /// All.
    pub total: u64,
    /// What is taken.
    pub used: u64,
}

/// What a backend can do, beyond what all can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Snapshots, restoring and cloning.
    pub snapshots: bool,
    /// Volumes can grow.
    pub expand: bool,
    /// Mutable parameters.
    pub modify: bool,
    /// It is known where the data of snapshots is, and what two of them differ in.
    pub tracking: bool,
}

/// Storage to be made.
#[derive(Clone, Copy, Debug)]
pub struct New<'a> {
    /// Our name of it.
    pub id: &'a VolumeId,
    /// What it will be marked with.
    pub nonce: &'a Nonce,
    /// Bytes, at least.
    pub size: u64,
    /// Bytes, at most, where there is a limit.
    pub most: Option<u64>,
    /// What it will be handed out as.
    pub content: Content,
    /// What its class says.
    pub parameters: &'a Parameters,
}

/// Storage that was made.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// Its inode number, or what else it is known by in the pool.
    pub inode: u64,
    /// Bytes that it has.
    pub size: u64,
}

/// What new storage is made from.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// A snapshot.
    Snapshot(&'a Snapshot),
    /// A volume; whoever asks has seen to it that nothing is written to it meanwhile, or that it takes only a moment.
    Volume(&'a Record),
}

/// Whether a copy may go on; an error ends it.
pub type GoOn<'a> = &'a dyn Fn() -> std::io::Result<()>;

/// A volume's storage, checked against its record and locked: no mkfs of anyone runs on it, and none can begin.
pub trait Locked: Send {
    /// Makes the storage blank again, after a mkfs that was cut short.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn wipe(&mut self) -> Result<()>;

    /// Makes the filesystem that the record names, durably. The caller has written down that it is about to.
    ///
    /// # Errors
    /// [`Error::Mkfs`], [`Error::Io`].
    fn format(&mut self) -> Result<()>;

    /// Grows the filesystem, which is mounted nowhere, to the size of the storage: where the kernel would not let us.
    ///
    /// # Errors
    /// [`Error::InUse`] when it is attached, [`Error::Mkfs`], [`Error::Io`].
    fn grow(&mut self) -> Result<()> {
        Ok(())
    }

    /// Attaches the storage, where it is not yet, and makes a mount of its filesystem that nobody sees yet. The device
    /// goes by itself with the last mount.
    ///
    /// # Errors
    /// [`Error::Io`], with what the filesystem said.
    fn mount(&mut self, options: &MountOptions, read_only: bool) -> Result<Detached>;

    /// Attaches the storage as a block device, where it is not yet. The device stays until [`Backend::detach`].
    ///
    /// # Errors
    /// [`Error::Io`].
    fn attach(&mut self, read_only: bool) -> Result<()>;
}

/// A volume on this node, held: it stays that volume for as long as this lives.
pub trait Attached: Send {
    /// Whether what was found at a target is this volume: its filesystem, its directory, or its device's node.
    fn is(&self, found: &Found) -> bool;

    /// Whether a line of the mount table is a mount of it, of whatever kind.
    fn shows(&self, mount: &Mount) -> bool;

    /// The number of its own device, where it has one.
    fn dev(&self) -> Option<Dev> {
        None
    }

    /// Bytes that the device has; nothing for what has none.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn size(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Gives the device the size that the storage has.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn take_size(&self) -> Result<()> {
        Ok(())
    }

    /// Brings what is in the device's own cache to the storage.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Puts mutable parameters into effect.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn tune(&self, _: &Mutable) -> Result<()> {
        Ok(())
    }

    /// How full the volume is, where its filesystem would not say so.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn usage(&self) -> Result<Option<Usage>> {
        Ok(None)
    }

    /// How many errors the volume's filesystem has met, where it counts them.
    fn errors(&self) -> u64 {
        0
    }

    /// Makes a mount of the device's node that nobody sees yet.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn node(&self) -> Result<Detached>;

    /// Makes the whole device refuse writes, or accept them.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn set_read_only(&self, read_only: bool) -> Result<()>;

    /// Whether the whole device refuses writes.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn read_only(&self) -> Result<bool>;
}

/// A kind of storage.
pub trait Backend: Send + Sync {
    /// Which it is.
    fn kind(&self) -> BackendKind;

    /// What its volumes share the room of.
    fn store(&self) -> Store;

    /// What it can do.
    fn features(&self) -> Features;

    /// Bytes that the store has free now.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn free(&self) -> Result<u64>;

    /// The largest volume that could be had now, where it is not all that is free.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn largest(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Bytes that a volume may come to take of the store beyond what it has taken: blocks that were not yet written, or
    /// that it shares.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn outstanding(&self, record: &Record) -> Result<u64>;

    /// As [`Backend::outstanding`], for a snapshot.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn outstanding_of(&self, _: &Snapshot) -> Result<u64> {
        Ok(0)
    }

    /// Sizes are multiples of this many bytes.
    fn granule(&self) -> u64 {
        1
    }

    /// Whether a volume with these parameters can be had at all.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    fn admit(&self, _: &Parameters) -> Result<()> {
        Ok(())
    }

    /// Makes storage, durably, blank or with what the origin holds.
    ///
    /// # Errors
    /// [`Error::Io`]; then nothing is left behind, or `erase` finds it.
    fn create(&self, new: New<'_>, origin: Option<Origin<'_>>, go_on: GoOn<'_>) -> Result<Made>;

    /// Removes storage that `create` made with this nonce; storage with another one is left alone. `false` when there
    /// was none.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::InUse`], [`Error::Io`].
    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool>;

    /// Removes a volume's storage, with what callers have written to it.
    ///
    /// # Errors
    /// As [`Backend::erase`].
    fn discard(&self, record: &Record) -> Result<()> {
        self.erase(&record.id, &record.nonce).map(drop)
    }

    /// Checks that the storage is the one in the record.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Io`].
    fn check(&self, record: &Record) -> Result<()>;

    /// Checks the storage against the record and locks it.
    ///
    /// # Errors
    /// [`Error::Busy`] while an earlier mkfs runs, [`Error::Damaged`], [`Error::Io`].
    fn lock(&self, record: &Record) -> Result<Box<dyn Locked>>;

    /// The volume, when it is attached. What has no device always is.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Io`].
    fn attached(&self, record: &Record) -> Result<Option<Box<dyn Attached>>>;

    /// The volume as it is attached or mounted still, when its storage is not there or `damage` says that it is another: to
    /// take it down, and for nothing else.
    ///
    /// # Errors
    /// The damage, where that leaves nothing to know the volume by; [`Error::Io`].
    fn remains(&self, _: &Record, damage: Option<Error>) -> Result<Option<Box<dyn Attached>>> {
        damage.map_or(Ok(None), Err)
    }

    /// Detaches the volume, where it is attached, and waits for it up to [`SETTLE`].
    ///
    /// # Errors
    /// [`Error::InUse`] when something still holds the device, [`Error::Io`].
    fn detach(&self, record: &Record) -> Result<()>;

    /// Brings the storage to a size between the record's and the one that it is growing to.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Io`].
    fn resize(&self, _: &Record, _: u64) -> Result<()> {
        Err(unsupported(self.kind(), "expand", "its volumes have the size that they were made with"))
    }

    /// Whether a snapshot takes a moment, however large the volume is, and is of one moment.
    fn snapshots_at_once(&self) -> bool {
        false
    }

    /// Whether a mounted filesystem is held still by what takes its snapshot.
    fn holds_still(&self) -> bool {
        false
    }

    /// Takes a snapshot, durably, and returns its storage's inode number.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Io`]; then nothing is left behind, or `erase_snapshot` finds it.
    fn snapshot(&self, _: &Record, _: &SnapshotId, _: &Nonce, _: GoOn<'_>) -> Result<u64> {
        Err(unsupported(self.kind(), "snapshot", "image, btrfs and lvm-thin can"))
    }

    /// Removes a snapshot's storage, as [`Backend::erase`] a volume's.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Io`].
    fn erase_snapshot(&self, _: &SnapshotId, _: &Nonce) -> Result<bool> {
        Ok(false)
    }

    /// Checks that a snapshot's storage is the one in its record.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Io`].
    fn check_snapshot(&self, _: &Snapshot) -> Result<()> {
        Ok(())
    }

    /// Where a snapshot's data is on the disk, in order.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Damaged`], [`Error::Io`].
    fn extents(&self, _: &Snapshot) -> Result<Vec<Extent>> {
        Err(unsupported(self.kind(), "snapshot metadata", "images whose pool can share blocks can"))
    }

    /// The name in the pool of a volume's storage, where it has one.
    fn name(&self, id: &VolumeId) -> Option<String>;

    /// The name in the pool of a snapshot's storage.
    fn snapshot_name(&self, _: &SnapshotId) -> Option<String> {
        None
    }

    /// Names of what is outside of the pool and marked as ours.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn names(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

fn unsupported(kind: BackendKind, what: &'static str, why: &str) -> Error {
    Error::Unsupported { what, backend: kind.as_str(), why: why.into() }
}

/// What of storage does not agree with its record.
fn damaged(id: &VolumeId, what: &'static str, expected: impl ToString, found: impl ToString) -> Error {
    Error::Damaged { id: id.clone(), what, expected: expected.to_string(), found: found.to_string() }
}

/// The inode number of an open file.
fn inode_of(file: &File, what: &str) -> Result<u64> {
    use crate::error::Context;
    Ok(std::os::unix::fs::MetadataExt::ino(&file.metadata().context(|| format!("stat {what}"))?))
}
