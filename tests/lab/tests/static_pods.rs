//! A pod that the kubelet reads from a file, under a real kubelet and API server: the runtime names the file's uid, the API has a
//! mirror with another one. The agent runs from our manifests, which do not say where the node's cgroups are.
use keelway_lab::cluster::kubelet::STATIC_PODS;
use keelway_lab::cluster::{Cluster, install, programs};
use keelway_lab::sh::{self, SOON, wait_for};

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: fixed, labels: {app: fixed}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: 'keelway.local/probe:lab', imagePullPolicy: Never}]
";

#[test]
fn a_static_pod_gets_its_network_and_keeps_it_without_its_mirror() {
    let ours = ["keelway-agent", "keelway-cni", "keelway-csi", "keelway", "keelway-probe"];
    if let Some(reason) = programs::missing(programs::CLUSTER).or_else(|| sh::missing(&["openssl", "runc"], &ours)) {
        println!("skipped: {reason}");
        return;
    }
    let cluster = Cluster::up("static", 1).unwrap();
    let node = cluster.lab.node(1);
    install::keelway(&cluster).unwrap();
    cluster.wait(&["node", "--all", "--for=condition=Ready"], 300).unwrap();
    node.run(&["sh", "-c", &format!("cat > {STATIC_PODS}/fixed.yaml <<'END'\n{POD}END\n")]).unwrap();
    let get = |path: &str| cluster.kubectl(&["get", "pod", "fixed-node1", "-o", &format!("jsonpath={path}")]);
    let running = || {
        wait_for("the static pod", 3 * SOON, || {
            let address = get("{.status.podIP}")?;
            anyhow::ensure!(!address.is_empty(), "{}", cluster.kubectl(&["get", "events"])?);
            Ok(address)
        })
        .unwrap()
    };
    let address = running();
    let client = POD.replace("name: fixed, labels: {app: fixed}", "name: client");
    wait_for("the default service account", SOON, || cluster.apply(&client)).unwrap();
    cluster.wait(&["pod/client", "--for=condition=Ready"], 300).unwrap();
    let target = format!("{address}:8080");
    let reaches = || {
        let ask = ["exec", "client", "--", "keelway-probe", "ask", &target, "--count", "1", "--timeout", "500"];
        cluster.kubectl(&ask).is_ok_and(|text| text.contains("fixed"))
    };
    let reached = || -> anyhow::Result<()> {
        anyhow::ensure!(reaches(), "no answer");
        Ok(())
    };
    wait_for("the pod's answer", SOON, reached).unwrap();
    let uid = get("{.metadata.uid}").unwrap();

    // Somebody deletes the mirror; the pod runs on, and a policy still finds it.
    cluster.kubectl(&["delete", "pod", "fixed-node1", "--force", "--grace-period=0"]).unwrap();
    // The kubelet looks at its pods once in a minute or two.
    wait_for("another mirror", 5 * SOON, || {
        let now = get("{.metadata.uid}")?;
        anyhow::ensure!(!now.is_empty() && now != uid, "the old one is there");
        Ok(())
    })
    .unwrap();
    assert_eq!(running(), address);
    wait_for("the pod's answer", SOON, reached).unwrap();
    cluster
        .apply(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: fixed}\n\
             spec: {podSelector: {matchLabels: {app: fixed}}, policyTypes: [Ingress]}\n",
        )
        .unwrap();
    wait_for("the policy", SOON, || {
        anyhow::ensure!(!reaches(), "the client still reaches the pod");
        Ok(())
    })
    .unwrap();
    // The agent found the hierarchy by itself.
    let agent = ["-n", "kube-system", "get", "configmap", "keelway-agent", "-o", "jsonpath={.data}"];
    assert!(!cluster.kubectl(&agent).unwrap().contains("cgroup-root"));
    let status = node.run(&[&sh::own("keelway").unwrap().display().to_string(), "status", "-o", "json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let hooked = status["hooks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|hook| hook["hook"].as_str().unwrap().contains("connect4"))
        .unwrap();
    assert!(hooked["device"].as_str().unwrap().starts_with("/host/cgroup"), "{hooked}");
    let pods: serde_json::Value =
        serde_json::from_str(&cluster.kubectl(&["get", "pods", "-A", "-o", "json"]).unwrap()).unwrap();
    let pods = pods["items"].as_array().unwrap();
    let networked = pods.iter().filter(|pod| pod["spec"]["hostNetwork"] != true).count();
    assert!(networked >= 2, "fixed and client");
    assert_eq!(status["counts"]["endpoints"], networked, "{status}");
}
