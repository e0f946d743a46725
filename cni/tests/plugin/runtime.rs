//! The conflist and the binary as the CNI project's own `cnitool` uses them. Needs root and cnitool.

use std::path::PathBuf;
use std::process::Command;

use keelway_cni::install::{Conflist, install_binary, install_conflist};
use serde_json::Value;

use crate::fake_agent::FakeAgent;

/// `$CNITOOL`, the cluster's cache, or the path.
fn cnitool() -> Option<PathBuf> {
    let named = std::env::var_os("CNITOOL").map(PathBuf::from);
    let cached = std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache/kubernetes-cluster/bin/cnitool"));
    let found = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&found).map(|dir| dir.join("cnitool")).find(|p| p.exists());
    named.or(cached.filter(|p| p.exists())).or(found)
}

struct Netns(String);

impl Netns {
    fn new() -> Self {
        let name = format!("kwnc-tool-{}", std::process::id());
        let made = Command::new("ip").args(["netns", "add", &name]).status().expect("iproute2");
        assert!(made.success(), "ip netns add {name} (this test needs root)");
        Self(name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

#[test]
fn cnitool_adds_checks_and_deletes() {
    let Some(cnitool) = cnitool() else {
        println!("skipped: cnitool is neither in $CNITOOL, the cluster's cache nor $PATH");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (bin, etc) = (dir.path().join("bin"), dir.path().join("etc"));
    install_binary(env!("CARGO_BIN_EXE_keelway-cni").as_ref(), &bin).unwrap();
    let conflist = Conflist {
        socket: Some(dir.path().join("agent.sock")),
        state_dir: Some(dir.path().join("cni-del")),
        ..Conflist::default()
    };
    install_conflist(&etc, &conflist).unwrap();
    let netns = Netns::new();
    let path = format!("/run/netns/{}", netns.0);
    let tool = |command: &str| {
        let mut call = Command::new(&cnitool);
        call.args([command, "keelway", &path]);
        let out =
            call.env("CNI_PATH", &bin).env("NETCONFPATH", &etc).env("HOME", dir.path()).output().expect("cnitool");
        (
            out.status.success(),
            String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr),
        )
    };

    let agent = FakeAgent::default().serve(dir.path());
    let (ok, said) = tool("add");
    assert!(ok, "{said}");
    let result: Value = serde_json::from_str(&said).expect("a result");
    assert_eq!(result["cniVersion"], "1.1.0", "the newest that both speak");
    assert_eq!(result["ips"][1]["address"], "fd00:244:1::7/128");
    assert_eq!(result["interfaces"][1]["sandbox"], path.as_str());
    for command in ["check", "status", "del"] {
        let (ok, said) = tool(command);
        assert!(ok, "{command}: {said}");
    }
    // It gives GC no list of what to keep: that must not mean everything.
    let (ok, said) = tool("gc");
    assert!(!ok && said.contains("valid-attachments is missing"), "{said}");
    let asked: Vec<_> = agent.asked().iter().map(|a| a.split(' ').next().unwrap().to_owned()).collect();
    assert_eq!(asked, ["ADD", "CHECK", "STATUS", "DEL"]);

    drop(agent);
    let (ok, said) = tool("add");
    assert!(!ok && said.contains("the agent does not answer"), "{said}");
    let (ok, said) = tool("del");
    assert!(ok, "a DEL without an agent succeeds: {said}");
}
