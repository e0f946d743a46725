//! What a change costs in writes, and that a failed one shows no packet anything but the old or the new.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use keelway_agent::engine::{ServiceTables, Services};
use keelway_agent::source::convert;
use keelway_layout::Hook;
use keelway_maps::{Datapath, TableError};
use keelway_proxy::{Backend, Dump, Op};
use serde_json::{Value, json};

use crate::kernel::{Dsr, Kernel};
use crate::packet::{self, SYN, TCP};

/// The kernel's tables, counted, and refusing one write when told so.
struct Counted<'a, W: FnMut(&Datapath)> {
    datapath: &'a mut Datapath,
    writes: Vec<Op>,
    /// Writes until the one that is refused.
    fail_after: Option<usize>,
    /// Looks after each write.
    watch: W,
}

impl<W: FnMut(&Datapath)> ServiceTables for Counted<'_, W> {
    fn write(&mut self, op: &Op) -> Result<(), TableError> {
        if self.fail_after == Some(self.writes.len()) {
            return Err(TableError::Busy { table: "refusing" });
        }
        self.writes.push(*op);
        self.datapath.tables.write(op)?;
        (self.watch)(self.datapath);
        Ok(())
    }
    fn dump(&self) -> Result<Dump, TableError> {
        self.datapath.tables.dump()
    }
    fn backend(&self, id: u32) -> Result<Option<Backend>, TableError> {
        self.datapath.tables.backend(id)
    }
}

/// Hands an object to the model as the API would.
pub fn put(services: &mut Services, object: Value) {
    if object["kind"] == "EndpointSlice" {
        let slice = convert::endpoint_slice(&serde_json::from_value(object).unwrap()).unwrap().unwrap();
        services.slice_changed(slice.0, None);
    } else {
        services.model.upsert_service(convert::service(&serde_json::from_value(object).unwrap()).unwrap());
    }
}

fn service(number: usize) -> Value {
    json!({
        "kind": "Service", "metadata": {"namespace": "ns", "name": format!("s{number}")},
        "spec": {"clusterIPs": [format!("10.{}.{}.{}", 96 + number / 65_536, number / 256 % 256, number % 256)],
            "ports": [{"name": "p", "port": 80}]},
    })
}

fn slice(number: usize, endpoints: usize) -> Value {
    let address = |at| format!("10.{}.{}.{}", 150 + number / 1000, number / 4 % 250, number % 4 * 60 + at + 1);
    json!({
        "kind": "EndpointSlice", "addressType": "IPv4", "ports": [{"name": "p", "port": 8080}],
        "metadata": {"namespace": "ns", "name": format!("s{number}-1"), "labels": {"kubernetes.io/service-name": format!("s{number}")}},
        "endpoints": (0..endpoints).map(|at| json!({"addresses": [address(at)]})).collect::<Vec<_>>(),
    })
}

/// 10,000 Services of ten endpoints; in one of them there are eleven.
#[test]
fn one_endpoint_more_among_a_hundred_thousand_is_a_handful_of_writes() {
    let Some(mut kernel) = Kernel::new() else { return };
    for number in 1..=10_000 {
        put(&mut kernel.services, service(number));
        put(&mut kernel.services, slice(number, 10));
    }
    kernel.apply();
    put(&mut kernel.services, slice(4711, 11));
    let datapath = &mut kernel.datapath;
    let mut counted = Counted { datapath, writes: Vec::new(), fail_after: None, watch: |_: &Datapath| {} };
    kernel.services.apply(&mut counted).unwrap();
    let writes = counted.writes;
    println!("{} writes: {writes:?}", writes.len());
    // The backend, its slot, and the frontend that counts it.
    assert_eq!(writes.len(), 3, "{writes:?}");
    // And back. What is idle is removed after what named it.
    put(&mut kernel.services, slice(4711, 10));
    let datapath = &mut kernel.datapath;
    let mut counted = Counted { datapath, writes: Vec::new(), fail_after: None, watch: |_: &Datapath| {} };
    kernel.services.apply(&mut counted).unwrap();
    assert!(counted.writes.len() <= 4, "{:?}", counted.writes);
}

/// Every write of a change is refused once. After each write that is made, before and after the resync, new flows reach
/// backends of the old set or of the new one, and at the end of the new one alone.
#[test]
fn a_refused_write_and_the_resync_after_it_show_no_packet_anything_else() {
    let Some(mut kernel) = Kernel::new() else { return };
    kernel.set_mode(true, Dsr::None);
    let mut sport = 10_000;
    let old: BTreeSet<SocketAddr> = (1..=6).map(|at| format!("10.150.0.{}:8080", 60 + at).parse().unwrap()).collect();
    let put_endpoints = |kernel: &mut Kernel, endpoints: &BTreeSet<SocketAddr>| {
        let mut object = slice(1, 0);
        object["endpoints"] = endpoints.iter().map(|at| json!({"addresses": [at.ip()]})).collect();
        put(&mut kernel.services, object);
    };
    let (mut refused, mut looks) = (0, 0);
    for fail_after in 0..40 {
        put(&mut kernel.services, service(1));
        put_endpoints(&mut kernel, &old);
        kernel.apply();
        // Half of them go, others come.
        let new: BTreeSet<SocketAddr> =
            (4..=12).map(|at| format!("10.150.0.{}:8080", 60 + at).parse().unwrap()).collect();
        put_endpoints(&mut kernel, &new);
        let either: BTreeSet<SocketAddr> = old.union(&new).copied().collect();
        let Kernel { services, datapath, .. } = &mut kernel;
        let probe = |datapath: &Datapath, sport: &mut u16, allowed: &BTreeSet<SocketAddr>| {
            for _ in 0..12 {
                *sport = if *sport > 59_000 { 10_000 } else { *sport + 1 };
                let client = SocketAddr::from(([203, 0, 113, 9], *sport));
                let sent = packet::flow(client, "10.96.0.1:80".parse().unwrap(), TCP, SYN);
                let run = datapath.run(Hook::NodeIngress, &sent, 1).unwrap();
                let seen = packet::read(&run.packet).unwrap();
                assert!(run.verdict != 2 && allowed.contains(&seen.dst), "write {fail_after}: {seen:?} of {allowed:?}");
            }
        };
        let mut watch = |datapath: &Datapath| {
            probe(datapath, &mut sport, &either);
            looks += 1;
        };
        let mut counted = Counted { datapath, writes: Vec::new(), fail_after: Some(fail_after), watch: &mut watch };
        let failed = services.apply(&mut counted).is_err();
        refused += usize::from(failed);
        if failed {
            let mut again = Counted { datapath, writes: Vec::new(), fail_after: None, watch: &mut watch };
            services.restore(&mut again).unwrap();
        }
        probe(datapath, &mut sport, &new);
        kernel.forget_flows();
        if !failed {
            break;
        }
    }
    println!("{refused} refused writes, {looks} looks");
    assert!(refused >= 9 && looks > 100, "{refused} refused, {looks} looks");
}

/// The same objects, written entry by entry into one kernel's tables and in batches into another's; then changed, and once more.
#[test]
fn batches_leave_what_single_writes_leave() {
    let (Some(mut single), Some(mut batched)) = (Kernel::new(), Kernel::new()) else { return };
    let mut random = crate::objects::Random::new(7);
    for _ in 0..40 {
        // As many Services as make a batch of each round, beside those that random changes pile up.
        let number = random.below(300);
        let mut objects: Vec<Value> =
            crate::objects::scenario(&mut random).steps.into_iter().flat_map(|step| step.put).collect();
        for number in number..number + 40 {
            objects.push(service(number));
            objects.push(slice(number, random.below(9)));
        }
        for object in objects {
            put(&mut single.services, object.clone());
            put(&mut batched.services, object);
        }
        let datapath = &mut single.datapath;
        let mut counted = Counted { datapath, writes: Vec::new(), fail_after: None, watch: |_: &Datapath| {} };
        single.services.apply(&mut counted).unwrap();
        batched.services.apply(&mut batched.datapath.tables).unwrap();
        let [single, batched] = [&single, &batched].map(|kernel| {
            let mut dump = kernel.datapath.tables.dump().unwrap();
            dump.frontends.sort_unstable_by_key(|(key, _)| *key);
            dump.slots.sort_unstable();
            dump.backends.sort_unstable();
            dump.members.sort_unstable();
            dump.source_ranges.sort_unstable();
            dump
        });
        assert!(batched == single, "{batched:?}\n{single:?}");
    }
}
