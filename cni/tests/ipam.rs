//! Leases: who gets which address, and what a crash leaves of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::net::IpAddr;
use std::process::{Command, Stdio};

use ipnet::IpNet;
use keelway_cni::ipam::journal::Journal;
use keelway_cni::ipam::{Book, IpamError, LeaseStore, MemoryStore, Pool, Record, StoreError, Usage};
use keelway_cni::lease::LeaseRequest;
use keelway_cni::{Lease, LeaseKey, PodRef};
use proptest::prelude::*;

fn cidrs(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

fn request(container: &str) -> LeaseRequest {
    LeaseRequest {
        key: LeaseKey::new(container, "eth0"),
        network: "keelway".into(),
        netns: format!("/run/netns/{container}"),
        pod: PodRef { namespace: "ns".into(), name: container.into(), uid: format!("uid-{container}") },
        mtu: 1450,
    }
}

fn book(texts: &[&str]) -> Book<MemoryStore> {
    Book::open(MemoryStore::default(), &cidrs(texts)).unwrap()
}

fn texts(lease: &Lease) -> Vec<String> {
    lease.addresses.iter().map(ToString::to_string).collect()
}

#[test]
fn addresses_go_up_from_behind_the_nodes_own() {
    let mut book = book(&["10.244.1.0/24", "fd00:244:1::/64"]);
    let host: Vec<_> = book.pool().host_addresses().iter().map(ToString::to_string).collect();
    assert_eq!(host, ["10.244.1.1", "fd00:244:1::1"]);
    assert_eq!(texts(&book.allocate(&request("a")).unwrap()), ["10.244.1.2", "fd00:244:1::2"]);
    assert_eq!(texts(&book.allocate(&request("b")).unwrap()), ["10.244.1.3", "fd00:244:1::3"]);
    assert_eq!(texts(&book.allocate(&request("a")).unwrap()), ["10.244.1.2", "fd00:244:1::2"], "the same again");
    let second = LeaseRequest { key: LeaseKey::new("a", "net1"), ..request("a") };
    assert_eq!(
        texts(&book.allocate(&second).unwrap()),
        ["10.244.1.4", "fd00:244:1::4"],
        "another interface, another lease"
    );
    let owner = book.pool().owner("10.244.1.3".parse().unwrap()).unwrap();
    assert_eq!(owner.key, LeaseKey::new("b", "eth0"));
}

#[test]
fn a_repeated_request_brings_the_lease_up_to_date() {
    let mut book = book(&["10.244.1.0/24"]);
    let first = book.allocate(&request("a")).unwrap();
    let moved = LeaseRequest { netns: "/run/netns/other".into(), mtu: 1400, ..request("a") };
    let second = book.allocate(&moved).unwrap();
    assert_eq!(second.addresses, first.addresses);
    assert_eq!((second.netns.as_str(), second.mtu), ("/run/netns/other", 1400));
    assert_eq!(book.pool().get(&first.key), Some(&second));
}

#[test]
fn a_full_range_says_so_and_hands_out_what_comes_free() {
    let mut book = book(&["10.244.1.0/29", "fd00::/64"]);
    for n in 0..5 {
        book.allocate(&request(&format!("c{n}"))).unwrap();
    }
    assert_eq!(book.pool().usage()[0], Usage { cidr: "10.244.1.0/29".parse().unwrap(), capacity: 5, used: 5 });
    let full = book.allocate(&request("late")).unwrap_err();
    assert_eq!(full.to_string(), "pod CIDR 10.244.1.0/29: all 5 addresses are leased");
    assert_eq!(book.pool().usage()[1].used, 5, "nothing of the other family was taken");
    book.release(&LeaseKey::new("c2", "eth0")).unwrap().unwrap();
    assert_eq!(texts(&book.allocate(&request("late")).unwrap())[0], "10.244.1.4", "the only free one, however recent");
}

#[test]
fn what_was_released_last_is_reused_last_also_after_a_restart() {
    let mut book = book(&["10.244.1.0/28"]);
    let capacity = book.pool().usage()[0].capacity;
    assert_eq!(capacity, 13);
    for n in 0..4 {
        book.allocate(&request(&format!("c{n}"))).unwrap();
    }
    for n in [1, 3, 0] {
        book.release(&LeaseKey::new(format!("c{n}"), "eth0")).unwrap().unwrap();
    }
    let continue_with = |mut book: Book<MemoryStore>| {
        (0..12).map(|n| texts(&book.allocate(&request(&format!("d{n}"))).unwrap())[0].clone()).collect::<Vec<_>>()
    };
    // Never used ones first, .6 to .14; then .3, .5, .2 in the order in which they were released.
    let wanted: Vec<_> = (6..=14).chain([3, 5, 2]).map(|n| format!("10.244.1.{n}")).collect();
    let pool = cidrs(&["10.244.1.0/28"]);
    let replayed = Book::open(MemoryStore { records: history(&book), fail: false }, &pool).unwrap();
    let snapshot = Book::open(MemoryStore { records: book.pool().snapshot(), fail: false }, &pool).unwrap();
    assert_eq!(continue_with(replayed), wanted);
    assert_eq!(continue_with(snapshot), wanted);
    assert_eq!(continue_with(book), wanted);
}

/// The history of a book, from the one place that has it: a copy made by replaying its changes.
fn history(book: &Book<MemoryStore>) -> Vec<Record> {
    book.store().records.clone()
}

#[test]
fn bad_ranges_are_named() {
    for (texts, words) in [
        (&[][..], "pod CIDRs: expected one or two"),
        (&["10.0.0.0/24", "10.0.1.0/24"], "pod CIDRs 10.0.0.0/24 and 10.0.1.0/24: expected at most one of each family"),
        (&["10.0.0.0/31"], "pod CIDR 10.0.0.0/31: expected at most /30"),
        (&["fd00::/127"], "pod CIDR fd00::/127: expected at most /30 for IPv4 and /126"),
    ] {
        let error = Pool::new(&cidrs(texts)).unwrap_err();
        assert!(error.to_string().starts_with(words), "{error}");
    }
    let smallest = Pool::new(&cidrs(&["10.0.0.0/30", "fd00::/126"])).unwrap();
    assert_eq!(smallest.usage().iter().map(|u| u.capacity).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn leases_of_an_earlier_cidr_are_kept_and_two_of_one_address_are_refused() {
    let lease = |container: &str, address: &str| Record::Put {
        lease: Lease {
            key: LeaseKey::new(container, "eth0"),
            network: "keelway".into(),
            netns: String::new(),
            pod: PodRef::default(),
            mtu: 1450,
            addresses: vec![address.parse().unwrap()],
        },
    };
    let pool = Pool::restore(&cidrs(&["10.244.2.0/24"]), [lease("a", "10.244.1.7")]).unwrap();
    assert_eq!(pool.leases().len(), 1);
    assert_eq!(pool.usage()[0].used, 0);
    let twice = Pool::restore(&cidrs(&["10.244.1.0/24"]), [lease("a", "10.244.1.7"), lease("b", "10.244.1.7")]);
    assert_eq!(twice.unwrap_err().to_string(), "address 10.244.1.7: leased to both a/eth0 and b/eth0");
}

#[test]
fn gc_names_what_is_of_this_network_and_not_valid() {
    let mut book = book(&["10.244.1.0/24"]);
    for container in ["a", "b", "c"] {
        book.allocate(&request(container)).unwrap();
    }
    book.allocate(&LeaseRequest { network: "other".into(), ..request("d") }).unwrap();
    let valid = BTreeSet::from([LeaseKey::new("b", "eth0"), LeaseKey::new("unknown", "eth0")]);
    let stale: Vec<_> = book.pool().stale("keelway", &valid).into_iter().map(|l| l.key.container_id).collect();
    assert_eq!(stale, ["a", "c"]);
}

#[test]
fn nothing_is_handed_out_or_freed_that_is_not_written_down() {
    let mut book = book(&["10.244.1.0/24"]);
    let a = book.allocate(&request("a")).unwrap();
    book.store_mut().fail = true;
    assert!(matches!(book.allocate(&request("b")), Err(IpamError::Store(StoreError::Io { .. }))));
    assert!(matches!(book.release(&a.key), Err(IpamError::Store(StoreError::Io { .. }))));
    assert_eq!(book.pool().leases().cloned().collect::<Vec<_>>(), std::slice::from_ref(&a));
    book.store_mut().fail = false;
    assert_eq!(texts(&book.allocate(&request("b")).unwrap()), ["10.244.1.3"]);
}

#[derive(Clone, Debug)]
enum Op {
    Allocate(u8),
    Release(u8),
    Restart,
    RestartFromSnapshot,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (0..40u8).prop_map(Op::Allocate),
        4 => (0..40u8).prop_map(Op::Release),
        1 => Just(Op::Restart),
        1 => Just(Op::RestartFromSnapshot),
    ];
    prop::collection::vec(op, 1..200)
}

proptest! {
    /// Against a model that only knows sets: no address twice, none outside, leases stable, full exactly when full.
    #[test]
    fn leases_never_collide(ops in ops()) {
        let ranges = cidrs(&["10.244.1.0/27", "fd00:244::/64"]);
        let mut book = Book::open(MemoryStore::default(), &ranges).unwrap();
        let mut model: BTreeMap<u8, Vec<IpAddr>> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Allocate(n) => match book.allocate(&request(&format!("c{n}"))) {
                    Ok(lease) => {
                        prop_assert!(lease.addresses.iter().zip(&ranges).all(|(a, r)| r.contains(a)));
                        if let Some(before) = model.insert(n, lease.addresses.clone()) {
                            prop_assert_eq!(&before, &lease.addresses);
                        }
                    }
                    Err(IpamError::Exhausted { capacity, .. }) => {
                        prop_assert!(capacity == 29 && model.len() == 29 && !model.contains_key(&n));
                    }
                    Err(other) => return Err(TestCaseError::fail(other.to_string())),
                },
                Op::Release(n) => {
                    let released = book.release(&LeaseKey::new(format!("c{n}"), "eth0")).unwrap();
                    prop_assert_eq!(released.map(|l| l.addresses), model.remove(&n));
                }
                Op::Restart => book = Book::open(book.store().clone(), &ranges).unwrap(),
                Op::RestartFromSnapshot => {
                    let records = book.pool().snapshot();
                    book = Book::open(MemoryStore { records, fail: false }, &ranges).unwrap();
                }
            }
            let all: BTreeSet<_> = model.values().flatten().collect();
            prop_assert_eq!(all.len(), model.values().map(Vec::len).sum::<usize>(), "an address was given twice");
            prop_assert!(book.pool().host_addresses().iter().all(|h| !all.contains(h)));
            let kept: BTreeMap<_, _> = book.pool().leases().map(|l| (l.key.clone(), l.addresses.clone())).collect();
            let wanted: BTreeMap<_, _> =
                model.iter().map(|(n, a)| (LeaseKey::new(format!("c{n}"), "eth0"), a.clone())).collect();
            prop_assert_eq!(kept, wanted);
            prop_assert_eq!(book.pool().usage()[0].used, model.len() as u128);
        }
    }
}

fn two_leases(path: &std::path::Path) -> Vec<u8> {
    let mut book = Book::open(Journal::open(path).unwrap(), &cidrs(&["10.244.1.0/24", "fd00::/64"])).unwrap();
    book.allocate(&request("a")).unwrap();
    book.allocate(&request("b")).unwrap();
    book.release(&LeaseKey::new("a", "eth0")).unwrap();
    book.allocate(&request("c")).unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn a_journal_survives_restarts_and_keeps_a_second_agent_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/leases");
    two_leases(&path);
    let ranges = cidrs(&["10.244.1.0/24", "fd00::/64"]);
    let journal = Journal::open(&path).unwrap();
    let second = Journal::open(&path).unwrap_err();
    assert!(matches!(second, StoreError::Locked { .. }) && second.to_string().contains("state/leases"), "{second}");
    let mut book = Book::open(journal, &ranges).unwrap();
    let kept: Vec<_> = book.pool().leases().map(|l| (l.key.container_id.clone(), texts(l)[0].clone())).collect();
    assert_eq!(kept, [("b".into(), "10.244.1.3".into()), ("c".into(), "10.244.1.4".into())]);
    assert_eq!(book.pool().get(&LeaseKey::new("b", "eth0")).unwrap().pod.uid, "uid-b");
    assert_eq!(texts(&book.allocate(&request("d")).unwrap())[0], "10.244.1.5");
}

#[test]
fn a_journal_cut_anywhere_gives_every_record_that_was_complete() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    let whole = two_leases(&path);
    let lines: Vec<usize> = whole.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i + 1).collect();
    let header = lines[0];
    for cut in header..=whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        let records = journal.load().unwrap_or_else(|e| panic!("cut at {cut}: {e}"));
        let complete = lines.iter().filter(|end| **end <= cut).count();
        assert_eq!(records.len(), complete - 1, "cut at {cut}");
        assert_eq!(journal.torn_bytes() as usize, cut - lines[complete - 1]);
        // What comes next is appended behind the last good record and read back.
        let record = Record::Cursor { addresses: vec!["10.244.1.9".parse().unwrap()] };
        journal.append(&record).unwrap();
        drop(journal);
        let again = Journal::open(&path).unwrap().load().unwrap();
        assert_eq!((again.len(), again.last()), (records.len() + 1, Some(&record)));
    }
}

#[test]
fn a_journal_changed_anywhere_is_refused_with_the_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    let whole = two_leases(&path);
    // All but the last line end: without it, the last record counts as unfinished.
    for at in 0..whole.len() - 1 {
        let mut changed = whole.clone();
        changed[at] ^= 0x08;
        std::fs::write(&path, &changed).unwrap();
        let error = Journal::open(&path).unwrap().load().err();
        let line = 1 + whole[..at].iter().filter(|b| **b == b'\n').count();
        match error {
            Some(StoreError::Corrupt { line: found, .. }) => {
                assert!(found == line, "byte {at}: line {found}, not {line}")
            }
            other => panic!("byte {at} of line {line} changed unnoticed: {other:?}"),
        }
    }
    for (content, words) in
        [(&b""[..], "is empty"), (b"keelway-leases 2\n", "expected the header \"keelway-leases 1\"")]
    {
        std::fs::write(&path, content).unwrap();
        let error = Journal::open(&path).unwrap().load().unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn the_history_stays_short() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    let ranges = cidrs(&["10.244.1.0/24"]);
    let mut book = Book::open(Journal::open(&path).unwrap(), &ranges).unwrap();
    let keeper = book.allocate(&request("keeper")).unwrap();
    for n in 0..3000 {
        let lease = book.allocate(&request(&format!("c{n}"))).unwrap();
        book.release(&lease.key).unwrap();
        assert!(book.store().len() <= 4097, "{} records", book.store().len());
    }
    assert!(book.store().len() < 2500, "it was shortened: {}", book.store().len());
    let next = book.pool().propose(&request("next")).unwrap();
    drop(book);
    let reopened = Book::open(Journal::open(&path).unwrap(), &ranges).unwrap();
    assert_eq!(reopened.pool().leases().cloned().collect::<Vec<_>>(), [keeper]);
    assert_eq!(reopened.pool().propose(&request("next")).unwrap(), next);
}

/// The test below runs itself as a child with this variable set, and kills it.
const CHILD: &str = "KEELWAY_IPAM_CHILD";

#[test]
fn kill_9_at_any_moment_loses_no_lease_that_was_handed_out() {
    if let Some(path) = std::env::var_os(CHILD) {
        let mut book = Book::open(Journal::open(path).unwrap(), &cidrs(&["10.244.0.0/16"])).unwrap();
        let start = book.pool().leases().len();
        // The harness may have begun a line.
        println!();
        for n in start.. {
            let lease = book.allocate(&request(&format!("c{n}"))).unwrap();
            println!("+{} {}", lease.key.container_id, lease.addresses[0]);
            if n % 3 == 2 {
                let gone = book.release(&LeaseKey::new(format!("c{}", n - 1), "eth0")).unwrap();
                gone.into_iter().for_each(|l| println!("-{}", l.key.container_id));
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    for round in 0..12u64 {
        let path = dir.path().join(format!("leases{}", round % 3));
        let before = Book::open(Journal::open(&path).unwrap(), &cidrs(&["10.244.0.0/16"])).unwrap();
        let mut wanted: BTreeMap<String, String> =
            before.pool().leases().map(|l| (l.key.container_id.clone(), texts(l)[0].clone())).collect();
        drop(before);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill_9_at_any_moment_loses_no_lease_that_was_handed_out", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (first, handed_out) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let told = |line: &String| {
                if line.starts_with('+') {
                    let _ = first.send(());
                }
            };
            out.lines().map_while(Result::ok).inspect(told).collect::<Vec<_>>()
        });
        // From its first lease on: how long it takes to start says nothing.
        handed_out.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(17 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut said = 0;
        for line in reader.join().unwrap() {
            if let Some((container, address)) = line.strip_prefix('+').and_then(|l| l.split_once(' ')) {
                wanted.insert(container.into(), address.into());
                said += 1;
            } else if let Some(container) = line.strip_prefix('-') {
                wanted.remove(container);
            }
        }
        assert!(said > 0, "round {round}: the child handed out nothing before it was killed");
        let after = Book::open(Journal::open(&path).unwrap(), &cidrs(&["10.244.0.0/16"])).unwrap();
        let mut kept: BTreeMap<_, _> =
            after.pool().leases().map(|l| (l.key.container_id.clone(), texts(l)[0].clone())).collect();
        // The last change may be on disk and not yet said: one lease more or one fewer, never another.
        let unsaid: Vec<_> = kept.keys().filter(|k| !wanted.contains_key(*k)).cloned().collect();
        let freed: Vec<_> = wanted.keys().filter(|k| !kept.contains_key(*k)).cloned().collect();
        assert!(unsaid.len() + freed.len() <= 1, "round {round}: unsaid {unsaid:?}, freed {freed:?}");
        unsaid.iter().for_each(|k| drop(kept.remove(k)));
        freed.iter().for_each(|k| drop(wanted.remove(k)));
        assert_eq!(kept, wanted, "round {round}");
    }
}
