//! `cargo xtask kernels`: the data plane on kernels other than this machine's.

use anyhow::bail;

/// Runs the named kernels, or all of them.
pub fn run(_names: &[String]) -> anyhow::Result<bool> {
    bail!("wip")
}
