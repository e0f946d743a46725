//! Nodes: who is behind which pod CIDR.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use keelway_cni::ipam::Pool;
use keelway_layout::{Tunnel, node_flags, tunnel_flags};
use keelway_maps::Table as _;
use keelway_policy as policy;

use super::{Devices, Engine, EngineError, convert};
use crate::source::Node;

/// Where other nodes' pods are: pod CIDR to the node's address of the same family (routed mode) or none (the tunnel).
pub type HostRoutes = BTreeMap<IpNet, Option<IpAddr>>;

/// On a Node, "false": it does not take packets of Services' clients as they came (an older agent, or one that is about to be told of
/// the mode). Other nodes send it those in their own name.
const DSR_LABEL: &str = "keelway.dev/dsr";

/// The node's address that tunnelled packets go to.
fn underlay(node: &Node) -> Option<IpAddr> {
    node.internal_addresses.first().copied()
}

fn host_addresses(node: &Node) -> Vec<IpAddr> {
    // A CIDR that cannot be used is reported where it matters, on its own node.
    Pool::new(&node.pod_cidrs).map(|pool| pool.host_addresses()).unwrap_or_default()
}

impl Engine {
    fn policy_node(&self, node: &Node) -> policy::model::Node {
        let mut addresses = node.internal_addresses.clone();
        addresses.extend(host_addresses(node));
        if node.name == self.settings.node_name {
            addresses.extend(self.own.iter().filter(|own| !addresses.contains(own)).copied().collect::<Vec<_>>());
        }
        policy::model::Node {
            name: node.name.clone(),
            is_local: node.name == self.settings.node_name,
            addresses,
            pod_cidrs: node.pod_cidrs.clone(),
        }
    }

    /// Addresses came to this host or left it.
    pub(super) fn own_changed(&mut self, own: Vec<IpAddr>) {
        if self.own == own {
            return;
        }
        self.own = own;
        if let Some(node) = self.nodes.get(&self.settings.node_name) {
            self.policies.model.upsert_node(self.policy_node(node));
        }
    }

    pub(super) fn node_changed(&mut self, node: Node) {
        if self.nodes.get(&node.name) == Some(&node) {
            return;
        }
        self.policies.model.upsert_node(self.policy_node(&node));
        if node.name == self.settings.node_name {
            let zone = node.labels.get("topology.kubernetes.io/zone").cloned();
            let first = |v6: bool| node.internal_addresses.iter().copied().find(|address| address.is_ipv6() == v6);
            self.services.set_place(zone, first(false).into_iter().chain(first(true)).collect());
            self.health.set_eligible(node.eligible);
            self.node_tx.send_replace(Some(node.clone()));
        }
        self.nodes.insert(node.name.clone(), node);
        self.nodes_changed();
    }

    pub(super) fn node_gone(&mut self, name: &str) {
        self.policies.model.delete_node(name);
        self.nodes.remove(name);
        self.nodes_changed();
    }

    pub(super) fn replay_nodes(&mut self) {
        let nodes: Vec<_> = self.nodes.values().map(|node| self.policy_node(node)).collect();
        for node in nodes {
            self.policies.model.upsert_node(node);
        }
    }

    fn nodes_changed(&mut self) {
        if !self.is_synced() {
            return;
        }
        let devices = self.devices.borrow().clone();
        if let Some(devices) = devices
            && let Err(error) = self.sync_nodes(&devices)
        {
            self.settle(Err(error));
        }
    }

    /// Brings the tunnel table, and the host's wish for routes, to the nodes that are known.
    pub(super) fn sync_nodes(&mut self, devices: &Devices) -> Result<(), EngineError> {
        let has_tunnel = devices.vxlan.is_some();
        let tunnelled = devices.config.flags & node_flags::VXLAN != 0;
        let mut wanted: BTreeMap<IpNet, Tunnel> = BTreeMap::new();
        let mut routes = HostRoutes::new();
        for node in self.nodes.values().filter(|node| node.name != self.settings.node_name) {
            let Some(remote) = underlay(node) else { continue };
            let takes_dsr = node.labels.get(DSR_LABEL).is_none_or(|value| value != "false");
            let flags = if takes_dsr { tunnel_flags::DSR } else { 0 };
            let tunnel = Tunnel { remote: remote.into(), flags, reserved: 0 };
            for cidr in &node.pod_cidrs {
                let gateway = node.internal_addresses.iter().find(|addr| addr.is_ipv4() == cidr.addr().is_ipv4());
                if has_tunnel {
                    wanted.insert(cidr.trunc(), tunnel);
                }
                if tunnelled {
                    routes.insert(cidr.trunc(), None);
                } else if let Some(gateway) = gateway {
                    routes.insert(cidr.trunc(), Some(*gateway));
                }
            }
            if has_tunnel {
                for address in &node.internal_addresses {
                    wanted.insert(IpNet::from(*address), tunnel);
                }
            }
        }
        let tables = &mut self.datapath.tables;
        let kernel = |error: keelway_maps::TableError| EngineError::Kernel(error.to_string());
        let present: BTreeMap<_, _> = tables.tunnels.dump().map_err(kernel)?.into_iter().collect();
        let wanted: BTreeMap<_, _> = wanted.into_iter().map(|(net, tunnel)| (convert::prefix(net), tunnel)).collect();
        for (key, value) in &wanted {
            if present.get(key) != Some(value) {
                tables.tunnels.put(key, value).map_err(kernel)?;
            }
        }
        for key in present.keys().filter(|key| !wanted.contains_key(key)) {
            tables.tunnels.delete(key).map_err(kernel)?;
        }
        self.tunnels = Some(wanted.len());
        let routes = Some(routes);
        self.host_routes.send_if_modified(|now| {
            let changed = *now != routes;
            *now = routes;
            changed
        });
        Ok(())
    }
}
