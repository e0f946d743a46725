//! Throw-away network namespaces, and `ip -j` as the second opinion on what the verbs did.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use keelway_netlink::{Handle, Netns};
use serde_json::Value;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A network namespace `kwnc-<pid>-<n>` that is removed on drop, also when the test fails.
pub struct Ns {
    pub name: String,
}

impl Ns {
    pub fn new() -> Self {
        let name = format!("kwnc-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        sh(&format!("ip netns add {name}"));
        Self { name }
    }

    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    pub fn open(&self) -> Netns {
        Netns::open(self.path()).expect("a namespace that was just made")
    }

    pub async fn handle(&self) -> Handle {
        Handle::open_in(&self.open()).await.expect("a handle in a namespace that was just made")
    }

    /// Runs `ip -n <this> <args>`.
    pub fn ip(&self, args: &str) {
        sh(&format!("ip -n {} {args}", self.name));
    }

    /// What `ip -j -d <args>` says in this namespace.
    pub fn json(&self, args: &str) -> Value {
        let text = sh(&format!("ip -n {} -j -d {args}", self.name));
        if text.trim().is_empty() { Value::Array(vec![]) } else { serde_json::from_str(&text).expect("JSON of ip") }
    }

    /// Runs a command inside.
    pub fn exec(&self, command: &str) -> String {
        sh(&format!("ip netns exec {} {command}", self.name))
    }
}

impl Drop for Ns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Runs a command and gives its output; fails with what it said.
pub fn sh(command: &str) -> String {
    let mut words = command.split_whitespace();
    let out = Command::new(words.next().expect("a command")).args(words).output();
    let out = out.unwrap_or_else(|e| panic!("`{command}`: {e} (these tests need iproute2)"));
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "`{command}`: {err}(these tests need root: CAP_NET_ADMIN and CAP_SYS_ADMIN)");
    String::from_utf8(out.stdout).expect("UTF-8")
}
