//! Tables for people and `target/report/<name>.json` for programs.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// A report as every suite and benchmark writes it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The chore's name, which is also the file's.
    pub name: String,
    /// What a person types to get it again.
    pub command: String,
    /// One row for each group of checks.
    pub rows: Vec<Row>,
}

/// One group of checks: how many passed of how many that should.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The group.
    pub what: String,
    /// What is counted.
    pub unit: &'static str,
    /// Checks that passed.
    pub ours: usize,
    /// Nothing is compared against: always null.
    pub peer: Option<f64>,
    /// See `peer`.
    pub peer_name: Option<String>,
    /// See `peer`.
    pub ratio: Option<f64>,
    /// Checks that were run and should pass.
    pub goal: usize,
    /// Whether every check that ran passed, and at least one did.
    pub met: bool,
    /// Wall time in seconds.
    pub seconds: f64,
    /// What was not run, each with its reason.
    pub skipped: Vec<String>,
}

impl Row {
    /// A group of `passed` and `failed` checks that took `seconds`.
    pub fn new(what: &str, passed: usize, failed: usize, skipped: Vec<String>, seconds: f64) -> Self {
        let goal = passed + failed;
        // A group that was skipped whole is not met, yet fails nothing: the table shows it as skipped.
        let met = failed == 0 && passed > 0;
        let (peer, peer_name, ratio) = (None, None, None);
        Self {
            what: what.to_owned(),
            unit: "checks",
            ours: passed,
            peer,
            peer_name,
            ratio,
            goal,
            met,
            seconds,
            skipped,
        }
    }

    /// Checks that ran and did not pass.
    pub fn failed(&self) -> usize {
        self.goal - self.ours
    }
}

impl Report {
    /// Writes `target/report/<name>.json`.
    pub fn write(&self) -> anyhow::Result<()> {
        let directory = Path::new("target/report");
        std::fs::create_dir_all(directory).context("target/report")?;
        let path = directory.join(format!("{}.json", self.name));
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(&path, text).with_context(|| path.display().to_string())
    }

    /// What was skipped, the table and the closing line, as a person reads them.
    pub fn table(&self) -> String {
        let width = self.rows.iter().map(|row| row.what.len()).max().unwrap_or(0).max("suite".len());
        let mut out = String::new();
        for row in &self.rows {
            for (reason, names) in grouped(&row.skipped) {
                let what = match names[..] {
                    [""] => String::new(),
                    [name] => format!("{name}: "),
                    _ => format!("{} of them: ", names.len()),
                };
                out += &format!("skipped: {}: {what}{reason}\n", row.what);
            }
        }
        out += &format!("\n{:width$}  {:>6}  {:>6}  {:>7}  {:>7}\n", "suite", "passed", "failed", "skipped", "seconds");
        for row in &self.rows {
            let (failed, skipped) = (row.failed(), row.skipped.len());
            out += &format!("{:width$}  {:>6}  {failed:>6}  {skipped:>7}  {:>7.1}\n", row.what, row.ours, row.seconds);
        }
        let passed: usize = self.rows.iter().map(|row| row.ours).sum();
        let failed: usize = self.rows.iter().map(Row::failed).sum();
        let skipped: usize = self.rows.iter().map(|row| row.skipped.len()).sum();
        out + &format!("{passed} passed, {failed} failed, {skipped} skipped\n")
    }

    /// Whether nothing failed.
    pub fn passed(&self) -> bool {
        self.rows.iter().all(|row| row.failed() == 0)
    }
}

/// The reasons, each with the names of what it kept from running. Of upstream's suites the end of the name is the reason.
fn grouped(skipped: &[String]) -> BTreeMap<&str, Vec<&str>> {
    let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for line in skipped {
        let (name, reason) =
            line.rsplit_once(" skipped - ").or_else(|| line.split_once(": ")).unwrap_or(("", line.as_str()));
        groups.entry(reason).or_default().push(name.trim_end_matches(':'));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(rows: Vec<Row>) -> Report {
        Report { name: "test".to_owned(), command: "make test".to_owned(), rows }
    }

    #[test]
    fn the_closing_line_adds_up() {
        let rows = vec![
            Row::new("unit", 40, 1, vec!["big: needs root".to_owned()], 3.0),
            Row::new("lab", 2, 0, Vec::new(), 90.5),
        ];
        let report = report(rows);
        let table = report.table();
        assert!(table.ends_with("42 passed, 1 failed, 1 skipped\n"), "{table}");
        assert!(table.contains("skipped: unit: big: needs root\n"), "{table}");
        assert!(!report.passed());
    }

    #[test]
    fn a_group_that_ran_nothing_is_not_met_and_fails_nothing() {
        let row = Row::new("lab", 0, 0, vec!["no root".to_owned()], 0.0);
        assert!(!row.met);
        assert!(report(vec![row]).passed());
    }

    #[test]
    fn many_skips_for_one_reason_are_one_line() {
        let skipped =
            ["a: skipped - no snapshots", "b: skipped - no snapshots", "c: needs root", "d: no FUSE", "e: no FUSE"];
        let table = report(vec![Row::new("sanity", 1, 0, skipped.map(str::to_owned).to_vec(), 1.0)]).table();
        for line in ["sanity: c: needs root", "sanity: 2 of them: no snapshots", "sanity: 2 of them: no FUSE"] {
            assert!(table.contains(&format!("skipped: {line}\n")), "{table}");
        }
        assert!(table.ends_with("1 passed, 0 failed, 5 skipped\n"), "{table}");
    }
}
