//! What STATUS and ADD of the plugin answer while the node cannot take pods: before the agent knows what there is, when its
//! addresses are used up, and when no agent runs. The kubelet makes a node Ready by what STATUS says.
use std::time::Duration;

use keelway_lab::plugin::{self, Answer};
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::small_api::{self, SmallApi};
use keelway_lab::{Lab, Node, Process};
use nix::sys::signal::Signal;

/// Before the agent counts by itself, which it does once a minute.
const AT_ONCE: Duration = Duration::from_secs(30);
const NOT_AVAILABLE: Option<u64> = Some(50);
const TRY_AGAIN: Option<u64> = Some(11);

fn missing() -> Option<String> {
    sh::missing(&["ip", "busybox", "openssl", "curl"], &["keelway-agent", "keelway-cni", "keelway"])
}

macro_rules! lab_or_skip {
    () => {{
        if let Some(reason) = missing() {
            println!("skipped: {reason}");
            return;
        }
        Lab::new(1).unwrap()
    }};
}

fn own(name: &str) -> String {
    sh::own(name).unwrap().display().to_string()
}

fn install(node: &Node, extra: &[&str]) {
    let argv = [own("keelway-agent"), "install-cni".into(), "--from".into(), own("keelway-cni")];
    let argv: Vec<&str> = argv.iter().map(String::as_str).chain(extra.iter().copied()).collect();
    node.run(&argv).unwrap();
}

fn agent(node: &Node, source: &[&str], extra: &[&str]) -> Process {
    let program = own("keelway-agent");
    let argv = [&[program.as_str(), "--node-name", &node.name], source, extra].concat();
    // That of an earlier agent.
    node.run(&["rm", "-f", "/run/keelway/agent.sock"]).unwrap();
    let agent = node.spawn("agent", &argv).unwrap();
    wait_for("the agent's socket", SOON, || node.run(&["ls", "/run/keelway/agent.sock"])).unwrap();
    agent
}

fn status(node: &Node) -> Answer {
    plugin::call(node, "STATUS", "none", "default", "none", "").unwrap()
}

fn add(node: &Node, name: &str) -> Answer {
    plugin::call(node, "ADD", name, "default", name, &format!("uid-{name}")).unwrap()
}

#[track_caller]
fn becomes_available(node: &Node) {
    wait_for("STATUS to be well", SOON, || {
        let answer = status(node);
        anyhow::ensure!(answer.ok, "{answer:?}");
        Ok(())
    })
    .unwrap();
}

fn node_yaml(node: &Node, cidr: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\nspec: {{podCIDRs: [{cidr}]}}\n\
         status: {{addresses: [{{type: InternalIP, address: {}}}]}}\n",
        node.name, node.v4
    )
}

fn pods_yaml(node: &Node, names: &[String]) -> String {
    let one = |name: &String| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, uid: uid-{name}}}\nspec: {{nodeName: {}}}\n",
            node.name
        )
    };
    names.iter().map(one).collect::<Vec<_>>().join("---\n")
}

#[test]
fn a_node_takes_no_pods_before_the_first_sync_and_does_afterwards() {
    let lab = lab_or_skip!();
    if let Some(reason) = small_api::missing() {
        println!("skipped: {reason}");
        return;
    }
    let node = lab.node(1);
    install(node, &[]);
    let kubeconfig = SmallApi::write_kubeconfig(&lab).unwrap().display().to_string();
    // Nobody is there yet.
    let mut running = agent(node, &["--kubeconfig", &kubeconfig], &[]);
    for _ in 0..3 {
        let answer = status(node);
        assert_eq!(answer.code(), NOT_AVAILABLE, "{answer:?}");
        assert!(answer.words().contains("not yet read all objects"), "{answer:?}");
        let answer = add(node, "early");
        assert_eq!(answer.code(), TRY_AGAIN, "{answer:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
    // Its socket answers all the while: the agent lives, and is not ready.
    let health = ["busybox", "wget", "-qO-", "http://127.0.0.1:10256/livez"];
    assert!(node.run(&health).unwrap().contains("\"synced\":false"));

    let mut api = SmallApi::start(&lab, "networkpolicies").unwrap();
    api.node("10.244.1.0/24").unwrap();
    becomes_available(node);
    let uid = api.pod("first").unwrap();
    let answer = plugin::call(node, "ADD", "first", "default", "first", &uid).unwrap();
    assert!(answer.ok, "{answer:?}");

    // A restart while the API server is away is not an event, for as long as the grace lasts.
    api.stop().unwrap();
    running.stop(Signal::SIGKILL).unwrap();
    let _running = agent(node, &["--kubeconfig", &kubeconfig], &["--status-grace", "6s"]);
    let answer = status(node);
    assert!(answer.ok, "{answer:?}");
    let answer = add(node, "early");
    assert!(answer.words().contains("not yet read all objects"), "{answer:?}");
    std::thread::sleep(Duration::from_secs(7));
    let answer = status(node);
    assert_eq!(answer.code(), NOT_AVAILABLE, "{answer:?}");
}

#[test]
fn a_directory_without_this_node_is_no_sync() {
    let lab = lab_or_skip!();
    let node = lab.node(1);
    install(node, &[]);
    let manifests = lab.dir.join("manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    let _agent = agent(node, &["--manifests", &manifests.display().to_string()], &[]);
    assert_eq!(status(node).code(), NOT_AVAILABLE);
    assert_eq!(add(node, "early").code(), TRY_AGAIN);
    std::fs::write(manifests.join("node.yaml"), node_yaml(node, "10.244.1.0/24")).unwrap();
    becomes_available(node);
    assert_eq!(add(node, "unknown").code(), TRY_AGAIN, "a pod that nobody wrote down");
}

#[test]
fn a_node_without_addresses_takes_no_pods_until_one_is_free() {
    let lab = lab_or_skip!();
    let node = lab.node(1);
    install(node, &[]);
    let manifests = lab.dir.join("manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    std::fs::write(manifests.join("node.yaml"), node_yaml(node, "10.244.1.0/29")).unwrap();
    let names: Vec<String> = (0..8).map(|number| format!("p{number}")).collect();
    std::fs::write(manifests.join("pods.yaml"), pods_yaml(node, &names)).unwrap();
    let _agent = agent(node, &["--manifests", &manifests.display().to_string()], &[]);
    becomes_available(node);
    let mut added = Vec::new();
    let refused = loop {
        let name = &names[added.len()];
        let answer = add(node, name);
        if !answer.ok {
            break answer;
        }
        added.push(name.clone());
    };
    // Of eight, the network's own, the broadcast and the host's are not for pods.
    assert_eq!(added.len(), 5, "{refused:?}");
    assert!(refused.words().contains("10.244.1.0/29"), "{refused:?}");
    let answer = status(node);
    assert_eq!(answer.code(), NOT_AVAILABLE, "{answer:?}");
    assert!(answer.words().contains("10.244.1.0/29"), "{answer:?}");
    let gone = plugin::call(node, "DEL", &added[0], "default", &added[0], "").unwrap();
    assert!(gone.ok, "{gone:?}");
    assert!(status(node).ok);
    let answer = add(node, &names[5]);
    assert!(answer.ok, "{answer:?}");
}

#[test]
fn without_an_agent_status_is_well_for_the_grace_time() {
    let lab = lab_or_skip!();
    let node = lab.node(1);
    install(node, &["--status-grace", "5s"]);
    assert_eq!(status(node).code(), NOT_AVAILABLE, "no agent was ever seen");
    let manifests = lab.dir.join("manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    std::fs::write(manifests.join("node.yaml"), node_yaml(node, "10.244.1.0/24")).unwrap();
    let source = ["--manifests", &manifests.display().to_string()];
    let mut running = agent(node, &source, &[]);
    becomes_available(node);
    running.stop(Signal::SIGKILL).unwrap();
    let answer = status(node);
    assert!(answer.ok, "a restart would be an event: {answer:?}");
    assert_eq!(add(node, "p").code(), TRY_AGAIN);
    std::thread::sleep(Duration::from_secs(6));
    let answer = status(node);
    assert_eq!(answer.code(), NOT_AVAILABLE, "{answer:?}");
    assert!(answer.words().contains("last seen"), "{answer:?}");
    let _running = agent(node, &source, &[]);
    becomes_available(node);
}

#[test]
fn the_fill_of_tables_that_is_shown_is_the_kernels() {
    let lab = lab_or_skip!();
    let Ok(bpftool) = sh::system("bpftool") else {
        println!("skipped: no bpftool");
        return;
    };
    let node = lab.node(1);
    install(node, &[]);
    let manifests = lab.dir.join("manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    let write = |name: &str, text: &str| {
        let fresh = manifests.join(format!(".{name}"));
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(fresh, manifests.join(name)).unwrap();
    };
    let second =
        node_yaml(node, "10.244.2.0/24").replace(&node.name, "other").replace(&node.v4.to_string(), "192.0.2.7");
    write("nodes.yaml", &format!("{}---\n{second}", node_yaml(node, "10.244.1.0/24")));
    let names: Vec<String> = (0..3).map(|number| format!("p{number}")).collect();
    write("pods.yaml", &pods_yaml(node, &names));
    let service = |number: usize, backends: usize| {
        let endpoints: Vec<String> = (0..backends).map(|b| format!("{{addresses: [10.244.2.{}]}}", b + 2)).collect();
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{number}}}\n\
             spec: {{clusterIPs: [10.96.0.{number}], ports: [{{port: 80}}]}}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {{name: s{number}, labels: {{kubernetes.io/service-name: s{number}}}}}\n\
             ports: [{{port: 8080}}]\nendpoints: [{}]\n",
            endpoints.join(", ")
        )
    };
    write("services.yaml", &[service(1, 3), service(2, 2)].join("---\n"));
    write(
        "policy.yaml",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: {podSelector: {}, \
         ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}, {podSelector: {}}], ports: [{port: 80, endPort: 90}]}]}\n",
    );
    let _agent = agent(node, &["--manifests", &manifests.display().to_string()], &[]);
    becomes_available(node);
    for name in &names {
        assert!(add(node, name).ok);
    }
    let compare = || {
        let shown: serde_json::Value =
            serde_json::from_str(&node.run(&[own("keelway").as_str(), "status", "-o", "json"])?)?;
        for map in shown["maps"].as_array().unwrap() {
            let name = map["name"].as_str().unwrap();
            let written = ["front", "slots", "back", "endp", "ident", "rules", "cidrs", "tunn"];
            if !written.iter().any(|part| name.contains(part)) {
                continue;
            }
            let pin = format!("/sys/fs/bpf/keelway/v1/{name}");
            let dump = node.run(&[&bpftool.display().to_string(), "-j", "map", "dump", "pinned", &pin])?;
            let held = serde_json::from_str::<serde_json::Value>(&dump)?.as_array().map_or(0, Vec::len);
            anyhow::ensure!(map["entries"] == held, "{name}: {} is shown, {held} are there", map["entries"]);
            anyhow::ensure!(held > 0, "{name} is empty: it proves nothing");
        }
        anyhow::ensure!(shown["counts"]["servicesLeftOut"] == 0, "{shown}");
        Ok(())
    };
    compare().unwrap();
    // After changes in both directions, at once.
    let gone = plugin::call(node, "DEL", "p0", "default", "p0", "").unwrap();
    assert!(gone.ok, "{gone:?}");
    write("services.yaml", &service(2, 4));
    wait_for("the same counts", AT_ONCE, compare).unwrap();
}

/// A Node that nobody gives pod CIDRs keeps the agent waiting for good: that is no reason to start it again and again.
#[test]
fn an_agent_that_waits_for_pod_cidrs_lives() {
    let lab = lab_or_skip!();
    let node = lab.node(1);
    let manifests = lab.dir.join("manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    let write = |name: &str, text: &str| std::fs::write(manifests.join(name), text).unwrap();
    write("node.yaml", &node_yaml(node, "").replace("podCIDRs: []", "unschedulable: false"));
    let service = |port: u16| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}\n"
        )
    };
    write("service.yaml", &service(80));
    let _running = agent(node, &["--manifests", &manifests.display().to_string()], &[]);
    let get = |path: &str| -> (u16, serde_json::Value) {
        let url = format!("http://127.0.0.1:10256/{path}");
        let text = node.run(&["curl", "-sw", "\n%{http_code}", &url]).unwrap();
        let (body, code) = text.trim_end().rsplit_once('\n').unwrap();
        (code.parse().unwrap(), serde_json::from_str(body).unwrap())
    };
    wait_for("the reason to be said", SOON, || {
        let output = node.exec(&[&own("keelway"), "status", "-o", "json"])?;
        let said = String::from_utf8(output.stdout)?;
        anyhow::ensure!(said.contains("spec.podCIDRs is empty"), "{said}");
        Ok(())
    })
    .unwrap();
    for port in 81..84 {
        write("service.yaml", &service(port));
        std::thread::sleep(Duration::from_millis(700));
        let (code, body) = get("livez");
        // No change waits: the two minutes after which the agent would be taken for hung do not begin.
        assert_eq!((code, &body["pendingSeconds"]), (200, &serde_json::Value::Null), "{body}");
        assert_eq!(get("healthz").0, 503, "it has nothing to serve with yet");
    }
    write("node.yaml", &node_yaml(node, "10.244.1.0/24"));
    wait_for("the first sync", SOON, || {
        let (code, body) = get("healthz");
        anyhow::ensure!(code == 200, "{body}");
        Ok(())
    })
    .unwrap();
}
