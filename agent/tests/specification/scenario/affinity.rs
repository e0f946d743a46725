//! ClientIP affinity: a client has one backend of a Service port, whichever address it dials, over changes and restarts.

use std::net::{IpAddr, SocketAddr};

use keelway_proxy::model::Service;
use keelway_proxy::{Forward, ObjectName, Verdict, reference};

use super::{Case, From, Runner};
use crate::kernel::{NODE, ip};
use crate::packet::SYN;

/// A client and the Service port of which it has one backend.
pub(super) type Affine = (IpAddr, u8, ObjectName, String);

impl Runner<'_> {
    pub(super) fn affine(&self, case: &Case) -> Option<Affine> {
        let services: Vec<Service> = self.services.values().cloned().collect();
        let (service, port) = reference::service_port(&self.node, &services, &case.packet())?;
        Some((case.client, case.proto(), service, port))
    }

    /// Notes the backend of a client with affinity. Of two, one of which is not for every address to choose, either may be had.
    pub(super) fn keep(&mut self, case: &Case, backend: SocketAddr) {
        let has_affinity = |affine: &Affine| self.services[&affine.2].affinity_seconds.is_some();
        let Some(affine) = self.affine(case).filter(has_affinity) else { return };
        if self.kept.get(&affine).is_none_or(|had| *had == backend) {
            self.kept.insert(affine, backend);
        } else {
            self.kept.remove(&affine);
        }
    }

    /// A client's time may be over.
    pub(super) fn forget(&mut self, client: IpAddr) {
        self.kept.retain(|(of, ..), _| *of != client);
    }

    /// A client with affinity meets its backend by every address of the Service port that has it.
    pub(super) fn has_by_all_addresses(&mut self, case: &Case, backend: SocketAddr) -> Result<(), String> {
        let Some(affine) = self.affine(case).filter(|_| case.from != From::Host) else { return Ok(()) };
        let service = &self.services[&affine.2];
        let all = [&service.cluster_ips, &service.load_balancer_ips, &service.external_ips].into_iter().flatten();
        let all = all.copied().chain(NODE.map(ip)).filter(|addr| addr.is_ipv6() == case.to.is_ipv6());
        let ports: Vec<u16> = service.ports.iter().flat_map(|port| [port.port, port.node_port]).collect();
        let all: Vec<SocketAddr> = all.flat_map(|addr| ports.iter().map(move |port| (addr, *port).into())).collect();
        for to in all {
            let other = Case { to, ..case.clone() };
            let verdict = self.reference(&other);
            let has = |to: &Forward| to.backends.iter().any(|to| SocketAddr::from((to.addr, to.port)) == backend);
            if self.affine(&other).as_ref() != Some(&affine) || !matches!(&verdict, Verdict::Forward(to) if has(to)) {
                continue;
            }
            let client = self.client(&other);
            let got = self.meets(&other, client, SYN, &verdict).map_err(|error| format!("by {to}: {error}"))?;
            if got != Some(backend) {
                return Err(format!("a client with affinity to {backend} got {got:?} by {to}"));
            }
        }
        Ok(())
    }
}
