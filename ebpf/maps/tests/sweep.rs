//! Flows past their time leave the tables; a flow that begins anew under the keys of one that is over is never lost. With the
//! kernel's maps and the real programs on real packets, as root.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Bpffs, client, pod_and_service, service_packet};
use keelway_layout::{CtEntry, CtKey, Hook, NatEntry, Port, scope};
use keelway_maps::{Datapath, Table};

const SECOND: u64 = 1_000_000_000;

fn now() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    Duration::from(now).as_nanos() as u64
}

fn key(number: u16, scope: u8) -> CtKey {
    CtKey { src: client(), sport: Port::new(number), dport: Port::new(80), proto: 6, scope, ..CtKey::default() }
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn what_is_past_its_time_leaves_and_the_rest_stays() {
    let bpffs = Bpffs::new();
    let mut datapath = Datapath::open(bpffs.path()).unwrap();
    let now = now();
    // Long past, past but within the grace, and alive; in every table and scope.
    let ends = [now - 60 * SECOND, now - SECOND, now + 600 * SECOND];
    for (number, expires) in (0..3_000_u16).zip(ends.into_iter().cycle()) {
        for scope in [scope::OUT, scope::IN, scope::SERVICE] {
            let entry = CtEntry { expires, ..CtEntry::default() };
            datapath.tables.conntrack.put(&key(number, scope), &entry).unwrap();
        }
        for scope in [scope::NAT_OUT, scope::NAT_IN] {
            datapath.tables.nat.put(&key(number, scope), &NatEntry { expires, ..NatEntry::default() }).unwrap();
        }
    }
    let mut sweep = datapath.sweep().unwrap();
    // Slices of less than a table, as the agent takes them.
    for _ in 0..100 {
        sweep.step(700).unwrap();
    }
    let found = sweep.found();
    assert_eq!(found.map(|table| (table.live, table.expired, table.removed)), [(3000, 3000, 3000), (2000, 2000, 2000)]);
    assert!(found.iter().all(|table| table.passes > 1), "{found:?}");
    assert_eq!((datapath.tables.conntrack.len().unwrap(), datapath.tables.nat.len().unwrap()), (6000, 4000));
    for (number, expires) in (0..3_000_u16).zip(ends.into_iter().cycle()) {
        let there = datapath.tables.conntrack.get(&key(number, scope::SERVICE)).unwrap().is_some();
        assert_eq!(there, expires != ends[0], "{number}");
    }
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn a_flow_that_begins_where_one_ended_outlives_thousands_of_sweeps() {
    let bpffs = Bpffs::new();
    let mut datapath = Datapath::open(bpffs.path()).unwrap();
    let frontend = pod_and_service(&mut datapath.tables);
    let mut sweep = datapath.sweep().unwrap();
    let (stop, swept) = (AtomicBool::new(false), std::sync::atomic::AtomicU64::new(0));
    let begun = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                sweep.pass().unwrap();
                swept.fetch_add(1, Ordering::Relaxed);
            }
        });
        let packet = service_packet(4000, frontend);
        let service = CtKey { dst: frontend.0, sport: Port::new(4000), ..key(0, scope::SERVICE) };
        let (mut begun, start) = (0_u64, Instant::now());
        while swept.load(Ordering::Relaxed) < 3_000 || begun < 3_000 {
            assert!(start.elapsed() < Duration::from_secs(600), "{begun} flows, {swept:?} sweeps");
            // The first packet of a flow, in place of an entry that the sweep is after.
            let run = datapath.run(Hook::PodIngress, &packet, 1).unwrap();
            let backend = run.packet[30..34].to_vec();
            begun += 1;
            let entry = datapath.tables.conntrack.get(&service).unwrap();
            let mut entry = entry.unwrap_or_else(|| panic!("flow {begun} was removed as it began"));
            assert!(entry.expires > now(), "flow {begun} did not begin: verdict {}", run.verdict);
            // And its next goes where the first went.
            let run = datapath.run(Hook::PodIngress, &packet, 1).unwrap();
            assert_eq!(run.packet[30..34], backend, "flow {begun}");
            // All of it is over, long ago.
            for scope in [scope::SERVICE, scope::OUT] {
                let mut key = CtKey { scope, ..service };
                if scope == scope::OUT {
                    (key.dst, key.dport) = (common::v4(backend.clone().try_into().unwrap()), Port::new(8080));
                    entry = datapath.tables.conntrack.get(&key).unwrap().expect("the flow to the backend");
                }
                entry.expires = 1;
                datapath.tables.conntrack.put(&key, &entry).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
        begun
    });
    let removed = sweep.found()[0].removed;
    println!("{begun} flows began, {removed} entries were removed in {swept:?} sweeps");
    assert!(removed > 100, "the sweep met {removed} of {begun} flows: nothing was tried");
}
