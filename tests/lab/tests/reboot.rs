//! A node loses power and boots: the kernel has forgotten everything, the disk has not.
use std::collections::BTreeSet;
use std::net::SocketAddr;

use keelway_lab::probe::Asked;
use keelway_lab::sh::{SOON, wait_for};
use keelway_lab::standalone::{self, Pod, Standalone};

fn ask(s: &Standalone, from: &Pod, to: &Pod, v6: bool, timeout: &str) -> Asked {
    let target = SocketAddr::from((to.address(v6), 8080)).to_string();
    s.probe(from, &["ask", &target, "--count", "10", "--timeout", timeout]).unwrap()
}

#[test]
fn pods_are_back_after_a_power_cut_and_nothing_is_left_of_the_dead_ones() {
    if let Some(reason) = standalone::missing() {
        println!("skipped: {reason}");
        return;
    }
    let mut s = Standalone::new(2, &[]).unwrap();
    let steady = s.pod(2, "steady", &[]).unwrap();
    let before: Vec<Pod> = ["a", "b", "c"].map(|name| s.pod(1, name, &[]).unwrap()).into();
    for pod in &before {
        assert_eq!(ask(&s, &steady, pod, false, "5000").answered(), 10);
    }
    s.kill_node(1).unwrap();
    assert_eq!(ask(&s, &steady, &before[0], false, "500").answered(), 0);

    s.boot_node(1).unwrap();
    // The dead pods' devices and endpoints are gone.
    let devices = || s.node(1).run(&["ls", "/sys/class/net"]).unwrap().split_whitespace().count();
    let idle = devices();
    let endpoints = || s.status(1).unwrap()["counts"]["endpoints"].as_u64().unwrap();
    assert_eq!(endpoints(), 0);
    let after: Vec<Pod> = ["a2", "b2", "c2"].map(|name| s.pod(1, name, &[]).unwrap()).into();
    assert_eq!((devices(), endpoints()), (idle + after.len(), 3));
    let addresses: BTreeSet<_> = after.iter().flat_map(|pod| pod.sandbox.addresses.clone()).collect();
    assert_eq!(addresses.len(), 6, "two pods share an address: {after:?}");
    for pod in &after {
        for v6 in [false, true] {
            // The other node's agent hears of the new pods a moment later.
            wait_for("the new pod", SOON, || {
                let (there, back) = (ask(&s, &steady, pod, v6, "500"), ask(&s, pod, &steady, v6, "500"));
                anyhow::ensure!(there.answered() == 10 && back.answered() == 10, "{there:?} {back:?}");
                Ok(())
            })
            .unwrap();
        }
    }
    for pod in &after {
        s.remove_pod(pod).unwrap();
    }
    assert_eq!((devices(), endpoints()), (idle, 0));
}
