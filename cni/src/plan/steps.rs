//! The steps of a plan, in order, and what takes each back.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Mac, Plan, gateway};

/// In whose network namespace a step happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The node's.
    Host,
    /// The pod's.
    Pod,
}

/// One change. Links are meant by `side`: `Host` is the host's end of the pair, `Pod` the pod's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The pair, both ends down, the pod's end born in the pod's namespace.
    CreateVeth,
    /// A key below `/proc/sys`.
    Sysctl {
        /// Where.
        side: Side,
        /// With slashes.
        key: String,
        /// As written.
        value: String,
    },
    /// The end goes up.
    Up {
        /// Which.
        side: Side,
    },
    /// An address of the end, usable at once and without a route of its own.
    Address {
        /// Which end.
        side: Side,
        /// With full prefix length.
        address: IpNet,
    },
    /// A permanent neighbour.
    Neighbour {
        /// On which end.
        side: Side,
        /// Of whom.
        address: IpAddr,
        /// Where it is.
        mac: Mac,
    },
    /// A route over the end.
    Route {
        /// Over which end.
        side: Side,
        /// Destination.
        to: IpNet,
        /// Through this gateway, which is taken to be on the link; `None`: the destination is.
        via: Option<IpAddr>,
        /// Preferred source address.
        src: Option<IpAddr>,
    },
    /// The caller's part: programs, identity, policy, endpoint.
    Hook,
}

/// What takes a step back. Each tolerates that there is nothing to take back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undo {
    /// Delete the host's route to the pod's address.
    DeleteRoute {
        /// Destination.
        to: IpNet,
    },
    /// Delete the host's neighbour entry of the pod.
    DeleteNeighbour {
        /// Of whom.
        address: IpAddr,
    },
    /// Delete the pair; all that lives on either end goes with it.
    DeleteVeth,
}

impl Step {
    /// What takes this step back; `None` for what goes away with the pair.
    #[must_use]
    pub fn undo(&self) -> Option<Undo> {
        match self {
            Step::CreateVeth => Some(Undo::DeleteVeth),
            Step::Route { side: Side::Host, to, .. } => Some(Undo::DeleteRoute { to: *to }),
            Step::Neighbour { side: Side::Host, address, .. } => Some(Undo::DeleteNeighbour { address: *address }),
            _ => None,
        }
    }
}

impl Plan {
    /// Every step, in order.
    #[must_use]
    pub fn steps(&self) -> Vec<Step> {
        let host = self.host_sysctls().into_iter().map(|s| sysctl(Side::Host, s));
        let pod = self.pod_sysctls().into_iter().map(|s| sysctl(Side::Pod, s));
        let mut steps = vec![Step::CreateVeth];
        steps.extend(host);
        steps.push(Step::Up { side: Side::Host });
        for &address in &self.addresses {
            let (to, src) = (IpNet::from(address), self.source_for(address));
            steps.push(Step::Neighbour { side: Side::Host, address, mac: self.pod_mac });
            steps.push(Step::Route { side: Side::Host, to, via: None, src });
        }
        steps.extend(pod);
        steps.extend(self.addresses.iter().map(|&a| Step::Address { side: Side::Pod, address: a.into() }));
        steps.push(Step::Hook);
        steps.push(Step::Up { side: Side::Pod });
        for &address in &self.addresses {
            let gateway = gateway(address);
            steps.push(Step::Neighbour { side: Side::Pod, address: gateway, mac: self.host_mac });
            let to = default_route(address);
            steps.push(Step::Route { side: Side::Pod, to, via: Some(gateway), src: None });
        }
        steps
    }

    /// What takes all of it back, in order.
    #[must_use]
    pub fn undo(&self) -> Vec<Undo> {
        self.steps().iter().rev().filter_map(Step::undo).collect()
    }

    fn host_sysctls(&self) -> Vec<(String, &'static str)> {
        let name = &self.host_ifname;
        let mut all = Vec::new();
        if self.addresses.iter().any(IpAddr::is_ipv4) {
            all.push((format!("net/ipv4/conf/{name}/forwarding"), "1"));
        }
        if self.addresses.iter().any(IpAddr::is_ipv6) {
            all.push((format!("net/ipv6/conf/{name}/disable_ipv6"), "0"));
            // The gateway's address is nobody's: the host's end needs no link-local address, and learns nothing from pods.
            all.push((format!("net/ipv6/conf/{name}/addr_gen_mode"), "1"));
            all.push((format!("net/ipv6/conf/{name}/accept_ra"), "0"));
            all.push((format!("net/ipv6/conf/{name}/accept_dad"), "0"));
            all.push((format!("net/ipv6/conf/{name}/forwarding"), "1"));
        }
        all
    }

    fn pod_sysctls(&self) -> Vec<(String, &'static str)> {
        let name = &self.pod_ifname;
        if !self.addresses.iter().any(IpAddr::is_ipv6) {
            return Vec::new();
        }
        vec![
            (format!("net/ipv6/conf/{name}/disable_ipv6"), "0"),
            // Nobody else is on this link: no duplicates to detect, no routers to hear.
            (format!("net/ipv6/conf/{name}/accept_dad"), "0"),
            (format!("net/ipv6/conf/{name}/accept_ra"), "0"),
        ]
    }
}

fn sysctl(side: Side, (key, value): (String, &str)) -> Step {
    Step::Sysctl { side, key, value: value.to_owned() }
}

fn default_route(family_of: IpAddr) -> IpNet {
    // `trunc` of any address with length 0 is the unspecified address.
    IpNet::new(family_of, 0).expect("0 is a prefix length of both families").trunc()
}
