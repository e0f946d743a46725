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
    println!("==> building the BPF object and the guests' programs");
    let object = work.join("keelway.bpf");
    let bpf_target = target_directory().join("bpf");
    let (object_path, bpf_path) = (object.display().to_string(), bpf_target.display().to_string());
    step("bpf", &["hack/build-bpf", &object_path, &bpf_path], work, BUILD_LIMIT)?;
    let flags = ["cargo", "rustc", "--locked", "--release", "--package=keelway-kernel-tests", "--bin", LOAD];
    let flags = [&flags[..], &["--", "-Ctarget-feature=+crt-static"]].concat();
    step("programs", &flags, work, BUILD_LIMIT)?;
    let release = target_directory().join("release");
    Ok(vec![format!("{object_path}=keelway.bpf"), format!("{}={LOAD}", release.join(LOAD).display())])
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
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048", "-nographic",
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
