//! The lab starts pods through containerd's CRI. The plugins are Debian's, not Keelway's: this tries the lab alone.
use std::net::SocketAddr;

use keelway_lab::containerd::{Containerd, PROBE, basic_images};
use keelway_lab::cri::PodSpec;
use keelway_lab::probe::Asked;
use keelway_lab::{Lab, sh};

const BRIDGE: &str = r#"{"cniVersion":"1.0.0","name":"smoke","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,
"ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.1.0/24"}],[{"subnet":"fd00:10:244:1::/64"}]],
"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}]}"#;

#[test]
fn a_pod_starts_answers_dies_and_leaves_no_trace() {
    if let Some(reason) = sh::missing(&["containerd", "runc", "busybox"], &["keelway-probe"]) {
        println!("skipped: {reason}");
        return;
    }
    if !std::path::Path::new("/usr/lib/cni/bridge").exists() {
        println!("skipped: no /usr/lib/cni/bridge (Debian's containernetworking-plugins)");
        return;
    }
    let lab = Lab::new(1).unwrap();
    let node = lab.node(1);
    node.run(&["sh", "-c", "cp /usr/lib/cni/* /opt/cni/bin/"]).unwrap();
    std::fs::write(node.path("/etc/cni/net.d/10-smoke.conflist").unwrap(), BRIDGE).unwrap();
    let containerd = Containerd::start(node, None).unwrap();
    containerd.import(node, &basic_images(&lab.dir.join("images")).unwrap()).unwrap();
    let cri = containerd.cri(node).unwrap();
    let pod = |name: &str| PodSpec {
        namespace: "default".into(),
        name: name.into(),
        uid: format!("uid-of-{name}"),
        image: PROBE.into(),
        command: Vec::new(),
        mounts: Vec::new(),
    };
    let (server, client) = (cri.run(&pod("server")).unwrap(), cri.run(&pod("client")).unwrap());
    assert_eq!(server.addresses.len(), 2, "{server:?}");
    for address in &server.addresses {
        let target = SocketAddr::from((*address, 8080)).to_string();
        for udp in [&[][..], &["--udp"]] {
            let ask = [&["keelway-probe", "ask", &target, "--count", "5"], udp].concat();
            let inside = cri.exec(&client.container, &ask).unwrap();
            let report: Asked = serde_json::from_str(&inside.stdout).unwrap_or_else(|_| panic!("{inside:?}"));
            assert_eq!(report.answers.get("server"), Some(&5), "{report:?}");
            assert!(report.seen_as.keys().all(|seen| client.addresses.contains(&seen.parse().unwrap())), "{report:?}");
        }
    }
    // The pod's processes are in the node's part of the v2 tree: the node's socket hooks hold for them.
    let groups = std::process::Command::new("find").arg(node.cgroup_v2().unwrap().join("kubepods")).output().unwrap();
    assert!(String::from_utf8_lossy(&groups.stdout).contains(&server.container), "{groups:?}");
    assert!(cri.netns(&server.id).unwrap().starts_with("/"));
    for pod in [server, client] {
        cri.remove(&pod.id).unwrap();
    }
    assert_eq!(cri.list().unwrap(), Vec::<String>::new());
}
