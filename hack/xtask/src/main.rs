//! The project's chores that outgrew a shell script: `cargo xtask <chore>`.
//!
//! - `test [SUITE...]` runs the suites one after the other and ends in a table ([`suites`], [`runner`]).
//! - `walls` holds the crates against the dependency rules of `hack/walls.txt` ([`walls`]).
//! - `kernels [NAME...]` boots other kernels under QEMU and reports what ran in them ([`kernels`]).
//!
//! Every chore exits non-zero when something failed, and writes `target/report/<chore>.json` ([`report`]).
#![forbid(unsafe_code)]

mod kernels;
mod libtest;
mod report;
mod rules;
mod runner;
mod source;
mod suites;
mod tap;
mod walls;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};

const USAGE: &str = "usage: cargo xtask test [SUITE...] | walls | kernels [NAME...]";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs the chore that the arguments name; `Ok(false)` when it ran and something in it failed.
fn run() -> anyhow::Result<bool> {
    std::env::set_current_dir(root()?).context("entering the workspace")?;
    let mut args = std::env::args().skip(1);
    let chore = args.next().context(USAGE)?;
    let rest: Vec<String> = args.collect();
    match chore.as_str() {
        "test" => suites::run(&rest),
        "walls" if rest.is_empty() => walls::run(),
        "kernels" => kernels::run(&rest),
        _ => bail!("{USAGE}"),
    }
}

/// The workspace's directory, two above this crate.
fn root() -> anyhow::Result<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).map(PathBuf::from).context("xtask lives two levels below the workspace")
}
