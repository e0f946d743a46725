//! The dependency rules as data: what `hack/walls.txt` says, and what breaks it. Pure.
//!
//! A line is a crate's name, its kind, and what it may depend on. A `pure` crate names every crate of its closure; an
//! `io` crate names the workspace's crates only and may use any other. A third kind of line, `module PATH`, names a
//! file of an `io` crate that has to stay pure.

use std::collections::{BTreeMap, BTreeSet};

/// How strictly a crate is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No I/O in the crate or in anything that is linked into it.
    Pure,
    /// Held by the direction of its workspace dependencies only.
    Io,
}

/// What one crate may depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// How strictly it is held.
    pub kind: Kind,
    /// Names of the crates that it may depend on.
    pub allowed: BTreeSet<String>,
}

/// All rules.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// One rule for each crate of the workspace.
    pub crates: BTreeMap<String, Rule>,
    /// Paths of modules (files, relative to the workspace) that are pure inside a crate that is not.
    pub modules: Vec<String>,
}

/// One crate of the workspace as cargo resolves it.
#[derive(Debug, Default, Clone)]
pub struct Crate {
    /// Workspace crates that it names as any kind of dependency.
    pub inward: BTreeSet<String>,
    /// Every crate that is linked into it: normal dependencies, without procedural macros.
    pub closure: BTreeSet<String>,
}

impl Rules {
    /// Reads the rules; the error names the line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut rules = Self::default();
        for (index, line) in text.lines().enumerate() {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(first) = words.next() else { continue };
            let at = |what: &str| format!("line {}: {what}: {line:?}", index + 1);
            let second = words.next().ok_or_else(|| at("expected a kind or a path after the first word"))?;
            let kind = match (first, second) {
                ("module", path) => {
                    rules.modules.push(path.to_owned());
                    continue;
                }
                (_, "pure") => Kind::Pure,
                (_, "io") => Kind::Io,
                _ => return Err(at("expected pure or io")),
            };
            let rule = Rule { kind, allowed: words.map(str::to_owned).collect() };
            if rules.crates.insert(first.to_owned(), rule).is_some() {
                return Err(at("the crate is listed twice"));
            }
        }
        Ok(rules)
    }

    /// What breaks the rules, one line for each; empty when the walls hold.
    pub fn breaches(&self, workspace: &BTreeMap<String, Crate>) -> Vec<String> {
        let mut found = Vec::new();
        for (name, krate) in workspace {
            let Some(rule) = self.crates.get(name) else {
                found.push(format!("{name} has no rule in hack/walls.txt"));
                continue;
            };
            for dependency in krate.inward.difference(&rule.allowed) {
                found.push(format!("{name} must not depend on {dependency}"));
            }
            if rule.kind == Kind::Pure {
                let foreign = krate.closure.iter().filter(|c| !workspace.contains_key(*c));
                for dependency in foreign.filter(|c| !rule.allowed.contains(*c)) {
                    found.push(format!(
                        "{name} is pure and would be linked with {dependency}, which is not listed for it"
                    ));
                }
            }
        }
        for name in self.crates.keys().filter(|name| !workspace.contains_key(*name)) {
            found.push(format!("hack/walls.txt has a rule for {name}, which is not in the workspace"));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = "# layers\nlayout pure zerocopy\nproxy pure ipnet # addresses\nagent io layout proxy\nmodule agent/src/plan.rs\n";

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn workspace() -> BTreeMap<String, Crate> {
        BTreeMap::from([
            ("layout".to_owned(), Crate { inward: set(&[]), closure: set(&["zerocopy"]) }),
            ("proxy".to_owned(), Crate { inward: set(&[]), closure: set(&["ipnet"]) }),
            (
                "agent".to_owned(),
                Crate { inward: set(&["layout", "proxy"]), closure: set(&["layout", "proxy", "tokio"]) },
            ),
        ])
    }

    #[test]
    fn holds_when_every_dependency_is_listed() {
        let rules = Rules::parse(RULES).unwrap();
        assert_eq!(rules.modules, ["agent/src/plan.rs"]);
        assert_eq!(rules.breaches(&workspace()), Vec::<String>::new());
    }

    #[test]
    fn a_pure_crate_that_gains_io_is_a_breach() {
        let mut workspace = workspace();
        workspace.get_mut("proxy").unwrap().closure.insert("tokio".to_owned());
        let found = Rules::parse(RULES).unwrap().breaches(&workspace);
        assert_eq!(found, ["proxy is pure and would be linked with tokio, which is not listed for it"]);
    }

    #[test]
    fn a_dependency_outwards_is_a_breach() {
        let mut workspace = workspace();
        workspace.get_mut("layout").unwrap().inward.insert("agent".to_owned());
        assert_eq!(Rules::parse(RULES).unwrap().breaches(&workspace), ["layout must not depend on agent"]);
    }

    #[test]
    fn a_crate_without_a_rule_and_a_rule_without_a_crate_are_breaches() {
        let mut workspace = workspace();
        workspace.remove("proxy");
        workspace.insert("new".to_owned(), Crate::default());
        let found = Rules::parse(RULES).unwrap().breaches(&workspace);
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn malformed_rules_name_the_line() {
        assert!(Rules::parse("\nlayout soft zerocopy").unwrap_err().contains("line 2"));
        assert!(Rules::parse("layout").unwrap_err().contains("line 1"));
        assert!(Rules::parse("a io\na io").unwrap_err().contains("twice"));
    }
}
