//! An API server, a real kube-proxy and an agent on one node, with the same objects.
#![allow(dead_code, reason = "each test uses its part")]

use anyhow::ensure;
use keelway_lab::Process;
use keelway_lab::cluster::programs;
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::small_api::{self, SmallApi};
use keelway_lab::{Lab, Node};

pub fn missing() -> Option<String> {
    let tools = ["openssl", "ip", "nft", "iptables", "iptables-legacy", "conntrack", "ipset", "curl"];
    let bin = programs::bin_dir().ok()?;
    let absent = (!bin.join("kube-proxy").is_file()).then(|| format!("no kube-proxy in {}", bin.display()));
    small_api::missing()
        .or(absent)
        .or_else(|| sh::missing(&tools, &["keelway-probe", "keelway-agent", "keelway-cni", "keelway"]))
}

/// The object of the node, with both families.
pub fn node(api: &SmallApi<'_>, node: &Node) {
    api.create(&format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\n\
         spec: {{podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, \"fd00:10:244:1::/64\"]}}\n",
        node.name
    ))
    .unwrap();
    let addresses = serde_json::json!({"status": {"addresses": [
        {"type": "InternalIP", "address": node.v4.to_string()},
        {"type": "InternalIP", "address": node.v6.to_string()},
    ]}});
    api.kubectl(&["patch", "node", &node.name, "--subresource=status", "-p", &addresses.to_string()], "").unwrap();
}

/// The Service `web` (node ports 30080 TCP, 30081 UDP) over two servers on `backend` itself, ports 8080 and 8081.
pub fn service(api: &SmallApi<'_>, backend: &Node) {
    let mut text = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  type: NodePort\n  \
        clusterIP: 10.96.0.50\n  clusterIPs: [10.96.0.50, \"fd00:10:96::50\"]\n  ipFamilyPolicy: RequireDualStack\n  ports:\n  \
        - {name: t, protocol: TCP, port: 80, nodePort: 30080}\n  - {name: u, protocol: UDP, port: 80, nodePort: 30081}\n"
        .to_owned();
    for (family, address) in [("IPv4", backend.v4.to_string()), ("IPv6", backend.v6.to_string())] {
        for port in [8080, 8081] {
            text += &format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n\
                 metadata: {{name: web-{}-{port}, labels: {{kubernetes.io/service-name: web}}}}\n\
                 ports: [{{name: t, protocol: TCP, port: {port}}}, {{name: u, protocol: UDP, port: {port}}}]\n\
                 endpoints: [{{addresses: [\"{address}\"], conditions: {{ready: true}}, nodeName: {}}}]\n",
                family.to_lowercase(),
                backend.name
            );
        }
    }
    api.create(&text).unwrap();
}

/// A kube-proxy on node 1; `legacy`: with iptables' old back end.
pub fn proxy(lab: &Lab, api: &SmallApi<'_>, mode: &str, legacy: bool) -> Process {
    let (node, bin) = (lab.node(1), programs::bin_dir().unwrap());
    let tools = lab.dir.join("legacy");
    let mut path = std::env::var("PATH").unwrap_or_default();
    if legacy {
        std::fs::create_dir_all(&tools).unwrap();
        for family in ["iptables", "ip6tables"] {
            for tool in ["", "-save", "-restore"] {
                let link = tools.join(format!("{family}{tool}"));
                std::os::unix::fs::symlink("/usr/sbin/xtables-legacy-multi", link).unwrap();
            }
        }
        path = format!("{}:{path}", tools.display());
    }
    let argv = [
        "env".into(),
        format!("PATH={path}"),
        bin.join("kube-proxy").display().to_string(),
        format!("--kubeconfig={}", api.kubeconfig().display()),
        format!("--proxy-mode={mode}"),
        format!("--hostname-override={}", node.name),
        "--conntrack-max-per-core=0".into(),
        "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56".into(),
    ];
    node.spawn("kube-proxy", &argv).unwrap()
}

/// An agent on node 1, in sync.
pub fn agent(lab: &Lab, api: &SmallApi<'_>, more: &[&str]) -> Process {
    let node = lab.node(1);
    let agent = sh::own("keelway-agent").unwrap().display().to_string();
    let config = api.kubeconfig().display().to_string();
    let argv = [&[agent.as_str(), "--kubeconfig", &config, "--node-name", &node.name], more].concat();
    let running = node.spawn("agent", &argv).unwrap();
    let keelway = sh::own("keelway").unwrap().display().to_string();
    wait_for("the agent to be in sync", SOON, || {
        let output = node.exec(&[&keelway, "status", "-o", "json"])?;
        ensure!(matches!(output.status.code(), Some(0 | 3)), "{}", sh::words(&output));
        let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(status["synced"] == true, "{}\n{}", status["problems"], running.output());
        Ok(())
    })
    .unwrap();
    running
}
