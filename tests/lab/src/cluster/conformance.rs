//! Upstream's network specs: which there are is fixed by a dry run, and each of them has to pass.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

pub use super::suite::Fate;
use super::suite::{self, Outcome};
use super::{Cluster, programs};

/// What the name of a spec that every cluster has to pass says.
const CONFORMANCE: &str = "[Conformance]";

/// The specs that every cluster's network has to pass.
pub const NETWORK: &str = r"\[sig-network\].*\[Conformance\]";

/// Which of the other network specs are run, cannot be, or belong to another part.
const SPECS: &str = include_str!("../../../cluster/network-specs.txt");

/// The Services, DNS and proxy specs beside the [Conformance] ones, as `tests/cluster/network-specs.txt` sorts them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sorted {
    /// To be run.
    run: BTreeSet<String>,
    /// Not possible in the lab, with the reason.
    cannot: BTreeMap<String, String>,
    /// Of other parts.
    other: BTreeSet<String>,
}

impl Sorted {
    fn read(text: &str) -> Result<Self> {
        let (mut sorted, mut heading) = (Self::default(), "");
        for line in text.lines().filter(|line| !line.is_empty()) {
            match (line.strip_prefix("# "), heading) {
                (Some(words), _) => heading = words,
                (None, "run") => drop(sorted.run.insert(line.to_owned())),
                (None, heading) => match heading.split_once(": ") {
                    Some(("cannot", reason)) => drop(sorted.cannot.insert(line.to_owned(), reason.to_owned())),
                    Some(("other", _)) => drop(sorted.other.insert(line.to_owned())),
                    _ => bail!("network-specs.txt: {line:?} is below {heading:?}, expected run, cannot or other"),
                },
            }
        }
        Ok(sorted)
    }

    /// That every network spec of the suite is sorted, and nothing else is.
    fn check(&self, suite: &BTreeSet<String>) -> Result<()> {
        let sorted: BTreeSet<String> = self.run.iter().chain(self.cannot.keys()).chain(&self.other).cloned().collect();
        let open: Vec<&String> = suite.difference(&sorted).filter(|spec| !spec.contains(CONFORMANCE)).collect();
        let gone: Vec<&String> = sorted.difference(suite).collect();
        ensure!(
            open.is_empty() && gone.is_empty(),
            "network-specs.txt: not sorted yet: {open:#?}; not in the suite: {gone:#?}"
        );
        Ok(())
    }
}

/// Runs the specs that match and returns what became of each. Progress goes to this program's output.
pub fn run(cluster: &Cluster, focus: &str) -> Result<Outcome> {
    let wanted = suite::dry(cluster, focus, &[])?;
    println!("{} specs match {focus}", wanted.len());
    suite::run(cluster, wanted, &[])
}

/// Runs the network's [Conformance] specs and those of Services, DNS and proxy that `network-specs.txt` has under "run".
pub fn run_network(cluster: &Cluster) -> Result<Outcome> {
    let sorted = Sorted::read(SPECS)?;
    let all = suite::dry(cluster, r"\[sig-network\]", &[])?;
    sorted.check(&all)?;
    let conformance = all.into_iter().filter(|spec| spec.contains(CONFORMANCE));
    let wanted: BTreeSet<String> = conformance.chain(sorted.run).collect();
    println!("{} specs to run, {} cannot be", wanted.len(), sorted.cannot.len());
    let mut outcome = suite::run(cluster, wanted, &[])?;
    outcome.extend(sorted.cannot.into_iter().map(|(spec, reason)| (spec, Fate::Skipped(reason))));
    Ok(outcome)
}

/// Prints a table and writes `target/report/<name>.json`; whether every spec passed.
pub fn report(name: &str, command: &str, outcome: &Outcome) -> Result<bool> {
    let mut groups: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
    for (spec, state) in outcome {
        let group = groups.entry(group(spec)).or_default();
        group.0 += u32::from(state.passed());
        group.1 += 1;
        if spec.contains(CONFORMANCE) {
            let conformance = groups.entry(CONFORMANCE).or_default();
            conformance.0 += u32::from(state.passed());
            conformance.1 += 1;
        }
    }
    let rows: Vec<Value> = groups
        .iter()
        .map(|(group, (ours, goal))| {
            json!({"what": group, "unit": "specs", "ours": ours, "peer": null, "peer_name": null, "ratio": null,
                "goal": goal, "met": ours == goal})
        })
        .collect();
    let (mut failed, mut skipped) = (Vec::new(), Vec::new());
    for (spec, fate) in outcome.iter().filter(|(_, fate)| !fate.passed()) {
        match fate {
            Fate::Ended(_) => failed.push(spec),
            Fate::Skipped(reason) => skipped.push(json!({"what": spec, "reason": reason})),
        }
    }
    let dir = programs::root().join("target/report");
    fs::create_dir_all(&dir)?;
    let passing: Vec<&String> = outcome.iter().filter(|(_, fate)| fate.passed()).map(|(spec, _)| spec).collect();
    let report = json!({"name": name, "command": command, "rows": rows, "passed": passing, "failed": failed, "skipped": skipped});
    fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(&report)?)?;
    for (group, (ours, goal)) in &groups {
        println!("{ours:>4} of {goal:<4} {group}");
    }
    for (spec, fate) in outcome {
        match fate {
            Fate::Ended(state) if state != "passed" => println!("{state:>8}  {spec}"),
            Fate::Skipped(reason) => println!(" not run  {spec}: {reason}"),
            Fate::Ended(_) => {}
        }
    }
    let passed = outcome.values().filter(|fate| fate.passed()).count();
    println!("{passed} of {} passed, {} failed, {} not run", outcome.len(), failed.len(), skipped.len());
    Ok(failed.is_empty() && skipped.is_empty() && !outcome.is_empty())
}

/// `[sig-network] Services should ...` belongs to `Services`.
fn group(spec: &str) -> &str {
    spec.split_whitespace().find(|word| !word.starts_with('[')).unwrap_or("others")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{SPECS, Sorted, group};

    #[test]
    fn the_list_sorts_every_spec_once() {
        let sorted = Sorted::read(SPECS).unwrap();
        assert!(sorted.run.len() > 100 && sorted.cannot.len() > 10 && sorted.other.len() > 50);
        let lines = SPECS.lines().filter(|line| line.starts_with('[')).count();
        assert_eq!(lines, sorted.run.len() + sorted.cannot.len() + sorted.other.len(), "a spec stands twice");
        let mut suite: BTreeSet<String> = SPECS.lines().filter(|line| line.starts_with('[')).map(Into::into).collect();
        suite.insert("[sig-network] X works [Conformance]".into());
        sorted.check(&suite).unwrap();
        suite.insert("[sig-network] X is new".into());
        assert!(sorted.check(&suite).unwrap_err().to_string().contains("X is new"));
        assert!(Sorted::read("[sig-network] X").is_err());
    }

    #[test]
    fn a_spec_belongs_to_a_group() {
        assert_eq!(group("[sig-network] Services should work [Conformance]"), "Services");
    }
}
