//! A pod that starts is under every policy that is older than it, however late the watch of policies is. With a real API
//! server, whose watch of policies is held back on its way.
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keelway_lab::plugin::{self, Answer};

use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::small_api::{self, SmallApi};
use keelway_lab::{Lab, Node, Process};

const DENY_B: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny-b}\n\
                      spec: {podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress]}\n";

fn missing() -> Option<String> {
    small_api::missing()
        .or_else(|| sh::missing(&["ip", "busybox", "openssl"], &["keelway-agent", "keelway-cni", "keelway"]))
}

/// An agent on node 1 that reads from the API server there, in sync.
fn start_agent(lab: &Lab, api: &SmallApi) -> Process {
    let node = lab.node(1);
    let own = |name: &str| sh::own(name).unwrap().display().to_string();
    api.node("10.244.1.0/24").unwrap();
    node.run(&[own("keelway-agent"), "install-cni".into(), "--from".into(), own("keelway-cni")]).unwrap();
    let kubeconfig = api.kubeconfig().display().to_string();
    let agent = node
        .spawn("agent", &[own("keelway-agent").as_str(), "--kubeconfig", &kubeconfig, "--node-name", &node.name])
        .unwrap();
    wait_for("the agent to be in sync", SOON, || {
        let status: serde_json::Value =
            serde_json::from_str(&node.run(&[own("keelway").as_str(), "status", "-o", "json"])?)?;
        anyhow::ensure!(status["synced"] == true, "{status}");
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}", agent.output()));
    agent
}

fn add(node: &Node, name: &str, uid: &str) -> Answer {
    plugin::call(node, "ADD", name, "default", name, uid).unwrap()
}

#[track_caller]
fn added(node: &Node, name: &str, uid: &str) -> String {
    let answer = add(node, name, uid);
    assert!(answer.ok, "{answer:?}");
    answer.address().unwrap()
}

fn ping(node: &Node, from: &str, to: &str) -> bool {
    let ping = ["ip", "netns", "exec", from, "busybox", "ping", "-c", "1", "-W", "1", to];
    node.exec(&ping).unwrap().status.success()
}

/// Count and sum in seconds of the waits so far.
fn waits(node: &Node) -> (u64, f64, u64) {
    let text = node.run(&["busybox", "wget", "-qO-", "http://127.0.0.1:9965/metrics"]).unwrap();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is not in {text}")).parse::<f64>().unwrap()
    };
    let wait = |end: &str| value(&format!("keelway_cni_policy_wait_seconds_{end}"));
    (wait("count") as u64, wait("sum"), value("keelway_cni_policy_unchecked_total") as u64)
}

#[test]
fn a_pod_never_starts_before_a_policy_that_is_older_than_it() {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let lab = Lab::new(1).unwrap();
    let node = lab.node(1);
    let mut api = SmallApi::start(&lab, "networkpolicies").unwrap();
    let _agent = start_agent(&lab, &api);
    let uid = |name: &str| api.pod(name).unwrap();
    added(node, "a", &uid("a"));

    // The policy first, then its pod; the pod's watch is faster.
    api.hold(true);
    api.create(DENY_B).unwrap();
    let b = uid("b");
    let address = thread::scope(|scope| {
        let start = Instant::now();
        let adding = scope.spawn(|| added(node, "b", &b));
        thread::sleep(Duration::from_secs(2));
        assert!(!adding.is_finished(), "the pod is up after {:?} without its policy", start.elapsed());
        api.hold(false);
        adding.join().unwrap()
    });
    assert!(!ping(node, "a", &address), "what the policy forbids went through");

    // What a policy allowed is as old: its deletion is waited for.
    api.hold(true);
    api.kubectl(&["delete", "networkpolicy", "deny-b"], "").unwrap();
    let c = uid("c");
    thread::scope(|scope| {
        let adding = scope.spawn(|| added(node, "c", &c));
        thread::sleep(Duration::from_secs(1));
        assert!(!adding.is_finished(), "the pod is up while a policy is in force that is no more");
        api.hold(false);
        adding.join().unwrap();
    });
    assert!(ping(node, "a", &address));

    // A policy that goes while it is waited for: nobody waits for ever.
    api.hold(true);
    api.create(DENY_B).unwrap();
    let d = uid("d");
    thread::scope(|scope| {
        let adding = scope.spawn(|| added(node, "d", &d));
        thread::sleep(Duration::from_millis(500));
        api.kubectl(&["delete", "networkpolicy", "deny-b"], "").unwrap();
        api.hold(false);
        adding.join().unwrap();
    });

    // When it does not come at all, the runtime is told to try again, and of what.
    api.hold(true);
    api.create(DENY_B).unwrap();
    let e = uid("e");
    let refused = add(node, "e", &e);
    assert_eq!(refused.code(), Some(11), "{refused:?}");
    assert!(refused.words().contains("deny-b"), "{refused:?}");
    assert!(node.run(&["ip", "netns", "exec", "e", "ip", "-o", "link"]).unwrap().lines().count() <= 1, "left over");
    api.hold(false);
    added(node, "e", &e);

    // Without anything to wait for it costs next to nothing, also while other objects change all the time.
    let measure = |prefix: &str| {
        let names: Vec<String> = (0..20).map(|number| format!("{prefix}{number}")).collect();
        let pods: Vec<(&String, String)> = names.iter().map(|name| (name, uid(name))).collect();
        let (count, sum, _) = waits(node);
        let start = Instant::now();
        for (name, uid) in &pods {
            added(node, name, uid);
        }
        let took = start.elapsed() / 20;
        let (more, longer, unchecked) = waits(node);
        assert_eq!((more - count, unchecked), (20, 0));
        let mean = (longer - sum) / 20.0;
        println!("{prefix}: an ADD takes {took:?}; its policies are known to be new after {:.1} ms", mean * 1000.0);
        assert!(mean < 0.5, "{mean} s");
    };
    measure("quiet");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = 0;
            while !done.load(Ordering::Relaxed) {
                written += 1;
                let label = format!("written={written}");
                api.kubectl(&["label", "--overwrite", "namespace", "kube-system", &label], "").unwrap();
            }
            written
        });
        measure("busy");
        done.store(true, Ordering::Relaxed);
        println!("{} objects were written meanwhile", writer.join().unwrap());
    });

    // The API server goes away: pods that are known start all the same.
    let late = uid("late");
    added(node, "g", &uid("g"));
    api.stop().unwrap();
    let start = Instant::now();
    added(node, "late", &late);
    // It asked for two seconds; for a policy it would have waited fifteen.
    assert!(start.elapsed() < Duration::from_secs(12), "{:?}", start.elapsed());
    assert_eq!(waits(node).2, 1);
}
