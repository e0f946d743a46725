//! Which addresses are whose. No I/O: [`super::Book`] writes down what this decides.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::range::Range;
use super::{IpamError, Record, Usage};
use crate::lease::{Lease, LeaseKey, LeaseRequest};

/// The leases of a node and the CIDRs that they come from.
#[derive(Clone, Debug)]
pub struct Pool {
    ranges: Vec<Range>,
    leases: BTreeMap<LeaseKey, Lease>,
    owners: BTreeMap<IpAddr, LeaseKey>,
}

impl Pool {
    /// An empty pool over the node's pod CIDRs, in the order of `Node.spec.podCIDRs`.
    ///
    /// # Errors
    /// [`IpamError::NoCidrs`], [`IpamError::SameFamily`], [`IpamError::TooSmall`].
    pub fn new(cidrs: &[IpNet]) -> Result<Self, IpamError> {
        match cidrs {
            [] => return Err(IpamError::NoCidrs),
            [one, .., other] if cidrs.len() > 2 || one.addr().is_ipv4() == other.addr().is_ipv4() => {
                return Err(IpamError::SameFamily(*one, *other));
            }
            _ => {}
        }
        let ranges = cidrs.iter().map(|c| Range::new(*c)).collect::<Result<_, _>>()?;
        Ok(Self { ranges, leases: BTreeMap::new(), owners: BTreeMap::new() })
    }

    /// A pool with the history of an earlier one. Leases outside the CIDRs (which may have changed) are kept.
    ///
    /// # Errors
    /// As [`Pool::new`], and [`IpamError::Duplicate`].
    pub fn restore(cidrs: &[IpNet], history: impl IntoIterator<Item = Record>) -> Result<Self, IpamError> {
        let mut pool = Self::new(cidrs)?;
        for record in history {
            match record {
                Record::Put { lease } => pool.insert(lease)?,
                Record::Del { key, addresses } => {
                    pool.remove(&key);
                    // A snapshot remembers releases without the leases that went before them.
                    for address in addresses.into_iter().filter(|a| !pool.owners.contains_key(a)).collect::<Vec<_>>() {
                        pool.range_of(address).into_iter().for_each(|r| r.put_back(address));
                    }
                }
                Record::Cursor { addresses } => {
                    for address in addresses {
                        pool.range_of(address).into_iter().for_each(|r| r.set_cursor(address));
                    }
                }
            }
        }
        Ok(pool)
    }

    /// The shortest history that restores this pool.
    pub fn snapshot(&self) -> Vec<Record> {
        let nobody = LeaseKey::new("", "");
        let released = self.ranges.iter().flat_map(Range::recent);
        let released = released.map(|address| Record::Del { key: nobody.clone(), addresses: vec![address] });
        let leases = self.leases.values().map(|lease| Record::Put { lease: lease.clone() });
        let cursor = Record::Cursor { addresses: self.ranges.iter().map(Range::cursor).collect() };
        released.chain(leases).chain([cursor]).collect()
    }

    /// What the lease of `request` would be; changes nothing. An existing lease keeps its addresses.
    ///
    /// # Errors
    /// [`IpamError::Exhausted`] when any family is full.
    pub fn propose(&self, request: &LeaseRequest) -> Result<Lease, IpamError> {
        if let Some(lease) = self.leases.get(&request.key) {
            return Ok(request.with(lease.addresses.clone()));
        }
        let addresses = self.ranges.iter().map(Range::next).collect::<Result<_, _>>()?;
        Ok(request.with(addresses))
    }

    /// Takes the lease in, in place of one with the same key.
    ///
    /// # Errors
    /// [`IpamError::Duplicate`] when an address is another's; then nothing changed.
    pub fn insert(&mut self, lease: Lease) -> Result<(), IpamError> {
        for address in &lease.addresses {
            if let Some(owner) = self.owners.get(address).filter(|owner| **owner != lease.key) {
                let (first, second) = (owner.clone(), lease.key);
                return Err(IpamError::Duplicate {
                    address: *address,
                    first: Box::new(first),
                    second: Box::new(second),
                });
            }
        }
        if self.leases.get(&lease.key).is_some_and(|old| old.addresses != lease.addresses) {
            self.remove(&lease.key);
        }
        for address in &lease.addresses {
            self.owners.insert(*address, lease.key.clone());
            if let Some(range) = self.range_of(*address) {
                range.take(*address);
            }
        }
        self.leases.insert(lease.key.clone(), lease);
        Ok(())
    }

    /// Gives the lease up; `None` when there was none.
    pub fn remove(&mut self, key: &LeaseKey) -> Option<Lease> {
        let lease = self.leases.remove(key)?;
        for address in &lease.addresses {
            self.owners.remove(address);
            if let Some(range) = self.range_of(*address) {
                range.put_back(*address);
            }
        }
        Some(lease)
    }

    /// The lease of `key`.
    #[must_use]
    pub fn get(&self, key: &LeaseKey) -> Option<&Lease> {
        self.leases.get(key)
    }

    /// Whose `address` is.
    #[must_use]
    pub fn owner(&self, address: IpAddr) -> Option<&Lease> {
        self.leases.get(self.owners.get(&address)?)
    }

    /// Every lease, by key.
    pub fn leases(&self) -> impl ExactSizeIterator<Item = &Lease> {
        self.leases.values()
    }

    /// The leases of `network` that the runtime does not list as valid: what GC has to remove.
    #[must_use]
    pub fn stale(&self, network: &str, valid: &BTreeSet<LeaseKey>) -> Vec<Lease> {
        let stale = self.leases.values().filter(|l| l.network == network && !valid.contains(&l.key));
        stale.cloned().collect()
    }

    /// The CIDRs.
    pub fn cidrs(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.ranges.iter().map(Range::cidr)
    }

    /// The node's own address in each CIDR, which no pod gets: the source of its routes to pods.
    #[must_use]
    pub fn host_addresses(&self) -> Vec<IpAddr> {
        self.ranges.iter().map(Range::host_address).collect()
    }

    /// How full each CIDR is.
    #[must_use]
    pub fn usage(&self) -> Vec<Usage> {
        self.ranges.iter().map(Range::usage).collect()
    }

    fn range_of(&mut self, address: IpAddr) -> Option<&mut Range> {
        self.ranges.iter_mut().find(|r| r.covers(address))
    }
}
