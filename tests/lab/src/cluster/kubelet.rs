//! containerd and the kubelet on a node. No network plugin and no service proxy: bringing those is the point.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use super::control_plane::{Arguments, DNS};
use super::pki::Pki;
use crate::containerd::Containerd;
use crate::node::Node;

/// Where the kubelet reads static pods.
pub const STATIC_PODS: &str = "/etc/kubernetes/manifests";

/// The kubelet's configuration, in the node's directory.
const CONFIG: &str = "kubelet.json";

/// Starts containerd, imports the images if they are not on the node's disk yet, and starts the kubelet.
pub fn start(node: &Node, bin: &Path, pki: &Pki, server: &str, images: &[PathBuf]) -> Result<()> {
    let name = &node.name;
    let containerd = Containerd::start(node, Some(bin))?;
    let imported = node.dir.join("imported");
    if !imported.exists() {
        containerd.import(node, images)?;
        fs::write(imported, "")?;
    }
    containerd.keep();

    pki.sign(
        name,
        &format!("/O=system:nodes/CN=system:node:{name}"),
        &format!("DNS:{name},IP:{},IP:{}", node.v4, node.v6),
    )?;
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki.certificate("ca")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki.certificate(name),
        "tlsPrivateKeyFile": pki.key(name),
        // The machine below may have v1 controllers beside its v2 tree, and swap.
        "failCgroupV1": false,
        "failSwapOn": false,
        "cgroupDriver": "cgroupfs",
        "enforceNodeAllocatable": [],
        "clusterDomain": "cluster.local",
        "clusterDNS": [DNS],
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        // All nodes share one disk, whose fill is not theirs to act on.
        "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "serializeImagePulls": false,
        "maxPods": 250,
        "staticPodPath": STATIC_PODS,
    });
    node.run(&["mkdir", "-p", STATIC_PODS])?;
    fs::write(node.dir.join(CONFIG), serde_json::to_vec_pretty(&config)?)?;
    spawn(node, bin, pki, server)
}

/// Starts the kubelet alone, on a node that was started before.
pub fn spawn(node: &Node, bin: &Path, pki: &Pki, server: &str) -> Result<()> {
    let (name, file) = (&node.name, node.dir.join(CONFIG));
    let kubeconfig = pki.kubeconfig(name, server)?;
    let mut kubelet = Arguments::new(bin.join("kubelet").to_string_lossy().into_owned());
    kubelet.add("config", &file.to_string_lossy()).add("kubeconfig", &kubeconfig.to_string_lossy());
    kubelet.add("hostname-override", name).add("node-ip", &format!("{},{}", node.v4, node.v6));
    // Three zones, in turns.
    kubelet.add("node-labels", &format!("topology.kubernetes.io/zone=zone{}", (node.number - 1) % 3 + 1));
    node.spawn("kubelet", &kubelet.0)?.keep();
    Ok(())
}
