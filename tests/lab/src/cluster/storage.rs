//! Upstream's External.Storage specs, which a file of ours tells about the driver.
use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};

use super::Cluster;
use super::programs::root;
use super::suite::{self, Fate, Outcome};

/// All of them.
pub const FOCUS: &str = r"External.Storage";

/// As many volumes the pods of a node may use, so that the suite can try it, and the pool still holds them all.
pub const MAX_VOLUMES: u32 = 48;

/// What the specs of this suite are about is which node a volume is on: they want more than one.
const TOPOLOGY: &str = "] topology ";

/// Why the suite may leave a spec out, and why that is right; and what cannot be run at all.
const CANNOT: &str = include_str!("../../../csi/external-storage-cannot.txt");

/// Runs the specs that match [`FOCUS`] and this, and returns what became of each, [`explained`].
pub fn run(cluster: &Cluster, focus: &str) -> Result<Outcome> {
    let driver = root().join("tests/csi/external-storage.yaml");
    // All nodes but the first are kept from other specs' pods, which makes them not ready in the suite's eyes.
    let unready = format!("--allowed-not-ready-nodes={}", cluster.lab.nodes().len());
    let flags = [format!("--storage.testdriver={}", driver.display()), unready];
    let all = suite::dry(cluster, FOCUS, &flags)?;
    ensure!(!all.is_empty(), "the suite knows no spec of {}", driver.display());
    let matching = if focus == FOCUS { all } else { &all & &suite::dry(cluster, focus, &flags)? };
    let known = known(CANNOT)?;
    let reason = |spec: &str| {
        let named = known.iter().find(|(part, _)| part.strip_prefix("spec: ").is_some_and(|part| spec.contains(part)));
        named.map(|(_, reason)| Fate::Skipped((*reason).to_owned()))
    };
    let (cannot, can): (BTreeSet<_>, BTreeSet<_>) = matching.into_iter().partition(|spec| reason(spec).is_some());
    println!("{} specs to run, {} cannot be", can.len(), cannot.len());
    let (spread, rest): (BTreeSet<_>, BTreeSet<_>) = can.into_iter().partition(|spec| spec.contains(TOPOLOGY));
    // The suite restores and clones without saying where, and the scheduler does not know where a source is.
    others(cluster, "cordon")?;
    let mut outcome = suite::run(cluster, rest, &flags)?;
    others(cluster, "uncordon")?;
    outcome.extend(suite::run(cluster, spread, &flags)?);
    let mut outcome = explained(outcome)?;
    outcome.extend(cannot.into_iter().filter_map(|spec| reason(&spec).map(|fate| (spec, fate))));
    Ok(outcome)
}

/// Keeps new pods from every node but the first, or lets them there again.
fn others(cluster: &Cluster, verb: &str) -> Result<()> {
    cluster.lab.nodes().iter().skip(1).try_for_each(|node| cluster.kubectl(&[verb, &node.name]).map(drop))
}

/// Gives what the suite left out for a reason that `external-storage-cannot.txt` knows our words for it, and what it left out
/// for any other reason as failed.
fn explained(outcome: Outcome) -> Result<Outcome> {
    let known = known(CANNOT)?;
    let explain = |fate| match fate {
        Fate::Skipped(words) => match known.iter().find(|(part, _)| words.contains(*part)) {
            Some((_, reason)) => Fate::Skipped((*reason).to_owned()),
            None => Fate::Ended(format!("left out: {}", words.lines().next().unwrap_or_default())),
        },
        ended @ Fate::Ended(_) => ended,
    };
    Ok(outcome.into_iter().map(|(spec, fate)| (spec, explain(fate))).collect())
}

/// A line is a part of the suite's words, or `spec: ` and a part of a spec's name; then ` => `, and our reason.
fn known(text: &str) -> Result<BTreeMap<&str, &str>> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_once(" => ").with_context(|| format!("{line:?} has no ` => `"))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::suite::{Fate, Outcome};
    use super::{CANNOT, explained, known};

    #[test]
    fn a_reason_that_nobody_wrote_down_is_a_failure() {
        let (part, reason) = known(CANNOT).unwrap().into_iter().next().unwrap();
        let outcome = Outcome::from([
            ("a".to_owned(), Fate::Skipped(format!("x {part} y"))),
            ("b".to_owned(), Fate::Skipped("something new".to_owned())),
        ]);
        let explained = explained(outcome).unwrap();
        assert_eq!(explained["a"], Fate::Skipped(reason.to_owned()));
        assert_eq!(explained["b"], Fate::Ended("left out: something new".to_owned()));
        assert!(known("no arrow").is_err());
    }
}
