//! A node that changes over from kube-proxy: its live connections live on, its rules go, and nobody else's do.
mod kube;

use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, ensure};
use keelway_lab::probe::{Asked, Flowed};
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::small_api::SmallApi;
use keelway_lab::{Lab, Node, Process};
use nix::sys::signal::Signal;

const FOREIGN: &str = "ip netns add elsewhere && ip link add veth-e type veth peer name eth0 netns elsewhere \
    && ip addr add 10.200.0.1/24 dev veth-e && ip addr add fd00:200::1/64 dev veth-e nodad && ip link set veth-e up \
    && ip -n elsewhere addr add 10.200.0.2/24 dev eth0 && ip -n elsewhere addr add fd00:200::2/64 dev eth0 nodad \
    && ip -n elsewhere link set eth0 up && ip -n elsewhere link set lo up \
    && ip -n elsewhere route add default via 10.200.0.1 && ip -n elsewhere -6 route add default via fd00:200::1 \
    && sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1";

/// Somebody else's rules, in every place where a kube-proxy has some.
const RULES: &str = "set -e
    nft add table inet mine; nft add chain inet mine KUBE-SERVICES; nft add rule inet mine KUBE-SERVICES tcp dport 9 drop
    for f in iptables ip6tables; do for back in '' -legacy; do
        $f$back -t nat -N MINE; $f$back -t nat -A MINE -p tcp --dport 9 -j RETURN; $f$back -t nat -A PREROUTING -j MINE
        $f$back -N KUBE-ROUTER-INPUT; $f$back -A INPUT -p tcp --dport 9 -j KUBE-ROUTER-INPUT
    done; done
    ipset create KUBE-SRC-X hash:ip; ipset create KUBE-CLUSTER-IP hash:ip; ipset create KUBE-6-LOOP-BACK hash:ip family inet6
    ip link add kube-ipvs0 type bridge";

/// Every rule of the node but the one table that is ours.
fn rules(node: &Node) -> Vec<String> {
    let text = node
        .run(&["sh", "-c", "nft list ruleset; for f in iptables ip6tables; do $f-legacy-save; done; ipset list -n"])
        .unwrap();
    let counters = |line: &str| line.starts_with('#') || line.starts_with(':') && line.contains(" [");
    let uncounted = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_count = |at: usize| at > 0 && ["packets", "bytes"].contains(&words[at - 1]);
        (0..words.len()).map(|at| if is_count(at) { "N" } else { words[at] }).collect::<Vec<_>>().join(" ")
    };
    text.lines().map(uncounted).filter(|line| !line.is_empty() && !counters(line)).collect()
}

fn its(rules: &[String]) -> Vec<&String> {
    let marks =
        ["kube-proxy", "KUBE-SVC", "KUBE-SEP", "KUBE-MARK", "KUBE-POSTROUTING", "KUBE-NODEPORTS", "KUBE-FORWARD"];
    rules.iter().filter(|line| marks.iter().any(|mark| line.contains(mark))).collect()
}

/// Families and transports: IPv6?, UDP?
const KINDS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

fn node_port(node: &Node, v6: bool, udp: bool) -> String {
    let port = if udp { 30081 } else { 30080 };
    if v6 { format!("[{}]:{port}", node.v6) } else { format!("{}:{port}", node.v4) }
}

type Running = JoinHandle<Result<Flowed>>;

/// Flows under way: through node ports from outside, and through the Services' own addresses from the node and a foreign pod.
fn flows(lab: &Lab, seconds: &str) -> Vec<(String, Running)> {
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let node = lab.node(1);
    let mut started = Vec::new();
    for (v6, udp) in KINDS {
        let vip = if v6 { "[fd00:10:96::50]:80" } else { "10.96.0.50:80" };
        for (from, target, count) in
            [("outside", node_port(node, v6, udp), 6), ("node", vip.to_owned(), 3), ("elsewhere", vip.to_owned(), 3)]
        {
            for _ in 0..count {
                // Few enough datagrams that a busy machine's server loses none of them in its buffer.
                let rate = if udp { "10" } else { "50" };
                let mut argv = vec![probe.as_str(), "flow", &target, "--rate", rate, "--seconds", seconds];
                if udp {
                    argv.push("--udp");
                }
                let inside = [&["ip", "netns", "exec", "elsewhere"], &argv[..]].concat();
                let command = match from {
                    "outside" => lab.outside.command(&argv),
                    "node" => node.command(&argv),
                    _ => node.command(&inside),
                };
                let mut command = command.unwrap();
                let running = std::thread::spawn(move || Ok(serde_json::from_str(&sh::checked(&mut command)?)?));
                started.push((format!("{from} to {target} udp {udp}"), running));
            }
        }
    }
    started
}

/// The backends of [`kube::service`], on the second node.
fn servers(lab: &Lab) -> [Process; 2] {
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    [("b1", "8080"), ("b2", "8081")]
        .map(|(name, port)| lab.node(2).spawn(name, &[&probe, "serve", "--name", name, "--port", port]).unwrap())
}

fn change_over(mode: &str, legacy: bool) {
    if let Some(reason) = kube::missing() {
        println!("skipped: {reason}");
        return;
    }
    let lab = Lab::new(2).unwrap();
    let node = lab.node(1);
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let servers = servers(&lab);
    node.run(&["sh", "-c", FOREIGN]).unwrap();
    for (family, net, via) in
        [("-4", "10.200.0.0/24", node.v4.to_string()), ("-6", "fd00:200::/64", node.v6.to_string())]
    {
        lab.node(2).run(&["ip", family, "route", "add", net, "via", &via]).unwrap();
    }
    node.run(&["sh", "-c", RULES]).unwrap();
    let before = rules(node);

    let api = SmallApi::start(&lab, "pods").unwrap();
    kube::node(&api, node);
    kube::service(&api, lab.node(2));
    let mut proxy = kube::proxy(&lab, &api, mode, legacy);
    let ask = |v6: bool, udp: bool, count: &str| -> Asked {
        let target = node_port(node, v6, udp);
        let transport: &[&str] = if udp { &["--udp"] } else { &[] };
        let text = lab.outside.run(&[&[probe.as_str(), "ask", &target, "--count", count], transport].concat()).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    for (v6, udp) in KINDS {
        wait_for("kube-proxy to serve the node port", SOON, || {
            ensure!(ask(v6, udp, "1").answered() == 1, "{}", proxy.output());
            Ok(())
        })
        .unwrap();
    }
    assert!(!its(&rules(node)).is_empty(), "kube-proxy has written no rules that are seen here");
    let agent = sh::own("keelway-agent").unwrap().display().to_string();
    let refused = node.exec(&[&agent, "cleanup", "--kube-proxy"]).unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("kube-proxy") && said.contains("--force"), "{said}");

    let under_way = flows(&lab, "20");
    std::thread::sleep(Duration::from_secs(3));
    proxy.stop(Signal::SIGTERM).unwrap();
    let started = kube::agent(&lab, &api, &[]);
    let said = node.run(&[&agent, "cleanup", "--kube-proxy"]).unwrap();
    println!("{mode} legacy {legacy}: {said}");
    let after = rules(node);
    assert!(its(&after).is_empty(), "{:#?}", its(&after));
    // New connections are ours: both backends answer, and no rule is there.
    for (v6, udp) in KINDS {
        let asked = ask(v6, udp, "40");
        assert_eq!((asked.answered(), asked.answers.len()), (40, 2), "{asked:?}");
    }
    let mut lost = Vec::new();
    for (what, running) in under_way {
        let flowed = running.join().unwrap().unwrap();
        if flowed.lost() > 0 || !flowed.failures.is_empty() || flowed.answers.len() != 1 {
            lost.push((what, flowed));
        }
    }
    assert!(lost.is_empty(), "{lost:#?}\n{}", started.output());
    // With the last of them the kernel's translation is let go.
    node.run(&["conntrack", "-F"]).unwrap();
    wait_for("the translation to be let go", SOON, || {
        let tables = node.run(&["nft", "list", "tables"])?;
        ensure!(!tables.contains("keelway"), "{tables}");
        Ok(())
    })
    .unwrap();
    let said = node.run(&[&agent, "cleanup", "--kube-proxy"]).unwrap();
    assert_eq!(said.trim(), "nothing of a kube-proxy is left");
    let after = rules(node);
    let gone: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
    assert_eq!(gone, ["KUBE-CLUSTER-IP", "KUBE-6-LOOP-BACK"], "of everything that was there before");
    assert!(node.run(&["ip", "link", "show", "kube-ipvs0"]).is_err());
    drop((started, servers));
}

#[test]
fn connections_of_an_nftables_kube_proxy_outlive_it() {
    change_over("nftables", false);
}

#[test]
fn connections_of_an_iptables_kube_proxy_outlive_it() {
    change_over("iptables", false);
}

#[test]
fn connections_of_a_kube_proxy_with_old_iptables_outlive_it() {
    change_over("iptables", true);
}

/// kube-proxy has the kernel masquerade at any port, also at those that we give: here at one of three, of which every connection to
/// a backend takes another.
#[test]
fn a_port_that_the_kernel_gave_to_a_connection_is_given_to_nobody_else() {
    if let Some(reason) = kube::missing() {
        println!("skipped: {reason}");
        return;
    }
    let lab = Lab::new(2).unwrap();
    let node = lab.node(1);
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let _servers = servers(&lab);
    let api = SmallApi::start(&lab, "pods").unwrap();
    kube::node(&api, node);
    kube::service(&api, lab.node(2));
    let mut proxy = kube::proxy(&lab, &api, "nftables", false);
    let target = node_port(node, false, false);
    let ask = |more: &[&str]| -> Asked {
        let text = lab.outside.run(&[&[probe.as_str(), "ask", &target], more].concat()).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    wait_for("kube-proxy to serve the node port", SOON, || {
        ensure!(ask(&[]).answered() == 1, "{}", proxy.output());
        Ok(())
    })
    .unwrap();
    let flowed: Flowed = std::thread::scope(|scope| {
        let flow = scope.spawn(|| {
            let flow = [probe.as_str(), "flow", &target, "--rate", "20", "--seconds", "60"];
            serde_json::from_str(&lab.outside.run(&flow).unwrap()).unwrap()
        });
        lab.wait_for_flows(1).unwrap();
        // `tcp 6 431999 ESTABLISHED src= dst= sport= dport= src= dst= sport= dport=`: the second four are the answers'.
        let tracked =
            node.run(&["conntrack", "-L", "-p", "tcp", "--state", "ESTABLISHED", "--dport", "30080"]).unwrap();
        let port = tracked.split("dport=").nth(2).and_then(|rest| rest.split(' ').next());
        let port: u16 = port.unwrap_or_else(|| panic!("{tracked}")).parse().unwrap();
        let first = port.min(u16::MAX - 2);
        proxy.stop(Signal::SIGTERM).unwrap();
        let started = kube::agent(&lab, &api, &["--snat-ports", &format!("{first}-{}", first + 2)]);
        let agent = sh::own("keelway-agent").unwrap().display().to_string();
        node.run(&[&agent, "cleanup", "--kube-proxy"]).unwrap();
        // A port is free again some time after its connection has ended: the one that finds none tries until then.
        let asked = ask(&["--count", "10", "--timeout", "40000"]);
        assert_eq!((asked.answered(), asked.answers.len()), (10, 2), "{asked:?}\n{}", started.output());
        flow.join().unwrap()
    });
    assert_eq!((flowed.lost(), flowed.failures.len(), flowed.answers.len()), (0, 0, 1), "{flowed:?}");
}
