//! What two snapshots differ in, by where their blocks are: what is at the same place of the disk is the same.

/// A run of bytes of a file, and where they are on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// From the start of the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// From the start of the disk.
    pub physical: u64,
}

impl Extent {
    fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// A run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// From the start of the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Where there is data, from `start` on; the extents are in order.
pub fn allocated(extents: &[Extent], start: u64) -> Vec<Range> {
    joined(extents.iter().map(|extent| (extent.offset, extent.end())), start)
}

/// Where the two may differ, from `start` on: also where one has data and the other has none.
pub fn changed(base: &[Extent], target: &[Extent], start: u64) -> Vec<Range> {
    let mut cuts: Vec<u64> = base.iter().chain(target).flat_map(|extent| [extent.offset, extent.end()]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    // Between two cuts neither list changes, so one look at the first byte tells of all.
    let place = |extents: &[Extent], at: u64| {
        let after = extents.partition_point(|extent| extent.offset <= at);
        let found = extents[..after].last().filter(|extent| at < extent.end());
        found.map(|extent| extent.physical + (at - extent.offset))
    };
    let differs = |cut: &&[u64]| place(base, cut[0]) != place(target, cut[0]);
    joined(cuts.windows(2).filter(differs).map(|cut| (cut[0], cut[1])), start)
}

fn joined(runs: impl Iterator<Item = (u64, u64)>, start: u64) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    for (from, to) in runs.map(|(from, to)| (from.max(start), to)).filter(|(from, to)| from < to) {
        match ranges.last_mut() {
            Some(last) if last.offset + last.length == from => last.length = to - last.offset,
            _ => ranges.push(Range { offset: from, length: to - from }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(list: &[(u64, u64, u64)]) -> Vec<Extent> {
        list.iter().map(|&(offset, length, physical)| Extent { offset, length, physical }).collect()
    }

    fn ranges(list: Vec<Range>) -> Vec<(u64, u64)> {
        list.into_iter().map(|range| (range.offset, range.length)).collect()
    }

    #[test]
    fn what_moved_changed() {
        let base = extents(&[(0, 100, 1000), (200, 50, 5000)]);
        // Bytes 40 to 60 were written anew, 200 to 250 were discarded, 300 to 310 are new.
        let target = extents(&[(0, 40, 1000), (40, 20, 9000), (60, 40, 1060), (300, 10, 7000)]);
        assert_eq!(ranges(changed(&base, &target, 0)), [(40, 20), (200, 50), (300, 10)]);
        assert_eq!(ranges(changed(&base, &target, 50)), [(50, 10), (200, 50), (300, 10)]);
        assert_eq!(changed(&base, &base, 0), []);
        // The same blocks, cut into other extents, are the same.
        assert_eq!(changed(&base, &extents(&[(0, 30, 1000), (30, 70, 1030), (200, 50, 5000)]), 0), []);
    }

    #[test]
    fn neighbours_are_one() {
        assert_eq!(ranges(allocated(&extents(&[(0, 10, 5), (10, 10, 90), (40, 5, 7)]), 0)), [(0, 20), (40, 5)]);
        assert_eq!(ranges(allocated(&extents(&[(0, 10, 5)]), 4)), [(4, 6)]);
    }
}
