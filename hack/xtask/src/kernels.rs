//! `cargo xtask kernels`: the data plane on kernels other than this machine's, under QEMU without KVM.
//!
//! `tests/kernels/image` makes what is booted, `tests/kernels/guest/plan` is what runs inside, and what the guest
//! prints on its serial line is judged here. `storage` is a guest of its own, with disks, for volumes, and `ipvs` one
//! for what a former kube-proxy of that mode left.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use crate::report::{Report, Row};
use crate::{runner, tap};

/// The kernels that the project claims: Debian's long-term ones.
const SERIES: &[&str] = &["6.1", "6.12"];
/// The guest for volumes, and its kernel.
const STORAGE: (&str, &str) = ("storage", "6.12");
/// Its disk, for a volume group; a sparse file.
const DISK_BYTES: u64 = 4 << 30;
/// The guest for a former kube-proxy's IPVS, and its kernel.
const IPVS: (&str, &str) = ("ipvs", "6.1");
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
const IMAGE_LIMIT: Duration = Duration::from_secs(20 * 60);
/// An emulated CPU is some twenty times slower than a real one, and CI's machines are busy: it takes four minutes on a quiet one.
const BOOT_LIMIT: Duration = Duration::from_secs(25 * 60);
/// Of the guest for volumes, which runs LVM's programs some two thousand times: six minutes on a quiet machine.
const STORAGE_LIMIT: Duration = Duration::from_secs(30 * 60);
/// The program that asks the guest's verifier about every BPF program.
const LOAD: &str = "keelway-kernel-load";
/// Tests of the CSI driver that run in the guest for volumes.
const STORAGE_TESTS: &[&str] = &["crash", "lvm", "random", "sanity", "snapshots", "trees"];
/// What the driver and its tests run there.
const STORAGE_PROGRAMS: &[&str] = &[
    "/usr/sbin/lvm",
    "/usr/sbin/dmsetup",
    "/usr/sbin/thin_check",
    "/usr/sbin/mkfs.ext4",
    "/usr/sbin/e2fsck",
    "/usr/sbin/resize2fs",
    "/usr/sbin/mkfs.xfs",
    "/usr/sbin/mkfs.btrfs",
];
/// What the tests of IPVS run there, under the names of their call.
const IPVS_PROGRAMS: &[&str] = &[
    "/usr/sbin/ip=ip",
    "/usr/sbin/ipset=ipset",
    "/usr/sbin/ipvsadm=ipvsadm",
    "/usr/sbin/xtables-nft-multi=iptables",
    "/usr/sbin/xtables-nft-multi=iptables-save",
    "/usr/sbin/xtables-nft-multi=iptables-restore",
    "/usr/sbin/xtables-nft-multi=ip6tables",
    "/usr/sbin/xtables-nft-multi=ip6tables-save",
    "/usr/sbin/xtables-nft-multi=ip6tables-restore",
    // The agent's client wants some authority to trust, whomever it talks to.
    "/etc/ssl/certs/ca-certificates.crt",
];
const CNITOOL: &str = "github.com/containernetworking/cni/cnitool";

/// Boots the named kernels, or all of them; `Ok(false)` when a check failed in one.
pub fn run(names: &[String]) -> anyhow::Result<bool> {
    for name in names {
        let known = SERIES.contains(&name.as_str()) || name == STORAGE.0 || name == IPVS.0;
        ensure!(known, "no kernel {name:?}; there are: {}, {}, {}", SERIES.join(", "), IPVS.0, STORAGE.0);
    }
    let work = target_directory().join("kernels");
    std::fs::create_dir_all(&work).with_context(|| work.display().to_string())?;
    let wanted = |name: &str| names.is_empty() || names.iter().any(|wanted| wanted == name);
    let chosen: Vec<_> = SERIES.iter().filter(|series| wanted(series)).collect();
    let mut rows = Vec::new();
    if !chosen.is_empty() {
        let programs = build(&work)?;
        for series in chosen {
            rows.push(boot(&Guest { series, plan: None, programs: &programs }, &work.join(series))?);
        }
    }
    if wanted(IPVS.0) {
        let programs = build_ipvs(&work)?;
        rows.push(boot(&Guest { series: IPVS.1, plan: Some(IPVS.0), programs: &programs }, &work.join(IPVS.0))?);
    }
    if wanted(STORAGE.0) {
        let programs = build_storage(&work)?;
        rows.push(boot(
            &Guest { series: STORAGE.1, plan: Some(STORAGE.0), programs: &programs },
            &work.join(STORAGE.0),
        )?);
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

/// Builds the driver and its tests, and names what they run; the arguments for `tests/kernels/image`.
fn build_storage(work: &Path) -> anyhow::Result<Vec<String>> {
    println!("==> building the driver and its tests for the guest");
    let build = ["cargo", "build", "--locked", "--package=keelway-csi"];
    step("csi", &build, work, BUILD_LIMIT)?;
    let mut tests = vec!["cargo", "test", "--locked", "--package=keelway-csi", "--no-run"];
    let flags: Vec<_> = STORAGE_TESTS.iter().map(|name| format!("--test={name}")).collect();
    tests.extend(flags.iter().map(String::as_str));
    let printed = step("csi-tests", &tests, work, BUILD_LIMIT)?;
    let mut built = vec![("keelway-csi".to_owned(), target_directory().join("debug/keelway-csi"))];
    for name in STORAGE_TESTS {
        // `Executable tests/lvm.rs (/target/debug/deps/lvm-0123456789abcdef)`
        let line = printed.lines().find(|line| line.contains(&format!("tests/{name}.rs ")));
        let path = line.and_then(|line| line.split_once('(')).and_then(|(_, rest)| rest.strip_suffix(')'));
        built.push((
            format!("test-{name}"),
            path.with_context(|| format!("cargo does not say where the test {name} is"))?.into(),
        ));
    }
    let mut programs = stripped(work, built)?;
    programs.extend(cached("csi-sanity")?);
    programs.extend(STORAGE_PROGRAMS.iter().map(|&name| name.to_owned()));
    Ok(programs)
}

/// Builds the agent and what stands in for an API server, and names what the guest with a kube-proxy runs.
fn build_ipvs(work: &Path) -> anyhow::Result<Vec<String>> {
    println!("==> building the agent for the guest with a kube-proxy");
    let debug = target_directory().join("debug");
    step("other", &["cargo", "build", "--locked", "--package=keelway-agent"], work, BUILD_LIMIT)?;
    let lab =
        ["cargo", "build", "--locked", "--package=keelway-lab", "--bin=keelway-memory-api", "--bin=keelway-probe"];
    step("lab", &lab, work, BUILD_LIMIT)?;
    let built =
        ["keelway-agent", "keelway-memory-api", "keelway-probe"].map(|name| (name.to_owned(), debug.join(name)));
    let mut programs = stripped(work, built.into())?;
    programs.extend(cached("kube-proxy")?);
    programs.extend(IPVS_PROGRAMS.iter().map(|&name| name.to_owned()));
    Ok(programs)
}

/// Programs by the names that they get, for `tests/kernels/image`: with what debuggers need, a guest would take minutes to read them.
fn stripped(work: &Path, built: Vec<(String, PathBuf)>) -> anyhow::Result<Vec<String>> {
    let mut programs = Vec::new();
    for (name, path) in built {
        let stripped = work.join(format!("{name}-stripped")).display().to_string();
        step("strip", &["strip", "-o", &stripped, &path.display().to_string()], work, BUILD_LIMIT)?;
        programs.push(format!("{stripped}={name}"));
    }
    Ok(programs)
}

/// A program of Kubernetes', if it is built; without it the guest skips what it is for.
fn cached(name: &str) -> anyhow::Result<Option<String>> {
    let cache = std::env::var_os("KEELWAY_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/keelway")));
    let path = cache.context("HOME is not set")?.join("bin").join(name);
    Ok(path.exists().then(|| format!("{}={name}", path.display())))
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

/// What is booted.
struct Guest<'a> {
    series: &'a str,
    /// The plan, when it is another than what runs on every kernel.
    plan: Option<&'a str>,
    programs: &'a [String],
}

/// Boots one kernel, runs the plan in it and judges what it reported.
fn boot(guest: &Guest<'_>, work: &Path) -> anyhow::Result<Row> {
    std::fs::create_dir_all(work).with_context(|| work.display().to_string())?;
    let out = work.display().to_string();
    let plan = format!("PLAN={}", guest.plan.unwrap_or("network"));
    let mut command = vec!["env", &plan, "tests/kernels/image", guest.series, &out];
    command.extend(guest.programs.iter().map(String::as_str));
    let printed = step("image", &command, work, IMAGE_LIMIT)?;
    let release = printed.lines().last().context("tests/kernels/image prints the kernel's release")?;
    let what = guest.plan.map_or_else(|| format!("kernel {release}"), |plan| format!("{plan} on kernel {release}"));
    println!("==> {what}: booting under QEMU");
    let (kernel, initrd) = (format!("{out}/vmlinuz"), format!("{out}/initrd"));
    let mut append = "console=ttyS0 quiet loglevel=3 panic=-1".to_owned();
    #[rustfmt::skip]
    let mut qemu = vec![
        "qemu-system-x86_64", "-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", "3072", "-nographic",
        "-no-reboot", "-nic", "none", "-device", "virtio-rng-pci", "-kernel", &kernel, "-initrd", &initrd,
    ];
    let drive = format!("file={out}/disk,if=virtio,format=raw,cache=unsafe,discard=unmap");
    if let Some(plan) = guest.plan {
        append = format!("{append} keelway.plan={plan}");
    }
    if guest.plan == Some(STORAGE.0) {
        let disk = work.join("disk");
        let made = std::fs::File::create(&disk).and_then(|file| file.set_len(DISK_BYTES));
        made.with_context(|| disk.display().to_string())?;
        qemu.extend(["-drive", &drive]);
    }
    qemu.extend(["-append", &append]);
    let log = Path::new("target/report").join(format!("kernel-{}.log", guest.plan.unwrap_or(guest.series)));
    let outcome = runner::run(&what, &qemu, &log, if guest.plan.is_some() { STORAGE_LIMIT } else { BOOT_LIMIT })?;
    let results = tap::read(&outcome.output);
    if !results.failed.is_empty() {
        println!("{}", runner::tail(&outcome.output, 60));
    }
    for name in &results.failed {
        println!("    {what}: FAILED: {name}");
    }
    Ok(Row::new(&what, results.passed.len(), results.failed.len(), results.skipped, outcome.seconds))
}
