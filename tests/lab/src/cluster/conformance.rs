//! Upstream's end-to-end suite: which specs there are is fixed by a dry run, and each of them has to pass.
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Cluster, programs};

/// The specs that every cluster's network has to pass.
pub const NETWORK: &str = r"\[sig-network\].*\[Conformance\]";

/// How each spec of the set came out; `None` is one that the run left out.
pub type Outcome = BTreeMap<String, Option<String>>;

/// Runs the specs that match and returns what became of each. Progress goes to this program's output.
pub fn run(cluster: &Cluster, focus: &str) -> Result<Outcome> {
    if let Some(reason) = programs::missing(programs::SUITE) {
        bail!(reason);
    }
    let dir = cluster.lab.dir.join("suite");
    fs::create_dir_all(&dir)?;
    let (dry, wet) = (dir.join("dry.json"), dir.join("run.json"));
    suite(cluster, focus, &dry, &["--ginkgo.dry-run"], false)?;
    let wanted: Vec<String> =
        specs(&dry)?.into_iter().filter(|(_, state)| state != "skipped").map(|(name, _)| name).collect();
    println!("{} specs match {focus}", wanted.len());
    // A failed spec makes the suite's exit status 1; what counts is its report.
    let ended = suite(cluster, focus, &wet, &[], true);
    let mut states: BTreeMap<String, String> = match specs(&wet) {
        Ok(specs) => specs.into_iter().collect(),
        Err(error) => return Err(ended.err().unwrap_or(error)),
    };
    Ok(wanted.into_iter().map(|name| (name.clone(), states.remove(&name).filter(|state| state != "skipped"))).collect())
}

fn suite(cluster: &Cluster, focus: &str, report: &Path, more: &[&str], loud: bool) -> Result<()> {
    let mut argv = vec![
        cluster.bin.join("e2e.test").to_string_lossy().into_owned(),
        format!("--kubeconfig={}", cluster.kubeconfig().display()),
        "--provider=skeleton".to_owned(),
        "--allowed-not-ready-nodes=0".to_owned(),
        "--ginkgo.no-color".to_owned(),
        format!("--ginkgo.focus={focus}"),
        format!("--ginkgo.json-report={}", report.display()),
    ];
    argv.extend(more.iter().map(|&flag| flag.to_owned()));
    if loud {
        let status = cluster.control_plane.command(&argv)?.status()?;
        anyhow::ensure!(status.success(), "the suite ended with {status}");
    } else {
        cluster.control_plane.run(&argv)?;
    }
    Ok(())
}

/// Name and state of each spec in a Ginkgo report.
fn specs(report: &Path) -> Result<Vec<(String, String)>> {
    let text = fs::read(report).with_context(|| format!("the suite wrote no {}", report.display()))?;
    let suites: Value = serde_json::from_slice(&text)?;
    let all =
        suites.as_array().into_iter().flatten().flat_map(|suite| suite["SpecReports"].as_array().into_iter().flatten());
    Ok(all.filter(|spec| spec["LeafNodeType"] == "It").map(|spec| (name(spec), text_of(&spec["State"]))).collect())
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
    let passed = |state: &Option<String>| state.as_deref() == Some("passed");
    let mut groups: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
    for (spec, state) in outcome {
        let group = groups.entry(group(spec)).or_default();
        group.0 += u32::from(passed(state));
        group.1 += 1;
    }
    let rows: Vec<Value> = groups
        .iter()
        .map(|(group, (ours, goal))| {
            json!({"what": group, "unit": "specs", "ours": ours, "peer": null, "peer_name": null, "ratio": null,
                "goal": goal, "met": ours == goal})
        })
        .collect();
    let short = |wanted: bool| outcome.iter().filter(move |(_, state)| !passed(state) && state.is_none() == wanted);
    let failed: Vec<&String> = short(false).map(|(spec, _)| spec).collect();
    let skipped: Vec<Value> =
        short(true).map(|(spec, _)| json!({"what": spec, "reason": "the suite did not run it here"})).collect();
    let dir = programs::root().join("target/report");
    fs::create_dir_all(&dir)?;
    let report = json!({"name": name, "command": command, "rows": rows, "failed": failed, "skipped": skipped});
    fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(&report)?)?;
    for (group, (ours, goal)) in &groups {
        println!("{ours:>4} of {goal:<4} {group}");
    }
    for (spec, state) in outcome.iter().filter(|(_, state)| !passed(state)) {
        println!("{:>8}  {spec}", state.as_deref().unwrap_or("not run"));
    }
    Ok(failed.is_empty() && skipped.is_empty() && !outcome.is_empty())
}

/// `[sig-network] Services should ...` belongs to `Services`.
fn group(spec: &str) -> &str {
    spec.split_whitespace().find(|word| !word.starts_with('[')).unwrap_or("others")
}

#[cfg(test)]
mod tests {
    use super::{group, name};

    #[test]
    fn reads_names_of_a_report() {
        let spec = serde_json::json!({"ContainerHierarchyTexts": ["[sig-network] Services"], "LeafNodeText": "should work [Conformance]"});
        assert_eq!(name(&spec), "[sig-network] Services should work [Conformance]");
        assert_eq!(group(&name(&spec)), "Services");
    }
}
