//! The plugin under the name `loopback`, against the kernel: its answers, and what `ip` says of `lo` meanwhile. Needs root.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use keelway_cni::install::{Loopback, install_binary, install_loopback, is_our_loopback};
use serde_json::{Value, json};

use crate::{Answer, Netns, about};

const OWN: &str = env!("CARGO_BIN_EXE_keelway-cni");

/// What containerd 1.6 and 1.7 hand over.
fn conf(version: &str, more: Value) -> Vec<u8> {
    let mut conf = json!({ "cniVersion": version, "name": "cni-loopback", "type": "loopback" });
    conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    conf.to_string().into_bytes()
}

fn run(program: &Path, command: &str, netns: &str, conf: &[u8]) -> Answer {
    let env = about(command, netns).into_iter().map(|(k, v)| if k == "CNI_IFNAME" { (k, "lo") } else { (k, v) });
    crate::run_program(program, &env.collect::<Vec<_>>(), conf)
}

fn lo(netns: &Netns) -> Value {
    let out = Command::new("ip").args(["-n", &netns.0, "-j", "addr", "show", "lo"]).output().unwrap();
    serde_json::from_slice::<Value>(&out.stdout).unwrap()[0].clone()
}

fn is_up(netns: &Netns) -> bool {
    lo(netns)["flags"].as_array().unwrap().iter().any(|flag| flag == "UP")
}

#[test]
fn lo_goes_up_is_checked_and_goes_down_again() {
    let netns = Netns::new("lo");
    let path = netns.path();
    let own = Path::new(OWN);
    assert!(!is_up(&netns));
    let answer = run(own, "ADD", &path, &conf("0.3.1", json!({})));
    assert!(answer.success, "{answer:?}");
    let result = answer.json();
    let addresses: Vec<&str> =
        result["ips"].as_array().unwrap().iter().map(|ip| ip["address"].as_str().unwrap()).collect();
    assert_eq!(addresses, ["127.0.0.1/8", "::1/128"], "{result}");
    assert_eq!(result["interfaces"], json!([{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": path}]));
    assert_eq!((&result["ips"][1]["version"], &result["ips"][1]["interface"]), (&json!("6"), &json!(0)));
    assert!(is_up(&netns));
    let ping = |to| Command::new("ip").args(["netns", "exec", &netns.0, "busybox", "ping", "-c1", "-W1", to]).output();
    for to in ["127.0.0.1", "::1"] {
        assert!(ping(to).unwrap().status.success(), "{to}");
    }
    // Twice is as good as once, and an older plugin's answer is handed on.
    let again = run(own, "ADD", &path, &conf("1.0.0", json!({})));
    let prev = again.json();
    assert_eq!(prev["ips"].as_array().unwrap().len(), 2, "{prev}");
    run(own, "CHECK", &path, &conf("1.0.0", json!({ "prevResult": prev }))).silent();
    run(own, "STATUS", "", &conf("1.1.0", json!({}))).silent();
    run(own, "GC", "", &conf("1.1.0", json!({ "cni.dev/valid-attachments": [] }))).silent();
    run(own, "DEL", &path, &conf("0.3.1", json!({}))).silent();
    assert!(!is_up(&netns));
    let (code, message) = run(own, "CHECK", &path, &conf("1.0.0", json!({ "prevResult": prev }))).error();
    assert!(code == 102 && message.starts_with("lo is down"), "{code} {message}");
}

#[test]
fn without_a_namespace_add_fails_and_del_has_nothing_to_do() {
    let own = Path::new(OWN);
    let (code, message) = run(own, "ADD", "/run/netns/kw-none", &conf("1.0.0", json!({}))).error();
    assert!(code == 3 && message.contains("kw-none"), "{code} {message}");
    for netns in ["/run/netns/kw-none", ""] {
        run(own, "DEL", netns, &conf("1.0.0", json!({}))).silent();
    }
}

#[test]
fn its_name_is_enough_and_version_asks_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let netns = Netns::new("name");
    std::fs::copy(OWN, dir.path().join("loopback")).unwrap();
    let program = dir.path().join("loopback");
    // Nothing in the configuration says what is meant, and no agent is there to ask.
    let bare = json!({ "cniVersion": "1.0.0", "name": "x" }).to_string().into_bytes();
    let answer = run(&program, "ADD", &netns.path(), &bare);
    assert_eq!(answer.json()["interfaces"][0]["name"], "lo", "{answer:?}");
    let versions = run(&program, "VERSION", "", &bare).json();
    assert_eq!(versions["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
}

#[test]
fn it_is_placed_once_follows_upgrades_and_never_replaces_anothers() {
    let dir = tempfile::tempdir().unwrap();
    let (bin, old, new) = (dir.path().join("bin"), dir.path().join("old"), dir.path().join("new"));
    std::fs::write(&old, "old").unwrap();
    std::fs::write(&new, "new").unwrap();
    let there = || std::fs::read_to_string(bin.join("loopback")).unwrap();
    let install = |from: &Path| {
        let loopback = install_loopback(from, &bin).unwrap();
        install_binary(from, &bin).unwrap();
        loopback
    };
    assert_eq!((install(&old), there()), (Loopback::Installed, "old".to_owned()));
    let mode = std::fs::metadata(bin.join("loopback")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
    assert_eq!((install(&new), there()), (Loopback::Installed, "new".to_owned()), "ours follows the plugin");
    assert!(is_our_loopback(&bin).unwrap());
    // An upgrade that ended between the two copies.
    install_loopback(&old, &bin).unwrap();
    assert_eq!((install(&old), there()), (Loopback::Installed, "old".to_owned()));

    std::fs::write(bin.join("loopback"), "another's").unwrap();
    assert_eq!((install(&new), there()), (Loopback::Foreign, "another's".to_owned()));
    assert!(!is_our_loopback(&bin).unwrap());
    // Not even a link that leads nowhere is replaced.
    std::fs::remove_file(bin.join("loopback")).unwrap();
    std::os::unix::fs::symlink("/nowhere/loopback", bin.join("loopback")).unwrap();
    assert_eq!(install(&new), Loopback::Foreign);
    let mut names: Vec<_> = std::fs::read_dir(&bin).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["keelway-cni", "loopback"], "no temporary file stays");
    // Whoever copies another one over ours does not write into the plugin.
    std::fs::remove_file(bin.join("loopback")).unwrap();
    assert_eq!(install(&new), Loopback::Installed);
    let copied = Command::new("cp").arg(&old).arg(bin.join("loopback")).stdin(Stdio::null()).status().unwrap();
    assert!(copied.success());
    assert_eq!(std::fs::read_to_string(bin.join("keelway-cni")).unwrap(), "new");
}
