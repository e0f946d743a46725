//! Reads back an attachment: what CHECK reports, and what a start uses to decide whether a pod's pair is still good.

use std::fmt;
use std::net::IpAddr;

use keelway_netlink::{Error, Handle, Link, Netns, RouteFilter, TABLE_MAIN};

use crate::plan::{Mac, Plan, Side, Step};

/// One thing that is not as planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where.
    pub side: Side,
    /// What, e.g. `mtu of eth0`.
    pub what: String,
    /// As planned.
    pub wanted: String,
    /// As the kernel has it; `absent` when it has nothing of the sort.
    pub found: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Host => "host",
            Side::Pod => "pod",
        };
        write!(f, "{side}: {}: wanted {}, found {}", self.what, self.wanted, self.found)
    }
}

/// Everything in which the kernel's state is not the plan's; empty when the attachment is good.
/// What others added beside it (addresses, routes) is not counted.
///
/// # Errors
/// The kernel's, when its state cannot be read.
pub async fn verify(plan: &Plan, host: &Handle, netns: &Netns) -> Result<Vec<Difference>, Error> {
    let pod = Handle::open_in(netns).await?;
    let mut differences = Vec::new();
    let host_link = host.link(&plan.host_ifname).await?;
    let pod_link = pod.link(&plan.pod_ifname).await?;
    let host_facts = Facts::read(host, host_link).await?;
    let pod_facts = Facts::read(&pod, pod_link).await?;
    for (side, name, mac, facts) in [
        (Side::Host, &plan.host_ifname, plan.host_mac, &host_facts),
        (Side::Pod, &plan.pod_ifname, plan.pod_mac, &pod_facts),
    ] {
        facts.compare_link(side, name, mac, plan.mtu, &mut differences);
    }
    if let (Some(h), Some(p)) = (&host_facts.link, &pod_facts.link) {
        let wanted = (Some(p.index), Some(h.index));
        if (h.peer_index, p.peer_index) != wanted {
            let what = format!("peers of {} and {}", h.name, p.name);
            let found = format!("{:?}", (h.peer_index, p.peer_index));
            differences.push(Difference { side: Side::Host, what, wanted: format!("{wanted:?}"), found });
        }
    }
    for step in plan.steps() {
        let side = match &step {
            Step::Address { side, .. } | Step::Neighbour { side, .. } | Step::Route { side, .. } => *side,
            _ => continue,
        };
        let facts = if side == Side::Host { &host_facts } else { &pod_facts };
        if facts.link.is_some() {
            differences.extend(facts.compare(side, &step));
        }
    }
    Ok(differences)
}

/// What the kernel has on one end.
struct Facts {
    link: Option<Link>,
    addresses: Vec<keelway_netlink::Address>,
    neighbours: Vec<keelway_netlink::Neighbour>,
    routes: Vec<keelway_netlink::Route>,
}

impl Facts {
    async fn read(handle: &Handle, link: Option<Link>) -> Result<Self, Error> {
        let Some(link) = link else {
            return Ok(Self { link: None, addresses: vec![], neighbours: vec![], routes: vec![] });
        };
        let index = link.index;
        let filter = RouteFilter { index: Some(index), table: Some(TABLE_MAIN), protocol: None };
        Ok(Self {
            addresses: handle.addresses(Some(index)).await?,
            neighbours: handle.neighbours(index).await?,
            routes: handle.routes(filter).await?,
            link: Some(link),
        })
    }

    fn compare_link(&self, side: Side, name: &str, mac: Mac, mtu: u32, differences: &mut Vec<Difference>) {
        let mut differ = |what: String, wanted: String, found: String| {
            if wanted != found {
                differences.push(Difference { side, what, wanted, found });
            }
        };
        let Some(link) = &self.link else {
            return differ(format!("link {name}"), "a veth".into(), "absent".into());
        };
        let found_mac = link.mac.map_or("none".into(), |m| Mac(m).to_string());
        differ(format!("kind of {name}"), "veth".into(), link.kind.clone());
        differ(format!("mac of {name}"), mac.to_string(), found_mac);
        differ(format!("mtu of {name}"), mtu.to_string(), link.mtu.to_string());
        differ(format!("state of {name}"), "up".into(), if link.up { "up" } else { "down" }.into());
    }

    fn compare(&self, side: Side, step: &Step) -> Option<Difference> {
        let absent = |what: String, wanted: String| Some(Difference { side, what, wanted, found: "absent".into() });
        match step {
            Step::Address { address, .. } => {
                let found = self.addresses.iter().find(|a| a.address == *address);
                if found.is_none() { absent("address".into(), address.to_string()) } else { None }
            }
            Step::Neighbour { address, mac, .. } => {
                let what = format!("neighbour {address}");
                let wanted = format!("{mac} permanent");
                let Some(found) = self.neighbours.iter().find(|n| n.address == *address) else {
                    return absent(what, wanted);
                };
                let permanent = if found.permanent { " permanent" } else { "" };
                let found = format!("{}{permanent}", found.mac.map_or("unresolved".into(), |m| Mac(m).to_string()));
                (found != wanted).then_some(Difference { side, what, wanted, found })
            }
            Step::Route { to, via, src, .. } => {
                let what = format!("route {to}");
                let words = |via: Option<IpAddr>, src: Option<IpAddr>| {
                    let via = via.map_or("direct".into(), |ip| format!("via {ip}"));
                    src.map_or(via.clone(), |ip| format!("{via} src {ip}"))
                };
                let wanted = words(*via, *src);
                let found: Vec<_> = self.routes.iter().filter(|r| r.to == *to).map(|r| words(r.via, r.src)).collect();
                match found.first() {
                    None => absent(what, wanted),
                    Some(_) if found.contains(&wanted) => None,
                    Some(first) => Some(Difference { side, what, wanted, found: first.clone() }),
                }
            }
            _ => None,
        }
    }
}
