//! The driver's journal, as others than it write it.

use sha2::{Digest, Sha256};

/// A line of it, as older builds write it, too.
pub fn line(json: &str) -> String {
    let digest: String = Sha256::digest(json)[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{digest} {json}\n")
}
