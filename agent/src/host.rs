//! The host's side of the network: devices, the node's own addresses in its pod CIDRs, sysctls, and routes to other nodes'
//! pods. All of it may be repeated; a restart finds it in place and touches nothing that is right.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use keelway_cni::install::write_atomically;
use keelway_cni::ipam::Pool;
use keelway_cni::plan::node_sysctls;
use keelway_layout::{Addr, NodeConfig, Port, node_flags};
use keelway_maps::XdpMode;
use keelway_netlink::{AddressOptions, Handle, Link, OnMismatch, Route, RouteFilter, Vxlan, sysctl};
use keelway_netlink::{PROTOCOL_KEELWAY, RouteScope, TABLE_MAIN};

use crate::config::{Config, LoadBalancerMode, NodePortAddresses, PortRange, Routing, Xdp};
use crate::engine::{Devices, HostRoutes};
use crate::source::Node;

/// The tunnel's device. Not `kw...`, which the pods' devices are called.
pub const VXLAN_DEVICE: &str = "keelway-vxlan";
/// Holds the node's pod CIDRs, a line each, below the state directory.
pub const CIDRS_FILE: &str = "pod-cidrs";
/// Bytes that the tunnel adds: outer IP, UDP and VXLAN headers and the inner Ethernet header.
const OVERHEAD_V4: u32 = 20 + 8 + 8 + 14;
const OVERHEAD_V6: u32 = 40 + 8 + 8 + 14;
const RESERVED_PORTS: &str = "net/ipv4/ip_local_reserved_ports";

/// What this node is, once its object has said so.
#[derive(Clone, Debug)]
pub struct HostNetwork {
    /// For the engine.
    pub devices: Devices,
    /// MTU of pods in bytes.
    pub mtu: u32,
    /// The node's pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Device that host routes go over: the tunnel's, or the first of the node.
    route_index: u32,
}

/// Makes the devices, addresses and settings that `node` needs here.
///
/// # Errors
/// When the node's object or the host lacks something, in words that name it.
pub async fn prepare(config: &Config, node: &Node, host: &Handle) -> anyhow::Result<HostNetwork> {
    if node.pod_cidrs.is_empty() {
        bail!(
            "Node {}: spec.podCIDRs is empty; the controller manager assigns them (--allocate-node-cidrs)",
            node.name
        );
    }
    let pool = Pool::new(&node.pod_cidrs).with_context(|| format!("Node {}: spec.podCIDRs", node.name))?;
    let links = node_links(config, node, host).await?;
    let first = links.first().context("no device")?;
    let underlay = *node.internal_addresses.first().with_context(|| no_address(node))?;
    let mtu = pod_mtu(config, first.mtu, underlay);
    let own = own_addresses(host).await?;
    let host_addresses = sources(&pool, node, &own);

    for link in &links {
        keep_router_advertisements(&link.name)?;
    }
    for (key, value) in node_sysctls(&host_addresses) {
        sysctl::write(&key, &value)?;
    }
    reserve_ports(config.snat_ports)?;

    let mut programs = NodeConfig {
        node_v4: first_of(node, IpAddr::is_ipv4),
        node_v6: first_of(node, IpAddr::is_ipv6),
        flags: node_flags::MASQUERADE_V4 | node_flags::MASQUERADE_V6 | dsr_flags(config.load_balancer_mode),
        snat_first: Port::new(config.snat_ports.first),
        snat_last: Port::new(config.snat_ports.last),
        vxlan_port: Port::new(config.vxlan_port),
        host_netns: keelway_netlink::netns::own_cookie()?,
        ..NodeConfig::default()
    }
    .with_pods_v6_word(first_v6_word(&node.pod_cidrs));
    let mut tunnel = None;
    let (route_index, address_index) = match config.routing {
        Routing::Vxlan => {
            let link = vxlan_device(config, mtu, host).await?;
            programs.flags |= node_flags::VXLAN;
            tunnel = Some(link.clone());
            (link.index, link.index)
        }
        Routing::Routed => {
            if config.load_balancer_mode != LoadBalancerMode::Snat {
                tunnel = Some(vxlan_device(config, mtu, host).await?);
            } else if host.link(VXLAN_DEVICE).await?.is_some() {
                // Of another mode. What it receives would reach the host's stack past every check.
                host.delete_link(VXLAN_DEVICE).await?;
            }
            (first.index, host.require_link("lo").await?.index)
        }
    };
    if let Some(link) = &tunnel {
        programs.vxlan_ifindex = link.index;
        programs.vxlan_mac = link.mac.unwrap_or_default();
    }
    let vxlan = tunnel.map(|link| link.name);
    for address in pool.host_addresses().iter().filter(|address| host_addresses.contains(address)) {
        let options = AddressOptions { nodad: true, noprefixroute: true };
        host.replace_address(address_index, IpNet::from(*address), options).await?;
    }
    remember_cidrs(&config.state_dir, &node.pod_cidrs)?;
    for cidr in &node.pod_cidrs {
        host.ensure_unreachable(cidr.trunc()).await?;
    }
    let node_devices = links.iter().map(|link| link.name.clone()).collect();
    let node_ports = node_port_addresses(&config.nodeport_addresses, node, &pool, &own);
    let xdp = links.iter().map(|link| (link.name.clone(), xdp_modes(config.xdp, &link.kind))).collect();
    let devices = Devices { node: node_devices, xdp, vxlan, config: programs, host_addresses, own, node_ports };
    Ok(HostNetwork { devices, mtu, pod_cidrs: node.pod_cidrs.clone(), route_index })
}

/// What the host sends from to pods, one address a family: its own, which peers know it by; the first of the pod CIDR where
/// it has none of that family. With another one than its own, a server of the host that answers UDP from the wildcard address
/// would answer from an address that was never asked.
fn sources(pool: &Pool, node: &Node, own: &[IpAddr]) -> Vec<IpAddr> {
    let held = |wanted: &IpAddr| own.contains(wanted);
    let of_family = |fallback: IpAddr| {
        let mut addresses = node.internal_addresses.iter().copied();
        addresses.find(|ip| ip.is_ipv4() == fallback.is_ipv4() && held(ip)).unwrap_or(fallback)
    };
    pool.host_addresses().into_iter().map(of_family).collect()
}

/// The addresses on which node ports answer, sorted; `true` for loopback ones, which only the host's own processes can dial.
fn node_port_addresses(wanted: &NodePortAddresses, node: &Node, pool: &Pool, own: &[IpAddr]) -> Vec<(IpAddr, bool)> {
    let pods = pool.host_addresses();
    let chosen = |address: &IpAddr| match wanted {
        _ if wanted.is_all(address.is_ipv6()) => !pods.contains(address),
        NodePortAddresses::Primary => node.internal_addresses.contains(address),
        NodePortAddresses::In(prefixes) => prefixes.iter().any(|prefix| prefix.contains(address)),
        NodePortAddresses::All => true,
    };
    let addresses = own.iter().copied().filter(chosen);
    addresses.map(|address| (address, address.is_loopback())).collect()
}

/// This host's addresses, sorted, without link-local ones.
///
/// # Errors
/// The kernel's.
pub async fn own_addresses(host: &Handle) -> keelway_netlink::Result<Vec<IpAddr>> {
    let addresses = host.addresses(None).await?.into_iter().map(|address| address.address.addr());
    let mut found: Vec<_> = addresses.filter(|address| !is_link_local(address)).collect();
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Whether an address is only one's own on its link. Every pod's device has such.
pub const fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Keeps the pod CIDRs for `cleanup`, which asks nobody.
fn remember_cidrs(state_dir: &Path, cidrs: &[IpNet]) -> anyhow::Result<()> {
    if remembered_cidrs(state_dir)? != cidrs {
        let text: String = cidrs.iter().map(|cidr| format!("{cidr}\n")).collect();
        write_atomically(&state_dir.join(CIDRS_FILE), text.as_bytes(), 0o600)?;
    }
    Ok(())
}

/// The pod CIDRs that this node had last; none when it never had any.
///
/// # Errors
/// That the file cannot be read.
pub fn remembered_cidrs(state_dir: &Path) -> anyhow::Result<Vec<IpNet>> {
    let path = state_dir.join(CIDRS_FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => text.lines().map(|line| line.parse().with_context(|| path.display().to_string())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

fn no_address(node: &Node) -> String {
    format!("Node {}: status.addresses has no InternalIP", node.name)
}

fn first_of(node: &Node, family: fn(&IpAddr) -> bool) -> Addr {
    node.internal_addresses.iter().find(|address| family(address)).map_or(Addr::UNSPECIFIED, |ip| Addr::from(*ip))
}

const fn dsr_flags(mode: LoadBalancerMode) -> u32 {
    match mode {
        LoadBalancerMode::Snat => 0,
        LoadBalancerMode::Hybrid => node_flags::DSR_TCP,
        LoadBalancerMode::Dsr => node_flags::DSR_TCP | node_flags::DSR_DATAGRAMS,
    }
}

/// The first word, network byte order, of the addresses of the node's IPv6 pods; 0 where they may differ in it.
fn first_v6_word(pod_cidrs: &[IpNet]) -> u32 {
    let v6 = pod_cidrs.iter().find(|cidr| cidr.addr().is_ipv6() && cidr.prefix_len() >= 32);
    v6.map_or(0, |cidr| Addr::from(cidr.network()).words()[0])
}

fn pod_mtu(config: &Config, device: u32, underlay: IpAddr) -> u32 {
    // What clients send to a pod goes through the tunnel in every mode but one: they are to send no more than fits.
    let overhead = match (config.routing, config.load_balancer_mode) {
        (Routing::Routed, LoadBalancerMode::Snat) => 0,
        _ if underlay.is_ipv4() => OVERHEAD_V4,
        _ => OVERHEAD_V6,
    };
    config.mtu.unwrap_or_else(|| device.saturating_sub(overhead))
}

/// In which modes a device is to run the hook, the best first. A veth's driver loses what a program sends back where the other end
/// runs none, which is not to be seen from here: it is taken at the word alone.
fn xdp_modes(wanted: Xdp, kind: &str) -> Vec<XdpMode> {
    match wanted {
        Xdp::Off => Vec::new(),
        Xdp::Native => vec![XdpMode::Native],
        Xdp::Auto if kind != "veth" => vec![XdpMode::Native, XdpMode::Generic],
        Xdp::Auto | Xdp::Generic => vec![XdpMode::Generic],
    }
}

async fn node_links(config: &Config, node: &Node, host: &Handle) -> anyhow::Result<Vec<Link>> {
    let mut links = Vec::new();
    for name in &config.devices {
        links.push(host.link(name).await?.with_context(|| format!("devices: there is no device {name:?}"))?);
    }
    if !links.is_empty() {
        return Ok(links);
    }
    let addresses = host.addresses(None).await?;
    for wanted in &node.internal_addresses {
        let found = addresses.iter().find(|address| address.address.addr() == *wanted);
        let Some(found) = found else { continue };
        if links.iter().all(|link: &Link| link.index != found.index) {
            links.extend(host.link_by_index(found.index).await?);
        }
    }
    if links.is_empty() {
        bail!(
            "devices: none of the addresses {:?} of Node {} is on a device of this host; is --node-name right?",
            node.internal_addresses,
            node.name
        );
    }
    Ok(links)
}

async fn vxlan_device(config: &Config, mtu: u32, host: &Handle) -> anyhow::Result<Link> {
    let wanted = Vxlan { name: VXLAN_DEVICE, port: config.vxlan_port, mtu, mac: None };
    let link = host.ensure_vxlan(&wanted, OnMismatch::Recreate).await.context("the tunnel's device")?;
    // Peers come from a table: there is nobody to ask for a hardware address.
    host.set_arp(link.index, false).await?;
    host.set_up(link.index, true).await?;
    Ok(host.require_link(VXLAN_DEVICE).await?)
}

/// A device that takes its IPv6 routes from router advertisements would stop to once the node forwards (`accept_ra` 1: hosts only).
fn keep_router_advertisements(device: &str) -> anyhow::Result<()> {
    let key = format!("net/ipv6/conf/{device}/accept_ra");
    // Without IPv6 there is no such key.
    if sysctl::read(&key).is_ok_and(|value| value.trim() == "1") {
        sysctl::write(&key, "2")?;
    }
    Ok(())
}

/// Keeps sockets from being given the ports that masquerading picks from, beside what others reserved.
fn reserve_ports(range: PortRange) -> anyhow::Result<()> {
    let ours = format!("{}-{}", range.first, range.last);
    let present = sysctl::read(RESERVED_PORTS)?;
    let present = present.trim();
    if present.split(',').any(|part| part == ours) {
        return Ok(());
    }
    let all = if present.is_empty() { ours } else { format!("{present},{ours}") };
    sysctl::write(RESERVED_PORTS, &all)?;
    Ok(())
}

/// Brings the host's routes to other nodes' pods to what is wanted; routes of ours to anything else there are removed.
///
/// # Errors
/// The kernel's; what was done stays, and the next call goes on.
pub async fn sync_routes(network: &HostNetwork, wanted: &HostRoutes, host: &Handle) -> keelway_netlink::Result<()> {
    let src = |to: &IpNet| {
        network.devices.host_addresses.iter().copied().find(|address| address.is_ipv4() == to.addr().is_ipv4())
    };
    let wanted: BTreeMap<IpNet, Route> = wanted
        .iter()
        .map(|(to, gateway)| {
            let route = match gateway {
                Some(gateway) => Route { src: src(to), ..Route::via(*to, *gateway, network.route_index) },
                None => Route { src: src(to), scope: RouteScope::Link, ..Route::dev(*to, network.route_index) },
            };
            (*to, route)
        })
        .collect();
    let filter =
        RouteFilter { index: Some(network.route_index), table: Some(TABLE_MAIN), protocol: Some(PROTOCOL_KEELWAY) };
    let present = host.routes(filter).await?;
    for route in wanted.values() {
        let same = |found: &&Route| found.to == route.to && found.via == route.via && found.src == route.src;
        if present.iter().find(same).is_none() {
            host.replace_route(route).await?;
        }
    }
    for route in present.iter().filter(|route| !wanted.contains_key(&route.to)) {
        host.delete_route(route).await?;
    }
    Ok(())
}
