//! One pod CIDR: which addresses pods may have, and which comes next.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::IpamError;

/// How many released addresses are remembered as "released lately" for each family.
pub(super) const RECENT: usize = 1024;

/// How full a pod CIDR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The CIDR.
    pub cidr: IpNet,
    /// Addresses that pods may have.
    pub capacity: u128,
    /// Of those, leased.
    pub used: u128,
}

/// Addresses are handled as numbers, so that both families share the arithmetic.
#[derive(Clone, Debug)]
pub(super) struct Range {
    cidr: IpNet,
    first: u128,
    last: u128,
    /// The address handed out last; the search goes on behind it.
    cursor: u128,
    leased: BTreeSet<u128>,
    recent: VecDeque<u128>,
    recent_set: BTreeSet<u128>,
}

impl Range {
    /// Leaves out the network address (IPv6: the routers' anycast address), the node's own, and IPv4's broadcast.
    pub(super) fn new(cidr: IpNet) -> Result<Self, IpamError> {
        let cidr = cidr.trunc();
        if cidr.max_prefix_len() - cidr.prefix_len() < 2 {
            return Err(IpamError::TooSmall(cidr));
        }
        let (network, end) = (number(cidr.network()), number(cidr.broadcast()));
        let last = if cidr.addr().is_ipv4() { end - 1 } else { end };
        let first = network + 2;
        Ok(Self {
            cidr,
            first,
            last,
            cursor: last,
            leased: BTreeSet::new(),
            recent: VecDeque::new(),
            recent_set: BTreeSet::new(),
        })
    }

    pub(super) fn cidr(&self) -> IpNet {
        self.cidr
    }

    /// The first address behind the network's: the node's own.
    pub(super) fn host_address(&self) -> IpAddr {
        self.address(self.first - 1)
    }

    pub(super) fn usage(&self) -> Usage {
        Usage { cidr: self.cidr, capacity: self.last - self.first + 1, used: self.leased.len() as u128 }
    }

    /// Whether pods may have `address`.
    pub(super) fn covers(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.cidr.addr().is_ipv4() && (self.first..=self.last).contains(&number(address))
    }

    /// The address that the next lease gets; takes nothing. Looks at no more addresses than are leased or recent.
    pub(super) fn next(&self) -> Result<IpAddr, IpamError> {
        let Usage { cidr, capacity, used } = self.usage();
        if used >= capacity {
            return Err(IpamError::Exhausted { cidr, capacity });
        }
        let mut candidate = self.cursor;
        for _ in 0..=self.leased.len() + self.recent.len() {
            candidate = if candidate >= self.last { self.first } else { candidate + 1 };
            if !self.leased.contains(&candidate) && !self.recent_set.contains(&candidate) {
                return Ok(self.address(candidate));
            }
        }
        let oldest = self.recent.iter().find(|n| !self.leased.contains(n));
        oldest.map(|&n| self.address(n)).ok_or(IpamError::Exhausted { cidr, capacity })
    }

    pub(super) fn take(&mut self, address: IpAddr) {
        let n = number(address);
        self.leased.insert(n);
        self.forget_recent(n);
        self.cursor = n;
    }

    pub(super) fn put_back(&mut self, address: IpAddr) {
        let n = number(address);
        self.leased.remove(&n);
        self.forget_recent(n);
        self.recent.push_back(n);
        self.recent_set.insert(n);
        if self.recent.len() > RECENT
            && let Some(oldest) = self.recent.pop_front()
        {
            self.recent_set.remove(&oldest);
        }
    }

    pub(super) fn cursor(&self) -> IpAddr {
        self.address(self.cursor)
    }

    pub(super) fn set_cursor(&mut self, address: IpAddr) {
        self.cursor = number(address);
    }

    /// Released lately, the oldest first.
    pub(super) fn recent(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.recent.iter().map(|&n| self.address(n))
    }

    fn forget_recent(&mut self, n: u128) {
        if self.recent_set.remove(&n) {
            self.recent.retain(|&r| r != n);
        }
    }

    fn address(&self, n: u128) -> IpAddr {
        if self.cidr.addr().is_ipv4() {
            // Within an IPv4 CIDR, so the cast loses nothing.
            IpAddr::V4(Ipv4Addr::from_bits(n as u32))
        } else {
            IpAddr::V6(Ipv6Addr::from_bits(n))
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}
