//! The connections of a former kube-proxy outlive it: the kernel's own connection tracking goes on translating them.
//!
//! Its rules decide only where a connection goes to begin with. From then on the tracking's entry translates, with the rules or
//! without, as long as packets get there; but ours are met before it, on the way in from the network, and would give a
//! connection under way to a backend that does not know it. So flows that the tracking translates get entries that say so,
//! and the programs let their packets pass. Connections of IPVS, which keeps its own table and notes its changes in the
//! tracking, are among them; they last as long as its virtual servers.
//!
//! ```text
//! read the tracking -> entries -> attach, with `ADOPTING`: connections under way and unknown pass -> read again -> entries -> no `ADOPTING`
//! ```
//!
//! The second reading finds what began between the first and the attachment.
//!
//! Where the kernel masquerades such a flow it has a port of the node's, which may be one of those that we give: it is taken for as
//! long as the flow lasts, or answers would go to whom we gave it.

use std::net::SocketAddr;
use std::time::Duration;

use keelway_layout::{Addr, CtEntry, CtKey, NatEntry, NodeConfig, Port, ct_flags, node_flags, scope};
use keelway_maps::{Table as _, TableError, Tables};
use keelway_proxy as proxy;
use nix::time::{ClockId, clock_gettime};

use super::{Engine, EngineError};
use crate::netfilter::conntrack::{self, Translated};
use crate::netfilter::nft;

const UDP: u8 = 17;
/// For how long a connection may be silent; the programs prolong this at its packets, by as much again.
const LEASE: Duration = Duration::from_secs(8_000);
const LEASE_UDP: Duration = Duration::from_secs(30);
/// How often somebody looks whether there are any left.
const PERIOD: Duration = Duration::from_secs(30);

impl Engine {
    /// What the programs are told of their node while flows are taken over; `None` when there are none to take over.
    ///
    /// Only before the programs attach for the first time: later every flow is known to them.
    pub(super) fn adoption(&self, node: &NodeConfig) -> Option<NodeConfig> {
        let first = self.datapath.tables.state().is_ok_and(|state| state.generation == 0);
        let flows = if first { translated() } else { Vec::new() };
        (!flows.is_empty()).then_some(NodeConfig { flags: node.flags | node_flags::ADOPTING, ..*node })
    }

    /// Leaves the flows that the kernel's tracking translates to it.
    pub(super) fn adopt(&mut self) -> Result<(), EngineError> {
        let flows = translated();
        if let Err(error) = nft::hold_translation() {
            tracing::warn!(%error, "a former kube-proxy's connections may end with its rules");
        }
        let services = &self.services;
        let backend = |flow: &Translated| {
            let backend = flow.backend;
            services.backend_id(&proxy::Backend {
                addr: backend.ip().to_canonical(),
                port: backend.port(),
                proto: flow.protocol,
            })
        };
        let tables = &mut self.datapath.tables;
        let adopted = write(tables, &flows, backend).map_err(|error| EngineError::Kernel(error.to_string()))?;
        tracing::info!(flows = adopted, "a former kube-proxy's connections are left to the kernel's own tracking");
        self.metrics.set_adopted(adopted);
        Ok(())
    }
}

fn translated() -> Vec<Translated> {
    match conntrack::translated() {
        Ok(flows) => flows,
        Err(refused) if refused.is_absent() => Vec::new(),
        Err(error) => {
            tracing::warn!(%error, "a former kube-proxy's connections cannot be seen");
            Vec::new()
        }
    }
}

/// Writes entries for flows that have none; how many.
fn write(
    tables: &mut Tables,
    flows: &[Translated],
    backend: impl Fn(&Translated) -> Option<u32>,
) -> Result<usize, TableError> {
    // The clock cannot fail to be read.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    let mut written = 0;
    for flow in flows {
        let Some((key, entry)) = entry(flow, backend(flow), now) else { continue };
        if tables.conntrack.get(&key)?.is_none() {
            tables.conntrack.put(&key, &entry)?;
            written += 1;
        }
        if let Some((key, entry)) = taken(flow, now)
            && tables.nat.get(&key)?.is_none()
        {
            tables.nat.put(&key, &entry)?;
        }
    }
    Ok(written)
}

/// The entry by which the programs give nobody else the port that the kernel gave a flow: it says of an answer that it is for whom it
/// is addressed to, whose packets go on to the tracking.
fn taken(flow: &Translated, now: Duration) -> Option<(CtKey, NatEntry)> {
    let (backend, own) = (flow.backend, flow.answered);
    let (addr, port) = (Addr::from(own.ip()), Port::new(own.port()));
    let (src, sport) = (Addr::from(backend.ip()), Port::new(backend.port()));
    let key = CtKey { src, dst: addr, sport, dport: port, proto: flow.protocol, scope: scope::NAT_IN, reserved: 0 };
    let expires = (now + lease(flow.protocol)).as_nanos() as u64;
    (own != flow.client).then_some((key, NatEntry { expires, addr, port, ..NatEntry::default() }))
}

fn lease(protocol: u8) -> Duration {
    if protocol == UDP { LEASE_UDP } else { LEASE }
}

fn entry(flow: &Translated, backend: Option<u32>, now: Duration) -> Option<(CtKey, CtEntry)> {
    let of = |address: SocketAddr| (Addr::from(address.ip()), Port::new(address.port()));
    let ((src, sport), (dst, dport), (nat_addr, nat_port)) = (of(flow.client), of(flow.dialled), of(flow.backend));
    // Datagrams stay with a backend while that serves; a connection stays whatever becomes of it.
    let backend = if flow.protocol == UDP { backend? } else { backend.unwrap_or_default() };
    let key = CtKey { src, dst, sport, dport, proto: flow.protocol, scope: scope::SERVICE, reserved: 0 };
    let expires = (now + lease(flow.protocol)).as_nanos() as u64;
    Some((key, CtEntry { expires, nat_addr, nat_port, backend, flags: ct_flags::STACK, ..CtEntry::default() }))
}

/// Lets go of the kernel's translation when its last connection has ended.
pub async fn watch() {
    loop {
        tokio::time::sleep(PERIOD).await;
        let look = || -> Result<bool, crate::netfilter::Refused> {
            let held = nft::tables()?.iter().any(|table| table.name == nft::HOLDING_TABLE);
            Ok(held && conntrack::translated()?.is_empty() && nft::release_translation()?)
        };
        match tokio::task::spawn_blocking(look).await {
            Ok(Ok(true)) => tracing::info!("the last connection of a former kube-proxy has ended"),
            Ok(Err(error)) if !error.is_absent() => {
                tracing::debug!(%error, "looking for a former kube-proxy's connections")
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_need_a_backend_that_serves_and_connections_do_not() {
        let flow = |protocol| Translated {
            protocol,
            client: "192.0.2.1:4000".parse().unwrap(),
            dialled: "192.0.2.2:30080".parse().unwrap(),
            backend: "10.0.0.1:8080".parse().unwrap(),
            answered: "192.0.2.2:61000".parse().unwrap(),
            by_ipvs: false,
        };
        assert_eq!(entry(&flow(UDP), None, Duration::ZERO), None);
        let (key, entry) = entry(&flow(6), None, Duration::from_secs(1)).unwrap();
        assert_eq!((key.scope, key.dport.get(), key.sport.get()), (scope::SERVICE, 30080, 4000));
        assert_eq!((entry.flags, entry.expires), (ct_flags::STACK, 8_001_000_000_000));
    }

    #[test]
    fn a_port_of_the_nodes_is_taken_and_a_clients_own_is_not() {
        let flow = |answered: &str| Translated {
            protocol: 6,
            client: "192.0.2.1:4000".parse().unwrap(),
            dialled: "192.0.2.2:30080".parse().unwrap(),
            backend: "10.0.0.1:8080".parse().unwrap(),
            answered: answered.parse().unwrap(),
            by_ipvs: false,
        };
        assert_eq!(taken(&flow("192.0.2.1:4000"), Duration::ZERO), None);
        let (key, entry) = taken(&flow("192.0.2.2:61000"), Duration::ZERO).unwrap();
        assert_eq!((key.scope, key.sport.get(), key.dport.get()), (scope::NAT_IN, 8080, 61000));
        assert_eq!((entry.addr, entry.port, entry.flags), (key.dst, key.dport, 0));
    }
}
