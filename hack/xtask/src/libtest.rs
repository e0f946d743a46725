//! Reads what `cargo test` prints. Pure.

/// What a run of `cargo test` did, over all of its binaries.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed.
    pub failed: usize,
    /// `name: reason` of the tests that were not run.
    pub skipped: Vec<String>,
}

/// The line that a test prints, by itself, when it finds that it cannot run here: the reason follows.
const SKIP: &str = "SKIPPED: ";

/// Counts the tests in the output by the closing line of each binary, since what the tests' own programs print may be
/// mixed into the lines above it. A test that passed after printing a `SKIPPED: ` line (shown with `--show-output`)
/// counts as skipped.
pub fn read(output: &str) -> Counts {
    let mut counts = Counts::default();
    // The test whose own output is being read: the same words in a build log are not a test.
    let mut shown = None;
    // Tests of this binary that skipped themselves; its closing line counts them as passed.
    let mut excused = 0;
    for line in output.lines() {
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            shown = Some(name);
        } else if let Some(reason) = line.trim_start().strip_prefix(SKIP) {
            if let Some(name) = shown.take() {
                counts.skipped.push(format!("{name}: {reason}"));
                excused += 1;
            }
        } else if let Some(summary) = line.strip_prefix("test result: ") {
            shown = None;
            counts.passed += number_before(summary, " passed").saturating_sub(excused);
            excused = 0;
            counts.failed += number_before(summary, " failed");
        } else if let Some((name, reason)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ignored"))
        {
            let reason = reason.strip_prefix(", ").unwrap_or("marked as ignored");
            counts.skipped.push(format!("{name}: {reason}"));
        }
    }
    counts
}

/// The number in front of `word`, zero when there is none.
fn number_before(text: &str, word: &str) -> usize {
    let before = text.split(word).next().unwrap_or_default();
    before.rsplit(' ').next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_of_several_binaries_add_up() {
        let output = "\
running 3 tests
test lease::tests::one ... chatter of a child ok
test lease::tests::two ... FAILED
test plan::tests::root ... ignored, needs root
test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
running 12 tests
test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let counts = read(output);
        assert_eq!((counts.passed, counts.failed), (13, 1));
        assert_eq!(counts.skipped, ["plan::tests::root: needs root"]);
    }

    #[test]
    fn a_test_that_says_it_could_not_run_is_not_passed() {
        let output = "\
SKIPPED: not a test's own line
successes:
---- e2e stdout ----
SKIPPED: no containerd

test result: ok. 2 passed; 0 failed; 0 ignored
";
        let counts = read(output);
        assert_eq!((counts.passed, counts.failed), (1, 0));
        assert_eq!(counts.skipped, ["e2e: no containerd"]);
    }
}
