//! Upstream's end-to-end suite: which specs there are is fixed by a dry run, and each of them has to pass.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Cluster, programs};
use crate::sh;

/// The specs that every cluster's network has to pass.
pub const NETWORK: &str = r"\[sig-network\].*\[Conformance\]";

/// Which of the other network specs are run, cannot be, or belong to another part.
const SPECS: &str = include_str!("../../../cluster/network-specs.txt");

/// How a spec of the set came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// In Ginkgo's word: `passed`, `failed`, `timedout`, ...
    Ended(String),
    /// It was not run, which counts as short: why.
    Skipped(String),
}

impl Fate {
    pub(super) fn passed(&self) -> bool {
        matches!(self, Self::Ended(state) if state == "passed")
    }
}

/// How each spec of the set came out.
pub type Outcome = BTreeMap<String, Fate>;

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
        let open: Vec<&String> = suite.difference(&sorted).filter(|spec| !spec.contains("[Conformance]")).collect();
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
    let wanted = dry(cluster, focus, &[])?;
    println!("{} specs match {focus}", wanted.len());
    finish(cluster, focus, wanted)
}

/// Runs the Services, DNS and proxy specs: the [Conformance] ones and those that `network-specs.txt` has under "run".
pub fn run_services(cluster: &Cluster) -> Result<Outcome> {
    let sorted = Sorted::read(SPECS)?;
    let all = dry(cluster, r"\[sig-network\]", &[])?;
    sorted.check(&all)?;
    let conformance = all.into_iter().filter(|spec| spec.contains("[Conformance]"));
    let wanted: BTreeSet<String> = conformance.chain(sorted.run).collect();
    println!("{} specs to run, {} cannot be", wanted.len(), sorted.cannot.len());
    let focus = wanted.iter().map(|spec| format!("{}$", quoted(spec))).collect::<Vec<_>>().join("|");
    let mut outcome = finish(cluster, &focus, wanted)?;
    outcome.extend(sorted.cannot.into_iter().map(|(spec, reason)| (spec, Fate::Skipped(reason))));
    Ok(outcome)
}

/// As a regular expression that matches this text only.
pub(super) fn quoted(text: &str) -> String {
    let special = |c: char| r"\.+*?()|[]{}^$".contains(c);
    text.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
}

/// The specs that match, as the suite itself would run them.
pub(super) fn dry(cluster: &Cluster, focus: &str, flags: &[String]) -> Result<BTreeSet<String>> {
    if let Some(reason) = programs::missing(programs::SUITE) {
        bail!(reason);
    }
    let dir = cluster.lab.dir.join("suite");
    fs::create_dir_all(&dir)?;
    let report = dir.join("dry.json");
    let flags = [flags, &["--ginkgo.dry-run".to_owned()]].concat();
    let mut command = cluster.control_plane.command(&suite(cluster, focus, &report, &flags))?;
    sh::checked(&mut command)?;
    let matching = specs(&report)?.into_iter().filter(|spec| spec.state != "skipped");
    Ok(matching.map(|spec| spec.name).collect())
}

fn finish(cluster: &Cluster, focus: &str, wanted: BTreeSet<String>) -> Result<Outcome> {
    let report = cluster.lab.dir.join("suite/run.json");
    let ended = cluster.control_plane.command(&suite(cluster, focus, &report, &[]))?.status()?;
    fates(&report, wanted).with_context(|| format!("the suite ended with {ended}"))
}

/// What became of each of these specs. A failed one makes the suite's exit status 1: what counts is its report.
pub(super) fn fates(report: &Path, wanted: BTreeSet<String>) -> Result<Outcome> {
    let mut found: BTreeMap<String, Spec> = specs(report)?.into_iter().map(|spec| (spec.name.clone(), spec)).collect();
    let mut fate = |name: &str| match found.remove(name) {
        Some(spec) if spec.state != "skipped" => Fate::Ended(spec.state),
        Some(spec) if !spec.words.is_empty() => Fate::Skipped(spec.words),
        _ => Fate::Skipped("the suite did not come to it".to_owned()),
    };
    Ok(wanted.into_iter().map(|name| (name.clone(), fate(&name))).collect())
}

/// The suite's command line.
pub(super) fn suite(cluster: &Cluster, focus: &str, report: &Path, flags: &[String]) -> Vec<String> {
    let mut argv = vec![
        cluster.bin.join("e2e.test").to_string_lossy().into_owned(),
        format!("--kubeconfig={}", cluster.kubeconfig().display()),
        "--provider=skeleton".to_owned(),
        "--allowed-not-ready-nodes=0".to_owned(),
        "--ginkgo.no-color".to_owned(),
        format!("--ginkgo.focus={focus}"),
        format!("--ginkgo.json-report={}", report.display()),
    ];
    argv.extend_from_slice(flags);
    argv
}

/// One spec of a Ginkgo report.
struct Spec {
    name: String,
    state: String,
    /// Why it failed or left itself out.
    words: String,
}

fn specs(report: &Path) -> Result<Vec<Spec>> {
    let text = fs::read(report).with_context(|| format!("the suite wrote no {}", report.display()))?;
    let suites: Value = serde_json::from_slice(&text)?;
    let all =
        suites.as_array().into_iter().flatten().flat_map(|suite| suite["SpecReports"].as_array().into_iter().flatten());
    let read =
        |spec| Spec { name: name(spec), state: text_of(&spec["State"]), words: text_of(&spec["Failure"]["Message"]) };
    Ok(all.filter(|spec| spec["LeafNodeType"] == "It").map(read).collect())
}

fn name(spec: &Value) -> String {
    let parts = spec["ContainerHierarchyTexts"].as_array().into_iter().flatten().map(text_of);
    parts.chain([text_of(&spec["LeafNodeText"])]).collect::<Vec<_>>().join(" ")
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Prints a table and writes `target/report/<name>.json`; whether every spec passed.
pub fn report(name: &str, command: &str, outcome: &Outcome) -> Result<bool> {
    let mut groups: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
    for (spec, state) in outcome {
        let group = groups.entry(group(spec)).or_default();
        group.0 += u32::from(state.passed());
        group.1 += 1;
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
    let report = json!({"name": name, "command": command, "rows": rows, "failed": failed, "skipped": skipped});
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

    use super::{SPECS, Sorted, group, name, quoted};

    #[test]
    fn the_list_sorts_every_spec_once() {
        let sorted = Sorted::read(SPECS).unwrap();
        assert!(sorted.run.len() > 100 && sorted.cannot.len() > 20 && sorted.other.len() > 50);
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
    fn a_name_is_matched_as_it_stands() {
        assert_eq!(quoted("[a] (b) 1.0|c"), r"\[a\] \(b\) 1\.0\|c");
    }

    #[test]
    fn reads_names_of_a_report() {
        let spec = serde_json::json!({"ContainerHierarchyTexts": ["[sig-network] Services"], "LeafNodeText": "should work [Conformance]"});
        assert_eq!(name(&spec), "[sig-network] Services should work [Conformance]");
        assert_eq!(group(&name(&spec)), "Services");
    }
}
