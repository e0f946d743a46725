//! One client port, used for a Service and then for its backend itself, and the other way round: each flow's answers come from whom
//! that flow dialled.

use std::net::SocketAddr;

use keelway_layout::{Hook, Reason};
use serde_json::json;

use crate::kernel::{Dsr, Kernel, NODE, REDIRECT, ip, is_behind_v6, pod};
use crate::packet::{self, ACK, FIN, RST, SCTP, SYN, TCP, UDP};
use crate::writes::put;

const CLIENT: u8 = 2;
const SERVER: u8 = 3;
const NODE_PORT: u16 = 30_080;

/// A Service of all protocols with one backend on this node.
fn kernel(v6: bool) -> Option<(Kernel, [SocketAddr; 3])> {
    let mut kernel = Kernel::new()?;
    kernel.set_mode(false, Dsr::None);
    let vip = if v6 { "fd00:10:96::1" } else { "10.96.0.1" };
    let ports = |port| {
        json!([{"name": "t", "protocol": "TCP", "port": port, "nodePort": NODE_PORT},
            {"name": "u", "protocol": "UDP", "port": port}, {"name": "s", "protocol": "SCTP", "port": port}])
    };
    let family = if v6 { "IPv6" } else { "IPv4" };
    put(
        &mut kernel.services,
        json!({"kind": "Service", "metadata": {"namespace": "ns", "name": "s"},
        "spec": {"type": "NodePort", "clusterIPs": [vip], "ipFamilies": [family], "ports": ports(80)}}),
    );
    put(
        &mut kernel.services,
        json!({"kind": "EndpointSlice", "addressType": family, "ports": ports(8080),
        "metadata": {"namespace": "ns", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
        "endpoints": [{"addresses": [pod(1, SERVER, v6)]}]}),
    );
    kernel.apply();
    let client = SocketAddr::new(pod(1, CLIENT, v6), 40_000);
    Some((kernel, [client, SocketAddr::new(ip(vip), 80), SocketAddr::new(pod(1, SERVER, v6), 8080)]))
}

/// Where a pod's packet goes from and to once its hook has had it; else why it was dropped.
fn sent(
    kernel: &mut Kernel,
    from: SocketAddr,
    to: SocketAddr,
    proto: u8,
    flags: u8,
) -> Result<(SocketAddr, SocketAddr), Vec<Reason>> {
    let did = kernel.run(Hook::PodIngress, &packet::flow(from, to, proto, flags));
    if did.run.verdict == 2 {
        return Err(did.counted);
    }
    let seen = packet::read(&did.run.packet).expect("a sound packet");
    Ok((seen.src, seen.dst))
}

#[test]
fn a_connection_from_a_port_that_a_service_had_is_answered_by_whom_it_dialled() {
    for (v6, proto) in [(false, TCP), (true, TCP), (false, SCTP), (true, SCTP)] {
        let Some((mut kernel, [client, vip, server])) = kernel(v6) else { return };
        let kernel = &mut kernel;
        assert_eq!(sent(kernel, client, vip, proto, SYN), Ok((client, server)));
        assert_eq!(sent(kernel, server, client, proto, SYN | ACK), Ok((vip, client)));
        // While it lasts a second one could not be told from it; what it sends itself goes on.
        assert_eq!(sent(kernel, client, server, proto, SYN), Err(vec![Reason::NatExhausted]));
        assert_eq!(sent(kernel, client, vip, proto, FIN), Ok((client, server)));
        assert_eq!(sent(kernel, client, server, proto, SYN), Err(vec![Reason::NatExhausted]), "one end is open");
        assert_eq!(sent(kernel, server, client, proto, FIN | ACK), Ok((vip, client)));
        // The port is free again.
        assert_eq!(sent(kernel, client, server, proto, SYN), Ok((client, server)));
        assert_eq!(sent(kernel, server, client, proto, SYN | ACK), Ok((server, client)));
        assert_eq!(sent(kernel, client, server, proto, FIN), Ok((client, server)));
        assert_eq!(sent(kernel, server, client, proto, FIN | ACK), Ok((server, client)));
        assert_eq!(sent(kernel, client, vip, proto, SYN), Ok((client, server)));
        assert_eq!(sent(kernel, server, client, proto, SYN | ACK), Ok((vip, client)));
        // What one end breaks off is over, too.
        assert_eq!(sent(kernel, server, client, proto, RST), Ok((vip, client)));
        assert_eq!(sent(kernel, client, server, proto, SYN), Ok((client, server)));
    }
}

#[test]
fn a_datagram_is_answered_by_whom_the_last_one_from_its_port_dialled() {
    for v6 in [false, true] {
        let Some((mut kernel, [client, vip, server])) = kernel(v6) else { return };
        for dialled in [vip, server, vip, server, server, vip] {
            assert_eq!(sent(&mut kernel, client, dialled, UDP, 0), Ok((client, server)), "to {dialled}");
            assert_eq!(sent(&mut kernel, server, client, UDP, 0), Ok((dialled, client)), "to {dialled}");
        }
    }
}

/// The kernel may give a node port to a connection that the node opens itself.
#[test]
fn answers_to_the_nodes_own_connection_from_a_node_port_reach_it() {
    for v6 in [false, true] {
        let Some((mut kernel, [_, _, server])) = kernel(v6) else { return };
        let own = SocketAddr::new(ip(NODE[usize::from(v6)]), NODE_PORT);
        kernel.services.set_addresses(vec![(own.ip(), false)]);
        kernel.apply();
        let outside = SocketAddr::new(ip(if v6 { "2001:db8:1::1" } else { "203.0.113.1" }), 443);
        let answer = packet::flow(outside, own, TCP, SYN | ACK);
        let did = kernel.run(Hook::NodeIngress, &answer);
        assert!(did.run.verdict == 0 && did.run.packet == answer, "{:?}", did.counted);
        // Who dials it is served, from then on with every packet.
        for flags in [SYN, ACK] {
            let did = kernel.run(Hook::NodeIngress, &packet::flow(outside, own, TCP, flags));
            assert_eq!(packet::read(&did.run.packet).map(|seen| seen.dst), Ok(server), "{:?}", did.counted);
        }
    }
}

/// A Service's address is nobody's: who asks whether it is there is told so, and does not ask the world.
#[test]
fn an_echo_request_to_a_service_is_refused() {
    for v6 in [false, true] {
        let Some((mut kernel, [client, vip, _])) = kernel(v6) else { return };
        let own = ip(NODE[usize::from(v6)]);
        for (hook, from) in [
            (Hook::PodIngress, client.ip()),
            (Hook::NodeEgress, own),
            (Hook::NodeIngress, ip(if v6 { "2001:db8:1::1" } else { "203.0.113.1" })),
        ] {
            let did = kernel.run(hook, &packet::echo(from, vip.ip()));
            let outer = packet::read(&did.run.packet).expect("a sound packet");
            assert_eq!((outer.src.ip(), outer.dst.ip()), (vip.ip(), from), "{hook:?}: {:?}", did.counted);
            let told = packet::carried(&did.run.packet).expect("an error");
            assert_eq!((told.src.ip(), told.dst.ip()), (from, vip.ip()), "{hook:?}");
            assert_eq!((did.run.verdict, did.counted.contains(&Reason::NoBackend)), (REDIRECT, true), "{hook:?}");
        }
    }
}

/// An address of the Services' range that no Service has leads nowhere: out of the node it would come back, or leave the cluster.
#[test]
fn what_is_for_no_service_of_the_range_is_dropped() {
    for v6 in [false, true] {
        let Some((mut kernel, [client, ..])) = kernel(v6) else { return };
        let nobody = SocketAddr::new(ip(if v6 { "fd00:10:96:1::7" } else { "10.96.1.7" }), 80);
        let outside = SocketAddr::new(ip(if v6 { "2001:db8:1::1" } else { "203.0.113.1" }), 40_000);
        for (hook, from) in [(Hook::PodIngress, client), (Hook::NodeIngress, outside)] {
            for proto in [TCP, UDP] {
                let did = kernel.run(hook, &packet::flow(from, nobody, proto, SYN));
                assert_eq!((did.run.verdict, &did.counted[..]), (2, &[Reason::NoEndpoint][..]), "{hook:?} {proto}");
            }
        }
    }
}

/// The hook before tc's sends through the tunnel what fits with the tunnel's headers; the rest it leaves as it is.
#[test]
fn what_does_not_fit_with_the_tunnels_headers_goes_on_to_tc() {
    const XDP_PASS: i32 = 2;
    const XDP_TX: i32 = 3;
    for (v6, last) in [(false, SERVER), (true, SERVER), (false, SERVER + 1), (true, SERVER + 1)] {
        let Some((mut kernel, _)) = kernel(v6) else { return };
        let backend = pod(2, last, v6);
        put(
            &mut kernel.services,
            json!({"kind": "EndpointSlice", "addressType": if v6 { "IPv6" } else { "IPv4" },
            "ports": [{"name": "u", "protocol": "UDP", "port": 8080}],
            "metadata": {"namespace": "ns", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
            "endpoints": [{"addresses": [backend]}]}),
        );
        let external = ip(if v6 { "2001:db8:e::10" } else { "198.51.100.10" });
        put(
            &mut kernel.services,
            json!({"kind": "Service", "metadata": {"namespace": "ns", "name": "s"},
            "spec": {"type": "NodePort", "clusterIPs": [if v6 { "fd00:10:96::1" } else { "10.96.0.1" }],
            "ipFamilies": [if v6 { "IPv6" } else { "IPv4" }], "externalIPs": [external],
            "ports": [{"name": "u", "protocol": "UDP", "port": 80}]}}),
        );
        kernel.apply();
        let client = SocketAddr::new(ip(if v6 { "2001:db8:1::1" } else { "203.0.113.1" }), 40_000);
        let fits = 1500 - if is_behind_v6(backend) { 70 } else { 50 };
        for (length, verdict) in [(fits, XDP_TX), (fits + 1, XDP_PASS), (1500, XDP_PASS), (fits, XDP_TX)] {
            let sent = packet::datagram(client, SocketAddr::new(external, 80), length);
            let did = kernel.run_alone(Hook::NodeXdp, &sent);
            assert_eq!(did.run.verdict, verdict, "{length} bytes to {backend}: {:?}", did.counted);
            let is_left = did.run.packet == sent && did.counted.is_empty();
            assert_eq!(is_left, verdict == XDP_PASS, "{length} bytes to {backend}: {:?}", did.counted);
            if verdict == XDP_TX {
                let (inside, _) = packet::tunnelled(&did.run.packet).expect("the tunnel's headers");
                assert_eq!(packet::read(&inside).map(|seen| seen.dst), Ok(SocketAddr::new(backend, 8080)));
            }
        }
    }
}
