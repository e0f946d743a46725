//! A node with pods, a proxy and clients, and another node with pods; once with the agent, once with kube-proxy.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keelway_lab::cluster::programs::bin_dir;
use keelway_lab::memory_api::MemoryApi;
use keelway_lab::probe::Asked;
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::{Host, Lab, Node, Process, plugin};
use serde_json::json;

use crate::wish::{PORTS, SERVERS, Wish, whereabouts};

/// Of a Service that is changed last: once its newest port answers, all is in force, or is being written in the same batch.
const MARK: [&str; 2] = ["10.96.9.9", "fd00:10:96::9:9"];
/// Far more than a batch takes.
const BATCH: Duration = Duration::from_millis(300);
/// Milliseconds without an answer that are silence; longer than until a lost SYN is sent again.
const SILENCE: &str = "1300";
/// Of who was answered before, on a busy machine.
const PATIENCE: &str = "5000";
/// Questions asked at once of one node.
const ASKING: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A pod of the node.
    Pod,
    /// A process of the node's own.
    Host,
    /// A machine on the nodes' network.
    Outside,
}

#[derive(Clone, Copy, Debug)]
pub enum Place {
    At(IpAddr, u16),
    /// A port of the node.
    NodePort(u16),
}

#[derive(Clone, Copy, Debug)]
pub struct Question {
    pub client: Client,
    pub place: Place,
    pub v6: bool,
    pub udp: bool,
}

/// Who answered, and what else happened, over some connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub answers: BTreeSet<String>,
    pub failures: BTreeSet<String>,
}

impl Outcome {
    pub fn add(&mut self, other: Self) {
        self.answers.extend(other.answers);
        self.failures.extend(other.failures);
    }
}

pub struct Court {
    api: MemoryApi,
    addresses: BTreeMap<&'static str, [IpAddr; 2]>,
    _servers: Vec<Process>,
    proxy: Process,
    // Last, so that what runs in it ends first.
    lab: Lab,
}

fn own(name: &str) -> Result<String> {
    Ok(sh::own(name)?.display().to_string())
}

/// A pod of no CNI plugin: a routed veth pair.
fn plain_pod(node: &Node, name: &str, [v4, v6]: [IpAddr; 2]) -> Result<()> {
    let script = format!(
        "set -e; ip netns add {name}; ip link add v-{name} type veth peer name eth0 netns {name}\n\
         ip link set v-{name} address 02:00:00:00:00:01 addrgenmode none up\n\
         ip addr add 169.254.1.1/32 dev v-{name}; ip addr add fe80::1/64 dev v-{name} nodad\n\
         ip route add {v4}/32 dev v-{name}; ip route add {v6}/128 dev v-{name}\n\
         ip -n {name} link set lo up; ip -n {name} link set eth0 up\n\
         ip -n {name} addr add {v4}/32 dev eth0; ip -n {name} addr add {v6}/128 dev eth0 nodad\n\
         ip -n {name} route add 169.254.1.1 dev eth0 scope link\n\
         ip -n {name} route add default via 169.254.1.1; ip -n {name} route add default via fe80::1 dev eth0\n"
    );
    node.run(&["sh", "-c", &script]).map(drop)
}

/// The pods of the node that is asked.
const NEAR: [&str; 3] = ["client", "l1", "l2"];

fn cidrs(number: u8) -> [String; 2] {
    [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")]
}

fn plain_address(node: u8, host: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 244, node, host).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, host.into()).into(),
    ]
}

impl Court {
    /// The node that is asked has the agent.
    pub fn ours() -> Result<Self> {
        Self::new(|lab, kubeconfig| {
            let node = lab.node(1);
            node.run(&[own("keelway-agent")?, "install-cni".into(), "--from".into(), own("keelway-cni")?])?;
            let argv = ["--kubeconfig", kubeconfig, "--node-name", "near", "--routing", "routed"];
            let agent = node.spawn("agent", &[&[own("keelway-agent")?.as_str()], &argv[..]].concat())?;
            wait_for("the agent to be in sync", SOON, || {
                node.run(&["busybox", "wget", "-qO-", "http://127.0.0.1:10256/healthz"]).map(drop)
            })
            .with_context(|| agent.output())?;
            let mut addresses = BTreeMap::new();
            for name in NEAR {
                let answer = plugin::call(node, "ADD", name, "default", name, &format!("uid-{name}"))?;
                ensure!(answer.ok, "{answer:?}");
                let ip = |index: usize| -> Result<IpAddr> {
                    let text = answer.json["ips"][index]["address"].as_str().context("an address")?;
                    Ok(text.split('/').next().unwrap_or_default().parse()?)
                };
                addresses.insert(name, [ip(0)?, ip(1)?]);
            }
            Ok((agent, addresses))
        })
    }

    /// The node that is asked has kube-proxy.
    pub fn kube_proxys() -> Result<Self> {
        Self::new(|lab, kubeconfig| {
            let node = lab.node(1);
            let [v4, v6] = cidrs(2);
            let script = format!(
                "set -e; for f in ipv4/ip_forward ipv6/conf/all/forwarding; do echo 1 >/proc/sys/net/$f; done\n\
                 # Refusals are to be told each time.\n\
                 for f in ipv4/icmp_ratelimit ipv6/icmp/ratelimit; do echo 0 >/proc/sys/net/$f; done\n\
                 ip route add {v4} via {}; ip route add {v6} via {}\n",
                lab.node(2).v4,
                lab.node(2).v6
            );
            node.run(&["sh", "-c", &script])?;
            let mut addresses = BTreeMap::new();
            for (host, name) in (2..).zip(NEAR) {
                addresses.insert(name, plain_address(1, host));
                plain_pod(node, name, addresses[name])?;
            }
            let config = lab.dir.join("kube-proxy.yaml");
            let text = format!(
                "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n\
                 clientConnection: {{kubeconfig: {kubeconfig}, contentType: application/json}}\nhostnameOverride: near\n\
                 clusterCIDR: 10.244.0.0/16,fd00:10:244::/48\nconntrack: {{maxPerCore: 0}}\n"
            );
            std::fs::write(&config, text)?;
            let argv = [bin_dir()?.join("kube-proxy").display().to_string(), format!("--config={}", config.display())];
            Ok((node.spawn("kube-proxy", &argv)?, addresses))
        })
    }

    fn new(start: impl FnOnce(&Lab, &str) -> Result<(Process, BTreeMap<&'static str, [IpAddr; 2]>)>) -> Result<Self> {
        let lab = Lab::new(2)?;
        let api = MemoryApi::start(&lab.outside)?;
        let kubeconfig = api.kubeconfig(&lab.dir)?.display().to_string();
        api.put([json!({"kind": "Namespace", "metadata": {"name": "default"}})])?;
        for (number, server) in [(1, "l"), (2, "r")] {
            let node = lab.node(number.into());
            let (zone, name) = whereabouts(server);
            let [v4, v6] = cidrs(number);
            api.put([json!({"kind": "Node",
                "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone, "kubernetes.io/hostname": name}},
                "spec": {"podCIDR": v4, "podCIDRs": [v4, v6]},
                "status": {"addresses": [{"type": "InternalIP", "address": node.v4}, {"type": "InternalIP", "address": node.v6}]}})])?;
        }
        api.put(NEAR.map(|name| {
            json!({"kind": "Pod", "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
                "spec": {"nodeName": "near", "containers": []}, "status": {"phase": "Pending"}})
        }))?;
        // The other node: a plain router.
        let far = lab.node(2);
        let [v4, v6] = cidrs(1);
        let script = format!(
            "set -e; for f in ipv4/ip_forward ipv6/conf/all/forwarding; do echo 1 >/proc/sys/net/$f; done\n\
             ip route add {v4} via {}; ip route add {v6} via {}\n",
            lab.node(1).v4,
            lab.node(1).v6
        );
        far.run(&["sh", "-c", &script])?;
        // What is not a node's address is dialled by way of the node.
        let (v4, v6) = (lab.node(1).v4.to_string(), lab.node(1).v6.to_string());
        lab.outside.run(&["ip", "route", "add", "198.51.100.0/24", "via", &v4])?;
        lab.outside.run(&["ip", "-6", "route", "add", "2001:db8:51::/48", "via", &v6])?;

        let (proxy, mut addresses) = start(&lab, &kubeconfig)?;
        for (host, name) in [(2, "r1"), (3, "r2")] {
            addresses.insert(name, plain_address(2, host));
            plain_pod(far, name, addresses[name])?;
        }
        let probe = own("keelway-probe")?;
        let serve = |(name, port): (&'static str, u16)| {
            let node = if whereabouts(name).1 == "near" { lab.node(1) } else { far };
            let (log, port) = (format!("{name}-{port}"), port.to_string());
            node.spawn(&log, &["ip", "netns", "exec", name, &probe, "serve", "--name", name, "--port", &port])
        };
        let all = SERVERS.iter().flat_map(|name| PORTS.map(|port| (*name, port)));
        let servers = all.map(serve).collect::<Result<_>>()?;
        Ok(Self { api, addresses, _servers: servers, proxy, lab })
    }

    /// Tells the proxy of the Services, and of the mark of this round after them.
    pub fn put(&mut self, wishes: &[Wish], round: usize) -> Result<()> {
        let address = |server: &str, v6: bool| self.addresses[server][usize::from(v6)];
        self.api.put(wishes.iter().flat_map(|wish| wish.objects(address)))?;
        let mark = json!({"kind": "Service", "metadata": {"name": "mark", "namespace": "default"},
            "spec": {"type": "ClusterIP", "clusterIP": MARK[0], "clusterIPs": MARK, "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "RequireDualStack", "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
                "ports": [{"name": format!("p{round}"), "protocol": "TCP", "port": 100 + round, "targetPort": 8080}]},
            "status": {"loadBalancer": {}}});
        let slice = |(v6, family)| {
            json!({"kind": "EndpointSlice", "addressType": family,
                "metadata": {"name": format!("mark-{family}").to_lowercase(), "namespace": "default",
                    "labels": {"kubernetes.io/service-name": "mark"}},
                "ports": [{"name": format!("p{round}"), "protocol": "TCP", "port": 8080}],
                "endpoints": [{"addresses": [address("l1", v6)], "nodeName": "near",
                    "conditions": {"ready": true, "serving": true, "terminating": false}}]})
        };
        self.api.put([mark, slice((false, "IPv4")), slice((true, "IPv6"))])
    }

    pub fn wait_programmed(&self, round: usize) -> Result<()> {
        for mark in MARK {
            // Each family has a proxy of its own in kube-proxy.
            let target = SocketAddr::new(mark.parse()?, 100 + u16::try_from(round)?);
            wait_for("the mark of the round", SOON, || {
                let asked = self.dial(Client::Pod, target, false, 1, SILENCE)?;
                ensure!(asked.answered() == 1, "{asked:?}\n{}", self.proxy.output());
                Ok(())
            })?;
        }
        std::thread::sleep(BATCH);
        Ok(())
    }

    fn dial(&self, client: Client, target: SocketAddr, udp: bool, count: u32, patience: &str) -> Result<Asked> {
        let (probe, target, count) = (own("keelway-probe")?, target.to_string(), count.to_string());
        let mut argv = vec![probe.as_str(), "ask", &target, "--timeout", patience, "--count", &count];
        argv.extend(udp.then_some("--udp"));
        let host: &Host = if client == Client::Outside { &self.lab.outside } else { self.lab.node(1) };
        if client == Client::Pod {
            argv.splice(0..0, ["ip", "netns", "exec", "client"]);
        }
        Ok(serde_json::from_str(&host.run(&argv)?)?)
    }

    /// What the agent says it dropped, and why.
    pub fn drops(&self) -> String {
        let argv = [own("keelway").unwrap(), "status".into(), "-o".into(), "json".into()];
        let status: serde_json::Value = serde_json::from_str(&self.lab.node(1).run(&argv).unwrap()).unwrap();
        status["drops"].to_string()
    }

    /// Asks some times, of which it makes one outcome; a question without any answer is not asked on.
    pub fn ask(&self, question: &Question) -> Outcome {
        let target = match question.place {
            Place::At(ip, port) => SocketAddr::new(ip, port),
            Place::NodePort(port) if question.v6 => SocketAddr::new(self.lab.node(1).v6.into(), port),
            Place::NodePort(port) => SocketAddr::new(self.lab.node(1).v4.into(), port),
        };
        let mut outcome = Outcome::default();
        for (count, patience) in [(1, SILENCE), (15, PATIENCE)] {
            let asked = self.dial(question.client, target, question.udp, count, patience).unwrap();
            outcome.answers.extend(asked.answers.into_keys());
            // What is dropped is silence, or, on the way out of the own host, an error: always ours, with kube-proxy of datagrams.
            let told = |kind: String| if kind == "denied" { "timeout".to_owned() } else { kind };
            outcome.failures.extend(asked.failures.into_keys().map(told));
            if outcome.answers.is_empty() {
                break;
            }
        }
        outcome
    }

    pub fn ask_all(&self, questions: &[&Question]) -> Vec<Outcome> {
        // Most of the time is spent waiting for what is dropped.
        let (next, outcomes) = (AtomicUsize::new(0), Mutex::new(vec![Outcome::default(); questions.len()]));
        std::thread::scope(|scope| {
            for _ in 0..ASKING {
                scope.spawn(|| {
                    while let index = next.fetch_add(1, Ordering::Relaxed)
                        && let Some(question) = questions.get(index)
                    {
                        let outcome = self.ask(question);
                        outcomes.lock().unwrap()[index] = outcome;
                    }
                });
            }
        });
        outcomes.into_inner().unwrap()
    }
}
