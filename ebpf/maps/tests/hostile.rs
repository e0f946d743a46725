//! Packets that try to pass for what they are not, through the real programs, as root: each beside the honest one that passes.

mod common;

use common::{Bpffs, client, v4};
use keelway_layout::{
    Addr, Backend, CtEntry, CtKey, Endpoint, Frontend, FrontendKey, Hook, Identity, NodeConfig, Port, PrefixKey,
    SlotKey, endpoint_flags, identity, node_flags, scope,
};
use keelway_maps::{Datapath, Table};

const PASS: i32 = 0;
const DROP: i32 = 2;
const REDIRECT: i32 = 7;
const LOOPBACK: u32 = 1;
const UDP: u8 = 17;
const TUNNEL: Port = Port::new(8472);

const POD: [u8; 4] = [10, 244, 1, 2];
const NODE: [u8; 4] = [192, 168, 0, 1];
const OTHER_NODE: [u8; 4] = [192, 168, 0, 2];
const PEER: [u8; 4] = [10, 244, 2, 9];
const OUTSIDE: [u8; 4] = [203, 0, 113, 7];

/// A node with one pod, on which `flags` are enforced while no rule allows anything.
fn node(flags: u32) -> (Bpffs, Datapath) {
    let bpffs = Bpffs::new();
    let mut datapath = Datapath::open(bpffs.path()).unwrap();
    let config = NodeConfig {
        node_v4: v4(NODE),
        flags: node_flags::VXLAN | node_flags::MASQUERADE_V4,
        vxlan_ifindex: LOOPBACK,
        vxlan_port: TUNNEL,
        snat_first: Port::new(61_000),
        snat_last: Port::new(64_511),
        ..NodeConfig::default()
    };
    datapath.tables.set_node(&config).unwrap();
    let pod = Endpoint { ifindex: LOOPBACK, id: 1, incarnation: 1, subject: 256, flags, ..Endpoint::default() };
    datapath.tables.endpoints.put(&client(), &pod).unwrap();
    let known =
        [(POD, 256), (NODE, identity::HOST), (OTHER_NODE, identity::REMOTE_NODE), (PEER, identity::FIRST_POD + 1)];
    for (addr, id) in known {
        datapath.tables.identities.put(&PrefixKey::host(v4(addr)), &Identity { id, flags: 0 }).unwrap();
    }
    (bpffs, datapath)
}

fn ipv4(src: [u8; 4], dst: [u8; 4], proto: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, proto, 0, 0]);
    packet.extend(src);
    packet.extend(dst);
    packet.extend(payload);
    packet
}

fn udp(src: [u8; 4], dst: [u8; 4], ports: (u16, u16)) -> Vec<u8> {
    let mut payload = [ports.0.to_be_bytes(), ports.1.to_be_bytes(), 12_u16.to_be_bytes(), [0, 0]].concat();
    payload.extend([0; 4]);
    ipv4(src, dst, UDP, &payload)
}

fn frame(ethertype: [u8; 2], packet: &[u8]) -> Vec<u8> {
    [&[0; 12][..], &ethertype, packet].concat()
}

fn verdict(datapath: &Datapath, hook: Hook, packet: &[u8]) -> i32 {
    datapath.run(hook, &frame([8, 0], packet), 1).unwrap().verdict
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn an_icmp_error_of_an_isolated_pod_reaches_only_whom_it_is_about() {
    let (_bpffs, mut datapath) = node(endpoint_flags::ENFORCE_EGRESS);
    let flow = CtKey {
        src: v4(OUTSIDE),
        dst: client(),
        sport: Port::new(4000),
        dport: Port::new(53),
        proto: UDP,
        scope: scope::IN,
        reserved: 0,
    };
    datapath.tables.conntrack.put(&flow, &CtEntry { expires: u64::MAX, incarnation: 1, ..CtEntry::default() }).unwrap();
    let carried = udp(OUTSIDE, POD, (4000, 53));
    let error = |dst| ipv4(POD, dst, 1, &[&[3, 3, 0, 0, 0, 0, 0, 0], &carried[..]].concat());
    assert_eq!(verdict(&datapath, Hook::PodIngress, &error(OUTSIDE)), PASS);
    assert_eq!(verdict(&datapath, Hook::PodIngress, &error(OTHER_NODE)), DROP);
    assert_eq!(verdict(&datapath, Hook::PodIngress, &error(NODE)), DROP);
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn who_comes_from_the_network_under_the_nodes_address_is_not_the_node() {
    let (_bpffs, datapath) = node(endpoint_flags::ENFORCE_INGRESS);
    let from_node = udp(NODE, POD, (4000, 53));
    // From the node's own stack it may, whatever the rules; from the wire it may not.
    assert_eq!(verdict(&datapath, Hook::PodEgress, &from_node), PASS);
    assert_eq!(verdict(&datapath, Hook::NodeIngress, &from_node), DROP);
    let (_bpffs, datapath) = node(0);
    assert_eq!(verdict(&datapath, Hook::NodeIngress, &udp(OUTSIDE, POD, (4000, 53))), REDIRECT);
    assert_eq!(verdict(&datapath, Hook::NodeIngress, &from_node), DROP);
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn no_pod_writes_to_a_tunnels_port_but_another_pods() {
    let (_bpffs, datapath) = node(0);
    for (dst, port, expected) in [
        (OTHER_NODE, TUNNEL.get(), DROP),
        (NODE, TUNNEL.get(), DROP),
        // An address of a node that nobody told us of: on the way there the packet would take this node's.
        (OUTSIDE, TUNNEL.get(), DROP),
        (OUTSIDE, 8473, PASS),
        (OTHER_NODE, 8473, PASS),
    ] {
        assert_eq!(verdict(&datapath, Hook::PodIngress, &udp(POD, dst, (4000, port))), expected, "{dst:?}:{port}");
    }
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn no_service_leads_to_a_tunnels_port() {
    let (_bpffs, mut datapath) = node(0);
    let vip = [198, 51, 100, 1];
    for (id, addr) in [(1, OTHER_NODE), (2, NODE), (3, OUTSIDE)] {
        let port = Port::new(8000 + id as u16);
        let backend = Backend { addr: v4(addr), port: TUNNEL, proto: UDP, ..Backend::default() };
        datapath.tables.backends.put(&id, &backend).unwrap();
        datapath.tables.slots.put(&SlotKey { frontend: id, slot: 0 }, &id).unwrap();
        let frontend = Frontend { id, count: 1, ..Frontend::default() };
        datapath.tables.frontends.put(&FrontendKey::new(v4(vip), port, UDP), &frontend).unwrap();
        let dialled = |from| udp(from, vip, (4000, port.get()));
        assert_eq!(verdict(&datapath, Hook::NodeIngress, &dialled(OUTSIDE)), DROP, "{addr:?} from outside");
        assert_eq!(verdict(&datapath, Hook::PodIngress, &dialled(POD)), DROP, "{addr:?} from a pod");
    }
    let (_bpffs, mut datapath) = node(0);
    let backend = Backend { addr: v4(NODE), port: Port::new(53), proto: UDP, ..Backend::default() };
    datapath.tables.backends.put(&1, &backend).unwrap();
    datapath.tables.slots.put(&SlotKey { frontend: 1, slot: 0 }, &1).unwrap();
    let frontend = Frontend { id: 1, count: 1, ..Frontend::default() };
    datapath.tables.frontends.put(&FrontendKey::new(v4(vip), Port::new(53), UDP), &frontend).unwrap();
    assert_eq!(verdict(&datapath, Hook::NodeIngress, &udp(OUTSIDE, vip, (4000, 53))), PASS);
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn an_ipv6_packet_with_mapped_addresses_is_no_ipv4_packet() {
    let (_bpffs, mut datapath) = node(0);
    let own: Addr = "fd00::2".parse::<std::net::IpAddr>().unwrap().into();
    let pod = datapath.tables.endpoints.get(&client()).unwrap().unwrap();
    datapath.tables.endpoints.put(&own, &pod).unwrap();
    let run = |src: Addr, dst: Addr| {
        let header = [&[0x60, 0, 0, 0, 0, 8, UDP, 64][..], &src.octets(), &dst.octets()].concat();
        let packet = [&header[..], &4000_u16.to_be_bytes(), &53_u16.to_be_bytes(), &[0, 8, 0, 1]].concat();
        datapath.run(Hook::PodIngress, &frame([0x86, 0xdd], &packet), 1).unwrap().verdict
    };
    let outside: Addr = "2001:db8::1".parse::<std::net::IpAddr>().unwrap().into();
    assert_eq!(run(own, outside), PASS);
    assert_eq!(run(client(), v4(PEER)), DROP);
    assert_eq!(run(client(), outside), DROP);
    assert_eq!(run(own, v4(OUTSIDE)), DROP);
}
