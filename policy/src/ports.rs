//! Ports as prefixes over protocol and port.

use std::collections::BTreeMap;

use crate::op::PortPrefix;

/// All of a protocol.
const PROTOCOL_BITS: u8 = 8;
/// One port of a protocol.
const FULL_BITS: u8 = 24;

impl PortPrefix {
    /// Every protocol and port, those without ports (ICMP) included.
    pub const EVERYTHING: Self = Self { proto: 0, port: 0, bits: 0 };

    /// All ports of a protocol.
    pub const fn protocol(proto: u8) -> Self {
        Self { proto, port: 0, bits: PROTOCOL_BITS }
    }

    /// The fewest prefixes that hold the ports from `first` to `last`, both included; none when `last` is smaller.
    pub fn range(proto: u8, first: u16, last: u16) -> Vec<Self> {
        let mut prefixes = Vec::new();
        let (mut next, last) = (u32::from(first), u32::from(last));
        while next <= last {
            // The largest aligned block that starts here and does not reach past the end.
            let aligned = if next == 0 { 16 } else { next.trailing_zeros().min(16) };
            let fits = (last - next + 1).ilog2();
            let size = aligned.min(fits);
            prefixes.push(Self { proto, port: next as u16, bits: FULL_BITS - size as u8 });
            next += 1 << size;
        }
        prefixes
    }

    /// Whether everything that `other` matches matches here too.
    pub fn covers(&self, other: &Self) -> bool {
        self.bits <= other.bits && (u32::from(*self) ^ u32::from(*other)) & mask(self.bits) == 0
    }

    /// Whether a packet's protocol and destination port match.
    pub fn matches(&self, proto: u8, port: u16) -> bool {
        self.covers(&Self { proto, port, bits: FULL_BITS })
    }
}

impl From<PortPrefix> for u32 {
    /// The 24 bits, protocol first.
    fn from(prefix: PortPrefix) -> u32 {
        u32::from(prefix.proto) << 16 | u32::from(prefix.port)
    }
}

fn mask(bits: u8) -> u32 {
    (0x00ff_ffff_u32 << (FULL_BITS - bits)) & 0x00ff_ffff
}

/// The ports that one peer may use, each with the rule that allows it.
pub type Ports = BTreeMap<PortPrefix, u32>;

/// Leaves out prefixes that another one covers.
pub fn prune(ports: &Ports) -> Ports {
    // The order of prefixes does not put every cover first (protocol 0 sorts by its bits only), so each is asked.
    let covered = |prefix: &PortPrefix| {
        (0..prefix.bits).any(|bits| {
            let m = mask(bits);
            let wider = u32::from(*prefix) & m;
            ports.contains_key(&PortPrefix { proto: (wider >> 16) as u8, port: wider as u16, bits })
        })
    };
    ports.iter().filter(|(prefix, _)| !covered(prefix)).map(|(prefix, rule)| (*prefix, *rule)).collect()
}

/// The rule of the longest prefix that matches, as the kernel's trie finds it.
pub fn lookup(ports: &Ports, proto: u8, port: u16) -> Option<u32> {
    let matching = ports.iter().filter(|(prefix, _)| prefix.matches(proto, port));
    matching.max_by_key(|(prefix, _)| prefix.bits).map(|(_, rule)| *rule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn whole_ranges_are_short() {
        assert_eq!(PortPrefix::range(6, 0, u16::MAX), [PortPrefix::protocol(6)]);
        assert_eq!(PortPrefix::range(6, 80, 80), [PortPrefix { proto: 6, port: 80, bits: 24 }]);
        assert_eq!(PortPrefix::range(6, 1, u16::MAX).len(), 16);
        assert_eq!(PortPrefix::range(6, 2, 1), []);
    }

    proptest! {
        #[test]
        fn a_range_holds_just_its_ports(first: u16, last: u16, port: u16) {
            let prefixes = PortPrefix::range(17, first, last);
            for probe in [port, first, last, first.wrapping_sub(1), last.wrapping_add(1)] {
                let hits = prefixes.iter().filter(|prefix| prefix.matches(17, probe)).count();
                prop_assert_eq!(hits, usize::from((first..=last).contains(&probe)));
                prop_assert!(!prefixes.iter().any(|prefix| prefix.matches(6, probe)));
            }
        }

        #[test]
        fn pruning_changes_no_answer(ranges in prop::collection::vec((0..3u8, 0..20u16, 0..20u16), 0..8), proto in 0..3u8, port in 0..24u16) {
            let mut ports = Ports::new();
            for (proto, first, length) in ranges {
                let prefixes = if proto == 0 && length == 0 { vec![PortPrefix::EVERYTHING] } else { PortPrefix::range(proto, first, first + length) };
                ports.extend(prefixes.into_iter().map(|prefix| (prefix, 1)));
            }
            let pruned = prune(&ports);
            prop_assert_eq!(lookup(&pruned, proto, port), lookup(&ports, proto, port));
            for a in pruned.keys() {
                prop_assert!(pruned.keys().filter(|b| b.covers(a)).count() == 1);
            }
        }
    }
}
