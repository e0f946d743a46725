//! Reads the results that a guest prints on its serial line, in the manner of the Test Anything Protocol. Pure.

/// What a guest reported.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Results {
    /// Checks that passed.
    pub passed: Vec<String>,
    /// Checks that failed.
    pub failed: Vec<String>,
    /// `name: reason` of checks that were not run.
    pub skipped: Vec<String>,
    /// How many checks the guest said it would report; none when it did not come to its end.
    pub planned: Option<usize>,
}

/// Reads `ok N - NAME`, `ok N - NAME # SKIP REASON`, `not ok N - NAME` and the plan `1..N`; kernel messages between
/// them are passed over.
pub fn read(serial: &str) -> Results {
    let mut results = Results::default();
    for line in serial.lines().map(str::trim_end) {
        if let Some(count) = line.strip_prefix("1..") {
            results.planned = count.parse().ok();
        } else if let Some(name) = line.strip_prefix("not ok ").and_then(name) {
            results.failed.push(name.to_owned());
        } else if let Some(name) = line.strip_prefix("ok ").and_then(name) {
            match name.split_once(" # SKIP ") {
                Some((name, reason)) => results.skipped.push(format!("{name}: {reason}")),
                None => results.passed.push(name.to_owned()),
            }
        }
    }
    let reported = results.passed.len() + results.failed.len() + results.skipped.len();
    match results.planned {
        None => results.failed.push("the guest did not come to the end of its plan".to_owned()),
        Some(planned) if planned != reported => {
            results.failed.push(format!("{reported} results of {planned} planned arrived"));
        }
        Some(_) => {}
    }
    results
}

/// The name behind the number of a result line.
fn name(rest: &str) -> Option<&str> {
    let (number, name) = rest.split_once(" - ")?;
    number.parse::<usize>().is_ok().then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_found_between_kernel_messages() {
        let results = read(
            "[ 0.1] Linux\r\nok 1 - bpffs mounts\r\n[ 1.0] veth: x\nok 2 - tcx # SKIP kernel 6.1\nnot ok 3 - deny\n1..3\n",
        );
        assert_eq!(results.passed, ["bpffs mounts"]);
        assert_eq!(results.skipped, ["tcx: kernel 6.1"]);
        assert_eq!(results.failed, ["deny"]);
    }

    #[test]
    fn a_guest_that_stops_early_or_loses_a_line_fails() {
        assert_eq!(read("ok 1 - boots\nKernel panic").failed.len(), 1);
        assert_eq!(read("ok 1 - boots\n1..2").failed, ["1 results of 2 planned arrived"]);
        assert_eq!(read("").failed.len(), 1);
    }
}
