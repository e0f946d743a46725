//! Runs the machine's own programs (ip, mount, losetup, ...) and finds them.
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Where programs are looked for, inside nodes too; `sbin` is not on every caller's path.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long to wait for what has to happen: long, for a busy machine takes its time, and where it happens none of it is wasted.
pub const SOON: Duration = Duration::from_secs(60);

/// Runs a program to its end and gives its standard output; an exit status other than 0 is an error with its words.
pub fn run<A: AsRef<OsStr>>(argv: &[A]) -> Result<String> {
    let (program, args) = argv.split_first().context("an empty command")?;
    let mut command = Command::new(program);
    checked(command.args(args))
}

/// The output of `command`, or an error that quotes the command and what it said.
pub fn checked(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {}", shown(command)))?;
    if !output.status.success() {
        bail!("{}: {}: {}", shown(command), output.status, words(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Both outputs, trimmed, the last 2,000 characters: what a person wants to see of a failure.
pub fn words(output: &Output) -> String {
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let text = text.trim();
    let skip = text.chars().count().saturating_sub(2000);
    text.chars().skip(skip).collect()
}

fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// A program of the system, by name.
pub fn system(name: &str) -> Result<PathBuf> {
    let own = std::env::var("PATH").unwrap_or_default();
    let found = PATH.split(':').chain(own.split(':')).map(|dir| Path::new(dir).join(name)).find(|path| path.is_file());
    found.with_context(|| format!("no program `{name}` on this machine: `make setup` installs what the lab needs"))
}

/// A program of this workspace: in `$KEELWAY_BIN`, beside the running program, or one directory above it (tests run
/// from `target/*/deps`).
pub fn own(name: &str) -> Result<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::var_os("KEELWAY_BIN").map(PathBuf::from).into_iter().collect();
    let exe = std::env::current_exe()?;
    places.extend(exe.ancestors().skip(1).take(2).map(Path::to_owned));
    let found = places.iter().map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("no program `{name}` in {places:?}: `make build` builds it, or set KEELWAY_BIN"))
}

/// The first of `system` and `ours` that cannot be found, as the reason why a test has to be skipped.
pub fn missing(system_programs: &[&str], ours: &[&str]) -> Option<String> {
    let absent = system_programs.iter().find_map(|name| system(name).err());
    absent.or_else(|| ours.iter().find_map(|name| own(name).err())).map(|error| error.to_string())
}

/// Tries `attempt` every 50 ms until it succeeds; after `limit`, its last error, with what was waited for.
pub fn wait_for<T>(what: &str, limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > limit => return Err(error.context(format!("waited {limit:?} for {what}"))),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
