//! Endpoints that flap a hundred times a second for a minute under load, with the agent killed in the middle: every request is
//! answered, by a backend that was allowed while it ran, or had been shortly before.
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};
use keelway_lab::memory_api::MemoryApi;
use keelway_lab::probe::{Asked, Percentiles};
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::{Lab, Node, Process, plugin};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const VIPS: [&str; 2] = ["10.96.0.50", "fd00:10:96::50"];
const NODE_PORT: u16 = 30_080;
const SERVERS: [&str; 4] = ["s1", "s2", "s3", "s4"];
const SECONDS: u64 = 60;
/// Changes of the endpoints.
const PER_SECOND: u64 = 100;
/// Questions per second of each client.
const RATE: u64 = 100;
/// How long after a backend has left a request may still begin that it answers. What is seen of it is printed.
const BOUND: Duration = Duration::from_millis(1000);

fn micros(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros()).unwrap()
}

fn now() -> u64 {
    micros(SystemTime::now())
}

fn own(name: &str) -> String {
    sh::own(name).unwrap().display().to_string()
}

fn start_agent(node: &Node, kubeconfig: &str) -> Process {
    let argv = [&own("keelway-agent"), "--kubeconfig", kubeconfig, "--node-name", &node.name];
    let agent = node.spawn("agent", &argv).unwrap();
    wait_for("the agent to be in sync", SOON, || {
        node.run(&["busybox", "wget", "-qO-", "http://127.0.0.1:10256/healthz"]).map(drop)
    })
    .unwrap_or_else(|error| panic!("{error:?}\n{}", agent.output()));
    agent
}

fn service() -> Value {
    json!({"kind": "Service", "metadata": {"name": "flap", "namespace": "default"},
        "spec": {"type": "NodePort", "clusterIP": VIPS[0], "clusterIPs": VIPS, "ipFamilies": ["IPv4", "IPv6"],
            "ports": [{"name": "tcp", "protocol": "TCP", "port": 80, "nodePort": NODE_PORT},
                {"name": "udp", "protocol": "UDP", "port": 80, "nodePort": NODE_PORT}]}})
}

/// What has left is gone, or on its way out: neither may be chosen. By TCP it still serves; by UDP it does not, since a client's port
/// that is taken again by chance is then of a flow that may stay.
fn slices(node: &str, addresses: &[[IpAddr; 2]; 4], allowed: [bool; 4], leave: bool, v6: bool) -> [Value; 2] {
    [("tcp", "TCP"), ("udp", "UDP")].map(|(name, protocol)| {
        let endpoints: Vec<Value> = addresses
            .iter()
            .zip(allowed)
            .filter(|(_, allowed)| *allowed || !leave)
            .map(|(addresses, allowed)| {
                let serving = allowed || protocol == "TCP";
                json!({"addresses": [addresses[usize::from(v6)]], "nodeName": node,
                    "conditions": {"ready": allowed, "serving": serving, "terminating": !allowed}})
            })
            .collect();
        let family = if v6 { "IPv6" } else { "IPv4" };
        json!({"kind": "EndpointSlice", "addressType": family,
            "metadata": {"name": format!("flap-{name}-{family}").to_lowercase(), "namespace": "default",
                "labels": {"kubernetes.io/service-name": "flap"}},
            "ports": [{"name": name, "protocol": protocol, "port": 8080}],
            "endpoints": endpoints})
    })
}

/// When each backend was allowed: from just before it was said to just after it was unsaid.
#[derive(Default)]
struct Allowed(BTreeMap<&'static str, Vec<(u64, u64)>>);

impl Allowed {
    fn change(&mut self, which: usize, allowed: bool, began: u64, ended: u64) {
        let spans = self.0.entry(SERVERS[which]).or_default();
        match allowed {
            true => spans.push((began, u64::MAX)),
            false => spans.last_mut().unwrap().1 = ended,
        }
    }

    /// How long before `begin` the backend had last been allowed; 0 if it was at any time until `end`; `None`: never.
    fn late(&self, by: &str, begin: u64, end: u64) -> Option<u64> {
        let spans = self.0.get(by)?.iter().filter(|(from, _)| *from <= end);
        spans.map(|(_, to)| begin.saturating_sub(*to)).min()
    }
}

/// Where a client is and what it asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Pod,
    PodPastSockets,
    Host,
    Outside,
}

/// By which way it asks.
#[derive(Clone, Copy, Debug)]
struct Way {
    from: From,
    udp: bool,
    v6: bool,
}

fn ask(lab: &Lab, Way { from, udp, v6 }: Way) -> Result<Asked> {
    let node = lab.node(1);
    let probe = own("keelway-probe");
    let own: IpAddr = if v6 { node.v6.into() } else { node.v4.into() };
    let target = match from {
        From::Outside => SocketAddr::new(own, NODE_PORT),
        _ => SocketAddr::new(VIPS[usize::from(v6)].parse()?, 80),
    };
    let target = target.to_string();
    let (count, rate) = ((SECONDS * RATE).to_string(), RATE.to_string());
    let mut args = vec![&*probe, "ask", &target, "--count", &count, "--rate", &rate, "--timeout", "5000", "--log"];
    args.extend(udp.then_some("--udp"));
    let text = match from {
        From::Pod => node.run(&[&["ip", "netns", "exec", "client"], &args[..]].concat())?,
        From::Host => node.run(&args)?,
        From::Outside => lab.outside.run(&args)?,
        From::PodPastSockets => {
            let mut command = Command::new(sh::own("keelway-lab")?);
            command.args(["enter", "--cgroup", &lab.outside.cgroup, "--net"]);
            sh::checked(command.arg(node.path("/run/netns/client")?).arg("--").args(&args))?
        }
    };
    Ok(serde_json::from_str(&text)?)
}

#[test]
fn endpoints_that_flap_under_load_with_the_agent_killed_lose_nothing() {
    if let Some(reason) =
        sh::missing(&["ip", "busybox"], &["keelway-agent", "keelway-cni", "keelway-lab", "keelway-probe"])
    {
        println!("skipped: {reason}");
        return;
    }
    let lab = Lab::new(1).unwrap();
    let node = lab.node(1);
    let api = MemoryApi::start(&lab.outside).unwrap();
    let kubeconfig = api.kubeconfig(&lab.dir).unwrap().display().to_string();
    let pod = |name: &str| {
        json!({"kind": "Pod", "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
            "spec": {"nodeName": node.name, "containers": []}, "status": {"phase": "Pending"}})
    };
    api.put([
        json!({"kind": "Namespace", "metadata": {"name": "default"}}),
        json!({"kind": "Node", "metadata": {"name": node.name},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]},
            "status": {"addresses": [{"type": "InternalIP", "address": node.v4}, {"type": "InternalIP", "address": node.v6}]}}),
        service(),
    ])
    .unwrap();
    api.put(SERVERS.iter().chain(&["client"]).map(|name| pod(name))).unwrap();
    node.run(&[own("keelway-agent"), "install-cni".into(), "--from".into(), own("keelway-cni")]).unwrap();
    let mut agent = start_agent(node, &kubeconfig);
    let add = |name: &str| {
        let answer = plugin::call(node, "ADD", name, "default", name, &format!("uid-{name}")).unwrap();
        assert!(answer.ok, "{answer:?}");
        [0, 1].map(|index| -> IpAddr {
            let text = answer.json["ips"][index]["address"].as_str().unwrap_or_else(|| panic!("{answer:?}"));
            text.split('/').next().unwrap().parse().unwrap()
        })
    };
    add("client");
    let addresses = SERVERS.map(add);
    let probe = own("keelway-probe");
    let _servers =
        SERVERS.map(|name| node.spawn(name, &["ip", "netns", "exec", name, &probe, "serve", "--name", name]).unwrap());
    let mut allowed = [true; 4];
    let mut history = Allowed::default();
    let began = now();
    (0..4).for_each(|which| history.change(which, true, began, began));
    api.put([false, true].map(|v6| slices(&node.name, &addresses, allowed, true, v6)).concat()).unwrap();
    // Everybody by both families, and each transport by both.
    let ways = [(From::Pod, false), (From::PodPastSockets, true), (From::Host, false), (From::Outside, true)];
    let ways = ways.map(|(from, v6)| [Way { from, udp: false, v6 }, Way { from, udp: true, v6: !v6 }]);
    let ways: Vec<Way> = ways.into_iter().flatten().collect();
    wait_for("the Service from everywhere", SOON, || {
        // The slices came in this order.
        let target = format!("[{}]:80", VIPS[1]);
        let argv = ["ip", "netns", "exec", "client", &probe, "ask", &target, "--count", "8"];
        let asked: Asked = serde_json::from_str(&node.run(&argv)?)?;
        ensure!(asked.answered() == 8, "{asked:?}");
        Ok(())
    })
    .unwrap();

    let over = AtomicBool::new(false);
    let (asked, outage, changes) = thread::scope(|scope| {
        let clients = ways.iter().map(|way| {
            let lab = &lab;
            scope.spawn(move || ask(lab, *way).unwrap_or_else(|error| panic!("{way:?}: {error:?}")))
        });
        let clients: Vec<_> = clients.collect();
        let kubeconfig = &kubeconfig;
        let killed = scope.spawn(move || {
            thread::sleep(Duration::from_secs(SECONDS / 2));
            agent.stop(Signal::SIGKILL).unwrap();
            let began = now();
            thread::sleep(Duration::from_secs(1));
            let agent = start_agent(node, kubeconfig);
            (began, now(), agent)
        });
        let over = &over;
        let flapping = scope.spawn({
            let (api, addresses, history, allowed) = (&api, &addresses, &mut history, &mut allowed);
            move || {
                let (start, mut number) = (Instant::now(), 0_u64);
                let mut random = 0x2545_f491_4f6c_dd1d_u64;
                while !over.load(Ordering::SeqCst) {
                    number += 1;
                    let due = start + Duration::from_micros(number * 1_000_000 / PER_SECOND);
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // The last one stays, and another comes instead.
                    let left = allowed.iter().filter(|allowed| **allowed).count();
                    let fits = |which: &usize| !allowed[*which] || left > 1;
                    let which = (0..4).map(|step| (random as usize + step) % 4).find(fits).unwrap();
                    allowed[which] = !allowed[which];
                    let began = now();
                    let leave = random & 256 != 0;
                    let all = [false, true].map(|v6| slices(&node.name, addresses, *allowed, leave, v6));
                    api.put(all.concat()).unwrap();
                    history.change(which, allowed[which], began, now());
                }
                (number, start.elapsed())
            }
        });
        let asked: Vec<Asked> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        over.store(true, Ordering::SeqCst);
        (asked, killed.join().unwrap(), flapping.join().unwrap())
    });
    let (killed, synced, _agent) = outage;
    let per_second = changes.0 as f64 / changes.1.as_secs_f64();
    println!(
        "{} changes in {:?}, {per_second:.0} a second; agent away for {} ms",
        changes.0,
        changes.1,
        (synced - killed) / 1000
    );
    assert!(per_second > 0.9 * PER_SECOND as f64 && changes.1 >= Duration::from_secs(SECONDS - 1), "{changes:?}");

    let bound = u64::try_from(BOUND.as_micros()).unwrap();
    let mut problems = Vec::new();
    let (mut steady, mut meanwhile) = (Vec::new(), Vec::new());
    for (way, asked) in ways.iter().zip(&asked) {
        let mut by: BTreeMap<&str, u64> = BTreeMap::new();
        for request in &asked.log {
            let way = format!("{way:?}, {} ms after the start", (request.begin - began) / 1000);
            let who = match &request.outcome {
                Ok(who) => who,
                Err(failure) => {
                    problems.push(format!("{way}: {failure} after {} ms", (request.end - request.begin) / 1000));
                    continue;
                }
            };
            *by.entry(who).or_default() += 1;
            let Some(late) = history.late(who, request.begin, request.end) else {
                problems.push(format!("{way}: {who} was never allowed"));
                continue;
            };
            // While no agent runs, what was programmed last holds.
            let away = request.begin + bound > killed && request.begin < synced + bound;
            let limit = if away { synced - killed + 2 * bound } else { bound };
            if late > limit {
                problems.push(format!("{way}: {who}, which had left {} ms before", late / 1000));
            }
            if away { &mut meanwhile } else { &mut steady }.push(Duration::from_micros(late));
        }
        println!("{way:?}: {} asked, answered by {by:?}, latency {:?} us", asked.tried, asked.latency);
        assert_eq!((asked.tried, asked.log.len() as u64), (SECONDS * RATE, SECONDS * RATE));
        assert_eq!(by.len(), 4, "all backends have answered: {by:?}");
    }
    println!(
        "a backend's answers after it had left, microseconds: {:?} of {}; while the agent was away: {:?} of {}",
        Percentiles::of(steady.clone()),
        steady.len(),
        Percentiles::of(meanwhile.clone()),
        meanwhile.len()
    );
    assert!(
        problems.is_empty(),
        "{} requests went wrong, the first: {:#?}",
        problems.len(),
        &problems[..problems.len().min(12)]
    );
}
