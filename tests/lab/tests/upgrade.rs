//! The agent killed, stopped, replaced by another build and away for long, under load that notices everything; each against
//! the same load with nothing happening, in the same run.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use keelway_lab::load::{self, Load};
use keelway_lab::probe::{Asked, Flowed};
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::standalone::{Pod, Standalone};
use keelway_lab::standalone_or_skip;
use nix::sys::signal::Signal;

/// Another build of the agent: `$KEELWAY_OTHER_AGENT`, else the one of the other profile (debug beside release).
fn other_build() -> Result<PathBuf> {
    let own = sh::own("keelway-agent")?;
    let path = match std::env::var_os("KEELWAY_OTHER_AGENT") {
        Some(path) => PathBuf::from(path),
        None => {
            let profile = own.parent().context("the agent is in a folder")?;
            let other = if profile.ends_with("release") { "debug" } else { "release" };
            profile.with_file_name(other).join("keelway-agent")
        }
    };
    ensure!(path.is_file(), "no other build of keelway-agent at {} (KEELWAY_OTHER_AGENT names one)", path.display());
    ensure!(build_id(&path)? != build_id(&own)?, "{} is the same build as {}", path.display(), own.display());
    Ok(path)
}

/// What the linker calls this build.
fn build_id(program: &Path) -> Result<String> {
    let notes = sh::run(&["readelf".as_ref(), "-n".as_ref(), program.as_os_str()])?;
    let id = notes.lines().find_map(|line| line.trim().strip_prefix("Build ID: "));
    Ok(id.with_context(|| format!("{} has no build id", program.display()))?.to_owned())
}

fn replace(s: &Standalone, node: usize, signal: Signal, program: &Path) -> Result<()> {
    s.stop_agent(node, signal)?;
    thread::sleep(Duration::from_millis(500));
    s.start_agent_from(node, program)?;
    s.wait_synced(node)
}

/// What the kernel holds of ours that only the agent writes, as bpftool reads it.
fn tables(s: &Standalone, node: usize) -> Vec<(String, Vec<String>)> {
    let bpftool = sh::system("bpftool").unwrap().display().to_string();
    let names = ["frontends", "slots", "backends", "endpoints", "identities", "rules", "cidrs", "tunnels"];
    let dump = |name: &str| {
        let pin = format!("/sys/fs/bpf/keelway/v1/kw_{name}");
        let text = s.node(node).run(&[&bpftool, "-j", "map", "dump", "pinned", &pin]).unwrap();
        let mut entries: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        if name == "endpoints" {
            // A start counts every endpoint's policy generation up, so that live flows are judged once by what it read.
            entries.iter_mut().for_each(|entry| entry["value"].as_array_mut().unwrap()[16..20].fill("".into()));
        }
        let mut entries: Vec<String> = entries.iter().map(ToString::to_string).collect();
        entries.sort();
        (name.to_owned(), entries)
    };
    names.map(dump).into()
}

#[test]
fn another_build_takes_over_from_a_killed_one_and_back_and_nobody_notices() {
    let s = standalone_or_skip!(2);
    let other = match other_build() {
        Ok(other) => other,
        Err(reason) => {
            println!("skipped: {reason:#}");
            return;
        }
    };
    let own = sh::own("keelway-agent").unwrap();
    println!("builds {} and {}", build_id(&own).unwrap(), build_id(&other).unwrap());
    let load = Load::new(&s).unwrap();
    let control = load.run(&s, 20, || Ok(())).unwrap();
    let before = [1, 2].map(|node| tables(&s, node));
    let generation = s.status(1).unwrap()["generation"].as_u64().unwrap();
    let ours = load
        .run(&s, 30, || {
            replace(&s, 1, Signal::SIGKILL, &other)?;
            replace(&s, 2, Signal::SIGKILL, &other)?;
            // Clean stop, and back to the first build: a downgrade.
            replace(&s, 1, Signal::SIGTERM, &own)
        })
        .unwrap();
    assert_eq!(s.status(1).unwrap()["generation"].as_u64().unwrap(), generation + 2, "no other programs took over");
    assert!(load::report("restart", "cargo test -p keelway-lab --test upgrade", &ours, &control).unwrap(), "{ours:#?}");
    // Nothing was wanted differently, so no entry differs, ids and numbers included.
    for (before, node) in before.into_iter().zip([1, 2]) {
        assert_eq!(tables(&s, node), before);
    }
}

/// Kills the agent and starts it again: what is right in the host's network stays as it is, so that nothing on it is lost.
fn a_restart_touches_nothing(args: &[&str]) {
    let s = standalone_or_skip!(2, args);
    let _pod = s.pod(1, "a", &[]).unwrap();
    let monitor = s.node(1).spawn("monitor", &["ip", "-ts", "monitor", "link", "address", "route", "rule"]).unwrap();
    thread::sleep(Duration::from_millis(300));
    // Seen it has to be: a monitor that hears nothing proves nothing.
    s.node(1).run(&["ip", "route", "add", "198.51.100.0/24", "via", &s.lab.outside.v4.to_string()]).unwrap();
    wait_for("the monitor", SOON, || {
        ensure!(monitor.output().contains("198.51.100.0/24"), "{}", monitor.output());
        Ok(())
    })
    .unwrap();
    let before = monitor.output().len();
    replace(&s, 1, Signal::SIGKILL, &sh::own("keelway-agent").unwrap()).unwrap();
    thread::sleep(Duration::from_secs(1));
    let heard = monitor.output()[before..].to_owned();
    assert!(!heard.contains("Deleted") && !heard.contains(" via ") && !heard.contains("unreachable"), "{heard}");
}

#[test]
fn a_restart_touches_no_route_of_the_tunnels() {
    a_restart_touches_nothing(&[]);
}

#[test]
fn a_restart_touches_no_route_between_nodes() {
    a_restart_touches_nothing(&["--routing", "routed"]);
}

#[test]
fn pods_come_and_go_while_the_agent_is_replaced() {
    let s = standalone_or_skip!(1);
    let other = other_build().or_else(|_| sh::own("keelway-agent")).unwrap();
    let own = sh::own("keelway-agent").unwrap();
    let steady = s.pod(1, "steady", &[]).unwrap();
    let devices = || s.node(1).run(&["ls", "/sys/class/net"]).unwrap().split_whitespace().count();
    let idle = devices();
    let done = AtomicBool::new(false);
    let (made, retried, flow) = thread::scope(|scope| {
        let churn = scope.spawn(|| {
            let (mut made, mut retried) = (0, 0);
            while !done.load(Ordering::Relaxed) {
                // As a kubelet does: again, until the agent is back.
                let start = Instant::now();
                let pod = loop {
                    match s.pod(1, &format!("fleeting{made}"), &[]) {
                        Ok(pod) => break pod,
                        Err(error) if start.elapsed() < SOON => {
                            let words = format!("{error:?}");
                            assert!(words.contains("agent"), "{words}");
                            retried += 1;
                            thread::sleep(Duration::from_millis(300));
                        }
                        Err(error) => panic!("{error:?}"),
                    }
                };
                for v6 in [false, true] {
                    let target = SocketAddr::from((pod.address(v6), 8080)).to_string();
                    // The server in it is started with the pod, and may take a moment.
                    wait_for("the new pod's answer", SOON, || {
                        let report: Asked = s.probe(&steady, &["ask", &target, "--timeout", "500"])?;
                        ensure!(report.answered() == 1, "{report:?}");
                        Ok(())
                    })
                    .unwrap();
                }
                s.remove_pod(&pod).unwrap();
                made += 1;
            }
            (made, retried)
        });
        let node = s.node(1).v4;
        let probe = sh::own("keelway-probe").unwrap().display().to_string();
        let _server = s.node(1).spawn("server", &[&probe, "serve", "--name", "node"]).unwrap();
        let target = SocketAddr::from((node, 8080)).to_string();
        thread::sleep(Duration::from_secs(1));
        let flow = scope.spawn(|| -> Flowed {
            let target = target;
            s.probe(&steady, &["flow", &target, "--udp", "--seconds", "15", "--rate", "100"]).unwrap()
        });
        for program in [&other, &own, &other] {
            replace(&s, 1, Signal::SIGKILL, program).unwrap();
            thread::sleep(Duration::from_millis(1500));
        }
        let flow = flow.join().unwrap();
        done.store(true, Ordering::Relaxed);
        let (made, retried) = churn.join().unwrap();
        (made, retried, flow)
    });
    println!("{made} pods came and went, {retried} times asked again");
    assert!(made > 5, "{made}");
    assert_eq!((flow.lost(), flow.failures.len()), (0, 0), "{flow:?}");
    // Nothing of the pods that went is left: DELs that met no agent included.
    wait_for("what the pods left", SOON, || {
        let status = s.status(1)?;
        ensure!(status["counts"]["endpoints"] == 1 && devices() == idle, "{} devices, {}", devices(), status["counts"]);
        let waiting = s.node(1).path("/var/lib/keelway/cni-del")?;
        ensure!(std::fs::read_dir(waiting).map_or(0, Iterator::count) == 0, "a DEL still waits");
        Ok(())
    })
    .unwrap();
    assert_eq!(s.status(1).unwrap()["problems"], serde_json::json!([]));
}

const VIP: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const OTHER_VIP: [&str; 2] = ["10.96.0.11", "fd00:10:96::11"];
const GONE_VIP: [&str; 2] = ["10.96.0.12", "fd00:10:96::12"];
const DENY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny, namespace: default}\n\
    spec: {podSelector: {matchLabels: {app: d}}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}\n";

/// How long the agent is away.
const AWAY: Duration = Duration::from_secs(20);

#[test]
fn what_changed_while_the_agent_was_away_is_written_without_a_flap() {
    let s = standalone_or_skip!(1);
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| s.pod(1, name, &[("app", name)]).unwrap());
    s.service("web", VIP, "TCP", 80, &[&b, &c]).unwrap();
    s.service("other", OTHER_VIP, "UDP", 80, &[&c]).unwrap();
    s.service("gone", GONE_VIP, "TCP", 80, &[&b]).unwrap();
    let ask =
        |from: &Pod, target: &str, count: &str| -> Asked { s.probe(from, &["ask", target, "--count", count]).unwrap() };
    let silent = |from: &Pod, target: &str| {
        let asked: Asked = s.probe(from, &["ask", target, "--count", "2", "--timeout", "500"]).unwrap();
        assert_eq!(asked.answered(), 0, "{asked:?}");
    };
    let names = |report: &Asked| report.answers.keys().cloned().collect::<String>();
    wait_for("the Services", SOON, || {
        ensure!(names(&ask(&a, "10.96.0.10:80", "50")) == "bc" && names(&ask(&a, "10.96.0.12:80", "1")) == "b");
        Ok(())
    })
    .unwrap();
    let length = (AWAY + Duration::from_secs(25)).as_secs();
    let rounds = (length * 50).to_string();
    let length = length.to_string();
    let (flow, asked) = thread::scope(|scope| {
        let flow = scope.spawn(|| -> Flowed {
            s.probe(&a, &["flow", "[fd00:10:96::11]:80", "--udp", "--seconds", &length, "--rate", "100"]).unwrap()
        });
        let asked = scope
            .spawn(|| -> Asked { s.probe(&a, &["ask", "10.96.0.10:80", "--count", &rounds, "--rate", "50"]).unwrap() });
        s.stop_agent(1, Signal::SIGTERM).unwrap();
        // b leaves, d comes, a Service goes, another is new, and d is closed to all but a. b itself lives on.
        s.service("web", VIP, "TCP", 80, &[&c, &d]).unwrap();
        s.remove_file("service-gone").unwrap();
        s.service("new", ["10.96.0.13", "fd00:10:96::13"], "TCP", 80, &[&d]).unwrap();
        s.write("deny", DENY).unwrap();
        thread::sleep(AWAY);
        // Until it is back all is as it was, also for those who come only now.
        assert_eq!(names(&ask(&b, "10.96.0.10:80", "50")), "bc");
        assert_eq!(names(&ask(&a, "10.96.0.12:80", "5")), "b");
        s.start_agent(1).unwrap();
        s.wait_synced(1).unwrap();
        // In step means in step: the first look sees the new state whole.
        assert_eq!(names(&ask(&a, "10.96.0.10:80", "50")), "cd");
        assert_eq!(names(&ask(&a, "10.96.0.13:80", "5")), "d");
        silent(&a, "10.96.0.12:80");
        let at = SocketAddr::from((d.address(false), 8080)).to_string();
        silent(&c, &at);
        assert_eq!(ask(&a, &at, "2").answered(), 2);
        (flow.join().unwrap(), asked.join().unwrap())
    });
    // A Service that did not change lost nothing, and one that did refused nobody on the way.
    assert_eq!((flow.lost(), flow.failures.len()), (0, 0), "{flow:?}");
    assert_eq!((asked.answered(), asked.failures.len(), asked.resent), (asked.tried, 0, 0), "{asked:?}");
    assert_eq!(names(&asked), "bcd", "{asked:?}");
}
