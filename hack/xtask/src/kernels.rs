//! `cargo xtask kernels`: the data plane on kernels other than this machine's, under QEMU without KVM.
//!
//! `tests/kernels/image` makes what is booted, `tests/kernels/guest/plan` is what runs inside, and what the guest
//! prints on its serial line is judged here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use crate::report::{Report, Row};
use crate::{runner, tap};

/// The kernels that the project claims: Debian's long-term ones.
const SERIES: &[&str] = &["6.1", "6.12"];
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
const IMAGE_LIMIT: Duration = Duration::from_secs(10 * 60);
/// An emulated CPU is some twenty times slower than a real one, and CI's machines are busy.
const BOOT_LIMIT: Duration = Duration::from_secs(10 * 60);
/// The program that asks the guest's verifier about every BPF program.
const LOAD: &str = "keelway-kernel-load";
const CNITOOL: &str = "github.com/containernetworking/cni/cnitool";

/// Boots the named kernels, or all of them; `Ok(false)` when a check failed in one.
pub fn run(names: &[String]) -> anyhow::Result<bool> {
    for name in names {
        ensure!(SERIES.contains(&name.as_str()), "no kernel {name:?}; there are: {}", SERIES.join(", "));
    }
    let work = target_directory().join("kernels");
    std::fs::create_dir_all(&work).with_context(|| work.display().to_string())?;
    let programs = build(&work)?;
    let chosen = SERIES.iter().filter(|series| names.is_empty() || names.iter().any(|name| name == *series));
    let mut rows = Vec::new();
    for series in chosen {
        rows.push(boot(series, &work.join(series), &programs)?);
    }
    let report = Report { name: "kernels".to_owned(), command: "make kernels".to_owned(), rows };
    report.write()?;
    println!("\n{}", report.table());
    Ok(report.passed())
}

/// Where cargo builds to.
fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}

/// Builds what the guests run; the arguments for `tests/kernels/image`.
fn build(work: &Path) -> anyhow::Result<Vec<String>> {
    println!("==> building the programs, the agent twice");
    let object = work.join("keelway.bpf").display().to_string();
    let bpf_target = target_directory().join("bpf").display().to_string();
    step("bpf", &["hack/build-bpf", &object, &bpf_target], work, BUILD_LIMIT)?;
    let load = ["cargo", "rustc", "--locked", "--release", "--package=keelway-kernel-tests", "--bin", LOAD];
    step("load", &[&load[..], &["--", "-Ctarget-feature=+crt-static"]].concat(), work, BUILD_LIMIT)?;
    step("build", &["hack/build"], work, BUILD_LIMIT)?;
    // The agent of the debug profile is the other build that takes over from the first.
    step("other", &["cargo", "build", "--locked", "--package=keelway-agent"], work, BUILD_LIMIT)?;
    let other = work.join("keelway-agent-other").display().to_string();
    let debug = target_directory().join("debug/keelway-agent").display().to_string();
    step("strip", &["strip", "-o", &other, &debug], work, BUILD_LIMIT)?;
    step(
        "cnitool",
        &["go", "-C", "tests/cluster/tools/cni", "build", "-o", &absolute(work, "cnitool")?, CNITOOL],
        work,
        BUILD_LIMIT,
    )?;

    let release = target_directory().join("release");
    let mut programs = vec![format!("{object}=keelway.bpf"), format!("{other}=keelway-agent-other")];
    for name in [LOAD, "keelway-agent", "keelway-cni", "keelway", "keelway-probe"] {
        programs.push(format!("{}={name}", release.join(name).display()));
    }
    programs.push(format!("{}=cnitool", work.join("cnitool").display()));
    for tool in ["ip", "tc", "bpftool"] {
        programs.push(format!("/usr/sbin/{tool}={tool}"));
    }
    Ok(programs)
}

/// A path below `work` that holds in any directory.
fn absolute(work: &Path, name: &str) -> anyhow::Result<String> {
    Ok(std::env::current_dir()?.join(work).join(name).display().to_string())
}

/// Runs a command that has to succeed; what it printed.
fn step(title: &str, command: &[&str], work: &Path, limit: Duration) -> anyhow::Result<String> {
    let outcome = runner::run(title, command, &work.join(format!("{title}.log")), limit)?;
    if !outcome.success {
        bail!("{}: failed:\n{}", command.join(" "), runner::tail(&outcome.output, 30));
    }
    Ok(outcome.output)
}

/// Boots one kernel, runs the plan in it and judges what it reported.
fn boot(series: &str, work: &Path, programs: &[String]) -> anyhow::Result<Row> {
    std::fs::create_dir_all(work).with_context(|| work.display().to_string())?;
    let out = work.display().to_string();
    let mut command = vec!["tests/kernels/image", series, &out];
    command.extend(programs.iter().map(String::as_str));
    let printed = step("image", &command, work, IMAGE_LIMIT)?;
    let release = printed.lines().last().context("tests/kernels/image prints the kernel's release")?;
    let what = format!("kernel {release}");
    println!("==> {what}: booting under QEMU");
    let (kernel, initrd) = (format!("{out}/vmlinuz"), format!("{out}/initrd"));
    #[rustfmt::skip]
    let qemu = [
        "qemu-system-x86_64", "-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", "3072", "-nographic",
        "-no-reboot", "-nic", "none", "-device", "virtio-rng-pci", "-kernel", &kernel, "-initrd", &initrd,
        "-append", "console=ttyS0 quiet loglevel=3 panic=-1",
    ];
    let log = Path::new("target/report").join(format!("kernel-{series}.log"));
    let outcome = runner::run(&what, &qemu, &log, BOOT_LIMIT)?;
    let results = tap::read(&outcome.output);
    if !results.failed.is_empty() {
        println!("{}", runner::tail(&outcome.output, 60));
    }
    for name in &results.failed {
        println!("    {what}: FAILED: {name}");
    }
    Ok(Row::new(&what, results.passed.len(), results.failed.len(), results.skipped, outcome.seconds))
}
