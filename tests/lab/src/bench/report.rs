//! Rows of figures, the table for people and the report for programs.
use std::fs;

use anyhow::Result;
use serde_json::{Value, json};

use crate::cluster::programs::root;

/// The middle of some measurements, and between what half of them lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    /// A quarter of them is below.
    pub(super) q1: f64,
    /// A quarter of them is above.
    pub(super) q3: f64,
    pub(super) count: usize,
}

impl Spread {
    /// Of one or more figures; nothing for none.
    pub(super) fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_unstable_by(f64::total_cmp);
        let last = figures.len().checked_sub(1)?;
        // Between the two nearest ranks, in proportion.
        let at = |share: f64| {
            let (rank, above) = ((last as f64 * share).floor(), (last as f64 * share).fract());
            let (low, high) = (figures[rank as usize], figures[(rank as usize + 1).min(last)]);
            low + (high - low) * above
        };
        Some(Self { median: at(0.5), q1: at(0.25), q3: at(0.75), count: figures.len() })
    }

    fn shown(self) -> String {
        format!("{} ({} to {})", digits(self.median), digits(self.q1), digits(self.q3))
    }

    fn json(self) -> Value {
        json!({"median": self.median, "q1": self.q1, "q3": self.q3, "count": self.count})
    }
}

fn digits(figure: f64) -> String {
    if figure.abs() < 100.0 { format!("{figure:.2}") } else { format!("{figure:.0}") }
}

/// A line of the table.
#[derive(Debug)]
struct Row {
    what: String,
    unit: &'static str,
    ours: Spread,
    peer: Option<Peer>,
    goal: Option<Goal>,
}

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Goal {
    /// Ours is this or less.
    OursAtMost(f64),
    /// Ours is this much of the peer's or less.
    RatioAtMost(f64),
    /// Ours is this much of the peer's or more.
    RatioAtLeast(f64),
}

impl Goal {
    /// The figure, and whether the row reaches it; `None` without a peer to compare with.
    fn judge(self, row: &Row) -> (f64, Option<bool>) {
        let ratio = row.peer.as_ref().map(|peer| peer.ratio);
        match self {
            Self::OursAtMost(goal) => (goal, Some(row.ours.median <= goal)),
            Self::RatioAtMost(goal) => (goal, ratio.map(|ratio| ratio <= goal)),
            Self::RatioAtLeast(goal) => (goal, ratio.map(|ratio| ratio >= goal)),
        }
    }

    fn shown(self, row: &Row) -> String {
        let (text, (goal, met)) = match self {
            Self::OursAtMost(_) => ("ours at most", self.judge(row)),
            Self::RatioAtMost(_) => ("ratio at most", self.judge(row)),
            Self::RatioAtLeast(_) => ("ratio at least", self.judge(row)),
        };
        let met = met.map_or("not known", |met| if met { "met" } else { "MISSED" });
        format!("  {text} {}: {met}", digits(goal))
    }
}

/// What ours is held against.
#[derive(Debug)]
struct Peer {
    name: &'static str,
    figure: Spread,
    /// Ours to the peer's: of the pairs that were taken in turn, or of the two medians.
    ratio: f64,
    /// Of the pairs' ratios.
    ratios: Option<Spread>,
}

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
        let Some(ours) = Spread::of(ours) else { return self.skip(what, "nothing was measured") };
        let peer = peer.and_then(|(figures, name)| {
            let figure = Spread::of(figures)?;
            Some(Peer { name, figure, ratio: ours.median / figure.median, ratios: None })
        });
        self.rows.push(Row { what: what.to_owned(), unit, ours, peer, goal: None });
    }

    /// Adds figures that were taken in turn with the peer's: the ratio is that of the middle pair.
    pub(super) fn pairs(&mut self, what: &str, unit: &'static str, pairs: &[[f64; 2]], name: &'static str) {
        let of = |figure: fn(&[f64; 2]) -> f64| Spread::of(pairs.iter().map(figure).collect());
        let (Some(ours), Some(figure), Some(ratios)) =
            (of(|pair| pair[0]), of(|pair| pair[1]), of(|pair| pair[0] / pair[1]))
        else {
            return self.skip(what, "nothing was measured");
        };
        let peer = Some(Peer { name, figure, ratio: ratios.median, ratios: Some(ratios) });
        self.rows.push(Row { what: what.to_owned(), unit, ours, peer, goal: None });
    }

    /// Says what the figure of a row should be; nothing for a row that could not be measured.
    pub(super) fn goal(&mut self, what: &str, goal: Goal) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.what == what) {
            row.goal = Some(goal);
        }
    }

    /// Notes what could not be measured, and why.
    pub(super) fn skip(&mut self, what: &str, reason: &str) {
        println!("  not measured: {what}: {reason}");
        self.skipped.push((what.to_owned(), reason.to_owned()));
    }

    /// Prints the table and writes `target/report/<name>.json`; whether everything was measured.
    pub(super) fn end(self, name: &str) -> Result<bool> {
        println!();
        let width = self.rows.iter().map(|row| row.what.len()).max().unwrap_or(0);
        println!(
            "{:width$}  {:8}  {:>24}  {:>24}  {:>19}  peer",
            "median (middle half)", "unit", "ours", "peer", "ratio"
        );
        let mut rows = Vec::new();
        for row in self.rows {
            let Row { what, unit, ours, peer, goal } = &row;
            let ratio = peer.as_ref().map(|peer| peer.ratios.map_or_else(|| digits(peer.ratio), Spread::shown));
            println!(
                "{what:width$}  {unit:8}  {:>24}  {:>24}  {:>19}  {}{}",
                ours.shown(),
                peer.as_ref().map_or_else(|| "-".to_owned(), |peer| peer.figure.shown()),
                ratio.unwrap_or_else(|| "-".to_owned()),
                peer.as_ref().map_or("-", |peer| peer.name),
                goal.map_or_else(String::new, |goal| goal.shown(&row)),
            );
            let judged = goal.map(|goal| goal.judge(&row));
            let peer = peer.as_ref();
            rows.push(json!({"what": what, "unit": unit, "ours": ours.median, "peer": peer.map(|peer| peer.figure.median),
                "peer_name": peer.map(|peer| peer.name), "ratio": peer.map(|peer| peer.ratio), "goal": judged.map(|(goal, _)| goal), "met": judged.and_then(|(_, met)| met),
                "ours_spread": ours.json(), "peer_spread": peer.map(|peer| peer.figure.json()),
                "ratio_spread": peer.and_then(|peer| peer.ratios).map(Spread::json)}));
        }
        let skipped: Vec<Value> =
            self.skipped.iter().map(|(what, reason)| json!({"what": what, "reason": reason})).collect();
        for (what, reason) in &self.skipped {
            println!("{what:width$}  not measured: {reason}");
        }
        let dir = root().join("target/report");
        fs::create_dir_all(&dir)?;
        let report = json!({"name": name, "command": format!("make {name}"), "rows": rows, "skipped": skipped});
        fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(&report)?)?;
        Ok(self.skipped.is_empty() && !rows.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn the_median_is_in_the_middle() {
        let of = |figures: &[f64]| Spread::of(figures.to_vec()).map(|of| (of.median, of.q1, of.q3, of.count));
        assert_eq!(of(&[3.0, 1.0, 2.0]), Some((2.0, 1.5, 2.5, 3)));
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0, 100.0]), Some((3.0, 2.0, 4.0, 5)));
        assert_eq!(of(&[7.0]), Some((7.0, 7.0, 7.0, 1)));
        assert_eq!(of(&[]), None);
    }
}
