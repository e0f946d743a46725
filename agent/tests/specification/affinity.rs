//! ClientIP affinity where addresses of one Service port have other backends: what one cannot have does not take a client from what it
//! has by another.

use std::net::SocketAddr;

use keelway_layout::Hook;
use serde_json::json;

use crate::kernel::{Dsr, Kernel, NODE, ip, pod};
use crate::packet::{self, SYN, TCP};
use crate::writes::put;

const NODE_PORT: u16 = 30_080;

#[test]
fn a_client_stays_with_a_backend_that_another_address_cannot_lead_to() {
    let Some(mut kernel) = Kernel::new() else { return };
    kernel.set_mode(true, Dsr::None);
    let own = ip(NODE[0]);
    kernel.services.set_addresses(vec![(own, false)]);
    put(
        &mut kernel.services,
        json!({"kind": "Service", "metadata": {"namespace": "ns", "name": "s"},
        "spec": {"type": "NodePort", "clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4"], "internalTrafficPolicy": "Local",
            "sessionAffinity": "ClientIP", "ports": [{"name": "p", "port": 80, "nodePort": NODE_PORT}]}}),
    );
    let (here, there) = (pod(1, 3, false), pod(2, 3, false));
    put(
        &mut kernel.services,
        json!({"kind": "EndpointSlice", "addressType": "IPv4", "ports": [{"name": "p", "port": 8080}],
        "metadata": {"namespace": "ns", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
        "endpoints": [{"addresses": [here], "nodeName": "n1"}, {"addresses": [there], "nodeName": "n2"}]}),
    );
    kernel.apply();
    let mut port = 10_000;
    let mut dial = |kernel: &mut Kernel, to: SocketAddr| {
        port += 1;
        let client = SocketAddr::new(pod(1, 2, false), port);
        let did = kernel.run(Hook::PodIngress, &packet::flow(client, to, TCP, SYN));
        packet::read(&did.run.packet).expect("a sound packet").dst.ip()
    };
    let (node_port, cluster_ip) = (SocketAddr::new(own, NODE_PORT), SocketAddr::new(ip("10.96.0.1"), 80));
    // Until it has the one that only the node port leads to.
    while dial(&mut kernel, node_port) != there {
        kernel.forget_flows();
    }
    for _ in 0..20 {
        assert_eq!(dial(&mut kernel, cluster_ip), here);
        assert_eq!(dial(&mut kernel, node_port), there);
    }
    kernel.forget_flows();
    // What both lead to, both keep.
    for _ in 0..20 {
        assert_eq!(dial(&mut kernel, cluster_ip), here);
        assert_eq!(dial(&mut kernel, node_port), here);
    }
}
