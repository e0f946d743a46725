//! The CNI specification as types.

mod version;

pub use version::Version;
