//! `cargo xtask test`: which suites there are and how each one is judged.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::bail;

use crate::libtest::{self, Counts};
use crate::report::{Report, Row};
use crate::runner::{self, Outcome};

/// How a suite's output is turned into counts.
enum Judge {
    /// One check: the command's exit status.
    Status,
    /// `cargo test`: each test is a check.
    Libtest,
    /// `cargo test` of csi-sanity: each of upstream's specs is a check, as the test sums them up.
    Sanity,
    /// Another chore of this program: the closing line of its table.
    Rows,
}

/// One suite: a command and what it takes.
struct Suite {
    name: &'static str,
    command: &'static [&'static str],
    judge: Judge,
    /// Programs that the suite cannot do without, each with the part of `hack/setup` that installs it.
    needs: &'static [(&'static str, &'static str)],
    /// Against what hangs: several times what it takes on a quiet machine.
    limit: Duration,
}

const fn minutes(count: u64) -> Duration {
    Duration::from_secs(60 * count)
}

/// All suites, quick ones first.
#[rustfmt::skip]
const SUITES: &[Suite] = &[
    Suite {
        name: "format",
        command: &["cargo", "fmt", "--all", "--check"],
        judge: Judge::Status,
        needs: &[("cargo-fmt", "lint")],
        limit: minutes(5),
    },
    Suite {
        name: "walls",
        command: &["cargo", "xtask", "walls"],
        judge: Judge::Status,
        needs: &[],
        limit: minutes(15),
    },
    Suite {
        name: "scripts",
        command: &["hack/lint-scripts"],
        judge: Judge::Status,
        needs: &[("shellcheck", "lint")],
        limit: minutes(5),
    },
    Suite {
        name: "licences and bans",
        command: &["cargo", "deny", "--locked", "check", "licenses", "bans", "sources"],
        judge: Judge::Status,
        needs: &[("cargo-deny", "lint")],
        limit: minutes(15),
    },
    Suite {
        name: "clippy",
        command: &["hack/clippy"],
        judge: Judge::Status,
        needs: &[("cargo-clippy", "lint")],
        limit: minutes(60),
    },
    Suite {
        // The lab's nodes run these, as a user's nodes would.
        name: "build",
        command: &["hack/build"],
        judge: Judge::Status,
        needs: &[],
        limit: minutes(60),
    },
    Suite {
        // A real API server and csi-sanity, which suites below run against; built once, then taken from the cache.
        name: "cluster programs",
        command: &["make", "--no-print-directory", "cluster-programs"],
        judge: Judge::Status,
        needs: &[("go", "cluster")],
        limit: minutes(90),
    },
    Suite {
        // As root: the tests of the crates that speak to the kernel make namespaces and maps of their own.
        name: "unit and property tests",
        command: &[
            "cargo", "test", "--locked", "--no-fail-fast", "--package=xtask", "--package=keelway-api",
            "--package=keelway-agent", "--package=keelway-cli", "--package=keelway-cni", "--package=keelway-csi",
            "--package=keelway-layout", "--package=keelway-maps", "--package=keelway-netlink",
            "--package=keelway-policy", "--package=keelway-proxy", "--", "--show-output",
        ],
        judge: Judge::Libtest,
        needs: &[],
        limit: minutes(60),
    },
    Suite {
        name: "csi-sanity",
        command: &[
            "cargo", "test", "--locked", "--no-fail-fast", "--package=keelway-csi", "--test=sanity", "--", "--ignored",
            "--show-output", "--test-threads=1",
        ],
        judge: Judge::Sanity,
        needs: &[],
        limit: minutes(30),
    },
    Suite {
        // The driver on real loop devices, and killed at every system call that changes something.
        name: "volumes",
        command: &[
            "cargo", "test", "--locked", "--no-fail-fast", "--package=keelway-csi", "--package=keelway-cli",
            "--test=volumes", "--test=codes", "--test=hangs", "--test=crash", "--test=local_volumes", "--", "--ignored",
            "--show-output",
        ],
        judge: Judge::Libtest,
        needs: &[],
        limit: minutes(45),
    },
    Suite {
        name: "lab",
        command: &["cargo", "test", "--locked", "--no-fail-fast", "--package=keelway-lab", "--", "--show-output"],
        judge: Judge::Libtest,
        needs: &[],
        limit: minutes(75),
    },
    Suite {
        // Our manifests on a real Kubernetes: nodes Ready, CoreDNS, volumes, Services, a policy, agents killed under load.
        name: "cluster",
        command: &["make", "--no-print-directory", "demo-cluster"],
        judge: Judge::Status,
        needs: &[("go", "cluster")],
        limit: minutes(60),
    },
    Suite {
        name: "kernels 6.1 and 6.12",
        command: &["cargo", "xtask", "kernels"],
        judge: Judge::Rows,
        needs: &[("qemu-system-x86_64", "kernels"), ("go", "cluster")],
        limit: minutes(120),
    },
];

/// Runs the named suites, or all of them; `Ok(false)` when a check failed.
pub fn run(names: &[String]) -> anyhow::Result<bool> {
    for name in names {
        if !SUITES.iter().any(|suite| suite.name == name) {
            let known: Vec<_> = SUITES.iter().map(|suite| suite.name).collect();
            bail!("no suite {name:?}; there are: {}", known.join(", "));
        }
    }
    let (mut rows, mut failures) = (Vec::new(), String::new());
    for suite in SUITES.iter().filter(|suite| names.is_empty() || names.iter().any(|name| name == suite.name)) {
        let (row, said) = suite.run()?;
        rows.push(row);
        failures += &said;
    }
    let report = Report { name: "test".to_owned(), command: "make test".to_owned(), rows };
    report.write()?;
    // What failed last of all: of a long log the end is what people see.
    println!("\n{}{failures}", report.table());
    Ok(report.passed())
}

impl Suite {
    /// Its row, and what is to be told of its failures.
    fn run(&self) -> anyhow::Result<(Row, String)> {
        if let Some((program, part)) = self.needs.iter().find(|(program, _)| !is_installed(program)) {
            let reason = format!("{program} is not installed: hack/setup {part}");
            println!("==> {}: skipped: {reason}", self.name);
            return Ok((Row::new(self.name, 0, 0, vec![reason], 0.0), String::new()));
        }
        println!("==> {}: {}", self.name, self.command.join(" "));
        let log = Path::new("target/report").join(format!("{}.log", self.name.replace(' ', "-")));
        let outcome = runner::run(self.name, self.command, &log, self.limit)?;
        let row = self.judge(&outcome);
        if row.failed() == 0 {
            return Ok((row, String::new()));
        }
        let said = libtest::failures(&outcome.output);
        println!("\n{said}\n    {}: failed, all of it is in {}\n", self.name, log.display());
        Ok((row, format!("\n{}: failed:\n{}\n", self.name, libtest::briefly(&said))))
    }

    fn judge(&self, outcome: &Outcome) -> Row {
        let mut counts = match self.judge {
            Judge::Status => Counts { passed: usize::from(outcome.success), ..Counts::default() },
            Judge::Libtest => libtest::read(&outcome.output),
            Judge::Sanity => libtest::read_sanity(&outcome.output),
            Judge::Rows => libtest::read_closing_line(&outcome.output),
        };
        // A crate that does not compile, or a test binary that was killed, reports no failed test.
        if !outcome.success && counts.failed == 0 {
            counts.failed = 1;
        }
        Row::new(self.name, counts.passed, counts.failed, counts.skipped, outcome.seconds)
    }
}

/// Whether the program can be run: from PATH, or by cargo, which looks where it installs to as well.
fn is_installed(program: &str) -> bool {
    let asked = match program.strip_prefix("cargo-") {
        Some(chore) => vec!["cargo", chore, "--version"],
        None => vec!["sh", "-c", "command -v \"$0\"", program],
    };
    let mut look = Command::new(asked[0]);
    look.args(&asked[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    look.status().is_ok_and(|status| status.success())
}
