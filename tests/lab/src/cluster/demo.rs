//! `make demo-cluster`: the same story on a real Kubernetes, with no kube-proxy and no other plugin anywhere.
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{Cluster, install};
use crate::probe::Asked;
use crate::sh::{SOON, wait_for};
use crate::story::Story;

const WORKLOAD: &str = include_str!("../../../fixtures/demo-cluster.yaml");
const POLICY: &str = include_str!("../../../fixtures/demo-cluster-policy.yaml");

/// Runs the demo; whether every row is as it should be.
pub fn run() -> Result<bool> {
    let mut story = Story::new("demo-cluster");
    story.say("a control plane and two kubelets, without network plugin and without kube-proxy");
    let cluster = Cluster::up("demo", 2)?;
    story.step("kubectl apply of our manifests: both nodes become Ready", || {
        install::keelway(&cluster)?;
        ready(&cluster)?;
        let nodes = cluster.kubectl(&["get", "nodes", "--no-headers"])?;
        Ok((nodes.matches(" Ready ").count() == 2, squeeze(&nodes)))
    });
    story.step("CoreDNS runs as pods", || {
        install::coredns(&cluster)?;
        cluster.kubectl(&["-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=300s"])?;
        let pods = [
            "-n",
            "kube-system",
            "get",
            "pods",
            "-l",
            "k8s-app=kube-dns",
            "--no-headers",
            "-o",
            "custom-columns=A:.status.podIP,B:.spec.nodeName",
        ];
        Ok((true, squeeze(&cluster.kubectl(&pods)?)))
    });
    cluster.apply(WORKLOAD)?;
    story.step("a StatefulSet with a PersistentVolumeClaim for each pod, bound by our driver", || {
        cluster.kubectl(&["rollout", "status", "statefulset/web", "--timeout=300s"])?;
        cluster.wait(&["pod/client", "--for=condition=Ready"], 300)?;
        let claims = cluster.kubectl(&["get", "pvc", "--no-headers"])?;
        Ok((claims.matches(" Bound ").count() == 2, squeeze(&claims)))
    });
    story.step("a pod asks CoreDNS through its Service", || {
        let name = "web.default.svc.cluster.local";
        let answer = retry(|| in_pod(&cluster, "client", &["busybox", "nslookup", "-type=a", name]))?;
        let service = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
        let good = answer.lines().any(|line| line.trim() == format!("Address: {service}"));
        Ok((good, format!("{name} is {service}")))
    });
    story.step("a pod reaches the API server through kubernetes.default", || {
        // Plain HTTP to a TLS port: the server's own words of refusal come back, which nothing else here would say.
        let ask = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 3 kubernetes.default.svc.cluster.local 443";
        let answer = retry(|| in_pod(&cluster, "client", &["busybox", "sh", "-c", ask]))?;
        Ok((answer.contains("HTTP request to an HTTPS server"), squeeze(answer.lines().last().unwrap_or_default())))
    });
    let service =
        cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[0]} {.spec.clusterIPs[1]}"])?;
    let (v4, v6) = service.trim().split_once(' ').context("the Service is not dual stack")?;
    let targets = [format!("{v4}:80"), format!("[{v6}]:80")];
    story.step("the Service from a pod, IPv4 and IPv6, spread over both backends", || {
        let reports = targets
            .iter()
            .map(|target| ask(&cluster, "client", target, &["--count", "200"]))
            .collect::<Result<Vec<_>>>()?;
        let good = |report: &Asked| {
            report.failures.is_empty() && report.answers.len() == 2 && report.answers.values().all(|count| *count > 50)
        };
        Ok((
            reports.iter().all(good),
            reports.iter().map(|report| format!("{:?}", report.answers)).collect::<Vec<_>>().join("; "),
        ))
    });
    story.step("a NetworkPolicy: the client gets in, a stranger does not", || {
        cluster.apply(POLICY)?;
        let (short, target) = (["--count", "5", "--timeout", "300"], &targets[0]);
        wait_for("the policy", SOON, || {
            // Often enough to meet both backends, each of which has its own node's word for it.
            let often = ["--count", "12", "--timeout", "300"];
            ensure!(ask(&cluster, "stranger", target, &often)?.answered() == 0, "the stranger still gets in");
            Ok(())
        })?;
        let (stranger, client) =
            (ask(&cluster, "stranger", target, &short)?, ask(&cluster, "client", target, &["--count", "5"])?);
        Ok((
            stranger.answered() == 0 && client.answered() == 5,
            format!("stranger {}/5, client {}/5", stranger.answered(), client.answered()),
        ))
    });
    story.step("a pod's data outlives the pod", || {
        in_pod(&cluster, "web-0", &["busybox", "sh", "-c", "echo kept >/data/file && sync"])?;
        cluster.kubectl(&["delete", "pod", "web-0"])?;
        cluster.wait(&["pod/web-0", "--for=condition=Ready"], 300)?;
        let read = in_pod(&cluster, "web-0", &["busybox", "cat", "/data/file"])?;
        Ok((read.trim() == "kept", format!("the new web-0 read \"{}\"", read.trim())))
    });
    story.step("the agents killed under load: no connection fails", || {
        let asked = std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask(&cluster, "client", &targets[0], &["--count", "1000", "--rate", "100"]));
            std::thread::sleep(Duration::from_secs(1));
            for node in cluster.lab.nodes() {
                let pid = node.run(&["pgrep", "-o", "keelway-agent"])?;
                node.run(&["kill", &format!("-{}", Signal::SIGKILL as i32), pid.trim()])?;
            }
            asked.join().expect("a probe does not panic")
        })?;
        let path = "jsonpath={.items[*].status.containerStatuses[0].restartCount}";
        let agents = ["-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=keelway-agent", "-o", path];
        let restarts = wait_for("the agents' restarts", SOON, || {
            let restarts = cluster.kubectl(&agents)?;
            ensure!(restarts.split_whitespace().filter(|count| *count != "0").count() == 2, "restarts: {restarts}");
            Ok(restarts)
        })?;
        ready(&cluster)?;
        let failed = asked.tried - asked.answered();
        let seen = format!(
            "{failed} of {} connections failed, {} SYNs were sent again; restarts of the agents: {restarts}",
            asked.tried, asked.resent
        );
        Ok((asked.answered() == 1000 && asked.resent == 0, seen))
    });
    story.step("no kube-proxy and no other plugin", || {
        let mut seen = Vec::new();
        for node in cluster.lab.nodes() {
            ensure!(node.run(&["pgrep", "-x", "kube-proxy"]).is_err(), "kube-proxy runs on {}", node.name);
            seen.push(squeeze(&node.run(&["ls", "/etc/cni/net.d"])?));
        }
        Ok((seen.iter().all(|files| files == "05-keelway.conflist"), seen.join("; ")))
    });
    story.say("removing the cluster");
    drop(cluster);
    story.end()
}

/// Waits until the agents and the drivers are ready, and the nodes with them.
pub fn ready(cluster: &Cluster) -> Result<()> {
    for name in ["keelway-agent", "keelway-csi"] {
        let set = format!("daemonset/{name}");
        cluster.kubectl(&["-n", "kube-system", "rollout", "status", &set, "--timeout=300s"])?;
    }
    cluster.wait(&["node", "--all", "--for=condition=Ready"], 300)
}

fn ask(cluster: &Cluster, pod: &str, target: &str, options: &[&str]) -> Result<Asked> {
    let text = in_pod(cluster, pod, &[&["keelway-probe", "ask", target], options].concat())?;
    serde_json::from_str(&text).with_context(|| format!("asking {target} from {pod}: {text}"))
}

fn in_pod(cluster: &Cluster, pod: &str, argv: &[&str]) -> Result<String> {
    cluster.kubectl(&[&["exec", pod, "--"], argv].concat())
}

fn retry(attempt: impl FnMut() -> Result<String>) -> Result<String> {
    wait_for("an answer", SOON, attempt)
}

/// Runs of blanks as one; lines joined.
fn squeeze(text: &str) -> String {
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join("\n")
}
