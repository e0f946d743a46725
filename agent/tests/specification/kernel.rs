//! A node made of nothing but its tables and programs, in a network namespace and on a bpffs of the test's own.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;

use keelway_agent::engine::Services;
use keelway_layout::{
    Addr, Affinity, AffinityKey, Counter, CtEntry, CtKey, Endpoint, Hook, Identity, NodeConfig, Port, PrefixKey,
    Reason, Tunnel, identity, node_flags, scope, tunnel_flags,
};
use keelway_maps::{Datapath, Run, Table as _, XdpMode};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use crate::packet;

pub const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
pub const OTHER_NODE: [&str; 2] = ["192.0.2.2", "2001:db8::2"];
const POD_NETS: [(&str, u32); 4] =
    [("10.244.1.0", 120), ("10.244.2.0", 120), ("fd00:10:244:1::", 64), ("fd00:10:244:2::", 64)];
/// Pods by the last number of their addresses, on either node.
pub const PODS: std::ops::RangeInclusive<u8> = 2..=5;
/// A run's packet comes by the loopback device.
const LOOPBACK: u32 = 1;
const SECOND: u64 = 1_000_000_000;
/// `TC_ACT_REDIRECT`.
pub const REDIRECT: i32 = 7;
const VXLAN_IFINDEX: u32 = 77;
/// Of which protocols a client outside is answered by its backend's node (`--load-balancer-mode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dsr {
    /// `snat`
    #[default]
    None,
    /// `hybrid`
    Tcp,
    /// `dsr`
    All,
}

pub const SNAT: std::ops::RangeInclusive<u16> = 61_000..=64_999;

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Pod `last` of a node.
pub fn pod(node: u8, last: u8, v6: bool) -> IpAddr {
    if v6 { ip(&format!("fd00:10:244:{node}::{last}")) } else { ip(&format!("10.244.{node}.{last}")) }
}

fn is_pod(node: u8, addr: IpAddr) -> bool {
    PODS.into_iter().any(|last| pod(node, last, addr.is_ipv6()) == addr)
}

/// Whether a pod of this node has the address.
pub fn is_local_pod(addr: IpAddr) -> bool {
    is_pod(1, addr)
}

/// Whether a pod of the other node has the address.
pub fn is_remote_pod(addr: IpAddr) -> bool {
    is_pod(2, addr)
}

/// Whether the tunnel to a pod of the other node has an IPv6 underlay: for some it is of the other family than they.
pub fn is_behind_v6(pod: IpAddr) -> bool {
    let last = Addr::from(pod).words()[3].to_ne_bytes()[3];
    pod.is_ipv6() != (last >= 4)
}

/// A bpffs, gone with the test.
struct Bpffs(tempfile::TempDir);

impl Bpffs {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), None::<&str>).expect("a bpffs");
        Self(dir)
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// What a program did with a packet.
pub struct Did {
    pub run: Run,
    /// How often each reason was counted at the hook.
    pub counted: Vec<Reason>,
    /// The network id under which the hook before tc's sent it through the tunnel; `run.packet` is what was inside.
    pub tunnelled: Option<u32>,
}

/// The tables, the programs, and the agent's writer of Services.
pub struct Kernel {
    pub services: Services,
    pub datapath: Datapath,
    counters: Vec<(Hook, Vec<Counter>)>,
    /// Index of the device through which everything has a route.
    out: u32,
    arrivals: u32,
    /// How many packets turned round before tc's hook.
    pub turned: usize,
    /// How many of them went through the tunnel.
    pub tunnelled: usize,
    /// How many answers came out of the tunnel and turned round at that hook.
    pub answered: usize,
    /// How many packets were handed on to their backend's node as they came.
    pub handed_on: usize,
    /// How many packets of the host's own went to a backend.
    pub from_host: usize,
    _bpffs: Bpffs,
}

/// A network namespace for this thread, in which everything has a route.
fn enter_netns() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
    let script = "ip link set lo up && ip link add out address 2:0:0:0:0:1 type veth peer name beyond && ip link set beyond up && ip link set out up \
        && ip addr add 192.0.2.1/24 dev out && ip -6 addr add 2001:db8::1/64 dev out nodad \
        && ip route add default via 192.0.2.254 && ip -6 route add default via 2001:db8::fe dev out \
        && ip neigh add 192.0.2.254 lladdr 2:0:0:0:0:9 dev out && ip neigh add 2001:db8::fe lladdr 2:0:0:0:0:9 dev out \
        && ip neigh add 192.0.2.2 lladdr 2:0:0:0:0:9 dev out && ip neigh add 2001:db8::2 lladdr 2:0:0:0:0:9 dev out \
        && echo 1 > /proc/sys/net/ipv4/ip_forward && echo 1 > /proc/sys/net/ipv6/conf/all/forwarding";
    let done = Command::new("sh").args(["-ec", script]).output().expect("sh runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

impl Kernel {
    /// `None`, with the reason printed, where the programs were not built.
    pub fn new() -> Option<Self> {
        assert!(nix::unistd::geteuid().is_root(), "this test loads BPF programs and needs root");
        let bpffs = Bpffs::new();
        let datapath = match Datapath::open(bpffs.path()) {
            Err(error @ keelway_maps::Error::NoObject) => {
                println!("skipped: {error}");
                return None;
            }
            other => other.expect("the programs load"),
        };
        enter_netns();
        let mut kernel = Self {
            services: Services::new("n1", tokio::sync::mpsc::unbounded_channel().0),
            datapath,
            counters: Vec::new(),
            out: nix::net::if_::if_nametoindex("out").expect("the device"),
            arrivals: 0,
            turned: 0,
            tunnelled: 0,
            answered: 0,
            handed_on: 0,
            from_host: 0,
            _bpffs: bpffs,
        };
        // A run's packet can come by no device without a program.
        let native = BTreeMap::from([("out".to_owned(), vec![XdpMode::Native])]);
        kernel.datapath.attach_xdp(&native).expect("the program is attached");
        kernel.populate();
        kernel.services.restore(&mut kernel.datapath.tables).expect("empty tables are restored");
        Some(kernel)
    }

    fn populate(&mut self) {
        let tables = &mut self.datapath.tables;
        let mut is = |prefix: PrefixKey, id: u32| {
            tables.identities.put(&prefix, &Identity { id, ..Identity::default() }).expect("an identity");
        };
        for (net, bits) in POD_NETS {
            is(PrefixKey::new(ip(net).into(), bits), identity::UNKNOWN_POD);
        }
        is(PrefixKey::new(ip("10.96.1.0").into(), 120), identity::SERVICES);
        is(PrefixKey::new(ip("fd00:10:96:1::").into(), 64), identity::SERVICES);
        for v6 in [false, true] {
            is(PrefixKey::host(ip(NODE[usize::from(v6)]).into()), identity::HOST);
            is(PrefixKey::host(ip(OTHER_NODE[usize::from(v6)]).into()), identity::REMOTE_NODE);
            for (node, last) in [1, 2].into_iter().flat_map(|node| PODS.map(move |last| (node, last))) {
                is(PrefixKey::host(pod(node, last, v6).into()), identity::FIRST_POD + u32::from(last));
            }
        }
        for v6 in [false, true] {
            for last in PODS {
                let id = u32::from(last);
                let endpoint = Endpoint {
                    ifindex: LOOPBACK,
                    id,
                    incarnation: id,
                    mac: [2, 0, 0, 0, 1, last],
                    host_mac: [2, 0, 0, 0, 2, last],
                    ..Endpoint::default()
                };
                tables.endpoints.put(&pod(1, last, v6).into(), &endpoint).expect("an endpoint");
            }
            let (net, bits) = POD_NETS[if v6 { 3 } else { 1 }];
            let remote = ip(OTHER_NODE[usize::from(v6)]).into();
            let by = |remote: Addr| Tunnel { remote, flags: tunnel_flags::DSR, ..Tunnel::default() };
            tables.tunnels.put(&PrefixKey::new(ip(net).into(), bits), &by(remote)).expect("a tunnel");
            for pod in PODS.map(|last| pod(2, last, v6)) {
                let remote = ip(OTHER_NODE[usize::from(is_behind_v6(pod))]).into();
                tables.tunnels.put(&PrefixKey::host(pod.into()), &by(remote)).expect("a tunnel");
            }
        }
    }

    /// Whether pods of other nodes are reached by routes, or else by the tunnel; and which clients' packets they are handed as they came.
    pub fn set_mode(&mut self, routed: bool, dsr: Dsr) {
        let masquerade = node_flags::MASQUERADE_V4 | node_flags::MASQUERADE_V6;
        let dsr = match dsr {
            Dsr::None => 0,
            Dsr::Tcp => node_flags::DSR_TCP,
            Dsr::All => node_flags::DSR_TCP | node_flags::DSR_DATAGRAMS,
        };
        let config = NodeConfig {
            node_v4: ip(NODE[0]).into(),
            node_v6: ip(NODE[1]).into(),
            vxlan_ifindex: VXLAN_IFINDEX,
            flags: masquerade | dsr | if routed { 0 } else { node_flags::VXLAN },
            snat_first: Port::new(*SNAT.start()),
            snat_last: Port::new(*SNAT.end()),
            vxlan_port: Port::new(8472),
            ..NodeConfig::default()
        }
        .with_pods_v6_word(Addr::from(pod(1, 0, true)).words()[0]);
        self.datapath.tables.set_node(&config).expect("the node's entry");
    }

    /// As a new agent does, by what the tables tell of the one before.
    pub fn restart(&mut self) {
        self.services.restore(&mut self.datapath.tables).expect("the tables are taken over");
    }

    /// Writes what changed.
    pub fn apply(&mut self) {
        self.services.apply(&mut self.datapath.tables).expect("the tables take it");
        assert!(self.services.left_out() == 0, "{:?}", self.services.problems());
    }

    /// No flow was ever seen.
    pub fn forget_flows(&mut self) {
        fn empty<K, V>(table: &mut impl keelway_maps::Table<K, V>) {
            for (key, _) in table.dump().expect("a dump") {
                table.delete(&key).expect("a removal");
            }
        }
        empty(&mut self.datapath.tables.conntrack);
        empty(&mut self.datapath.tables.nat);
        empty(&mut self.datapath.tables.affinity);
    }

    /// What became of a client's flow to a Service's address; `None` of one that this node does not know.
    pub fn service_flow(&self, client: SocketAddr, to: SocketAddr, proto: u8) -> Option<CtEntry> {
        let key = CtKey {
            src: client.ip().into(),
            dst: to.ip().into(),
            sport: Port::new(client.port()),
            dport: Port::new(to.port()),
            proto,
            scope: scope::SERVICE,
            reserved: 0,
        };
        self.datapath.tables.conntrack.get(&key).expect("a look-up")
    }

    /// Lets a client's affinity to all frontends be so many seconds older.
    pub fn age(&mut self, client: IpAddr, seconds: u32) {
        let table = &mut self.datapath.tables.affinity;
        let of: Vec<(AffinityKey, Affinity)> = table.dump().expect("a dump");
        for (key, value) in of.into_iter().filter(|(key, _)| key.client == Addr::from(client)) {
            let seen = value.seen.saturating_sub(u64::from(seconds) * SECOND);
            table.put(&key, &Affinity { seen, ..value }).expect("a write");
        }
    }

    /// Whether a backend drains; `None` when the tables no longer have it.
    pub fn drains(&self, backend: &keelway_proxy::Backend) -> Option<bool> {
        let is = |(_, entry): &(u32, keelway_layout::Backend)| {
            (IpAddr::from(entry.addr), entry.port.get(), entry.proto) == (backend.addr, backend.port, backend.proto)
        };
        let found = self.datapath.tables.backends.dump().expect("a dump").into_iter().find(is);
        found.map(|(_, entry)| entry.flags & keelway_layout::backend_flags::DRAINING != 0)
    }

    /// Runs a hook's program on a packet, Ethernet header first. What comes by the network meets the hook before tc's first, two
    /// times of three: a flow may go by either.
    pub fn run(&mut self, hook: Hook, packet: &[u8]) -> Did {
        const XDP_PASS: i32 = 2;
        const XDP_TX: i32 = 3;
        self.arrivals += 1;
        if hook == Hook::NodeIngress && !self.arrivals.is_multiple_of(3) {
            let did = self.run_alone(Hook::NodeXdp, packet);
            if did.run.verdict != XDP_PASS {
                assert_eq!(did.run.verdict, XDP_TX, "{:?}", did.counted);
                assert_eq!(did.run.packet[..12], [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1], "to the neighbour");
                self.turned += 1;
                let (inside, tunnelled) = match packet::tunnelled(&did.run.packet) {
                    Some((inside, id)) => (inside, Some(id)),
                    None => (did.run.packet, None),
                };
                self.tunnelled += usize::from(tunnelled.is_some());
                return Did { run: Run { verdict: REDIRECT, packet: inside, ..did.run }, tunnelled, ..did };
            }
            assert!(did.run.packet == packet && did.counted.is_empty(), "left to tc as it came: {:?}", did.counted);
        }
        self.run_alone(hook, packet)
    }

    /// Runs one hook's program, without those before it.
    pub fn run_alone(&mut self, hook: Hook, packet: &[u8]) -> Did {
        let before = self.counters(hook);
        let run = match hook {
            Hook::NodeXdp => self.datapath.run_xdp(packet, self.out),
            _ => self.datapath.run(hook, packet, 1),
        };
        let run = run.expect("the program runs");
        let after = self.read_counters(hook);
        let more = |at: &usize| after[*at].packets > before[*at].packets;
        let counted = (0..after.len()).filter(more).map(|at| Reason::ALL[at]).collect();
        self.counters.retain(|(of, _)| *of != hook);
        self.counters.push((hook, after));
        Did { run, counted, tunnelled: None }
    }

    fn counters(&self, hook: Hook) -> Vec<Counter> {
        let known = self.counters.iter().find(|(of, _)| *of == hook);
        known.map_or_else(|| self.read_counters(hook), |(_, counters)| counters.clone())
    }

    fn read_counters(&self, hook: Hook) -> Vec<Counter> {
        let read = |reason: &Reason| self.datapath.tables.counters.get(hook, *reason).expect("a counter");
        Reason::ALL.iter().map(read).collect()
    }
}

/// Where a packet to a Service's client, or from one, is expected to come from: an address and, where it is to be one of the node's
/// own, any of its ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Of(SocketAddr),
    Node(IpAddr),
}

impl Source {
    pub fn is(&self, seen: SocketAddr) -> bool {
        match self {
            Self::Of(addr) => *addr == seen,
            Self::Node(addr) => *addr == seen.ip() && SNAT.contains(&seen.port()),
        }
    }
}
