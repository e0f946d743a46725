//! csi-sanity, upstream's suite, against a running driver: nothing is left out by a flag.
//!
//! `cargo test -p keelway-csi --test sanity -- --ignored --nocapture`, as root.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use common::Driver;

/// The program in the project's cache of cluster programs, as `make cluster-programs` builds it.
fn csi_sanity() -> PathBuf {
    let cache = std::env::var_os("KEELWAY_CACHE").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/keelway");
    cache.unwrap_or_else(home).join("bin/csi-sanity")
}

// One flag each: what is tried, on which driver, as what, with which class.
fn run(name: &str, mut driver: Driver, access: &str, mebibytes: u64, parameters: &str, specs: usize) {
    common::need_root();
    let program = csi_sanity();
    if !program.exists() {
        eprintln!("skipped: no {} (`make cluster-programs` builds it)", program.display());
        return;
    }
    driver.start();
    let mutable = driver.path("mutable.yaml");
    std::fs::write(&mutable, "readAheadKiB: \"256\"\n").unwrap();
    let (parameter_file, report) = (driver.path("parameters.yaml"), driver.path("report.xml"));
    std::fs::write(&parameter_file, parameters).unwrap();
    let output = Command::new(program)
        .arg(format!("--csi.endpoint=unix://{}", driver.socket().display()))
        .arg(format!("--csi.mountdir={}", driver.kubelet("pods/sanity")))
        .arg(format!("--csi.stagingdir={}", driver.kubelet("staging/sanity")))
        .arg(format!("--csi.testvolumesize={}", mebibytes << 20))
        .arg(format!("--csi.testvolumeexpandsize={}", mebibytes << 21))
        .arg(format!("--csi.testvolumemutableparameters={}", mutable.display()))
        .arg("--csi.testnodevolumeattachlimit")
        .arg(format!("--csi.testvolumeaccesstype={access}"))
        .arg(format!("--csi.testvolumeparameters={}", parameter_file.display()))
        .arg(format!("--ginkgo.junit-report={}", report.display()))
        .arg("--ginkgo.no-color")
        .output()
        .expect("run csi-sanity");
    let said = String::from_utf8_lossy(&output.stdout);
    let xml = std::fs::read_to_string(&report).unwrap_or_default();
    let (passed, failed) = (xml.matches("status=\"passed\"").count(), xml.matches("status=\"failed\"").count());
    let skipped = skips(&xml);
    let left_out: usize = skipped.values().sum();
    eprintln!("csi-sanity {name}: {passed} passed, {failed} failed, {left_out} for what is not advertised:");
    skipped.iter().for_each(|(reason, count)| eprintln!("{count:6}  {reason}"));
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    // There are this many specs for what this backend can do; fewer means that something was not offered.
    assert!(passed >= specs && failed == 0, "{passed} passed, {failed} failed\n{said}");
    assert_eq!(driver.stop(), Some(0));
    driver.assert_clean();
}

/// Why the suite left specs out by itself, and how many for each reason.
fn skips(xml: &str) -> BTreeMap<String, usize> {
    let mut reasons = BTreeMap::new();
    for case in xml.split("<testcase ").skip(1).filter(|case| case.contains("status=\"skipped\"")) {
        let message = case.split_once("<skipped message=\"").and_then(|(_, rest)| rest.split_once('"'));
        *reasons.entry(message.map_or("no reason", |(text, _)| text).to_owned()).or_default() += 1;
    }
    reasons
}

#[test]
#[ignore = "needs root, loop devices and csi-sanity"]
fn image_mount_ext4() {
    run("image, ext4", Driver::new().with(&["--max-volumes=32"]), "mount", 64, "bytesPerInode: \"8192\"\n", 80);
}

#[test]
#[ignore = "needs root, loop devices and csi-sanity"]
fn image_block() {
    run("image, block", Driver::new().with(&["--max-volumes=32"]), "block", 64, "allocation: sparse\n", 80);
}

#[test]
#[ignore = "needs root, loop devices, XFS and csi-sanity"]
fn image_mount_on_xfs() {
    let driver = Driver::on("xfs", 4096).with(&["--max-volumes=32"]);
    run("image, ext4, on XFS", driver, "mount", 64, "backend: image\n", 80);
}

#[test]
#[ignore = "needs root, loop devices, btrfs and csi-sanity"]
fn btrfs_mount() {
    let driver = Driver::on("btrfs", 4096).with(&["--max-volumes=32", "--backends=btrfs"]);
    run("btrfs", driver, "mount", 64, "backend: btrfs\ncapacity: quota\n", 80);
}

#[test]
#[ignore = "needs root and csi-sanity"]
fn directory_mount() {
    let driver = Driver::new().with(&["--max-volumes=32", "--backends=directory"]);
    run("directory", driver, "mount", 64, "backend: directory\ncapacity: unenforced\n", 50);
}

#[test]
#[ignore = "needs root, loop devices and csi-sanity"]
fn raw_mount() {
    let driver = Driver::new().disks(16, 64).with(&["--max-volumes=16"]);
    run("raw, ext4", driver, "mount", 64, "backend: raw\n", 50);
}

#[test]
#[ignore = "needs root, loop devices and csi-sanity"]
fn raw_block() {
    let driver = Driver::new().disks(16, 64).with(&["--max-volumes=16"]);
    run("raw, block", driver, "block", 64, "backend: raw\n", 50);
}

/// Thick and thin ones, as filesystems and as block devices.
fn lvm(name: &str, access: &str, backend: &str, specs: usize) {
    if common::no_device_mapper() {
        return;
    }
    let driver = Driver::new().lvm(2048, backend).with(&["--max-volumes=16"]);
    run(name, driver, access, 64, &format!("backend: {backend}\n"), specs);
}

#[test]
#[ignore = "needs root, device-mapper and csi-sanity"]
fn lvm_mount() {
    lvm("lvm, ext4", "mount", "lvm", 50);
}

#[test]
#[ignore = "needs root, device-mapper and csi-sanity"]
fn lvm_block() {
    lvm("lvm, block", "block", "lvm", 50);
}

#[test]
#[ignore = "needs root, device-mapper and csi-sanity"]
fn lvm_thin_mount() {
    lvm("lvm-thin, ext4", "mount", "lvm-thin", 80);
}

#[test]
#[ignore = "needs root, device-mapper and csi-sanity"]
fn lvm_thin_block() {
    lvm("lvm-thin, block", "block", "lvm-thin", 80);
}
