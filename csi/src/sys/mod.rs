//! What is asked of the kernel: loop devices, mounts, paths below the kubelet's directory, mkfs, copies.

pub mod block;
pub mod btrfs;
pub mod copy;
pub mod freeze;
pub mod group;
pub mod grow;
pub mod loopdev;
pub mod lvm;
pub mod mkfs;
pub mod mount;
pub mod mountinfo;
pub mod quota;
pub mod remove;
pub mod target;

use std::fmt;

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dev {
    /// The driver's number.
    pub major: u32,
    /// The device's number.
    pub minor: u32,
}

impl Dev {
    /// From the form in which `stat` and the loop driver give it.
    pub fn from_raw(raw: u64) -> Self {
        Self { major: rustix::fs::major(raw), minor: rustix::fs::minor(raw) }
    }
}

impl fmt::Display for Dev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}
