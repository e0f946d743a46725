//! The journal's lines: `<8 hex digits> <JSON>\n`, the digits being the start of the JSON's SHA-256. No I/O.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::intent::Intent;
use crate::model::hex;

/// The most bytes that a line of an end has.
pub(super) const END: u64 = 96;

/// A line. `synced`: so many bytes of the file were on disk for certain when it was written; older builds did not say so.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Line {
    Begin {
        seq: u64,
        intent: Intent,
        #[serde(default, skip_serializing_if = "is_zero")]
        synced: u64,
    },
    End {
        seq: u64,
        #[serde(default, skip_serializing_if = "is_zero")]
        synced: u64,
    },
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn digest(json: &str) -> String {
    hex(&Sha256::digest(json)[..4])
}

pub(super) fn encode(line: &Line) -> String {
    let json = serde_json::to_string(line).expect("a line has only strings, numbers and UTF-8 paths");
    format!("{} {json}\n", digest(&json))
}

fn decode(line: &[u8]) -> Option<Line> {
    let (sum, json) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    if sum == digest(json) { serde_json::from_str(json).ok() } else { None }
}

/// What a journal says.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// What did not end.
    pub open: BTreeMap<u64, Intent>,
    /// The number of the next intent.
    pub next: u64,
    /// Where the lines end.
    pub end: usize,
    /// What a power cut left of lines that were not on disk yet, so that nobody had acted upon them.
    pub lost: Vec<Range<usize>>,
}

/// Reads a journal. Blocks that were not synced reach the disk in any order, or not: what was written last may be damaged with
/// whole lines behind it.
///
/// # Errors
/// What is wrong, for people: damage to what was on disk already, as a later line says.
pub(super) fn replay(bytes: &[u8]) -> Result<Replay, String> {
    let end = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let mut replay = Replay { end, ..Replay::default() };
    let (mut at, mut known) = (0, 0);
    for line in bytes[..end].split_inclusive(|&byte| byte == b'\n') {
        let place = at..at + line.len();
        at = place.end;
        match decode(&line[..line.len() - 1]) {
            Some(Line::Begin { seq, intent, synced }) => {
                (replay.next, known) = (replay.next.max(seq + 1), known.max(synced));
                replay.open.insert(seq, intent);
            }
            Some(Line::End { seq, synced }) => {
                known = known.max(synced);
                replay.open.remove(&seq);
            }
            // Something was damaged here, and an earlier start dealt with it.
            None if line == b"\n" => {}
            None => replay.lost.push(place),
        }
    }
    match replay.lost.iter().find(|place| (place.start as u64) < known) {
        Some(Range { start, .. }) => Err(format!("the line at byte {start} is damaged, and was on disk before others")),
        None => Ok(replay),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::VolumeId;
    use proptest::prelude::*;

    fn delete(n: u8) -> Intent {
        Intent::Delete { id: VolumeId::new([n; 16]) }
    }

    /// Each was synced before the next one.
    fn one_by_one(count: u8) -> String {
        (0..count).fold(String::new(), |text, n| {
            let synced = text.len() as u64;
            text + &encode(&Line::Begin { seq: n.into(), intent: delete(n), synced })
        })
    }

    #[test]
    fn a_journal_of_an_older_build_is_understood() {
        let id = VolumeId::new([1; 16]);
        let json = format!("{{\"begin\":{{\"seq\":7,\"intent\":{{\"op\":\"delete\",\"id\":\"{id}\"}}}}}}");
        let begin = format!("{} {json}\n", digest(&json));
        let end = format!("{} {{\"end\":{{\"seq\":7}}}}\n", digest("{\"end\":{\"seq\":7}}"));
        let read = replay(begin.as_bytes()).unwrap();
        assert_eq!((read.open.get(&7), read.next), (Some(&delete(1)), 8));
        let read = replay(format!("{begin}{end}{}", &begin[..30]).as_bytes()).unwrap();
        assert_eq!((read.open.len(), read.end), (0, begin.len() + end.len()));
    }

    #[test]
    fn an_end_has_its_room() {
        let longest = encode(&Line::End { seq: u64::MAX, synced: u64::MAX });
        assert!(longest.len() as u64 <= END, "{}", longest.len());
    }

    /// Two blocks were under way when the power went, and the second one arrived.
    #[test]
    fn blocks_may_arrive_out_of_order() {
        let mut text = one_by_one(2).into_bytes();
        let (from, synced) = (text.len(), text.len() as u64);
        for n in 2..40 {
            text.extend(encode(&Line::Begin { seq: n.into(), intent: delete(n), synced }).bytes());
        }
        for end in [0, 1] {
            text.extend(encode(&Line::End { seq: end, synced }).bytes());
        }
        let hole = from.next_multiple_of(512)..from.next_multiple_of(512) + 1024;
        assert!(hole.end < text.len());
        text[hole].fill(0);
        let read = replay(&text).unwrap();
        assert!(!read.open.contains_key(&0) && !read.open.contains_key(&1), "they ended");
        assert_eq!(read.lost.len(), 1);
        assert!((25..38).contains(&read.open.len()), "{}", read.open.len());
        // The same where a sync is known to have come first is no power cut.
        text.extend(encode(&Line::End { seq: 39, synced: text.len() as u64 }).bytes());
        assert!(replay(&text).unwrap_err().contains("damaged"));
    }

    proptest! {
        /// A cut anywhere loses at most the line that it is in, which nobody has acted upon.
        #[test]
        fn a_cut_anywhere_is_survived(cut in 0usize..700, zeros in 0usize..200) {
            let text = one_by_one(5);
            let cut = cut.min(text.len());
            let whole = text[..cut].matches('\n').count();
            let bytes = [&text.as_bytes()[..cut], &[0].repeat(zeros)].concat();
            prop_assert_eq!(replay(&bytes).unwrap().open.len(), whole);
        }

        /// A flipped bit is noticed: in the last line it counts as torn, elsewhere it stops the driver.
        #[test]
        fn a_flipped_bit_is_noticed(at in 0usize..700, bit in 0u8..8) {
            let mut bytes = one_by_one(5).into_bytes();
            let at = at.min(bytes.len() - 1);
            let last = bytes[..bytes.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
            bytes[at] ^= 1 << bit;
            match replay(&bytes) {
                Ok(read) => prop_assert!(at >= last - 1 && read.open.len() >= 3, "{} {}", at, read.open.len()),
                Err(why) => prop_assert!(why.contains("damaged")),
            }
        }
    }
}
