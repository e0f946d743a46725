//! `keelway-cni` called as a runtime calls it, without a runtime: for tests that want its very answer.
use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::Node;

const CONFLIST: &str = "/etc/cni/net.d/05-keelway.conflist";

/// What the plugin said.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Whether it succeeded.
    pub ok: bool,
    /// Its result or its error; null where it printed nothing.
    pub json: Value,
    /// What it wrote to its standard error.
    pub stderr: String,
}

impl Answer {
    /// The error's code, if it is one.
    pub fn code(&self) -> Option<u64> {
        (!self.ok).then(|| self.json["code"].as_u64()).flatten()
    }

    /// The error's words.
    pub fn words(&self) -> String {
        format!(
            "{} {}",
            self.json["msg"].as_str().unwrap_or_default(),
            self.json["details"].as_str().unwrap_or_default()
        )
    }

    /// The first address of a result.
    pub fn address(&self) -> Result<String> {
        let address = self.json["ips"][0]["address"].as_str().with_context(|| format!("no address: {self:?}"))?;
        Ok(address.split('/').next().unwrap_or_default().to_owned())
    }
}

/// Calls the plugin on `node` for the pod `namespace/name` with this uid, whose network namespace and container are named
/// `sandbox`; ADD makes the namespace. STATUS needs none of it.
pub fn call(node: &Node, command: &str, sandbox: &str, namespace: &str, name: &str, uid: &str) -> Result<Answer> {
    let list: Value = serde_json::from_str(&node.run(&["cat", CONFLIST])?)?;
    let mut config = list["plugins"][0].clone();
    (config["name"], config["cniVersion"]) = (list["name"].clone(), json!("1.1.0"));
    if command == "ADD" {
        node.run(&["sh", "-c", &format!("[ -e /run/netns/{sandbox} ] || ip netns add {sandbox}")])?;
    }
    let mut child = node
        .command(&["/opt/cni/bin/keelway-cni"])?
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", sandbox)
        .env("CNI_NETNS", format!("/run/netns/{sandbox}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env(
            "CNI_ARGS",
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
                 K8S_POD_INFRA_CONTAINER_ID={sandbox};K8S_POD_UID={uid}"
            ),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("its input")?.write_all(config.to_string().as_bytes())?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let json = if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text)? };
    Ok(Answer { ok: output.status.success(), json, stderr: String::from_utf8_lossy(&output.stderr).into_owned() })
}
