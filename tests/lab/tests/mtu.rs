//! How large a packet may be, on every path: the largest passes whole, and of one byte more the sender is told.
mod wire;

use std::net::{IpAddr, SocketAddr};

use keelway_lab::standalone::{self, Standalone};

use wire::{Fate, PORT, Place};

/// Of the lab's cables, less what VXLAN over IPv4 adds.
const POD_MTU: u32 = 1500 - 50;
/// Of the last cable on the way to the machine beyond.
const NARROW: u32 = 1300;
const BEYOND: [&str; 2] = ["198.51.100.10", "2001:db8:51::10"];
const VIPS: [&str; 2] = ["10.96.0.30", "fd00:10:96::30"];

fn at(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, PORT)
}

fn of(text: &str) -> SocketAddr {
    at(text.parse().unwrap())
}

/// The largest passes both for the first time and again; of one more the sender is told, and what it was told passes.
#[track_caller]
fn fits_exactly(what: &str, from: &Place, target: SocketAddr, mtu: u32) {
    let size = mtu as usize;
    assert_eq!(from.send(target, size), Fate::Answered, "{what}, {target}: {size} bytes");
    assert_eq!(from.send(target, size + 1), Fate::TooBig(mtu), "{what}, {target}: {} bytes", size + 1);
    assert_eq!(from.send(target, size), Fate::Answered, "{what}, {target}: {size} bytes again");
}

/// A machine behind the one outside, over a narrow cable.
fn beyond(s: &Standalone) -> Place {
    let outside = Place::host(&s.lab.outside);
    let host = s.lab.add_host("beyond", 20).unwrap();
    let place = Place::host(&host);
    place.ip("link set eth0 down");
    outside.ip(&format!(
        "link add narrow mtu {NARROW} type veth peer name narrow mtu {NARROW} netns {}",
        host.netns().file_name().unwrap().display()
    ));
    for (side, v4, v6) in
        [(&outside, "198.51.100.1/24", "2001:db8:51::1/64"), (&place, "198.51.100.10/24", "2001:db8:51::10/64")]
    {
        side.ip(&format!("addr add {v4} dev narrow"));
        side.ip(&format!("addr add {v6} dev narrow nodad"));
        side.ip("link set narrow up");
    }
    place.ip("route replace default via 198.51.100.1 dev narrow");
    place.ip("-6 route replace default via 2001:db8:51::1 dev narrow");
    place
}

fn service(s: &Standalone, backend: &standalone::Pod) {
    let [v4, v6] = VIPS;
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: big, namespace: default}}\n\
         spec: {{type: ClusterIP, clusterIP: {v4}, clusterIPs: [\"{v4}\", \"{v6}\"], \
         ports: [{{name: u, protocol: UDP, port: {PORT}, targetPort: {PORT}}}]}}\n"
    );
    for (family, is_v6) in [("IPv4", false), ("IPv6", true)] {
        text += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n\
             metadata: {{name: big-{is_v6}, namespace: default, labels: {{kubernetes.io/service-name: big}}}}\n\
             ports: [{{name: u, protocol: UDP, port: {PORT}}}]\n\
             endpoints: [{{addresses: [\"{}\"], conditions: {{ready: true}}}}]\n",
            backend.address(is_v6)
        );
    }
    s.write("service-big", &text).unwrap();
}

#[test]
fn the_largest_packet_passes_on_every_path_and_of_one_more_byte_the_sender_is_told() {
    if let Some(reason) = standalone::missing() {
        println!("skipped: {reason}");
        return;
    }
    let s = Standalone::new(2, &[]).unwrap();
    let [a, b] = ["a", "b"].map(|name| s.pod(1, name, &[]).unwrap());
    let c = s.pod(2, "c", &[]).unwrap();
    let [from, near, far] = [&a, &b, &c].map(|pod| Place::pod(&s, pod));
    let outside = Place::host(&s.lab.outside);
    let beyond = beyond(&s);
    for place in [&near, &far, &outside, &beyond] {
        place.serve();
    }
    service(&s, &c);
    let node = Place::host(s.node(1));
    for v6 in [false, true] {
        let family = usize::from(v6);
        let out: IpAddr = if v6 { s.lab.outside.v6.into() } else { s.lab.outside.v4.into() };
        fits_exactly("pod to pod, one node", &from, at(b.address(v6)), POD_MTU);
        fits_exactly("pod to pod, two nodes", &from, at(c.address(v6)), POD_MTU);
        fits_exactly("host to its pod", &node, at(b.address(v6)), POD_MTU);
        fits_exactly("host to a pod of another node", &node, at(c.address(v6)), POD_MTU);
        fits_exactly("pod to the outside, masqueraded", &from, at(out), POD_MTU);
        let vip = of(VIPS[family]);
        keelway_lab::sh::wait_for("the Service", keelway_lab::sh::SOON, || {
            anyhow::ensure!(from.send(vip, 100) == Fate::Answered);
            Ok(())
        })
        .unwrap();
        fits_exactly("Service, translated packet by packet", &from, vip, POD_MTU);
        // The router's complaint is about a packet with the node's address, and has to reach the pod that sent it.
        fits_exactly("pod to a machine behind a narrow cable", &from, of(BEYOND[family]), NARROW);
        assert_eq!(
            far.send(of(BEYOND[family]), POD_MTU as usize),
            Fate::TooBig(NARROW),
            "the largest its device takes"
        );
        for (what, from, target) in [
            ("one node", &from, at(b.address(v6))),
            ("two nodes", &from, at(c.address(v6))),
            ("host to another node", &node, at(c.address(v6))),
            ("outside, masqueraded", &from, at(out)),
            ("behind a narrow cable", &from, of(BEYOND[family])),
        ] {
            let bytes = 16 << 20;
            let before = node.sent("keelway-vxlan");
            let (counted, took) = from.stream(target, bytes);
            assert_eq!(counted, bytes, "{what}, {target}");
            println!("{what}, {target}: {bytes} bytes in {took:?}");
            if what == "two nodes" {
                // Large segments cross the tunnel whole, and are cut where they leave the node.
                let after = node.sent("keelway-vxlan");
                let mean = (after.0 - before.0) / (after.1 - before.1).max(1);
                assert!(mean > 2 * u64::from(POD_MTU), "{what}, {target}: segments of {mean} bytes in the tunnel");
            }
        }
    }
}
