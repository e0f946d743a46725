//! `--xdp`: flows between a client outside and a backend on another node turn round before the node's stack sees them, which a
//! packet socket on the node tells: it stands where tc's hooks do. By routes and by the tunnel, over an underlay of either family,
//! and handed on to the backend's node (DSR); both families, TCP and UDP.
mod wire;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use keelway_lab::probe::{Asked, Flowed};
use keelway_lab::services::Backend;
use keelway_lab::standalone::{self, Standalone};
use keelway_lab::{Host, Lab, sh};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};
use serde_json::json;
use std::os::fd::AsRawFd as _;

use wire::Place;

const NODE_PORT: u16 = 30080;
const BACKEND_PORT: u16 = 8080;
const EXTERNAL: [&str; 2] = ["198.51.100.77", "2001:db8:51::77"];
const TRANSPORTS: [&[&str]; 3] = [&[], &["--udp"], &["--udp", "--unconnected"]];

/// How backends on other nodes are reached.
#[derive(Clone, Copy)]
struct Way {
    routing: &'static str,
    mode: &'static str,
    /// The nodes' first addresses are IPv6.
    underlay_v6: bool,
    /// How often the node's stack is given each question and its answer, without XDP.
    seen: u64,
}

const ROUTED: Way = Way { routing: "routed", mode: "snat", underlay_v6: false, seen: 4 };

impl Way {
    fn text(self, xdp: &str) -> String {
        format!("routing: {}\nload-balancer-mode: {}\nxdp: {xdp}\n", self.routing, self.mode)
    }
    fn is_direct(self) -> bool {
        self.mode == "dsr"
    }
    fn has_tunnel(self) -> bool {
        self.routing == "vxlan" || self.is_direct()
    }
}

struct Nodes {
    s: Standalone,
    file: std::path::PathBuf,
    way: Way,
}

impl Nodes {
    fn new(way: Way) -> Self {
        let lab = Lab::new(2).unwrap();
        let file = lab.dir.join("agent.yaml");
        std::fs::write(&file, way.text("off")).unwrap();
        let argument = file.display().to_string();
        let nodes = Self { s: Standalone::on(lab, &["--config", &argument]).unwrap(), file, way };
        if way.underlay_v6 {
            nodes.put_v6_first();
        }
        nodes
    }

    /// The tunnel goes between the nodes' first addresses.
    fn put_v6_first(&self) {
        for number in [1, 2] {
            let node = self.s.node(number);
            let addresses = [node.v6.to_string(), node.v4.to_string()];
            let object = json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name},
                "spec": {"podCIDRs": Standalone::pod_cidrs(number)},
                "status": {"addresses": addresses.map(|address| json!({"type": "InternalIP", "address": address}))},
            });
            self.s.write(&format!("node-{}", node.name), &object.to_string()).unwrap();
        }
        for number in [1, 2] {
            self.s.stop_agent(number, Signal::SIGKILL).unwrap();
            self.s.start_agent(number).unwrap();
            self.s.wait_synced(number).unwrap();
        }
    }

    /// Starts node 1's agent again with another setting, after `kill -9`.
    fn set(&self, xdp: &str, expected: Option<&str>) {
        std::fs::write(&self.file, self.way.text(xdp)).unwrap();
        self.s.stop_agent(1, Signal::SIGKILL).unwrap();
        self.s.start_agent(1).unwrap();
        self.s.wait_synced(1).unwrap();
        let status = self.s.status(1).unwrap();
        assert_eq!(status["xdp"], xdp);
        let hooks = status["hooks"].as_array().unwrap();
        let by: Vec<_> =
            hooks.iter().filter(|hook| hook["hook"] == "node-xdp").map(|hook| &hook["mechanism"]).collect();
        assert_eq!(by, expected.iter().collect::<Vec<_>>(), "{status}");
        assert_eq!(status["problems"], json!([]));
    }
}

fn of(host: &Host, v6: bool) -> IpAddr {
    if v6 { host.v6.into() } else { host.v4.into() }
}

/// Everything by which node 1 serves: its node port, and an external address.
fn targets(s: &Standalone, v6: bool) -> [SocketAddr; 2] {
    let external: IpAddr = EXTERNAL[usize::from(v6)].parse().unwrap();
    [(of(s.node(1), v6), NODE_PORT).into(), (external, NODE_PORT + 1).into()]
}

fn probe<T: serde::de::DeserializeOwned>(s: &Standalone, what: &str, target: SocketAddr, flags: &[&str]) -> T {
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let target = target.to_string();
    let argv = [&[probe.as_str(), what, &target], flags].concat();
    serde_json::from_str(&s.lab.outside.run(&argv).unwrap()).unwrap()
}

/// Counts packets that a node's stack is given, from the network or for it.
struct Tap {
    seen: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
}

impl Tap {
    fn on(host: &Host, of_interest: fn(&[u8]) -> bool) -> Self {
        let (seen, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let counted = (Arc::clone(&seen), Arc::clone(&done));
        Place::host(host).run(move || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let tap = socket(AddressFamily::Packet, SockType::Datagram, flags, SockProtocol::EthAll).unwrap();
            std::thread::spawn(move || {
                let (seen, done) = counted;
                let mut packet = [0; 128];
                loop {
                    match recv(tap.as_raw_fd(), &mut packet, MsgFlags::empty()) {
                        Ok(length) => {
                            seen.fetch_add(u64::from(of_interest(&packet[..length.min(128)])), Ordering::Relaxed);
                        }
                        Err(Errno::EAGAIN) if done.load(Ordering::Relaxed) => return,
                        Err(_) => std::thread::sleep(Duration::from_millis(2)),
                    }
                }
            });
        });
        Self { seen, done }
    }

    /// How many it saw, once what is on its way has come.
    fn count(self) -> u64 {
        std::thread::sleep(Duration::from_millis(50));
        self.done.store(true, Ordering::Relaxed);
        while Arc::strong_count(&self.done) > 1 {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.seen.load(Ordering::Relaxed)
    }
}

/// Protocol and ports of an IP packet.
fn ports(packet: &[u8]) -> Option<(u8, [u16; 2])> {
    let (proto, at) = match packet.first()? >> 4 {
        4 => (packet.get(9)?, usize::from(packet[0] & 15) * 4),
        6 => (packet.get(6)?, 40),
        _ => return None,
    };
    let port = |at: usize| packet.get(at..at + 2).map(|two| u16::from_be_bytes([two[0], two[1]]));
    Some((*proto, [port(at)?, port(at + 2)?]))
}

/// Of Services and backends; not of the tunnel that carries them, whose device gives them to the stack once more.
fn is_of_a_service(packet: &[u8]) -> bool {
    let ours = [NODE_PORT, NODE_PORT + 1, BACKEND_PORT];
    ports(packet).is_some_and(|(proto, of)| matches!(proto, 6 | 17) && of.iter().any(|port| ours.contains(port)))
}

fn is_by_tunnel(packet: &[u8]) -> bool {
    ports(packet).is_some_and(|(proto, [_, to])| (proto, to) == (17, 8472))
}

fn is_by_tunnel_over_v6(packet: &[u8]) -> bool {
    is_by_tunnel(packet) && packet[0] >> 4 == 6
}

/// Ten questions by every way; the pod sees whom it should. How many packets of it all node 1's stack was given.
#[track_caller]
fn everywhere(nodes: &Nodes) -> u64 {
    let (s, way) = (&nodes.s, nodes.way);
    let client = |v6| of(if way.is_direct() { &s.lab.outside } else { s.node(1) }, v6).to_string();
    let ask = |count: &str| {
        for flags in TRANSPORTS {
            for target in [false, true].into_iter().flat_map(|v6| targets(s, v6)) {
                let flags = [&["--count", count], flags].concat();
                let report: Asked = probe(s, "ask", target, &flags);
                let seen_as: Vec<_> = report.seen_as.keys().cloned().collect();
                let drops = || [1, 2].map(|number| s.status(number).unwrap()["drops"].to_string());
                let count: u64 = count.parse().unwrap();
                assert_eq!(report.answered(), count, "{target} {flags:?}: {report:?}\n{:?}", drops());
                assert_eq!((report.wrong_source, seen_as), (0, vec![client(target.is_ipv6())]));
            }
        }
    };
    // The neighbours are known then.
    ask("1");
    let tap = Tap::on(s.node(1), is_of_a_service);
    let tunnel = Tap::on(s.node(2), if way.underlay_v6 { is_by_tunnel_over_v6 } else { is_by_tunnel });
    ask("10");
    let tunnelled = tunnel.count();
    assert_eq!(tunnelled >= 12 * 10, way.has_tunnel(), "{tunnelled}");
    tap.count()
}

/// Whether senders in these places fill in their checksums, as what comes over a real wire has them.
fn fill_in_checksums(places: &[&Place], on: bool) {
    for place in places {
        let on = on.to_owned();
        place.run(move || sh::run(&["ethtool", "-K", "eth0", "tx", if on { "off" } else { "on" }])).unwrap();
    }
}

#[test]
fn what_only_turns_round_here_does_so_before_the_stack() {
    turns_round(ROUTED);
}

#[test]
fn what_goes_by_the_tunnel_does_so_before_the_stack() {
    turns_round(Way { routing: "vxlan", ..ROUTED });
}

#[test]
fn what_goes_by_a_tunnel_over_ipv6_does_so_before_the_stack() {
    turns_round(Way { routing: "vxlan", underlay_v6: true, ..ROUTED });
}

#[test]
fn what_the_backends_node_answers_is_handed_on_before_the_stack() {
    turns_round(Way { routing: "vxlan", mode: "dsr", seen: 2, ..ROUTED });
}

fn turns_round(way: Way) {
    let gone = standalone::missing().or_else(|| sh::missing(&["ethtool"], &[]));
    if let Some(reason) = gone {
        println!("skipped: {reason}");
        return;
    }
    let nodes = Nodes::new(way);
    let s = &nodes.s;
    let c = s.pod(2, "c", &[]).unwrap();
    let node = [s.node(1).v4.to_string(), s.node(1).v6.to_string()];
    s.lab.outside.run(&["ip", "route", "add", EXTERNAL[0], "via", &node[0]]).unwrap();
    s.lab.outside.run(&["ip", "-6", "route", "add", EXTERNAL[1], "via", &node[1]]).unwrap();
    for (name, vips) in [("tcp", ["10.96.0.10", "fd00:10:96::10"]), ("udp", ["10.96.0.20", "fd00:10:96::20"])] {
        let port = json!({
            "protocol": name.to_uppercase(), "port": NODE_PORT + 1, "nodePort": NODE_PORT, "targetPort": BACKEND_PORT,
        });
        let spec = json!({
            "type": "NodePort", "clusterIP": vips[0], "clusterIPs": vips, "externalIPs": EXTERNAL, "ports": [port],
        });
        s.put_service(name, &spec, &json!({}), &[Backend::pod(s, &c)]).unwrap();
    }
    sh::wait_for("the Service", sh::SOON, || {
        for flags in TRANSPORTS {
            let flags = [&["--count", "1", "--timeout", "1000"], flags].concat();
            let all = [false, true].into_iter().flat_map(|v6| targets(s, v6));
            anyhow::ensure!(all.map(|to| probe::<Asked>(s, "ask", to, &flags).answered()).eq([1; 4]));
        }
        Ok(())
    })
    .unwrap();

    let places = [&Place::host(&s.lab.outside), &Place::pod(s, &c)];
    fill_in_checksums(&places, true);
    // Twelve targets and transports, ten questions each, and each in and out: by tc all of them.
    let by_tc = everywhere(&nodes);
    assert!(by_tc >= 12 * 10 * way.seen, "{by_tc}");
    // One packet in 65,536 looks as if its checksum were to be filled in.
    let few = 8;

    nodes.set("generic", Some("xdp generic"));
    let turned = || s.status(1).unwrap()["xdpPackets"].as_u64().unwrap();
    let before = turned();
    let left = everywhere(&nodes);
    assert!(left <= few, "{left} of {by_tc}");
    // In and out there is one.
    let turned = turned() - before;
    assert!(turned + left >= 12 * 10 * way.seen / 2, "{turned} of {by_tc}");
    // On the other node is the pod: its own node port leads to it by tc.
    let local = (of(s.node(2), false), NODE_PORT).into();
    assert_eq!(probe::<Asked>(s, "ask", local, &["--count", "10"]).answered(), 10);

    // What a program sends back a veth's driver hands over to an end that has one as well, as a real card's needs none.
    nodes.set("native", Some("xdp native"));
    let hooks = &s.status(1).unwrap()["hooks"];
    let program =
        hooks.as_array().unwrap().iter().find(|hook| hook["hook"] == "node-xdp").unwrap()["programId"].to_string();
    let switch = s.node(1).netns().with_file_name(keelway_lab::netns::name(&s.lab.id, "switch"));
    let net = format!("--net={}", switch.display());
    let port = keelway_lab::netns::port(&s.node(1).name);
    sh::run(&["nsenter", &net, "bpftool", "net", "attach", "xdpdrv", "id", &program, "dev", &port]).unwrap();
    let left = everywhere(&nodes);
    assert!(left <= few, "{left} of {by_tc}");

    // Who leaves checksums to a device is served by tc.
    fill_in_checksums(&places, false);
    let left = everywhere(&nodes);
    assert!(left >= by_tc / 2, "{left} of {by_tc}");
    fill_in_checksums(&places, true);

    lives_on(&nodes);

    nodes.set("auto", Some("xdp generic"));
    let agent = sh::own("keelway-agent").unwrap().display().to_string();
    s.stop_agent(1, Signal::SIGTERM).unwrap();
    s.node(1).run(&[agent.as_str(), "cleanup"]).unwrap();
    sh::wait_for("the hook to go", sh::SOON, || {
        let link = s.node(1).run(&["ip", "-j", "link", "show", "dev", "eth0"])?;
        anyhow::ensure!(!link.contains("xdp"), "{link}");
        Ok(())
    })
    .unwrap();
}

/// Flows that began by tc go on by XDP, and back, over kills of the agent.
fn lives_on(nodes: &Nodes) {
    let s = &nodes.s;
    nodes.set("off", None);
    let flows = std::thread::scope(|scope| {
        let flow = |target: SocketAddr, udp: bool| {
            let kind: &[&str] = if udp { &["--udp"] } else { &[] };
            let flags = [&["--seconds", "14", "--rate", "50"], kind].concat();
            scope.spawn(move || probe::<Flowed>(s, "flow", target, &flags))
        };
        let [v4, v6] = [false, true].map(|v6| targets(s, v6));
        let before = [flow(v4[0], false), flow(v6[1], false), flow(v4[1], true)];
        std::thread::sleep(Duration::from_secs(1));
        nodes.set("generic", Some("xdp generic"));
        let during = [flow(v4[1], false), flow(v6[0], false), flow(v6[0], true)];
        let tap = Tap::on(s.node(1), is_of_a_service);
        std::thread::sleep(Duration::from_secs(1));
        let left = tap.count();
        assert!(left <= 8, "{left}");
        nodes.set("off", None);
        before.into_iter().chain(during).map(|flow| flow.join().unwrap()).collect::<Vec<_>>()
    });
    for (number, flow) in flows.iter().enumerate() {
        let drops = || [1, 2].map(|number| s.status(number).unwrap()["drops"].to_string());
        assert_eq!((flow.lost(), flow.failures.len()), (0, 0), "flow {number}: {flow:?}\n{:?}", drops());
    }
}
