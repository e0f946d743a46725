//! Tables that a flow's hash picks from, in the place of Maglev's (Eisenbud et al., NSDI 2016): alike on every node, and a
//! backend's loss moves the flows of no other.
//!
//! The paper's backends take turns in filling the table. With 1,021 slots and ten backends the loss of one then moves 2.6 %
//! of the slots that the others had, and under 1 % takes 16,381. Here each slot goes to the backend with the highest hash
//! of both (rendezvous hashing, Thaler and Ravishankar 1998): none moves. The price is that shares are not equal but spread
//! as at random, by a tenth of the mean with [`SLOTS_PER_BACKEND`].

use std::net::{IpAddr, SocketAddr};

use crate::op::Backend;

/// Sizes of tables. The first with at least [`SLOTS_PER_BACKEND`] slots for each backend is taken, else the last.
pub const SIZES: &[usize] = &[1_021, 16_381, 131_071];

/// How many slots there are for a backend, at least.
pub const SLOTS_PER_BACKEND: usize = 100;

/// Slots of the table for so many backends; 0 for none. A function of the set alone: nodes must agree.
pub fn size(sizes: &[usize], backends: usize) -> usize {
    if backends == 0 {
        return 0;
    }
    let fits = sizes.iter().find(|size| **size >= backends * SLOTS_PER_BACKEND);
    fits.or(sizes.last()).copied().unwrap_or(backends)
}

/// For each slot the index of its backend in `backends`. `before` are the slots of a table of the same size: an index where
/// the backend is still there, all of whose rivals then are in `added`; without it, all are compared.
pub fn table(backends: &[Backend], size: usize, before: Option<(&[Option<u32>], &[u32])>) -> Vec<u32> {
    let seeds: Vec<u64> = backends.iter().map(hash).collect();
    let all: Vec<u32> = (0..backends.len() as u32).collect();
    let weight = |slot: u64, index: u32| mix(seeds[index as usize] ^ slot);
    let winner = |slot: usize| {
        let seed = mix(slot as u64);
        let (kept, rivals) = match before.map(|(slots, added)| (slots.get(slot).copied().flatten(), added)) {
            Some((Some(kept), added)) => (Some(kept), added),
            _ => (None, all.as_slice()),
        };
        let found = kept.into_iter().chain(rivals.iter().copied());
        found.max_by_key(|index| (weight(seed, *index), *index))
    };
    (0..size).filter_map(winner).collect()
}

/// What the programs pick a slot by: Murmur3's 32-bit hash over the words of a new flow's addresses, ports and protocol. The slot
/// is its remainder by the table's size.
pub fn flow_hash(client: SocketAddr, dialled: SocketAddr, protocol: u8) -> u32 {
    // In the byte order of memory, as the programs read packets.
    let words = |addr: SocketAddr| {
        let bytes = match addr.ip() {
            IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
            IpAddr::V6(addr) => addr.octets(),
        };
        [0, 4, 8, 12].map(|at| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
    };
    let ports = u32::from(client.port().to_be()) << 16 | u32::from(dialled.port().to_be());
    let all = words(client).into_iter().chain(words(dialled)).chain([ports, u32::from(protocol)]);
    let hash = all.fold(0x811c_9dc5_u32, |hash, word| {
        let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
        (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
    });
    let hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    let hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

/// The same on every node and in every build, unlike the standard library's.
fn hash(backend: &Backend) -> u64 {
    let addr = match backend.addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped(),
        IpAddr::V6(addr) => addr,
    };
    let bits = addr.to_bits();
    let port = u64::from(backend.port) << 8 | u64::from(backend.proto);
    mix(mix(mix(bits as u64) ^ (bits >> 64) as u64) ^ port)
}

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
