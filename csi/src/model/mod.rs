//! What a volume is: values and rules, without any input or output.

mod id;
mod mount_options;
mod parameters;
mod record;

pub use id::{Nonce, VolumeId};
pub(crate) use id::{hex, printable};
pub use mount_options::MountOptions;
pub use parameters::{Allocation, Parameters};
pub use record::{Content, FsType, Record, State};

/// Sizes are rounded up to this many bytes: the page, the largest sector size and the filesystems' block.
pub const GRAIN: u64 = 4096;
