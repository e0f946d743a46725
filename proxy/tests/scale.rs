//! The cost of a change is its Service's, not the cluster's.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use keelway_proxy::model::{EndpointPort, EndpointSlice, Protocol, Service, ServicePort, ServiceType, SliceEndpoint};
use keelway_proxy::{Limits, Model, NodeInfo, ObjectName, Op, Tables, maglev};

const LIMITS: Limits =
    Limits { frontends: 131_072, slots: 1_048_576, backends: 262_144, source_ranges: 65_536, maglev: maglev::SIZES };

fn v4(base: [u8; 2], n: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(u32::from_be_bytes([base[0], base[1], 0, 0]) + n))
}

fn service(n: u32) -> Service {
    Service {
        name: ObjectName::new("ns", format!("s{n}")),
        service_type: ServiceType::NodePort,
        cluster_ips: vec![v4([10, 96], n)],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 30_000 + n as u16,
        }],
        ..Service::default()
    }
}

fn slice(n: u32, endpoints: std::ops::Range<u32>) -> EndpointSlice {
    let endpoint = |i: u32| SliceEndpoint {
        addresses: vec![v4([10, 0], n * 10 + i)],
        ready: true,
        serving: true,
        node_name: Some(format!("n{}", i % 7)),
        ..SliceEndpoint::default()
    };
    EndpointSlice {
        name: ObjectName::new("ns", format!("s{n}-1")),
        service: format!("s{n}"),
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: Some(8080) }],
        endpoints: endpoints.map(endpoint).collect(),
        problems: Vec::new(),
    }
}

#[test]
fn one_endpoint_more_among_a_hundred_thousand() {
    let mut model = Model::new(NodeInfo { name: "n1".into(), ..NodeInfo::default() });
    let mut tables = Tables::new(LIMITS);
    for n in 0..10_000 {
        model.upsert_service(service(n));
        model.upsert_slice(slice(n, 0..10));
    }
    let begun = Instant::now();
    let ops: usize = model.take_changes().iter().map(|change| tables.apply(change).unwrap().len()).sum();
    let full = begun.elapsed();
    // Two frontends with ten slots each, one refusal, ten backends.
    assert_eq!(ops, 10_000 * (2 * 11 + 1 + 10));

    let mut times = Vec::new();
    for n in (0..10_000).step_by(100) {
        // Its own address, which no other Service has.
        let mut more = slice(n, 0..10);
        let mut new = more.endpoints[0].clone();
        new.addresses = vec![v4([10, 9], n)];
        more.endpoints.push(new);
        let begun = Instant::now();
        model.upsert_slice(more);
        let changes = model.take_changes();
        assert_eq!(changes.len(), 1);
        let ops = tables.apply(&changes[0]).unwrap();
        times.push(begun.elapsed());
        let kinds: Vec<&str> = ops
            .iter()
            .map(|op| match op {
                Op::PutBackend { .. } => "backend",
                Op::PutSlot { key, .. } if key.slot == 10 => "slot",
                Op::PutFrontend { frontend, .. } if frontend.count == 11 => "frontend",
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(kinds, ["backend", "slot", "frontend", "slot", "frontend"]);
        let ids: BTreeSet<u32> = ops
            .iter()
            .filter_map(|op| if let Op::PutFrontend { frontend, .. } = op { Some(frontend.id) } else { None })
            .collect();
        assert_eq!(ids.len(), 2, "its cluster IP's and its node port's");
    }
    times.sort();
    println!(
        "full build of 10,000 x 10: {full:?}, {ops} writes; one endpoint more: p50 {:?}, p99 {:?}",
        times[50], times[99]
    );
}
