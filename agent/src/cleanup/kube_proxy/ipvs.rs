//! What a kube-proxy's IPVS mode leaves beside rules: virtual servers, the device with their addresses, sets of addresses and ports.
//!
//! Upstream's `--cleanup` empties IPVS, whoever's virtual servers there are, and leaves the sets of IPv6. Here a virtual server goes
//! only if it stands where that kube-proxy has noted one (kubernetes/kubernetes, pkg/proxy/ipvs): under an address of its device,
//! under an address and port of its sets, or, for node ports, of which it notes the ports alone, under one of the node's own
//! addresses. The device and the sets go after them, so that what fails half-way is found again. IPVS drops what comes of
//! connections whose virtual server is gone (`expire_nodest_conn`, which a kube-proxy sets, ends them): it stays as long as they do.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use keelway_netlink::{Address, Handle};
use nix::errno::Errno;
use tokio::time::Instant;

use super::{Report, absent_is_none};
use crate::netfilter::conntrack::Translated;
use crate::netfilter::ipset::{self, Member};
use crate::netfilter::ipvs::{Ipvs, VirtualServer};

/// It has the addresses of virtual servers, so that the kernel takes packets for them as its own.
pub const DEVICE: &str = "kube-ipvs0";
const SETS: [&str; 8] = [
    "LOOP-BACK",
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "LOAD-BALANCER",
    "NODE-PORT",
    "HEALTH-CHECK-NODE-PORT",
    DEVICE_SET,
    "EXTERNAL-IP-LOCAL",
];
/// The addresses of the device.
const DEVICE_SET: &str = "IPVS-IPS";
/// Sets of what is dialled by address, protocol and port: their names begin so.
const SETS_OF_ADDRESSES: [&str; 3] = ["CLUSTER-IP", "EXTERNAL-IP", "LOAD-BALANCER"];
const NODE_PORTS: &str = "NODE-PORT-";
const TCP: u8 = 6;
const UDP: u8 = 17;
/// The kernel lets go of a rule's sets some time after the rule.
const PATIENCE: Duration = Duration::from_secs(3);
/// Virtual servers that are named.
const NAMED: usize = 10;

/// Removes it all, in an order that can be taken up again, but for what `live` connections go through.
pub(super) async fn remove(report: &mut Report, live: &[Translated]) -> anyhow::Result<()> {
    let sets: Vec<String> = absent_is_none(ipset::names())
        .context("sets: they cannot be listed")?
        .into_iter()
        .filter(|name| name_of(name).is_some())
        .collect();
    let host = Handle::open()?;
    let noted = Noted::read(&host, &sets).await.context("virtual servers of IPVS: whose they are cannot be read")?;
    let live: BTreeSet<_> = live.iter().map(|flow| (flow.protocol, flow.dialled)).collect();
    match virtual_servers(&noted, &live, report)? {
        Outcome::Gone => {}
        Outcome::Live => return unused_addresses(&host, &live, report).await,
        Outcome::Failed => {
            bail!("the device {DEVICE} and {} sets: they tell whose those virtual servers are", sets.len())
        }
    }
    if host.delete_link(DEVICE).await.with_context(|| format!("the device {DEVICE}"))? {
        report.removed.push(format!("the device {DEVICE}"));
    }
    let until = Instant::now() + PATIENCE;
    for name in sets {
        let done = destroy(&name, until).await;
        if report.succeeded(done) {
            report.removed.push(format!("the set {name}"));
        }
    }
    Ok(())
}

/// The device keeps the addresses of connections alone: without the rules that go, others would lead to the node's own sockets.
async fn unused_addresses(host: &Handle, live: &BTreeSet<(u8, SocketAddr)>, report: &mut Report) -> anyhow::Result<()> {
    let Some(device) = host.link(DEVICE).await? else { return Ok(()) };
    let mut gone = 0;
    for Address { address, global, .. } in host.addresses(Some(device.index)).await? {
        if global && !live.iter().any(|(_, dialled)| dialled.ip() == address.addr()) {
            gone += usize::from(host.delete_address(device.index, address).await?);
        }
    }
    if gone > 0 {
        report.removed.push(format!("{gone} addresses from {DEVICE}"));
    }
    Ok(())
}

/// Without the prefix of its family, which is the other value: is it IPv6?
fn name_of(set: &str) -> Option<(&str, bool)> {
    let v6 = set.strip_prefix("KUBE-6-");
    let name = v6.or_else(|| set.strip_prefix("KUBE-"))?;
    let its =
        SETS.iter().any(|set| name.strip_prefix(set).is_some_and(|rest| rest.is_empty() || rest.starts_with('-')));
    its.then_some((name, v6.is_some()))
}

async fn destroy(name: &str, until: Instant) -> anyhow::Result<()> {
    loop {
        match ipset::destroy(name) {
            Err(refused) if refused.errno == Errno::EBUSY && Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(refused) if refused.errno == Errno::EBUSY => {
                return Err(anyhow!("the set {name}: a rule or another set uses it"));
            }
            done => return done.with_context(|| format!("the set {name}")),
        }
    }
}

/// What became of its virtual servers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Gone,
    /// Some have connections.
    Live,
    /// Some could not be removed.
    Failed,
}

fn virtual_servers(noted: &Noted, live: &BTreeSet<(u8, SocketAddr)>, report: &mut Report) -> anyhow::Result<Outcome> {
    const WHAT: &str = "virtual servers of IPVS";
    let ipvs = match Ipvs::open() {
        Err(refused) if refused.is_absent() => None,
        opened => opened.context(WHAT)?,
    };
    let Some(ipvs) = ipvs else { return Ok(Outcome::Gone) };
    let (mut gone, mut waits, mut others) = (0, Vec::new(), Vec::new());
    let mut outcome = Outcome::Gone;
    for server in ipvs.virtual_servers().context(WHAT)? {
        match server {
            VirtualServer::Address { protocol, address } if noted.has(protocol, address) => {
                if live.contains(&(protocol, address)) {
                    waits.push(server.to_string());
                } else if report
                    .succeeded(ipvs.delete(protocol, address).with_context(|| format!("the virtual server {server}")))
                {
                    gone += 1;
                } else {
                    outcome = Outcome::Failed;
                }
            }
            _ => others.push(server.to_string()),
        }
    }
    if gone > 0 {
        report.removed.push(format!("{gone} virtual servers of IPVS, with their real servers"));
    }
    if !waits.is_empty() {
        report.left.push(format!(
            "{DEVICE}, its sets and the virtual servers that connections go on through: {}; run this again when they \
             have ended, or with --force, which ends them",
            some(&waits)
        ));
        if outcome == Outcome::Gone {
            outcome = Outcome::Live;
        }
    }
    if !others.is_empty() {
        eprintln!("left virtual servers of IPVS that no kube-proxy has noted as its own: {}", some(&others));
    }
    Ok(outcome)
}

/// There may be very many.
fn some(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    names[..names.len().min(NAMED)].join(", ") + &more
}

/// Where a kube-proxy has virtual servers.
#[derive(Debug, Default)]
struct Noted {
    /// On its device.
    addresses: BTreeSet<IpAddr>,
    /// With their protocols.
    dialled: BTreeSet<(u8, SocketAddr)>,
    /// With their protocols; is it IPv6?
    node_ports: BTreeSet<(bool, u8, u16)>,
    /// All of the node's addresses on other devices.
    own: BTreeSet<IpAddr>,
}

impl Noted {
    async fn read(host: &Handle, sets: &[String]) -> anyhow::Result<Self> {
        let mut noted = Self::default();
        let device = host.link(DEVICE).await?.map(|link| link.index);
        for address in host.addresses(None).await? {
            let ip = address.address.addr();
            if Some(address.index) == device {
                noted.addresses.insert(ip)
            } else {
                noted.own.insert(ip)
            };
        }
        for set in sets {
            let Some((name, v6)) = name_of(set) else { continue };
            for member in ipset::members(set).with_context(|| format!("the set {set}"))? {
                noted.note(name, v6, member);
            }
        }
        Ok(noted)
    }

    fn note(&mut self, name: &str, v6: bool, member: Member) {
        match member {
            Member { address: Some(address), .. } if name == DEVICE_SET => {
                self.addresses.insert(address);
            }
            Member { address: Some(address), protocol: Some(protocol), port: Some(port) }
                if name.starts_with(NODE_PORTS) || SETS_OF_ADDRESSES.iter().any(|of| name.starts_with(of)) =>
            {
                self.dialled.insert((protocol, SocketAddr::new(address, port)));
            }
            Member { address: None, port: Some(port), .. } if name.starts_with(NODE_PORTS) => {
                let protocol = [("TCP", TCP), ("UDP", UDP)].into_iter().find(|(end, _)| name.ends_with(end));
                self.node_ports.extend(protocol.map(|(_, protocol)| (v6, protocol, port)));
            }
            _ => {}
        }
    }

    fn has(&self, protocol: u8, address: SocketAddr) -> bool {
        let (ip, port) = (address.ip(), address.port());
        let node_port = || self.own.contains(&ip) && self.node_ports.contains(&(ip.is_ipv6(), protocol, port));
        self.addresses.contains(&ip) || self.dialled.contains(&(protocol, address)) || node_port()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_others_are_not_its() {
        for its in ["KUBE-CLUSTER-IP", "KUBE-6-CLUSTER-IP", "KUBE-NODE-PORT-LOCAL-SCTP-HASH", "KUBE-LOAD-BALANCER-FW"] {
            assert!(name_of(its).is_some(), "{its}");
        }
        // The kernel's limit of 31 letters cuts this one.
        assert_eq!(name_of("KUBE-6-NODE-PORT-LOCAL-SCTP-HAS"), Some(("NODE-PORT-LOCAL-SCTP-HAS", true)));
        for others in ["KUBE-SRC-ABC", "KUBE-DST-ABC", "kube-bridge", "MY-CLUSTER-IP", "KUBE-CLUSTER-IPS"] {
            assert!(name_of(others).is_none(), "{others}");
        }
    }

    #[test]
    fn a_virtual_server_is_its_only_where_it_has_noted_one() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let mut noted = Noted { own: [ip("192.0.2.1"), ip("2001:db8::1")].into(), ..Noted::default() };
        let at = |address: &str, port| Member { address: Some(ip(address)), protocol: Some(TCP), port: Some(port) };
        let port = |port| Member { address: None, protocol: None, port: Some(port) };
        noted.note("IPVS-IPS", false, Member { address: Some(ip("10.96.0.1")), protocol: None, port: None });
        noted.note("EXTERNAL-IP-LOCAL", false, at("198.51.100.1", 80));
        noted.note("NODE-PORT-LOCAL-SCTP-HASH", false, Member { protocol: Some(132), ..at("192.0.2.1", 30009) });
        noted.note("NODE-PORT-TCP", true, port(30080));
        noted.note("NODE-PORT-LOCAL-UDP", false, port(30081));
        noted.note("HEALTH-CHECK-NODE-PORT", false, port(30082));
        noted.note("LOOP-BACK", false, at("10.244.1.7", 8080));
        let has = |protocol, address: &str| noted.has(protocol, address.parse().unwrap());
        assert!(has(UDP, "10.96.0.1:53"), "an address of the device, by whichever port");
        assert!(has(TCP, "198.51.100.1:80") && !has(TCP, "198.51.100.1:81") && !has(UDP, "198.51.100.1:80"));
        assert!(has(132, "192.0.2.1:30009") && !has(TCP, "192.0.2.1:30009"));
        assert!(has(TCP, "[2001:db8::1]:30080") && !has(TCP, "192.0.2.1:30080"), "each family has its own ports");
        assert!(!has(TCP, "[2001:db8::2]:30080"), "an address that is not the node's");
        assert!(has(UDP, "192.0.2.1:30081") && !has(TCP, "192.0.2.1:30082") && !has(TCP, "10.244.1.7:8080"));
    }
}
