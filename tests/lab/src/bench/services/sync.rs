//! How long both sides take to program everything and one change, and what memory that costs.
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};

use super::super::report::{Goal, Report};
use super::site::{Mode, Side, Site};
use super::{metric, objects};
use crate::sh::wait_for;

/// Of each Service.
const ENDPOINTS: usize = 10;
/// Single changes of ours, and how many a second.
const CHANGES: usize = 500;
const PER_SECOND: u64 = 25;
/// How long kube-proxy gets for its single changes.
const PEER_CHANGES: Duration = Duration::from_secs(60);

pub(super) fn measure(mode: Mode, services: usize, patience: Duration, alone: bool, report: &mut Report) -> Result<()> {
    println!("full sync of {services} x {ENDPOINTS} beside {}", mode.peer());
    let mut site = Site::new()?;
    site.api.put(objects::targets(&site))?;
    site.api.put(objects::fillers(0..services, ENDPOINTS))?;
    let named = |what: &str| format!("{what}, {services} x {ENDPOINTS} ({})", mode.name());

    let start = Instant::now();
    site.spawn_agent()?;
    wait_for("the agent to be in sync", patience, || site.agent_synced())?;
    let ours = start.elapsed().as_secs_f64();
    // Ours is told of each family, and is one sync of both.
    let our_clock = metric(&site.metrics(Side::Ours)?, &full_sync("keelway"))?;
    println!("  ours: {ours:.2} s, of which {our_clock:.2} s from the models to the last write");
    let full = changes_of_ours(&site, services, &named, report)?;
    let our_memory = [site.memory(Side::Ours, "VmHWM")?, site.memory(Side::Ours, "VmRSS")?];
    if alone {
        println!("  agent: {}", site.agent_output());
        let what = named("full sync, the process's start included");
        report.row(&what, "s", vec![ours], None);
        report.goal(&what, Goal::OursAtMost(3.0));
        report.row(&named("one endpoint changed, until it is programmed"), "ms", full, None);
        report.row(&named("RSS, peak"), "MiB", vec![our_memory[0]], None);
        return Ok(());
    }

    let start = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    site.start_kube_proxy(mode)?;
    let peer = wait_for("kube-proxy's first sync", patience, || {
        let text = site.metrics(Side::Peer)?;
        let last = metric(&text, "kubeproxy_sync_proxy_rules_last_timestamp_seconds")?;
        ensure!(last > start, "it has not synced yet");
        Ok(last - start)
    })?;
    let their_clock = metric(&site.metrics(Side::Peer)?, &full_sync("kubeproxy"))?;
    println!("  {}: {peer:.2} s, of which {their_clock:.2} s in its sync of IPv4", mode.peer());
    let what = named("the full sync, each by its own metric");
    report.row(&what, "s", vec![our_clock], Some((vec![their_clock], mode.peer())));
    let what = named("from the start of the process to the full sync");
    report.row(&what, "s", vec![ours], Some((vec![peer], mode.peer())));
    if mode == Mode::Nftables {
        report.goal(&what, Goal::RatioAtMost(1.0 / 40.0));
        let what = named("full sync, the process's start included");
        report.row(&what, "s", vec![ours], None);
        report.goal(&what, Goal::OursAtMost(3.0));
    }
    let theirs = changes_of_peer(&site, services)?;
    report.row(&named("one endpoint changed, until it is programmed"), "ms", full, Some((theirs, mode.peer())));
    let their_memory = [site.memory(Side::Peer, "VmHWM")?, site.memory(Side::Peer, "VmRSS")?];
    for (index, field) in ["peak", "after the changes"].into_iter().enumerate() {
        let what = named(&format!("RSS, {field}"));
        report.row(&what, "MiB", vec![our_memory[index]], Some((vec![their_memory[index]], mode.peer())));
        if mode == Mode::Nftables {
            report.goal(&what, Goal::RatioAtMost(0.25));
        }
    }
    Ok(())
}

/// The metric of the seconds that full syncs took; kube-proxy's objects here are all of IPv4.
fn full_sync(prefix: &str) -> String {
    format!("{prefix}_sync_full_proxy_rules_duration_seconds_sum{{ip_family=\"IPv4\"}} ")
}

/// Milliseconds of each change from the API to the kernel; and the percentiles of what the agent alone took.
fn changes_of_ours(
    site: &Site,
    services: usize,
    named: &dyn Fn(&str) -> String,
    report: &mut Report,
) -> Result<Vec<f64>> {
    const OWN: &str = "keelway_change_write_duration_seconds";
    const WHOLE: &str = "keelway_network_programming_duration_seconds";
    let before = site.metrics(Side::Ours)?;
    let thread_before = site.agent_thread("engine")?;
    let next = Duration::from_millis(1000 / PER_SECOND);
    for number in 0..CHANGES {
        site.api.put([objects::filler_slice(number * 7 % services, ENDPOINTS, 1 + number * 7 / services)])?;
        std::thread::sleep(next);
    }
    let thread_after = site.agent_thread("engine")?;
    for (index, part) in ["runs", "waits for a CPU that others have"].into_iter().enumerate() {
        let what = named(&format!("one change, for how long the thread that writes {part}, mean"));
        let micros = (thread_after[index] - thread_before[index]) / 1000.0 / CHANGES as f64;
        report.row(&what, "us", vec![micros], None);
    }
    let count = |text: &str, name: &str| metric(text, &format!("{name}_count"));
    let after = wait_for("the changes to be written", Duration::from_secs(10), || {
        let text = site.metrics(Side::Ours)?;
        let done = count(&text, OWN)? - count(&before, OWN)?;
        ensure!(done >= CHANGES as f64, "{done} of {CHANGES} are");
        Ok(text)
    })?;
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let what = named(&format!("one change, from the decoded event to its last write, {name} of {CHANGES} at most"));
        report.row(&what, "ms", vec![percentile(&before, &after, OWN, share)? * 1000.0], None);
        if name == "p99" {
            report.goal(&what, Goal::OursAtMost(2.0));
        }
    }
    // Absent until there is one.
    let sum = |name: &str| Ok(metric(&after, name)? - metric(&before, name).unwrap_or(0.0)) as Result<f64>;
    let mean = sum(&format!("{WHOLE}_sum"))? / sum(&format!("{WHOLE}_count"))?;
    Ok(vec![mean * 1000.0])
}

/// The bound of the bucket below which `share` of what came between two readings of a histogram is.
fn percentile(before: &str, after: &str, name: &str, share: f64) -> Result<f64> {
    let mut bounds: Vec<(f64, f64)> = Vec::new();
    for line in after.lines() {
        let Some(rest) = line.strip_prefix(name).and_then(|rest| rest.strip_prefix("_bucket{le=\"")) else { continue };
        let Some((bound, _)) = rest.split_once('"') else { continue };
        let exact = format!("{name}_bucket{{le=\"{bound}\"}} ");
        let bound = bound.trim_start_matches('+').replace("Inf", "inf").parse::<f64>()?;
        bounds.push((bound, metric(after, &exact)? - metric(before, &exact)?));
    }
    let all = bounds.iter().map(|(_, count)| *count).fold(0.0, f64::max);
    let found = bounds.into_iter().find(|(_, count)| *count >= share * all);
    found.map(|(bound, _)| bound).ok_or_else(|| anyhow::anyhow!("no histogram {name}"))
}

/// Milliseconds of each change from the API to the kernel, as many as fit into [`PEER_CHANGES`].
fn changes_of_peer(site: &Site, services: usize) -> Result<Vec<f64>> {
    const WHOLE: &str = "kubeproxy_network_programming_duration_seconds";
    let read = || -> Result<(f64, f64)> {
        let text = site.metrics(Side::Peer)?;
        // Absent until there is one.
        let of = |end: &str| metric(&text, &format!("{WHOLE}_{end}")).unwrap_or(0.0);
        Ok((of("count"), of("sum")))
    };
    // The ages of the objects of the first sync come with it; wait until they are all in.
    std::thread::sleep(Duration::from_secs(2));
    let (start, mut taken) = (Instant::now(), Vec::new());
    while taken.is_empty() || (start.elapsed() < PEER_CHANGES && taken.len() < 20) {
        let before = read()?;
        let number = (taken.len() * 11 + 5) % services;
        site.api.put([objects::filler_slice(number, ENDPOINTS, 900 + taken.len())])?;
        let after = wait_for("kube-proxy to program a change", Duration::from_secs(180), || {
            let now = read()?;
            ensure!(now.0 > before.0, "it has not");
            Ok(now)
        })?;
        taken.push((after.1 - before.1) / (after.0 - before.0) * 1000.0);
    }
    Ok(taken)
}
