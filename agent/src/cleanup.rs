//! `keelway-agent cleanup`: everything of ours leaves the node, since pins, devices and routes outlive the agent's pod.

pub mod kube_proxy;

use std::net::IpAddr;
use std::path::Path;

use anyhow::Context as _;
use ipnet::IpNet;
use keelway_cni::install::{BINARY_FILE, CONFLIST_FILE, is_our_loopback};
use keelway_cni::ipam::Pool;
use keelway_cni::plan::HOST_PREFIX;
use keelway_netlink::{Handle, PROTOCOL_KEELWAY, RouteFilter};

use crate::config::Config;
use crate::host::{CIDRS_FILE, VXLAN_DEVICE, remembered_cidrs};
use crate::netfilter::nft::release_translation;
use crate::run::lock;

/// Removes what there is and says what that was.
///
/// # Errors
/// The first thing that could not be removed; what went before is gone.
pub async fn cleanup(config: &Config) -> anyhow::Result<()> {
    std::fs::create_dir_all(&config.state_dir).with_context(|| config.state_dir.display().to_string())?;
    let _lock = lock(config)?;
    let host = Handle::open()?;
    let mut routes = 0;
    for route in host.routes(RouteFilter { protocol: Some(PROTOCOL_KEELWAY), ..RouteFilter::default() }).await? {
        routes += usize::from(host.delete_route(&route).await?);
    }
    let pod_cidrs = remembered_cidrs(&config.state_dir)?;
    let own: Vec<IpAddr> = Pool::new(&pod_cidrs).map(|pool| pool.host_addresses()).unwrap_or_default();
    for cidr in &pod_cidrs {
        routes += usize::from(host.delete_unreachable(cidr.trunc()).await?);
    }
    let mut links = 0;
    for link in host.links().await? {
        for address in &own {
            host.delete_address(link.index, IpNet::from(*address)).await?;
        }
        keelway_maps::detach_clsact(&link.name);
        let pod = link.kind == "veth" && link.name.starts_with(HOST_PREFIX);
        if pod || link.name == VXLAN_DEVICE {
            links += usize::from(host.delete_link(&link.name).await?);
        }
    }
    let pins = keelway_maps::cleanup(&config.bpffs)?.len();
    let files = remove_files(config)?;
    // Where the kernel has no nftables there is nothing to let go of.
    let held = release_translation().or_else(|refused| if refused.is_absent() { Ok(false) } else { Err(refused) })?;
    let held = if held { ", and a former kube-proxy's connections let go" } else { "" };
    println!("removed {pins} pins, {links} devices, {routes} routes, {files} files{held}");
    Ok(())
}

fn remove_files(config: &Config) -> anyhow::Result<usize> {
    let plugins = Path::new("/opt/cni/bin");
    // Known by the plugin beside it, which goes below.
    let loopback = is_our_loopback(plugins).with_context(|| plugins.display().to_string())?;
    let loopback = loopback.then(|| plugins.join(keelway_cni::loopback::NAME));
    let mut removed = 0;
    let files = [
        config.state_dir.join("leases"),
        config.state_dir.join("leases.lock"),
        config.state_dir.join("policy-numbers"),
        config.state_dir.join(CIDRS_FILE),
        config.socket(),
        config.run_dir.join(keelway_cni::command::SEEN_FILE),
        Path::new("/etc/cni/net.d").join(CONFLIST_FILE),
        plugins.join(BINARY_FILE),
    ];
    for file in files.into_iter().chain(loopback) {
        match std::fs::remove_file(&file) {
            Ok(()) => removed += 1,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| file.display().to_string()),
        }
    }
    Ok(removed)
}
