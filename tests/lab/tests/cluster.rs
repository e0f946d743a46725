//! The lab's Kubernetes comes up dual stack and without a network: bringing one is what the cluster demo does.
use keelway_lab::cluster::{Cluster, programs};
use keelway_lab::sh;

#[test]
fn a_cluster_comes_up_bare_and_dual_stack() {
    let reason = programs::missing(programs::CLUSTER).or_else(|| sh::missing(&["openssl", "runc"], &["keelway-probe"]));
    if let Some(reason) = reason {
        println!("skipped: {reason}");
        return;
    }
    let cluster = Cluster::up("uptest", 1).unwrap();
    let get = |path: &str| cluster.kubectl(&["get", "node", "node1", "-o", &format!("jsonpath={path}")]).unwrap();
    assert_eq!(get("{.spec.podCIDRs}"), r#"["10.244.0.0/24","fd00:10:244::/64"]"#);
    assert_eq!(get("{.status.addresses[?(@.type=='InternalIP')].address}"), "192.168.77.11 fd00:77::b");
    assert_eq!(get("{.status.conditions[?(@.type=='Ready')].status}"), "False", "ready without a network plugin");
    assert!(cluster.lab.node(1).run(&["pgrep", "-x", "kube-proxy"]).is_err());
    // What a pod's image needs is on the node.
    let ctr = cluster.bin.join("ctr").display().to_string();
    let images = cluster.lab.node(1).run(&[&ctr, "-n", "k8s.io", "images", "list", "-q"]).unwrap();
    assert!(images.contains("keelway.local/probe:lab") && images.contains("registry.k8s.io/pause"), "{images}");
}
