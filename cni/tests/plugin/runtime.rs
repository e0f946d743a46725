//! The conflist and the binary as the CNI project's own `cnitool` uses them. Needs root and cnitool.

use std::path::PathBuf;
use std::process::Command;

use keelway_cni::install::{Conflist, install_binary, install_conflist};
use serde_json::Value;

use crate::Netns;
use crate::fake_agent::FakeAgent;

/// `$CNITOOL`, else where the lab builds it (`keelway-lab cluster build`), else the path; the reason when it is nowhere.
fn cnitool() -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os("CNITOOL") {
        return Ok(named.into());
    }
    let cache = std::env::var_os("KEELWAY_CACHE").map(PathBuf::from);
    let cache = cache.or(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/keelway")));
    let built = cache.map(|cache| cache.join("bin/cnitool"));
    if let Some(built) = built.iter().find(|path| path.exists()) {
        return Ok(built.clone());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join("cnitool")).find(|path| path.exists());
    found.ok_or_else(|| {
        let built = built.map_or("the cache".into(), |path| path.display().to_string());
        format!("cnitool is neither {built} (`keelway-lab cluster build` builds it) nor in $PATH nor named by $CNITOOL")
    })
}

#[test]
fn cnitool_adds_checks_and_deletes() {
    let cnitool = match cnitool() {
        Ok(cnitool) => cnitool,
        Err(reason) => {
            println!("skipped: {reason}");
            return;
        }
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
    let netns = Netns::new("tool");
    let path = netns.path();
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
