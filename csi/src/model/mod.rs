//! What a volume is: values and rules, without any input or output.

mod changes;
mod id;
mod mount_options;
mod parameters;
mod record;
mod snapshot;
mod usage;

pub use changes::{Extent, Range, allocated, changed};
pub use id::{GroupId, Nonce, SnapshotId, VolumeId};
pub(crate) use id::{hex, printable};
pub use mount_options::MountOptions;
pub(crate) use parameters::claim;
pub use parameters::{Allocation, BackendKind, Mutable, Parameters, Shape};
pub use record::{Content, FsType, Record, Source, State};
pub use snapshot::{Group, Snapshot, Taken};
pub use usage::{Access, Stop, Use};

/// Sizes are rounded up to this many bytes: the page, the largest sector size and the filesystems' block.
pub const GRAIN: u64 = 4096;
