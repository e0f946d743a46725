//! How long each call takes, one after the other. Prints a table; fails only when a call does.
//!
//! `cargo test --release -p keelway-csi --test latency -- --ignored --nocapture`, as root.

mod common;

use std::time::{Duration, Instant};

use common::{Calls, Driver, MIB, block, create, mount};

const ROUNDS: usize = 30;
const CALLS: [&str; 8] =
    ["create", "stage + mkfs", "publish", "unpublish", "unstage", "stage again", "stats", "delete"];

#[tokio::test]
#[ignore = "a measurement; needs root and loop devices"]
async fn latency_of_each_call() {
    let mut driver = Driver::new();
    driver.start();
    for (name, capability) in [("ext4", mount("ext4")), ("xfs", mount("xfs")), ("block", block())] {
        let mut times = vec![Vec::new(); CALLS.len()];
        for round in 0..ROUNDS {
            let (mut controller, mut node) = (driver.controller().await, driver.node().await);
            let mut calls = Calls::new(&driver, "", capability.clone());
            let mut start = Instant::now();
            let mut lap = |at: usize| {
                times[at].push(start.elapsed());
                start = Instant::now();
            };
            let request = create(&format!("{name}-{round}"), 1024 * MIB, &capability, &[]);
            calls.id = controller.create_volume(request).await.unwrap().into_inner().volume.unwrap().volume_id;
            lap(0);
            node.node_stage_volume(calls.stage()).await.unwrap();
            lap(1);
            node.node_publish_volume(calls.publish()).await.unwrap();
            lap(2);
            node.node_unpublish_volume(calls.unpublish()).await.unwrap();
            lap(3);
            node.node_unstage_volume(calls.unstage()).await.unwrap();
            lap(4);
            node.node_stage_volume(calls.stage()).await.unwrap();
            lap(5);
            node.node_publish_volume(calls.publish()).await.unwrap();
            lap(2);
            node.node_get_volume_stats(calls.stats()).await.unwrap();
            lap(6);
            node.node_unpublish_volume(calls.unpublish()).await.unwrap();
            lap(3);
            node.node_unstage_volume(calls.unstage()).await.unwrap();
            lap(4);
            controller.delete_volume(calls.delete()).await.unwrap();
            lap(7);
        }
        for (call, times) in CALLS.iter().zip(&mut times) {
            times.sort();
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            let (median, last) = (ms(times[times.len() / 2]), ms(*times.last().unwrap()));
            println!("{name:6} {call:14} median {median:8.2} ms   slowest of {:2} {last:8.2} ms", times.len());
        }
    }
    driver.assert_clean();
}
