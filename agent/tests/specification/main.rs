//! The executable specification against the kernel: objects go through the agent's conversion, model and writes into real maps,
//! packets through the real programs (`BPF_PROG_TEST_RUN`), and what they meet is what `keelway_proxy::reference` says: the
//! backends, refused, dropped and why, or left alone; with checksums, answers and ICMP errors in both directions, affinity,
//! hashing and draining.
//!
//! Packets from the network meet the hook before tc's (XDP) two times of three, so that flows change between the two.
//!
//! Left out: the socket hooks, which have no test run (`tests/lab` has real sockets; what no socket hook sees of the host's own is
//! here), and at tc packets out of the tunnel, those handed on to another node (DSR) included, whose outer
//! source a test run cannot have. They share `lb`.
//!
//! A disagreement is printed as a scenario. Once understood it becomes a file in `scenarios/`.
//! `KEELWAY_SPEC_SEED` and `KEELWAY_SPEC_SECONDS` choose other cases and more.

mod affinity;
mod kernel;
mod objects;
mod packet;
mod ports;
mod scenario;
mod writes;

use std::path::Path;
use std::time::{Duration, Instant};

use kernel::Kernel;
use objects::Random;
use scenario::Scenario;

fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name}: no number: {text}")))
}

#[test]
fn random_objects_and_packets_meet_what_the_reference_says() {
    let Some(mut kernel) = Kernel::new() else { return };
    let first = setting("KEELWAY_SPEC_SEED", 1);
    let bound = Duration::from_secs(setting("KEELWAY_SPEC_SECONDS", 20));
    let started = Instant::now();
    let (mut cases, mut packets) = (0, 0);
    // For that long, and as long as it takes to see something of everything.
    let too_few = |kernel: &Kernel| {
        [kernel.turned, kernel.tunnelled, kernel.answered, kernel.handed_on, kernel.from_host]
            .iter()
            .any(|seen| *seen <= 10)
    };
    while started.elapsed() < bound || too_few(&kernel) {
        let seed = first + cases;
        let scenario = objects::scenario(&mut Random::new(seed));
        match scenario::run(&mut kernel, &scenario) {
            Ok(compared) => packets += compared,
            Err(error) => {
                let file = std::env::temp_dir().join(format!("keelway-spec-{seed}.yaml"));
                std::fs::write(&file, serde_norway::to_string(&scenario).unwrap()).unwrap();
                panic!("seed {seed}: {error}\nas a scenario: {}", file.display());
            }
        }
        cases += 1;
    }
    let Kernel { turned, tunnelled, answered, handed_on, from_host, .. } = kernel;
    let seen = format!(
        "{cases} cases, {packets} packets: {turned} turned round at XDP, {tunnelled} of them through the tunnel, {answered} answers out of it, {handed_on} handed on, {from_host} of the host"
    );
    println!("{seen}");
    assert!(cases > 0 && packets > 100, "{seen}");
}

#[test]
fn scenarios() {
    let Some(mut kernel) = Kernel::new() else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/specification/scenarios");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no files in {}", folder.display());
    let mut wrong = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let scenario: Scenario = serde_norway::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        if let Err(error) = scenario::run(&mut kernel, &scenario) {
            wrong.push(format!("{}: {error}", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
