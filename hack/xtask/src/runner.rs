//! Runs one command with a log, a time limit and a sign of life.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

/// How long a command may be silent on the terminal before a line says that it still runs.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// What came of a command.
#[derive(Debug)]
pub struct Outcome {
    /// Whether it ended in time and with status zero.
    pub success: bool,
    /// Everything that it printed.
    pub output: String,
    /// Wall time in seconds.
    pub seconds: f64,
}

/// Runs `command` without input, its output in `log`; after `limit` its whole process group is killed.
pub fn run(title: &str, command: &[&str], log: &Path, limit: Duration) -> anyhow::Result<Outcome> {
    if let Some(directory) = log.parent() {
        std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    let mut file = File::create(log).with_context(|| log.display().to_string())?;
    let started = Instant::now();
    let (program, arguments) = command.split_first().context("a command has a program")?;
    // A group of its own, so that what the tests started goes with them when the time is up.
    let mut command = Command::new(program);
    // What `cargo run` says about this program. Build scripts watch some of it (ring's does), and would take the same
    // sources for others than they are in a shell: the agent would be built a second time.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_about_this_program)) {
        command.env_remove(name);
    }
    let mut child = command
        .args(arguments)
        .env("KEELWAY_BIN", release_directory()?)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file.try_clone()?)
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let mut next_sign = HEARTBEAT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        let elapsed = started.elapsed();
        if elapsed >= limit {
            kill_group(&mut child)?;
            writeln!(file, "\nstopped after {} s, its time limit", limit.as_secs())?;
            break None;
        }
        if elapsed >= next_sign {
            println!("    {title}: {} s, at: {}", elapsed.as_secs(), last_line(log));
            next_sign += HEARTBEAT;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let output = String::from_utf8_lossy(&std::fs::read(log)?).into_owned();
    Ok(Outcome { success: status.is_some_and(|s| s.success()), output, seconds: started.elapsed().as_secs_f64() })
}

/// Whether cargo sets this variable for the package that it runs, as `CARGO_HOME` and the like are not.
fn is_about_this_program(name: &str) -> bool {
    name == "CARGO" || name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
}

/// Where the lab's tests find the programs that `hack/build` made.
fn release_directory() -> anyhow::Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    Ok(std::path::absolute(target.join("release"))?)
}

/// First asks the group to end, so that tests can clean up, then makes it.
fn kill_group(child: &mut Child) -> anyhow::Result<()> {
    for signal in ["-TERM", "-KILL"] {
        Command::new("kill").args([signal, "--", &format!("-{}", child.id())]).status().context("kill")?;
        let asked = Instant::now();
        while child.try_wait()?.is_none() && asked.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}

/// The last line of the log that says something, cut to fit a terminal.
fn last_line(log: &Path) -> String {
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("nothing printed yet");
    line.chars().take(90).collect()
}

/// The last `count` lines of an output.
pub fn tail(output: &str, count: usize) -> String {
    let lines: Vec<&str> = output.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_output_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let outcome = run("t", &["sh", "-c", "echo out; echo err >&2; exit 3"], &log, Duration::from_secs(10)).unwrap();
        assert!(!outcome.success);
        assert_eq!(outcome.output, "out\nerr\n");
    }

    /// Cargo runs this test, too, and says so in variables.
    #[test]
    fn cargo_in_a_suite_sees_what_it_sees_in_a_shell() {
        let directory = tempfile::tempdir().unwrap();
        let outcome = run("t", &["env"], &directory.path().join("log"), Duration::from_secs(10)).unwrap();
        let names: Vec<_> = outcome.output.lines().filter_map(|line| line.split('=').next()).collect();
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        assert!(names.contains(&"PATH"));
        for set in ["CARGO", "CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH"] {
            assert!(!names.contains(&set), "{set} is handed on");
        }
    }

    #[test]
    fn a_command_over_its_time_is_ended_with_its_children() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let script = "sleep 600 & echo $!; wait";
        let outcome = run("t", &["sh", "-c", script], &log, Duration::from_secs(2)).unwrap();
        assert!(!outcome.success);
        assert!(outcome.seconds < 300.0);
        let sleeper = outcome.output.lines().next().unwrap().to_owned();
        let state = std::fs::read_to_string(format!("/proc/{sleeper}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "still there: {state}");
    }

    #[test]
    fn the_tail_is_no_longer_than_asked() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 5), "a");
    }
}
