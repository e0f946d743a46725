//! How many connections backends have, counted in one pass over the table of flows.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use aya::maps::MapData;
use keelway_layout::{Addr, CtEntry, CtKey, Port, ct_flags, maps as m, scope};
use nix::time::{ClockId, clock_gettime};
use zerocopy::FromBytes;

use crate::error::TableError;
use crate::sys;

/// Entries in one read.
const BATCH: usize = 4096;

/// A backend as a flow names it: address, port, IANA protocol number.
pub type Peer = (Addr, Port, u8);

/// The table of flows, to be counted by anyone at any time: the programs and the agent go on meanwhile.
pub struct Connections {
    map: OwnedFd,
}

impl Connections {
    pub(crate) fn new(map: &MapData) -> std::io::Result<Self> {
        Ok(Self { map: map.fd().as_fd().try_clone_to_owned()? })
    }

    /// Adds to each of `peers` the live flows to it that were opened by pods of this node or came by a Service from elsewhere. One
    /// pass: the table is bounded, and each entry is read once. Flows that begin or end meanwhile may be missed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn count(&self, peers: &mut HashMap<Peer, u64>) -> Result<(), TableError> {
        let failed = |error: &std::io::Error| TableError::from_io(m::CONNTRACK, m::MAX_CONNTRACK, error);
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|error| failed(&error.into()))?;
        let now = now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned();
        let (key_size, value_size) = (size_of::<CtKey>(), size_of::<CtEntry>());
        let (mut keys, mut values) = (vec![0; BATCH * key_size], vec![0; BATCH * value_size]);
        let mut cursor = None;
        loop {
            let read =
                sys::lookup_batch(self.map.as_fd(), &mut cursor, (&mut keys, key_size), (&mut values, value_size))
                    .map_err(|error| failed(&error))?;
            for (key, value) in keys.chunks_exact(key_size).zip(values.chunks_exact(value_size)).take(read) {
                let (Ok(key), Ok(entry)) = (CtKey::read_from_bytes(key), CtEntry::read_from_bytes(value)) else {
                    continue;
                };
                if is_connection(&key, &entry, now)
                    && let Some(count) = peers.get_mut(&(key.dst, key.dport, key.proto))
                {
                    *count += 1;
                }
            }
            if cursor.is_none() {
                return Ok(());
            }
        }
    }
}

/// Whether an entry is a connection that lasts, counted where it was opened.
fn is_connection(key: &CtKey, entry: &CtEntry, now: u64) -> bool {
    const CLOSED: u32 = ct_flags::FIN_FORWARD | ct_flags::FIN_REVERSE;
    let over = entry.flags & ct_flags::RESET != 0 || entry.flags & CLOSED == CLOSED;
    matches!(key.scope, scope::OUT | scope::LB | scope::HAIRPIN) && entry.expires > now && !over
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_counts_once_and_until_it_is_over() {
        let key = |scope| CtKey { scope, ..CtKey::default() };
        let live = CtEntry { expires: 11, ..CtEntry::default() };
        let counted = |scope, entry: &CtEntry| is_connection(&key(scope), entry, 10);
        // A flow from outside has an entry of each of these three, and one of a pod these two.
        assert_eq!([scope::SERVICE, scope::LB, scope::IN].map(|s| counted(s, &live)), [false, true, false]);
        assert_eq!([scope::SERVICE, scope::OUT].map(|s| counted(s, &live)), [false, true]);
        assert!(!counted(scope::OUT, &CtEntry { expires: 10, ..live }));
        assert!(!counted(scope::OUT, &CtEntry { flags: ct_flags::RESET, ..live }));
        let closing = ct_flags::FIN_FORWARD | ct_flags::REPLIED;
        assert!(counted(scope::OUT, &CtEntry { flags: closing, ..live }));
        assert!(!counted(scope::OUT, &CtEntry { flags: closing | ct_flags::FIN_REVERSE, ..live }));
    }
}
