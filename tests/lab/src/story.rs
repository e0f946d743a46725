//! A demo's steps as they happen, and the table that is left of them.
use std::fs;
use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use crate::cluster::programs::root;

/// Steps that were taken.
#[derive(Debug)]
pub struct Story {
    name: String,
    start: Instant,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    what: String,
    seen: String,
    good: bool,
}

impl Story {
    /// A story without steps; `name` is that of its `make` target.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), start: Instant::now(), rows: Vec::new() }
    }

    /// Says what is being done; for what takes a while and proves nothing.
    pub fn say(&self, what: &str) {
        println!("[{:>5.1} s] {what}", self.start.elapsed().as_secs_f64());
    }

    /// Takes a step: it says what was seen and whether that is what should be. An error is a step that failed.
    pub fn step(&mut self, what: &str, step: impl FnOnce() -> Result<(bool, String)>) {
        self.say(what);
        let (good, seen) = step().unwrap_or_else(|error| (false, format!("{error:#}")));
        self.rows.push(Row { what: what.to_owned(), seen, good });
    }

    /// Prints the table and writes `target/report/<name>.json`; whether every step went well.
    pub fn end(self) -> Result<bool> {
        println!();
        let width = self.rows.iter().map(|row| row.what.chars().count()).max().unwrap_or(0);
        for row in &self.rows {
            let mut lines = row.seen.lines();
            let first = lines.next().unwrap_or_default();
            println!("{}  {:width$}  {first}", if row.good { "ok  " } else { "FAIL" }, row.what);
            lines.for_each(|line| println!("      {:width$}  {line}", ""));
        }
        let good = !self.rows.is_empty() && self.rows.iter().all(|row| row.good);
        let count = self.rows.iter().filter(|row| row.good).count();
        println!(
            "\n{count} of {} steps as they should be, in {:.0} s",
            self.rows.len(),
            self.start.elapsed().as_secs_f64()
        );
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| json!({"what": row.what, "unit": "step", "ours": row.seen, "peer": null, "peer_name": null, "ratio": null, "goal": null, "met": row.good}))
            .collect();
        let dir = root().join("target/report");
        fs::create_dir_all(&dir)?;
        let report = json!({"name": self.name, "command": format!("make {}", self.name), "rows": rows});
        fs::write(dir.join(format!("{}.json", self.name)), serde_json::to_vec_pretty(&report)?)?;
        Ok(good)
    }
}
