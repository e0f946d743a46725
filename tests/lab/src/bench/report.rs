//! Rows of figures, the table for people and the report for programs.
use std::fs;

use anyhow::Result;
use serde_json::{Value, json};

use crate::cluster::programs::root;

/// The middle of some measurements, with the least and the greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// Of one or more figures; nothing for none.
    pub(super) fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*figures.first()?, *figures.last()?);
        let middle = figures.len() / 2;
        let median =
            if figures.len() % 2 == 1 { figures[middle] } else { f64::midpoint(figures[middle - 1], figures[middle]) };
        Some(Self { median, min, max })
    }

    fn shown(self) -> String {
        format!("{} ({} to {})", digits(self.median), digits(self.min), digits(self.max))
    }

    fn json(self) -> Value {
        json!({"median": self.median, "min": self.min, "max": self.max})
    }
}

fn digits(figure: f64) -> String {
    if figure.abs() < 100.0 { format!("{figure:.2}") } else { format!("{figure:.0}") }
}

/// What, its unit, our figure, and the peer's with its name.
type Row = (String, &'static str, Spread, Option<(Spread, &'static str)>);

/// What was measured so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    rows: Vec<Row>,
    skipped: Vec<(String, String)>,
}

impl Report {
    /// Adds a figure, with its peer's of the same run if there is one. No measurements at all are a part left out.
    pub(super) fn row(
        &mut self,
        what: &str,
        unit: &'static str,
        ours: Vec<f64>,
        peer: Option<(Vec<f64>, &'static str)>,
    ) {
        match Spread::of(ours) {
            Some(ours) => {
                let peer = peer.and_then(|(figures, name)| Some((Spread::of(figures)?, name)));
                self.rows.push((what.to_owned(), unit, ours, peer));
            }
            None => self.skip(what, "nothing was measured"),
        }
    }

    /// Notes what could not be measured, and why.
    pub(super) fn skip(&mut self, what: &str, reason: &str) {
        println!("  not measured: {what}: {reason}");
        self.skipped.push((what.to_owned(), reason.to_owned()));
    }

    /// Prints the table and writes `target/report/bench.json`; whether everything was measured.
    pub(super) fn end(self) -> Result<bool> {
        println!();
        let width = self.rows.iter().map(|row| row.0.len()).max().unwrap_or(0);
        println!(
            "{:width$}  {:8}  {:>24}  {:>24}  {:>6}  peer",
            "median (least to greatest)", "unit", "ours", "peer", "ratio"
        );
        let mut rows = Vec::new();
        for (what, unit, ours, peer) in self.rows {
            let ratio = peer.map(|(peer, _)| ours.median / peer.median);
            println!(
                "{what:width$}  {unit:8}  {:>24}  {:>24}  {:>6}  {}",
                ours.shown(),
                peer.map_or_else(|| "-".to_owned(), |(peer, _)| peer.shown()),
                ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
                peer.map_or("-", |(_, name)| name),
            );
            rows.push(
                json!({"what": what, "unit": unit, "ours": ours.median, "peer": peer.map(|(peer, _)| peer.median),
                "peer_name": peer.map(|(_, name)| name), "ratio": ratio, "goal": null, "met": null,
                "ours_spread": ours.json(), "peer_spread": peer.map(|(peer, _)| peer.json())}),
            );
        }
        let skipped: Vec<Value> =
            self.skipped.iter().map(|(what, reason)| json!({"what": what, "reason": reason})).collect();
        for (what, reason) in &self.skipped {
            println!("{what:width$}  not measured: {reason}");
        }
        let dir = root().join("target/report");
        fs::create_dir_all(&dir)?;
        let report = json!({"name": "bench", "command": "make bench", "rows": rows, "skipped": skipped});
        fs::write(dir.join("bench.json"), serde_json::to_vec_pretty(&report)?)?;
        Ok(self.skipped.is_empty() && !rows.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn the_median_is_in_the_middle() {
        let of = |figures: &[f64]| Spread::of(figures.to_vec());
        assert_eq!(of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(of(&[]), None);
    }
}
