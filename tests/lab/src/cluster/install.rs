//! Keelway and CoreDNS into a cluster: the image from this workspace's programs, the manifests from `deploy/`.
use anyhow::{Context, Result};

use super::Cluster;
use super::programs::{self, root};
use crate::image::Image;
use crate::sh;

/// The image that the manifests name.
pub const IMAGE: &str = "keelway/keelway:dev";

/// What the CSI driver runs; and `tc`, by which the agent looks after its filters on kernels before 6.6.
const TOOLS: [&str; 8] = ["tc", "mkfs.ext4", "mkfs.xfs", "blkid", "e2fsck", "resize2fs", "xfs_growfs", "xfs_repair"];

/// Builds the image, imports it on every node and applies the manifests.
pub fn keelway(cluster: &Cluster) -> Result<()> {
    let archive = cluster.lab.dir.join("keelway.tar");
    let mut image = Image::new(IMAGE, &["keelway-agent"]);
    for name in ["keelway-agent", "keelway-cni", "keelway-csi", "keelway"] {
        image = image.file(&sh::own(name)?, &format!("/usr/local/bin/{name}"))?;
    }
    for name in TOOLS {
        image = image.file(&sh::system(name)?, &format!("/usr/sbin/{name}"))?;
    }
    image.text("/etc/mke2fs.conf", &std::fs::read_to_string("/etc/mke2fs.conf").unwrap_or_default()).write(&archive)?;
    cluster.import(&archive)?;
    let rendered = cluster.kubectl(&["kustomize", &root().join("deploy").to_string_lossy()])?;
    cluster.apply(&fit(&rendered, &cluster.server())?)
}

/// Gives each node a pool on an XFS of its own, which takes of the machine's disk only what is written to it. Files there share
/// blocks, so that snapshots and clones take a moment. Before [`keelway`].
pub fn pools(cluster: &Cluster) -> Result<()> {
    let make =
        "set -e; cd /var/lib/keelway; mkdir pool; truncate -s 24G disk; mkfs.xfs -q disk; mount -o loop disk pool";
    cluster.lab.nodes().iter().try_for_each(|node| {
        node.run(&["mkdir", "-p", "/var/lib/keelway"])?;
        node.run(&["sh", "-c", make]).map(drop)
    })
}

/// Has each node's driver say that its pods may use this many volumes. After [`keelway`].
pub fn limit_volumes(cluster: &Cluster, volumes: u32) -> Result<()> {
    let path = "/spec/template/spec/containers/0/args/-";
    let patch = format!(r#"[{{"op": "add", "path": "{path}", "value": "--max-volumes={volumes}"}}]"#);
    cluster.kubectl(&["-n", "kube-system", "patch", "daemonset/keelway-csi", "--type=json", "-p", &patch])?;
    cluster.kubectl(&["-n", "kube-system", "rollout", "status", "daemonset/keelway-csi", "--timeout=300s"]).map(drop)
}

/// Applies upstream's snapshot definitions, its snapshot-controller and our csi-snapshotter, and waits for both.
pub fn snapshots(cluster: &Cluster) -> Result<()> {
    cluster.apply_kustomization(&programs::snapshot_definitions()?)?;
    cluster.apply_kustomization(&root().join("deploy/snapshots"))?;
    for name in ["deployment/snapshot-controller", "daemonset/keelway-csi-snapshotter"] {
        cluster.kubectl(&["-n", "kube-system", "rollout", "status", name, "--timeout=300s"])?;
    }
    Ok(())
}

/// The manifests with this lab's one fact filled in, as the ConfigMap's comments ask: the API server's real address.
fn fit(rendered: &str, server: &str) -> Result<String> {
    let next = "routing: vxlan\n";
    let (before, _) = rendered.split_once(next).context("deploy/agent/configmap.yaml has no `routing: vxlan`")?;
    let indent: String = before.chars().rev().take_while(|c| *c == ' ').collect();
    Ok(rendered.replacen(next, &format!("api-servers: {server}\n{indent}{next}"), 1))
}

/// What the name server outside knows. The Internet is not reached from a lab: the names are the few that upstream's specs ask
/// it for.
const OUTSIDE_NAMES: &str = r#"
. {
    template IN PTR in-addr.arpa ip6.arpa {
        match ^8[.]8[.]8[.]8[.]in-addr[.]arpa[.]$
        match ^8[.]8[.]8[.]8[.](0[.]){16}0[.]6[.]8[.]4[.]0[.]6[.]8[.]4[.]1[.]0[.]0[.]2[.]ip6[.]arpa[.]$
        answer "{{ .Name }} 60 IN PTR dns.google."
        fallthrough
    }
    template ANY ANY {
        rcode NXDOMAIN
    }
}
"#;

/// Applies CoreDNS: two pods behind the Service that kubelets tell pods of. What is not of the cluster they ask a name server
/// outside, as on every site.
pub fn coredns(cluster: &Cluster) -> Result<()> {
    let outside = &cluster.lab.outside;
    let config = outside.dir.join("names");
    std::fs::write(&config, OUTSIDE_NAMES)?;
    let program = cluster.bin.join("coredns");
    outside.spawn("names", &[&program.to_string_lossy(), "-conf", &config.to_string_lossy()])?.keep();
    let path = root().join("tests/cluster/coredns.yaml");
    cluster.apply(&std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?)
}

#[cfg(test)]
mod tests {
    use super::fit;

    #[test]
    fn fills_in_the_server() {
        let fitted = fit("data:\n  agent.yaml: |\n    routing: vxlan\n", "https://h:1").unwrap();
        assert!(fitted.contains("\n    api-servers: https://h:1\n    routing: vxlan\n"), "{fitted}");
    }
}
