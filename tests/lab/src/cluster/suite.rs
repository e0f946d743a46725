//! Upstream's end-to-end suite: a dry run says which specs there are, several suites at once run them.
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Cluster, programs};
use crate::sh;

/// Suites at a time.
const WORKERS: usize = 8;

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

/// The specs that match, as the suite itself would run them.
pub fn dry(cluster: &Cluster, focus: &str, flags: &[String]) -> Result<BTreeSet<String>> {
    if let Some(reason) = programs::missing(programs::SUITE) {
        bail!(reason);
    }
    let report = directory(cluster)?.join("dry.json");
    let flags = [flags, &["--ginkgo.dry-run".to_owned()]].concat();
    let mut command = cluster.control_plane.command(&suite(cluster, focus, &report, &flags))?;
    sh::checked(&mut command)?;
    let matching = specs(&report)?.into_iter().filter(|spec| spec.state != "skipped");
    Ok(matching.map(|spec| spec.name).collect())
}

/// Runs these specs, several suites at once, as most of a spec's time is waiting; then those that want the cluster for themselves.
pub fn run(cluster: &Cluster, wanted: BTreeSet<String>, flags: &[String]) -> Result<Outcome> {
    let (alone, together) = split(wanted);
    let mut outcome = at_once(cluster, together, flags)?;
    outcome.extend(at_once(cluster, vec![alone], flags)?);
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

/// A suite for each set. Each one's words go to a log; how many specs have ended is said every half a minute.
fn at_once(cluster: &Cluster, sets: Vec<BTreeSet<String>>, flags: &[String]) -> Result<Outcome> {
    let (dir, start) = (directory(cluster)?, Instant::now());
    let all: usize = sets.iter().map(BTreeSet::len).sum();
    let mut running = Vec::new();
    for wanted in sets.into_iter().filter(|wanted| !wanted.is_empty()) {
        let name = format!("{all}-{}", running.len());
        let (report, log) = (dir.join(format!("{name}.json")), dir.join(format!("{name}.log")));
        let focus = wanted.iter().map(|spec| format!("{}$", quoted(spec))).collect::<Vec<_>>().join("|");
        let out = File::create(&log).with_context(|| log.display().to_string())?;
        let mut command = cluster.control_plane.command(&suite(cluster, &focus, &report, flags))?;
        println!("{} specs: {}", wanted.len(), log.display());
        let child = command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).spawn()?;
        running.push((child, wanted, report, log));
    }
    let mut said = start;
    loop {
        let mut alive = false;
        for (child, ..) in &mut running {
            alive |= child.try_wait()?.is_none();
        }
        if !alive {
            break;
        }
        if said.elapsed() > Duration::from_secs(30) {
            // Ginkgo prints a dot for each spec that passed, and one before the words about each that did not.
            let count = |log: &Path| fs::read_to_string(log).unwrap_or_default().matches('•').count();
            let ended: usize = running.iter().map(|(.., log)| count(log)).sum();
            println!("[{:>5} s] {ended} of {all} specs have ended", start.elapsed().as_secs());
            said = Instant::now();
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    let mut outcome = Outcome::new();
    for (_, wanted, report, log) in running {
        let context = || format!("the suite ended early: {}", log.display());
        outcome.extend(fates(&report, wanted).with_context(context)?);
        // What is not its line of dots is about specs that did not pass.
        let text = fs::read_to_string(&log).with_context(|| log.display().to_string())?;
        text.lines().filter(|line| !line.contains("SSSSSSSS")).for_each(|line| println!("{line}"));
    }
    Ok(outcome)
}

fn directory(cluster: &Cluster) -> Result<PathBuf> {
    let dir = cluster.lab.dir.join("suite");
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    Ok(dir)
}

/// What became of each of these specs. A failed one makes the suite's exit status 1: what counts is its report.
fn fates(report: &Path, wanted: BTreeSet<String>) -> Result<Outcome> {
    let mut found: BTreeMap<String, Spec> = specs(report)?.into_iter().map(|spec| (spec.name.clone(), spec)).collect();
    let mut fate = |name: &str| match found.remove(name) {
        Some(spec) if spec.state != "skipped" => Fate::Ended(spec.state),
        Some(spec) if !spec.words.is_empty() => Fate::Skipped(spec.words),
        _ => Fate::Skipped("the suite did not come to it".to_owned()),
    };
    Ok(wanted.into_iter().map(|name| (name.clone(), fate(&name))).collect())
}

/// The suite's command line.
fn suite(cluster: &Cluster, focus: &str, report: &Path, flags: &[String]) -> Vec<String> {
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

/// As a regular expression that matches this text only.
fn quoted(text: &str) -> String {
    let special = |c: char| r"\.+*?()|[]{}^$".contains(c);
    text.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
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
    // As Ginkgo itself does it for --ginkgo.focus: a container without a text is none.
    parts.chain([text_of(&spec["LeafNodeText"])]).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{name, quoted, split};

    #[test]
    fn each_spec_is_run_once_and_those_that_disturb_run_alone() {
        let specs: BTreeSet<String> = (0..10).map(|n| format!("a {n}")).chain(["b [Disruptive]".to_owned()]).collect();
        let (alone, together) = split(specs.clone());
        assert_eq!(alone, BTreeSet::from(["b [Disruptive]".to_owned()]));
        assert_eq!(together.iter().map(BTreeSet::len).sum::<usize>(), 10);
        assert_eq!(together.into_iter().flatten().chain(alone).collect::<BTreeSet<_>>(), specs);
    }

    #[test]
    fn a_name_is_matched_as_it_stands() {
        assert_eq!(quoted("[a] (b) 1.0|c"), r"\[a\] \(b\) 1\.0\|c");
    }

    #[test]
    fn reads_names_of_a_report() {
        let spec = serde_json::json!({"ContainerHierarchyTexts": ["[sig-network] Services", ""], "LeafNodeText": "should work [Conformance]"});
        assert_eq!(name(&spec), "[sig-network] Services should work [Conformance]");
    }
}
