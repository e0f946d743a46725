//! Upstream's External.Storage specs, which a file of ours tells about the driver.
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;

use anyhow::{Context, Result, ensure};

use super::Cluster;
use super::conformance::{Fate, Outcome, dry, fates, quoted, suite};
use super::programs::root;

/// All of them.
pub const FOCUS: &str = r"External.Storage";

/// Why the suite may leave a spec out, and why that is right.
const CANNOT: &str = include_str!("../../../csi/external-storage-cannot.txt");

/// Suites at a time: most of a spec's time is waiting for a pod.
const WORKERS: usize = 4;

/// Runs the specs that match [`FOCUS`] and this, and returns what became of each. Each suite's words go to a log.
pub fn run(cluster: &Cluster, focus: &str) -> Result<Outcome> {
    let driver = root().join("tests/csi/external-storage.yaml");
    let flags = [format!("--storage.testdriver={}", driver.display())];
    let all = dry(cluster, FOCUS, &flags)?;
    ensure!(!all.is_empty(), "the suite knows no spec of {}", driver.display());
    let matching = if focus == FOCUS { all } else { &all & &dry(cluster, focus, &flags)? };
    let (alone, together) = split(matching);
    println!(
        "{} specs, {} of them one at a time",
        alone.len() + together.iter().map(BTreeSet::len).sum::<usize>(),
        alone.len()
    );
    let mut outcome = Outcome::new();
    let one = |name: String, wanted: BTreeSet<String>| -> Result<Outcome> {
        if wanted.is_empty() {
            return Ok(Outcome::new());
        }
        let dir = cluster.lab.dir.join("suite");
        let (report, log) = (dir.join(format!("{name}.json")), dir.join(format!("{name}.log")));
        let focus = wanted.iter().map(|spec| format!("{}$", quoted(spec))).collect::<Vec<_>>().join("|");
        let out = File::create(&log).with_context(|| log.display().to_string())?;
        let mut command = cluster.control_plane.command(&suite(cluster, &focus, &report, &flags))?;
        println!("{} specs: {}", wanted.len(), log.display());
        let ended = command.stdout(out.try_clone()?).stderr(out).status()?;
        fates(&report, wanted).with_context(|| format!("the suite ended with {ended}: {}", log.display()))
    };
    std::thread::scope(|scope| {
        let started: Vec<_> = together
            .into_iter()
            .enumerate()
            .map(|(number, wanted)| scope.spawn(move || one(format!("worker{number}"), wanted)))
            .collect();
        started.into_iter().try_for_each(|worker| {
            outcome.extend(worker.join().expect("a worker does not panic")?);
            anyhow::Ok(())
        })
    })?;
    outcome.extend(one("alone".to_owned(), alone)?);
    Ok(outcome)
}

/// The specs that want the cluster for themselves, and the others dealt out.
fn split(specs: BTreeSet<String>) -> (BTreeSet<String>, Vec<BTreeSet<String>>) {
    let (alone, others): (BTreeSet<String>, BTreeSet<String>) =
        specs.into_iter().partition(|spec| spec.contains("[Serial]") || spec.contains("[Disruptive]"));
    let mut together = vec![BTreeSet::new(); WORKERS];
    for (number, spec) in others.into_iter().enumerate() {
        together[number % WORKERS].insert(spec);
    }
    (alone, together)
}

/// Gives what the suite left out for a reason that `external-storage-cannot.txt` knows our words for it, and what it left out
/// for any other reason as failed.
pub fn explained(outcome: Outcome) -> Result<Outcome> {
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

/// A line is a part of the suite's words, ` => `, and our reason.
fn known(text: &str) -> Result<BTreeMap<&str, &str>> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_once(" => ").with_context(|| format!("{line:?} has no ` => `"))).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::conformance::{Fate, Outcome};
    use super::{CANNOT, explained, known, split};

    #[test]
    fn each_spec_is_run_once_and_those_that_disturb_run_alone() {
        let specs: BTreeSet<String> = (0..10).map(|n| format!("a {n}")).chain(["b [Disruptive]".to_owned()]).collect();
        let (alone, together) = split(specs.clone());
        assert_eq!(alone, BTreeSet::from(["b [Disruptive]".to_owned()]));
        assert_eq!(together.iter().map(BTreeSet::len).sum::<usize>(), 10);
        assert_eq!(together.into_iter().flatten().chain(alone).collect::<BTreeSet<_>>(), specs);
    }

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
