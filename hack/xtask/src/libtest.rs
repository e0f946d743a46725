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
const SKIP: &str = "skipped: ";

/// Counts the tests in the output by the closing line of each binary, since what the tests' own programs print may be
/// mixed into the lines above it. A test that passed after printing a `skipped: ` line (shown with `--show-output`)
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

/// What the failed tests said, without the call stacks; the last lines, when that is nothing.
pub fn failures(output: &str) -> String {
    const LINES: usize = 40;
    let (mut found, mut failed, mut stack) = (Vec::new(), false, false);
    for line in output.lines() {
        match line {
            "failures:" => failed = true,
            "stack backtrace:" => stack = true,
            _ if line.starts_with("test result: ") => failed = false,
            _ if line.starts_with("note: Some details are omitted") => stack = false,
            // Names without what was said are the list that closes a binary's output.
            _ if failed && !stack && !line.is_empty() && !line.starts_with("    ") => found.push(line),
            _ => {}
        }
    }
    if found.is_empty() {
        crate::runner::tail(output, LINES)
    } else {
        crate::runner::tail(&found.join("\n"), 2 * LINES)
    }
}

/// The beginning of what each failed test said, for a list of all that failed: `failures` in at most a screenful.
pub fn briefly(failures: &str) -> String {
    const LINES: usize = 30;
    let mut found = Vec::new();
    for test in failures.split("---- ").filter(|test| !test.trim().is_empty()) {
        found.extend(test.lines().take(5).map(|line| line.chars().take(200).collect::<String>()));
    }
    found.truncate(LINES);
    found.join("\n")
}

/// Counts upstream's CSI specs by the lines `csi-sanity NAME: P passed, F failed, S not advertised` that the tests print;
/// a spec about what the driver does not advertise is named on an indented line that follows.
pub fn read_sanity(output: &str) -> Counts {
    let tests = read(output);
    let mut counts = Counts { failed: tests.failed, skipped: tests.skipped, ..Counts::default() };
    let mut listing = None;
    for line in output.lines() {
        if let Some((name, sum)) = line.strip_prefix("csi-sanity ").and_then(|rest| rest.split_once(": ")) {
            counts.passed += number_before(sum, " passed");
            counts.failed += number_before(sum, " failed");
            listing = Some(name);
        } else if let (Some(name), Some(spec)) = (listing, line.strip_prefix("  ")) {
            counts.skipped.push(format!("{name}: {}", spec.trim()));
        } else {
            listing = None;
        }
    }
    counts
}

/// Counts by the line that closes a table of [`crate::report::Report`]; the reasons of what it skipped stand above it.
pub fn read_closing_line(output: &str) -> Counts {
    let closing = output.lines().rev().find(|line| line.ends_with(" skipped") && line.contains(" passed, "));
    let skipped = output.lines().filter_map(|line| line.strip_prefix(SKIP)).map(str::to_owned).collect();
    let count = |word| closing.map_or(0, |line| number_before(line, word));
    Counts { passed: count(" passed"), failed: count(" failed"), skipped }
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
skipped: not a test's own line
successes:
---- e2e stdout ----
skipped: no containerd

test result: ok. 2 passed; 0 failed; 0 ignored
";
        let counts = read(output);
        assert_eq!((counts.passed, counts.failed), (1, 0));
        assert_eq!(counts.skipped, ["e2e: no containerd"]);
    }

    #[test]
    fn what_failed_tests_said_is_told_without_their_stacks() {
        let output = "\
running 2 tests
successes:
---- good stdout ----
much
failures:

---- bad stdout ----
thread 'bad' panicked at a.rs:1:1:
left: 1
stack backtrace:
   0: main
note: Some details are omitted, run with
---- worse stdout ----
no

failures:
    bad
    worse

test result: FAILED. 1 passed; 2 failed
running 1 test
";
        let expected = "---- bad stdout ----\nthread 'bad' panicked at a.rs:1:1:\nleft: 1\n---- worse stdout ----\nno";
        assert_eq!(failures(output), expected);
        assert_eq!(failures("error: it does not compile"), "error: it does not compile");
        let brief = briefly("---- bad stdout ----\n1\n2\n3\n4\n5\n---- worse stdout ----\nno");
        assert_eq!(brief, "bad stdout ----\n1\n2\n3\n4\nworse stdout ----\nno");
    }

    #[test]
    fn specs_of_csi_sanity_count_one_by_one() {
        let output = "\
---- mount stdout ----
csi-sanity mount: 61 passed, 1 failed, 1 not advertised
  snapshots: not supported
that is all
  not a spec
test result: ok. 1 passed; 0 failed; 0 ignored
";
        let counts = read_sanity(output);
        assert_eq!((counts.passed, counts.failed), (61, 1));
        assert_eq!(counts.skipped, ["mount: snapshots: not supported"]);
    }

    #[test]
    fn another_chore_is_read_by_its_closing_line() {
        let counts = read_closing_line("suite  passed\nskipped: a: no tcx\n56 passed, 2 failed, 1 skipped\n\n");
        assert_eq!((counts.passed, counts.failed), (56, 2));
        assert_eq!(counts.skipped, ["a: no tcx"]);
        assert_eq!(read_closing_line("nothing"), Counts::default());
    }
}
