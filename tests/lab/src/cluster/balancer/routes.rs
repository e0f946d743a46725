//! Routes to balanced addresses, on the machines that clients run on.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use super::plan::{POOL, one_for};
use crate::netns::{self, CONTROL_PLANE, FAR_V4, FAR_V6};
use crate::sh::run;

/// As whom the control plane's machine asks balanced addresses: a client beyond the nodes' own network, as a cloud's clients are.
const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
/// See [`CLIENT_V4`].
const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x11);

/// Where packets for an address go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lead {
    /// The nodes.
    pub nodes: BTreeSet<IpAddr>,
    /// All of a machine's packets go to one of them.
    pub sticky: bool,
}

/// A machine that has the routes.
#[derive(Debug)]
struct Machine {
    name: &'static str,
    netns: String,
    /// Its address for each family as a client of balanced addresses.
    source: [IpAddr; 2],
}

/// All of them.
#[derive(Debug)]
pub struct Routes {
    machines: [Machine; 2],
    led: BTreeMap<IpAddr, Lead>,
}

impl Routes {
    /// Prepares the machines of this lab: connections are spread by ports too, and what leads nowhere ends in silence outside.
    pub fn prepare(id: &str) -> Result<Self> {
        let machine = |name, source| Machine { name, netns: netns::name(id, name), source };
        let outside = machine("outside", [FAR_V4.into(), FAR_V6.into()]);
        let control_plane = machine("cp", [CLIENT_V4.into(), CLIENT_V6.into()]);
        for v6 in [false, true] {
            let client = host(control_plane.source[usize::from(v6)]);
            ip(&control_plane, v6, &["addr", "replace", &client, "dev", "lo"])?;
            let via = if v6 { netns::v6(CONTROL_PLANE).to_string() } else { netns::v4(CONTROL_PLANE).to_string() };
            ip(&outside, v6, &["route", "replace", &client, "via", &via])?;
            ip(&outside, v6, &["route", "replace", "blackhole", POOL[usize::from(v6)]])?;
        }
        let machines = [outside, control_plane];
        for machine in &machines {
            let sysctls = ["net.ipv4.fib_multipath_hash_policy=1", "net.ipv6.fib_multipath_hash_policy=1"];
            run(&["ip", "netns", "exec", &machine.netns, "sysctl", "-qw", sysctls[0], sysctls[1]])?;
        }
        Ok(Self { machines, led: BTreeMap::new() })
    }

    /// Has every machine lead these addresses there, and no others anywhere. An address without a node has no route.
    pub fn lead(&mut self, mut wanted: BTreeMap<IpAddr, Lead>) -> Result<()> {
        wanted.retain(|_, lead| !lead.nodes.is_empty());
        let gone: Vec<IpAddr> = self.led.keys().copied().filter(|to| !wanted.contains_key(to)).collect();
        for to in gone {
            println!("{to}: to nobody");
            self.led.remove(&to);
            for machine in &self.machines {
                ip(machine, to.is_ipv6(), &["route", "del", &host(to)])?;
            }
        }
        for (to, lead) in wanted {
            if self.led.get(&to) == Some(&lead) {
                continue;
            }
            println!("{to}: to {:?}{}", lead.nodes, if lead.sticky { ", each client to one" } else { "" });
            for machine in &self.machines {
                let one = lead.sticky.then(|| one_for(machine.name, to, &lead.nodes)).flatten();
                let nodes = one.map_or_else(|| lead.nodes.clone(), |one| BTreeSet::from([one]));
                let (to, source) = (host(to), machine.source[usize::from(to.is_ipv6())].to_string());
                let nodes: Vec<String> = nodes.iter().map(IpAddr::to_string).collect();
                let mut words = vec!["route", "replace", &to, "src", &source];
                nodes.iter().for_each(|node| words.extend(["nexthop", "via", node]));
                let v6 = to.contains(':');
                ip(machine, v6, &words)?;
            }
            self.led.insert(to, lead);
        }
        Ok(())
    }
}

/// The address as a network of its own.
fn host(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv6() { 128 } else { 32 })
}

fn ip(machine: &Machine, v6: bool, words: &[&str]) -> Result<()> {
    run(&[&["ip", if v6 { "-6" } else { "-4" }, "-n", &machine.netns], words].concat()).map(drop)
}
