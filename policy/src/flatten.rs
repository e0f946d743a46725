//! Overlapping `ipBlock`s with exceptions turned into prefixes of which the longest match alone decides.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// One `ipBlock` of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub cidr: IpNet,
    pub except: Vec<IpNet>,
    /// Which rule it belongs to, as an index of the caller's.
    pub rule: usize,
}

/// For each prefix the rules that match an address of which it is the longest prefix in the result; an empty list hides a
/// shorter one. Prefixes that say the same as the next shorter one are left out.
///
/// The kernel keeps IPv4 as `::ffff:0:0/96`, so an IPv6 prefix that contains it would match IPv4 too: then 0.0.0.0/0 is
/// always in the result.
pub(crate) fn flatten(blocks: &[Block]) -> BTreeMap<IpNet, Vec<usize>> {
    let mut by_cidr: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
    let mut prefixes: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
    for (index, block) in blocks.iter().enumerate().filter(|(_, block)| !is_mapped(&block.cidr)) {
        by_cidr.entry(block.cidr.trunc()).or_default().push(index);
        for prefix in [&block.cidr].into_iter().chain(&block.except).filter(|prefix| !is_mapped(prefix)) {
            prefixes.insert(prefix.trunc(), Vec::new());
        }
    }
    let mut covers_v4 = false;
    for (prefix, rules) in &mut prefixes {
        let matching = ancestors(prefix).filter_map(|ancestor| by_cidr.get(&ancestor)).flatten();
        let matching = matching.map(|index| &blocks[*index]);
        let matching = matching.filter(|block| !block.except.iter().any(|except| except.contains(prefix)));
        rules.extend(matching.map(|block| block.rule));
        rules.sort_unstable();
        rules.dedup();
        covers_v4 |= contains_v4(prefix) && !rules.is_empty();
    }
    let mut flat: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
    // A network sorts before those inside it, so that the next shorter one is always known.
    for (prefix, rules) in prefixes {
        let wider = ancestors(&prefix).skip(1).find_map(|ancestor| flat.get(&ancestor));
        if wider.map_or(!rules.is_empty(), |wider| *wider != rules) {
            flat.insert(prefix, rules);
        }
    }
    if covers_v4 {
        flat.entry(IpNet::V4(Ipv4Net::default())).or_default();
    }
    flat
}

/// The prefix itself, then each shorter one down to length 0.
fn ancestors(prefix: &IpNet) -> impl Iterator<Item = IpNet> + use<> {
    std::iter::successors(Some(*prefix), IpNet::supernet)
}

/// ::ffff:0:0/96 or a part of it: addresses that no IPv6 packet carries.
fn is_mapped(prefix: &IpNet) -> bool {
    matches!(prefix, IpNet::V6(net) if net.prefix_len() >= 96 && net.addr().to_ipv4_mapped().is_some())
}

fn contains_v4(prefix: &IpNet) -> bool {
    let mapped: Ipv6Addr = Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();
    matches!(prefix, IpNet::V6(net) if net.prefix_len() < 96 && Ipv6Net::contains(net, &mapped))
}

/// The longest prefix of a map that holds an address, as the kernel's trie finds it, IPv4 mapped into IPv6.
pub(crate) fn longest_match<V>(map: &BTreeMap<IpNet, V>, addr: IpAddr) -> Option<(&IpNet, &V)> {
    let addr = addr.to_canonical();
    let own = ancestors(&IpNet::from(addr)).find_map(|prefix| map.get_key_value(&prefix));
    let mapped = || match addr {
        IpAddr::V4(v4) => {
            let prefix = IpNet::from(IpAddr::V6(v4.to_ipv6_mapped()));
            ancestors(&prefix).find_map(|prefix| map.get_key_value(&prefix))
        }
        IpAddr::V6(_) => None,
    };
    own.or_else(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn block(rule: usize, cidr: &str, except: &[&str]) -> Block {
        Block { cidr: net(cidr), except: except.iter().map(|e| net(e)).collect(), rule }
    }

    #[test]
    fn an_exception_of_one_rule_is_not_one_of_another() {
        let flat = flatten(&[
            block(0, "10.0.0.0/8", &["10.1.0.0/16"]),
            block(1, "10.1.2.0/24", &[]),
            block(2, "0.0.0.0/0", &[]),
        ]);
        let expect =
            [("0.0.0.0/0", vec![2]), ("10.0.0.0/8", vec![0, 2]), ("10.1.0.0/16", vec![2]), ("10.1.2.0/24", vec![1, 2])];
        assert_eq!(flat, expect.into_iter().map(|(prefix, rules)| (net(prefix), rules)).collect());
    }

    #[test]
    fn every_ipv6_address_is_no_ipv4_address() {
        let flat = flatten(&[block(0, "::/0", &[])]);
        assert_eq!(flat, [(net("0.0.0.0/0"), vec![]), (net("::/0"), vec![0])].into_iter().collect());
    }

    /// Prefixes that overlap often: few bits of few lengths.
    fn prefix() -> impl Strategy<Value = IpNet> {
        let v4 = (0..4u32, 0..4u32, prop::sample::select(vec![0u8, 1, 2, 3, 8, 30, 31, 32]))
            .prop_map(|(high, low, len)| Ipv4Net::new((high << 30 | low).into(), len).unwrap().trunc().into());
        let v6 = (0..4u128, 0..4u128, prop::sample::select(vec![0u8, 1, 2, 95, 126, 128]))
            .prop_map(|(high, low, len)| Ipv6Net::new((high << 126 | low).into(), len).unwrap().trunc().into());
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn the_longest_match_decides_as_the_blocks_do(
            blocks in prop::collection::vec((prefix(), prop::collection::vec(prefix(), 0..3), 0..3usize), 0..6),
            probes in prop::collection::vec(prefix(), 20),
        ) {
            let blocks: Vec<Block> = blocks.into_iter().map(|(cidr, except, rule)| Block { cidr, except, rule }).collect();
            let flat = flatten(&blocks);
            for addr in probes.iter().flat_map(|probe| [probe.network(), probe.broadcast()]) {
                let matching = blocks.iter().filter(|b| b.cidr.contains(&addr) && !b.except.iter().any(|e| e.contains(&addr)));
                let mut expect: Vec<usize> = matching.map(|b| b.rule).collect();
                expect.sort_unstable();
                expect.dedup();
                let found = longest_match(&flat, addr).map(|(_, rules)| rules.clone()).unwrap_or_default();
                prop_assert_eq!(found, expect, "{}", addr);
            }
        }
    }
}
