//! The plugin's binary as a runtime runs it, against a `FakeAgent`: protocol tests. What the agent does is tested with it.

mod agent_away;
mod bad_input;
mod fake_agent;
mod loopback;
mod protocol;
mod runtime;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// What a call printed and how it ended.
#[derive(Debug)]
pub struct Answer {
    /// Exit status 0.
    pub success: bool,
    /// Without the last newline.
    pub stdout: String,
}

impl Answer {
    /// The one JSON object of stdout.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("one JSON object on stdout: {e}: {self:?}"))
    }

    /// Fails unless it succeeded without a word.
    #[track_caller]
    pub fn silent(&self) {
        assert!(self.success && self.stdout.is_empty(), "{self:?}");
    }

    /// The code and message of an error.
    #[track_caller]
    pub fn error(&self) -> (u64, String) {
        assert!(!self.success, "{self:?}");
        let object = self.json();
        let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
        assert!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"].contains(&text("cniVersion").as_str()), "{object}");
        (object["code"].as_u64().expect("a code"), format!("{}|{}", text("msg"), text("details")))
    }
}

/// Runs the plugin with exactly these variables.
pub fn run(env: &[(&str, &str)], stdin: &[u8]) -> Answer {
    run_program(env!("CARGO_BIN_EXE_keelway-cni").as_ref(), env, stdin)
}

/// The same with a copy of the plugin.
pub fn run_program(program: &Path, env: &[(&str, &str)], stdin: &[u8]) -> Answer {
    let mut child = Command::new(program)
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary");
    // It may refuse before it has read everything.
    let _ = child.stdin.take().expect("piped").write_all(stdin);
    let out = child.wait_with_output().expect("its end");
    Answer {
        success: out.status.success(),
        stdout: String::from_utf8(out.stdout).expect("UTF-8").trim_end().to_owned(),
    }
}

/// A named network namespace that goes when this does.
pub struct Netns(pub String);

impl Netns {
    /// Makes one; `purpose` tells those of one process apart.
    pub fn new(purpose: &str) -> Self {
        let name = format!("kwnc-{purpose}-{}", std::process::id());
        let made = Command::new("ip").args(["netns", "add", &name]).status().expect("iproute2");
        assert!(made.success(), "ip netns add {name} (this test needs root)");
        Self(name)
    }

    /// Its path.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// Variables of a call about container `c1`.
pub fn about<'a>(command: &'a str, netns: &'a str) -> Vec<(&'a str, &'a str)> {
    vec![
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", netns),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
        (
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u-1",
        ),
    ]
}

/// A configuration whose socket and state live in `dir`, with `more` keys.
pub fn conf(dir: &Path, version: &str, more: Value) -> Vec<u8> {
    let mut conf = json!({
        "cniVersion": version,
        "name": "keelway",
        "type": "keelway-cni",
        "socket": dir.join("agent.sock"),
        "stateDir": dir.join("cni-del"),
    });
    conf.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    conf.to_string().into_bytes()
}
