//! `cargo xtask walls`: the workspace as cargo resolves it, and the pure sources, against `hack/walls.txt`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, anyhow, ensure};
use serde::Deserialize;

use crate::rules::{Crate, Kind, Rules};
use crate::source;

const RULES: &str = "hack/walls.txt";

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: BTreeSet<String>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    manifest_path: PathBuf,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Deserialize)]
struct DependencyKind {
    kind: Option<String>,
}

/// Prints each breach; `Ok(false)` when there is one.
pub fn run() -> anyhow::Result<bool> {
    let rules = Rules::parse(&std::fs::read_to_string(RULES).context(RULES)?).map_err(|e| anyhow!("{RULES}: {e}"))?;
    let metadata = metadata()?;
    let workspace = workspace(&metadata)?;
    let mut breaches = rules.breaches(&workspace);
    let mut files: Vec<PathBuf> = rules.modules.iter().map(PathBuf::from).collect();
    for package in metadata.packages.iter().filter(|p| metadata.workspace_members.contains(&p.id)) {
        if rules.crates.get(&package.name).is_some_and(|rule| rule.kind == Kind::Pure) {
            let source = package.manifest_path.parent().context("a manifest has a directory")?.join("src");
            rust_files(&source, &mut files)?;
        }
    }
    let root = std::env::current_dir()?;
    for file in &files {
        let text = std::fs::read_to_string(file).with_context(|| format!("{} named in {RULES}", file.display()))?;
        let shown = file.strip_prefix(&root).unwrap_or(file).display();
        breaches.extend(
            source::io_paths(&text).into_iter().map(|(line, path)| format!("{shown}:{line}: pure, and names {path}")),
        );
    }
    for breach in &breaches {
        println!("wall broken: {breach}");
    }
    let modules = rules.modules.len();
    println!(
        "walls: {} crates, {} pure files ({modules} of them in I/O crates): {} breaches",
        workspace.len(),
        files.len(),
        breaches.len()
    );
    Ok(breaches.is_empty())
}

fn metadata() -> anyhow::Result<Metadata> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version=1", "--locked"])
        .output()
        .context("running cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    serde_json::from_slice(&output.stdout).context("reading cargo metadata")
}

/// Each workspace crate with what it depends on.
fn workspace(metadata: &Metadata) -> anyhow::Result<BTreeMap<String, Crate>> {
    let packages: BTreeMap<&str, &Package> = metadata.packages.iter().map(|p| (p.id.as_str(), p)).collect();
    let nodes: BTreeMap<&str, &Node> = metadata.resolve.nodes.iter().map(|n| (n.id.as_str(), n)).collect();
    let mut found = BTreeMap::new();
    for id in &metadata.workspace_members {
        let node = nodes.get(id.as_str()).with_context(|| format!("{id} is not resolved"))?;
        let named = node.deps.iter().map(|d| d.pkg.as_str()).filter(|pkg| metadata.workspace_members.contains(*pkg));
        let mut krate = Crate { inward: named.map(|pkg| packages[pkg].name.clone()).collect(), ..Crate::default() };
        let mut queue = vec![id.as_str()];
        while let Some(next) = queue.pop() {
            for dependency in &nodes[next].deps {
                let package = packages[dependency.pkg.as_str()];
                let linked = dependency.dep_kinds.iter().any(|d| d.kind.is_none());
                let is_macro = package.targets.iter().any(|t| t.kind.iter().any(|k| k == "proc-macro"));
                if linked && !is_macro && krate.closure.insert(package.name.clone()) {
                    queue.push(&dependency.pkg);
                }
            }
        }
        found.insert(packages[id.as_str()].name.clone(), krate);
    }
    Ok(found)
}

/// Adds every `.rs` file below `directory`, in a stable order.
fn rust_files(directory: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(directory)
        .with_context(|| directory.display().to_string())?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<_, _>>()?;
    entries.sort();
    for entry in entries {
        if entry.is_dir() {
            rust_files(&entry, files)?;
        } else if entry.extension().is_some_and(|e| e == "rs") {
            files.push(entry);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check as it runs in CI has to be able to fail: this workspace against a rule that it breaks.
    #[test]
    fn this_workspace_breaks_a_stricter_rule() {
        let workspace = workspace(&metadata().unwrap()).unwrap();
        let found = Rules::parse("keelway-agent pure keelway-layout").unwrap().breaches(&workspace);
        for expected in
            ["keelway-agent must not depend on keelway-maps", "keelway-agent is pure and would be linked with tokio"]
        {
            assert!(found.iter().any(|breach| breach.starts_with(expected)), "{expected:?} not in {found:#?}");
        }
    }
}
