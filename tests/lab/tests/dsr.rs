//! `--load-balancer-mode`: clients outside dial one node, the pod is on the other. Whom the pod sees, under which address the client
//! is answered, and which way the answers take; with the tunnel and in routed mode, both families.
mod wire;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Duration;

use keelway_lab::probe::{Asked, Flowed};
use keelway_lab::services::Backend;
use keelway_lab::standalone::{self, Pod, Standalone};
use keelway_lab::{Host, Lab, sh};
use nix::sys::signal::Signal;
use serde_json::json;

use wire::Place;

const NODE_PORT: u16 = 30080;
const EXTERNAL: [&str; 2] = ["198.51.100.77", "2001:db8:51::77"];
const TRANSPORTS: [(&str, &[&str]); 3] = [("tcp", &[]), ("udp", &["--udp"]), ("udp", &["--udp", "--unconnected"])];
/// Of the VXLAN header: 2^16 says that a port follows, here the probe's.
const ID_OF_8080: [u8; 3] = [0x01, 0x1f, 0x90];

/// Two nodes whose agents read their mode from a file.
struct Modes {
    s: Standalone,
    file: std::path::PathBuf,
    routing: &'static str,
}

impl Modes {
    fn new(routing: &'static str, mode: &str) -> Self {
        let lab = Lab::new(2).unwrap();
        let file = lab.dir.join("agent.yaml");
        std::fs::write(&file, format!("routing: {routing}\nload-balancer-mode: {mode}\n")).unwrap();
        let argument = file.display().to_string();
        Self { s: Standalone::on(lab, &["--config", &argument]).unwrap(), file, routing }
    }

    /// Starts the agents again under a mode, after `kill -9`.
    fn set(&self, mode: &str) {
        std::fs::write(&self.file, format!("routing: {}\nload-balancer-mode: {mode}\n", self.routing)).unwrap();
        for number in [1, 2] {
            self.s.stop_agent(number, Signal::SIGKILL).unwrap();
            self.s.start_agent(number).unwrap();
            self.s.wait_synced(number).unwrap();
            assert_eq!(self.s.status(number).unwrap()["loadBalancerMode"], mode);
        }
    }
}

fn of(host: &Host, v6: bool) -> IpAddr {
    if v6 { host.v6.into() } else { host.v4.into() }
}

fn at(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, NODE_PORT)
}

/// A TCP and a UDP Service at one node port, with the pods as backends, and at external addresses that node 1 takes.
fn services(s: &Standalone, backends: &[&Pod]) {
    let backends: Vec<Backend> = backends.iter().map(|pod| Backend::pod(s, pod)).collect();
    for (name, vips) in [("tcp", ["10.96.0.10", "fd00:10:96::10"]), ("udp", ["10.96.0.20", "fd00:10:96::20"])] {
        let port = json!({"protocol": name.to_uppercase(), "port": 80, "nodePort": NODE_PORT, "targetPort": 8080});
        let spec = json!({
            "type": "NodePort", "clusterIP": vips[0], "clusterIPs": vips, "externalIPs": EXTERNAL, "ports": [port],
        });
        s.put_service(name, &spec, &json!({}), &backends).unwrap();
    }
}

fn ask(s: &Standalone, target: SocketAddr, flags: &[&str]) -> Asked {
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let target = target.to_string();
    let argv = [&[probe.as_str(), "ask", &target], flags].concat();
    serde_json::from_str(&s.lab.outside.run(&argv).unwrap()).unwrap()
}

/// Until the answers are by `pod` and for `seen` alone.
#[track_caller]
fn eventually_seen_as(s: &Standalone, target: SocketAddr, flags: &[&str], pod: &str, seen: IpAddr) {
    let seen = seen.to_string();
    sh::wait_for(&format!("{pod} to see {seen}"), sh::SOON, || {
        let report = ask(s, target, &[&["--count", "10", "--timeout", "1000"], flags].concat());
        let keys = |map: &BTreeMap<String, u64>| map.keys().cloned().collect::<Vec<_>>();
        let drops = [1, 2].map(|number| s.status(number).map(|status| status["drops"].to_string()));
        anyhow::ensure!(
            report.answered() == 10
                && report.wrong_source == 0
                && (keys(&report.answers), keys(&report.seen_as)) == (vec![pod.to_owned()], vec![seen.clone()]),
            "{target} {flags:?}: {report:?}\n{drops:?}"
        );
        Ok(())
    })
    .unwrap();
}

/// Every address under which node 1 takes the Services, every transport. `dsr` tells whose node answers.
#[track_caller]
fn everywhere(s: &Standalone, dsr: impl Fn(&str) -> bool) {
    let tunnel = || Place::host(s.node(2)).sent("keelway-vxlan").1;
    for (protocol, flags) in TRANSPORTS {
        for v6 in [false, true] {
            let seen = if dsr(protocol) { of(&s.lab.outside, v6) } else { of(s.node(1), v6) };
            let external = SocketAddr::new(EXTERNAL[usize::from(v6)].parse().unwrap(), 80);
            for target in [at(of(s.node(1), v6)), external] {
                eventually_seen_as(s, target, flags, "c", seen);
            }
            // The node of the pod itself shows the client's address in every mode.
            eventually_seen_as(s, at(of(s.node(2), v6)), flags, "c", of(&s.lab.outside, v6));
            if dsr(protocol) {
                let before = tunnel();
                assert_eq!(ask(s, at(of(s.node(1), v6)), &[&["--count", "30"], flags].concat()).answered(), 30);
                assert!(tunnel() - before < 10, "{protocol} {v6}: answers went through the tunnel");
            }
        }
    }
}

fn every_mode(routing: &'static str) {
    if let Some(reason) = standalone::missing() {
        println!("skipped: {reason}");
        return;
    }
    let modes = Modes::new(routing, "snat");
    let s = &modes.s;
    let c = s.pod(2, "c", &[("app", "c")]).unwrap();
    let d = s.pod(2, "d", &[]).unwrap();
    let node = [s.node(1).v4.to_string(), s.node(1).v6.to_string()];
    s.lab.outside.run(&["ip", "route", "add", EXTERNAL[0], "via", &node[0]]).unwrap();
    s.lab.outside.run(&["ip", "-6", "route", "add", EXTERNAL[1], "via", &node[1]]).unwrap();
    services(s, &[&c]);
    everywhere(s, |_| false);
    // Connections of before the change and those of after it, over two more restarts, lose nothing.
    let flows = std::thread::scope(|scope| {
        let flow = |udp: bool, v6: bool| {
            scope.spawn(move || -> Flowed {
                let probe = sh::own("keelway-probe").unwrap().display().to_string();
                let target = at(of(s.node(1), v6)).to_string();
                let mut argv = vec![probe.as_str(), "flow", &target, "--seconds", "14", "--rate", "50"];
                argv.extend(udp.then_some("--udp"));
                serde_json::from_str(&s.lab.outside.run(&argv).unwrap()).unwrap()
            })
        };
        let before = [flow(false, false), flow(false, true), flow(true, false)];
        std::thread::sleep(Duration::from_secs(1));
        modes.set("dsr");
        let after = [flow(false, false), flow(false, true), flow(true, true)];
        std::thread::sleep(Duration::from_secs(1));
        modes.set("dsr");
        before.into_iter().chain(after).map(|flow| flow.join().unwrap()).collect::<Vec<_>>()
    });
    for (number, flow) in flows.iter().enumerate() {
        let drops = || [1, 2].map(|number| s.status(number).unwrap()["drops"].to_string());
        assert_eq!((flow.lost(), flow.failures.len()), (0, 0), "flow {number}: {flow:?}\n{:?}", drops());
    }
    everywhere(s, |_| true);
    another_backend(s, [&c, &d]);
    rules(s);
    errors(s, &c);
    lies(s, &c);
    an_older_node(s);
    modes.set("hybrid");
    everywhere(s, |protocol| protocol == "tcp");
}

#[test]
fn with_the_tunnel_the_pods_node_answers_the_client_itself() {
    every_mode("vxlan");
}

#[test]
fn in_routed_mode_the_pods_node_answers_the_client_itself() {
    every_mode("routed");
}

/// Dials from a port of the client's; `reset` says how the connection is to end.
fn dial_from(port: u16, target: SocketAddr, reset: bool) -> std::io::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with, sockopt};
    let (family, any): (_, SocketAddr) = if target.is_ipv4() {
        (AddressFamily::INET, ([0, 0, 0, 0], port).into())
    } else {
        (AddressFamily::INET6, ([0_u16; 8], port).into())
    };
    // Not for the processes that another test starts meanwhile.
    let socket: OwnedFd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_linger(&socket, reset.then_some(Duration::ZERO))?;
    bind(&socket, &any)?;
    connect(&socket, &target)?;
    Ok(socket.into())
}

/// Sends a line of so many bytes and answers the first word of what comes back.
fn talk(mut stream: TcpStream, bytes: usize) -> std::io::Result<String> {
    stream.set_read_timeout(Some(sh::SOON))?;
    stream.write_all(format!("{}\n", "x".repeat(bytes)).as_bytes())?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    assert!(line.len() > bytes, "{} bytes of more than {bytes}", line.len());
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

/// One port of the client's, again and again: under both addresses of one backend, and then with another backend.
fn another_backend(s: &Standalone, [c, d]: [&Pod; 2]) {
    let outside = Place::host(&s.lab.outside);
    for v6 in [false, true] {
        let from = |port: u16, target: SocketAddr, reset: bool| {
            outside.run(move || dial_from(port, target, reset).and_then(|stream| talk(stream, 5))).unwrap()
        };
        let external = SocketAddr::new(EXTERNAL[usize::from(v6)].parse().unwrap(), 80);
        for (target, reset) in [
            (at(of(s.node(1), v6)), true),
            (external, false),
            (at(of(s.node(2), v6)), false),
            (at(of(s.node(1), v6)), true),
        ] {
            assert_eq!(from(5555, target, reset), "c", "{target}");
        }
        services(s, &[d]);
        eventually_seen_as(s, at(of(s.node(1), v6)), &[], "d", of(&s.lab.outside, v6));
        assert_eq!(from(5555, at(of(s.node(1), v6)), true), "d");
        services(s, &[c]);
        eventually_seen_as(s, at(of(s.node(1), v6)), &[], "c", of(&s.lab.outside, v6));
    }
}

/// The pod's rules judge the client itself.
fn rules(s: &Standalone) {
    let policy = |blocks: [String; 2]| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: default}}\n\
             spec: {{podSelector: {{matchLabels: {{app: c}}}}, policyTypes: [Ingress], \
             ingress: [{{from: [{{ipBlock: {{cidr: {}}}}}, {{ipBlock: {{cidr: {}}}}}]}}]}}\n",
            blocks[0], blocks[1]
        )
    };
    let both = |host: &Host| [format!("{}/32", host.v4), format!("\"{}/128\"", host.v6)];
    s.write("policy", &policy(both(s.node(1)))).unwrap();
    for v6 in [false, true] {
        sh::wait_for("the policy to hold", sh::SOON, || {
            let reports = TRANSPORTS.map(|(_, flags)| {
                ask(s, at(of(s.node(1), v6)), &[&["--count", "2", "--timeout", "1000"], flags].concat())
            });
            anyhow::ensure!(reports.iter().all(|report| report.answered() == 0), "{reports:?}");
            Ok(())
        })
        .unwrap();
    }
    s.write("policy", &policy(both(&s.lab.outside))).unwrap();
    for (_, flags) in TRANSPORTS {
        for v6 in [false, true] {
            eventually_seen_as(s, at(of(s.node(1), v6)), flags, "c", of(&s.lab.outside, v6));
        }
    }
    s.remove_file("policy").unwrap();
}

/// A router on the way to the client takes less than the pod sends: its complaint is to the address that the client dialled.
fn errors(s: &Standalone, c: &Pod) {
    let outside = Place::host(&s.lab.outside);
    let host = s.lab.add_host("beyond", 20).unwrap();
    let beyond = Place::host(&host);
    beyond.ip("link set eth0 down");
    outside.ip(&format!(
        "link add narrow mtu 1300 type veth peer name narrow mtu 1500 netns {}",
        host.netns().file_name().unwrap().display()
    ));
    for (side, v4, v6) in
        [(&outside, "192.0.2.1/24", "2001:db8:2::1/64"), (&beyond, "192.0.2.10/24", "2001:db8:2::10/64")]
    {
        side.ip(&format!("addr add {v4} dev narrow"));
        side.ip(&format!("addr add {v6} dev narrow nodad"));
        side.ip("link set narrow up");
    }
    // It sends what fits, and says that it takes more.
    beyond.ip("route replace default via 192.0.2.1 dev narrow mtu 1300 advmss 1460");
    beyond.ip("-6 route replace default via 2001:db8:2::1 dev narrow mtu 1300 advmss 1440");
    for (v6, client) in [(false, "192.0.2.10"), (true, "2001:db8:2::10")] {
        let target = at(of(s.node(1), v6));
        let answer =
            beyond.run(move || TcpStream::connect_timeout(&target, sh::SOON).and_then(|stream| talk(stream, 20_000)));
        assert_eq!(answer.unwrap(), "c", "{target}");
        // It was told, and not merely lucky.
        let route = Place::pod(s, c).run(move || sh::run(&["ip", "route", "get", client])).unwrap();
        assert!(route.contains("mtu 1300"), "{route}");
    }
}

/// A tunnelled packet that tells node 2 to give the pod a datagram from the client to node 1: from node 1 it is, from others not.
fn lies(s: &Standalone, c: &Pod) {
    let (client, frontend) = (s.lab.outside.v4, s.node(1).v4);
    let IpAddr::V4(backend) = c.address(false) else { panic!("an IPv4 address") };
    let datagram = |source_port: u16| {
        let mut ip = vec![0x45, 0, 0, 31, 0, 0, 0, 0, 64, 17, 0, 0];
        ip.extend(client.octets());
        ip.extend(frontend.octets());
        let sum: u32 = ip.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        ip[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
        ip.extend(source_port.to_be_bytes());
        ip.extend(NODE_PORT.to_be_bytes());
        ip.extend([0, 11, 0, 0]);
        ip.extend(b"who");
        // The pod's address, but for its first word, where a frame has its hardware addresses.
        let macs = [&[0, 0, 0, 0, 0, 0, 0xff, 0xff][..], &backend.octets()].concat();
        [&[8, 0, 0, 0][..], &ID_OF_8080, &[0], &macs, &[8, 0], &ip].concat()
    };
    let to = SocketAddr::from((s.node(2).v4, 8472));
    let heard = |from: &Place, port: u16, patience: Duration| {
        let packet = datagram(port);
        let answers = Place::host(&s.lab.outside).run(move || {
            let socket = UdpSocket::bind((client, port)).unwrap();
            socket.set_read_timeout(Some(patience)).unwrap();
            socket
        });
        from.run(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            let _ = socket.send_to(&packet, to);
        });
        let mut buffer = [0; 100];
        answers.recv_from(&mut buffer).ok().map(|(_, from)| from)
    };
    let [node, outside] = [s.node(1), &s.lab.outside].map(Place::host);
    let near = s.pod(1, "near", &[]).unwrap();
    let short = Duration::from_millis(700);
    let dropped = |reason: &str, number: usize| {
        let status = s.status(number).unwrap();
        let drops = status["drops"].as_array().unwrap().clone();
        drops.iter().filter(|drop| drop["reason"] == reason).filter_map(|drop| drop["packets"].as_u64()).sum::<u64>()
    };
    assert_eq!(
        heard(&node, 7001, Duration::from_secs(10)),
        Some(SocketAddr::from((frontend, NODE_PORT))),
        "what a node says is so"
    );
    let (foreign, pods) = (dropped("tunnel-source", 2), dropped("tunnel-from-pod", 1));
    assert_eq!(heard(&outside, 7002, short), None, "from outside");
    assert_eq!(dropped("tunnel-source", 2), foreign + 1);
    assert_eq!(heard(&Place::pod(s, &near), 7003, short), None, "from a pod");
    assert_eq!(dropped("tunnel-from-pod", 1), pods + 1);
    s.remove_pod(&near).unwrap();
}

/// A node that is said not to take such packets gets them in this one's name, as ever.
fn an_older_node(s: &Standalone) {
    let node = s.node(2);
    let file = s.manifests.join(format!("node-{}.yaml", node.name));
    let text = std::fs::read_to_string(&file).unwrap();
    let named = format!("metadata: {{name: {}", node.name);
    let labelled = text.replace(&named, &format!("{named}, labels: {{keelway.dev/dsr: \"false\"}}"));
    assert_ne!(text, labelled);
    // One of before, which goes on.
    let client = Place::host(&s.lab.outside).run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let target = at(s.node(1).v4.into());
    let seen = || {
        client.send_to(b"who", target).unwrap();
        let mut answer = [0; 100];
        let length = client.recv(&mut answer).unwrap_or(0);
        String::from_utf8_lossy(&answer[..length]).into_owned()
    };
    assert_eq!(seen(), format!("c {} who", s.lab.outside.v4));
    s.write(&format!("node-{}", node.name), &labelled).unwrap();
    for (_, flags) in TRANSPORTS {
        for v6 in [false, true] {
            eventually_seen_as(s, at(of(s.node(1), v6)), flags, "c", of(s.node(1), v6));
        }
    }
    assert_eq!(seen(), format!("c {} who", s.node(1).v4));
    s.write(&format!("node-{}", node.name), &text).unwrap();
    eventually_seen_as(s, at(s.node(1).v4.into()), &[], "c", s.lab.outside.v4.into());
}
