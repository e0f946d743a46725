//! A pod's attachment, as values: what it is called, and the steps that make it.
//!
//! The order is the promise: everything on the host side and the caller's hook (where the programs are attached and
//! policy is written) come before the pod's end goes up, so that the pod cannot send a packet that nobody judges.

mod names;
mod steps;

pub use names::{HOST_PREFIX, Mac, host_ifname, host_mac, pod_mac};
pub use steps::{Side, Step, Undo};

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::lease::{Lease, LeaseKey};

/// Every pod's IPv4 gateway: link-local, answered by no one, resolved by a permanent neighbour entry.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Every pod's IPv6 gateway.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The gateway of a pod address's family.
#[must_use]
pub fn gateway(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() }
}

/// All that there is to know about an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Name of the host's end, derived from the lease's key.
    pub host_ifname: String,
    /// Its hardware address, which the pod sees as its gateways'.
    pub host_mac: Mac,
    /// Name of the pod's end.
    pub pod_ifname: String,
    /// Its hardware address.
    pub pod_mac: Mac,
    /// Of both ends, in bytes.
    pub mtu: u32,
    /// The pod's, one a family.
    pub addresses: Vec<IpAddr>,
    /// The host's address of each pod CIDR: what the host sends from when it talks to the pod.
    pub host_addresses: Vec<IpAddr>,
}

impl Plan {
    /// The plan of `lease` on a node that holds `host_addresses` (as `Pool::host_addresses` has them).
    #[must_use]
    pub fn new(lease: &Lease, host_addresses: &[IpAddr]) -> Self {
        Self::of(&lease.key, &lease.addresses, lease.mtu, host_addresses)
    }

    /// As [`Plan::new`], from the parts.
    #[must_use]
    pub fn of(key: &LeaseKey, addresses: &[IpAddr], mtu: u32, host_addresses: &[IpAddr]) -> Self {
        Self {
            host_ifname: host_ifname(key),
            host_mac: host_mac(key),
            pod_ifname: key.ifname.clone(),
            pod_mac: pod_mac(key),
            mtu,
            addresses: addresses.to_vec(),
            host_addresses: host_addresses.to_vec(),
        }
    }

    /// The host's source address for packets to `pod`.
    #[must_use]
    pub fn source_for(&self, pod: IpAddr) -> Option<IpAddr> {
        self.host_addresses.iter().copied().find(|h| h.is_ipv4() == pod.is_ipv4())
    }
}

/// What a node needs below `/proc/sys` before any pod: it forwards, for the families that it has.
#[must_use]
pub fn node_sysctls(families: &[IpAddr]) -> Vec<(String, String)> {
    let mut all = Vec::new();
    if families.iter().any(IpAddr::is_ipv4) {
        all.push(("net/ipv4/ip_forward".to_owned(), "1".to_owned()));
    }
    if families.iter().any(IpAddr::is_ipv6) {
        all.push(("net/ipv6/conf/all/forwarding".to_owned(), "1".to_owned()));
    }
    all
}
