//! Addresses of this node's pods.
//!
//! [`Pool`] decides, in memory; [`LeaseStore`] remembers; [`Book`] keeps the two in step: nothing is handed out before
//! it is on disk, nothing is free before its release is. Addresses are handed out round robin, and those released
//! last are reused last, also across restarts, because peers and conntrack remember an address for a while.

mod book;
pub mod journal;
mod pool;
mod range;
mod store;

pub use book::Book;
pub use pool::Pool;
pub use range::Usage;
pub use store::{LeaseStore, MemoryStore, Record, StoreError};

use std::net::IpAddr;

use ipnet::IpNet;

use crate::lease::LeaseKey;

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// No pod CIDR is known yet.
    #[error("pod CIDRs: expected one or two (one a family), have none")]
    NoCidrs,
    /// Two CIDRs of one family.
    #[error("pod CIDRs {0} and {1}: expected at most one of each family")]
    SameFamily(IpNet, IpNet),
    /// A CIDR without room for a host and a pod address.
    #[error("pod CIDR {0}: expected at most /30 for IPv4 and /126 for IPv6")]
    TooSmall(IpNet),
    /// Every address is leased.
    #[error("pod CIDR {cidr}: all {capacity} addresses are leased")]
    Exhausted {
        /// The CIDR that is full.
        cidr: IpNet,
        /// How many pods it has room for.
        capacity: u128,
    },
    /// Two leases name one address: the journal was edited or two agents wrote it.
    #[error("address {address}: leased to both {first} and {second}")]
    Duplicate {
        /// The address.
        address: IpAddr,
        /// Who had it.
        first: Box<LeaseKey>,
        /// Who claims it as well.
        second: Box<LeaseKey>,
    },
    /// The lease could not be written down; nothing was handed out.
    #[error(transparent)]
    Store(#[from] StoreError),
}
