//! Which Services get an address, which one, and which nodes take part: no I/O.
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Node, Service};

/// The pool, in both families; an address's last byte is its number.
pub const POOL: [&str; 2] = ["198.51.100.0/24", "2001:db8:51::/112"];
/// What upstream's cloud controllers put on a Service whose balancer is yet to be taken down.
pub const FINALIZER: &str = "service.kubernetes.io/load-balancer-cleanup";
/// A node so labelled gets nothing from balancers.
const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

/// The pool's address of this number.
pub fn address(number: u8, v6: bool) -> IpAddr {
    match v6 {
        false => Ipv4Addr::new(198, 51, 100, number).into(),
        true => Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, u16::from(number)).into(),
    }
}

/// Whether somebody else looks after the Service, by its class.
pub fn foreign(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| spec.load_balancer_class.is_some())
}

/// Whether the Service is to have an address.
pub fn wants(service: &Service) -> bool {
    let balanced = service.spec.as_ref().is_some_and(|spec| spec.type_.as_deref() == Some("LoadBalancer"));
    balanced && !foreign(service) && service.metadata.deletion_timestamp.is_none()
}

/// Whether the Service has the finalizer.
pub fn held(service: &Service) -> bool {
    service.metadata.finalizers.iter().flatten().any(|name| name == FINALIZER)
}

/// What its status is to say under this number: an address for each of its families, in their order.
pub fn ingress(service: &Service, number: u8) -> Vec<LoadBalancerIngress> {
    let families = service.spec.iter().flat_map(|spec| spec.ip_families.iter().flatten());
    let entry = |family: &String| LoadBalancerIngress {
        ip: Some(address(number, family == "IPv6").to_string()),
        ip_mode: Some("VIP".to_owned()),
        ..LoadBalancerIngress::default()
    };
    families.map(entry).collect()
}

/// What its status says.
pub fn said(service: &Service) -> &[LoadBalancerIngress] {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default()
}

/// The port that says whether a node has backends, of a Service that wants to be led to those nodes only.
pub fn health_port(service: &Service) -> Option<u16> {
    let spec = service.spec.as_ref()?;
    let local = spec.external_traffic_policy.as_deref() == Some("Local");
    spec.health_check_node_port.filter(|_| local).and_then(|port| u16::try_from(port).ok())
}

/// Whether a client is to be led to one node, which then keeps it at one backend.
pub fn sticky(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| spec.session_affinity.as_deref() == Some("ClientIP"))
}

/// A node's addresses, if it may get packets: ready, not going, and not excluded.
pub fn addresses(node: &Node) -> Vec<IpAddr> {
    let status = node.status.iter();
    let mut conditions = status.clone().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let excluded = node.metadata.labels.iter().flatten().any(|(name, _)| name == EXCLUDED);
    if !ready || excluded || node.metadata.deletion_timestamp.is_some() {
        return Vec::new();
    }
    let internal = status.flat_map(|status| status.addresses.iter().flatten()).filter(|it| it.type_ == "InternalIP");
    internal.filter_map(|it| it.address.parse().ok()).collect()
}

/// The one of the nodes that a machine's packets go to for as long as it is there, as balancers do that hash a client's address.
pub fn one_for(machine: &str, to: IpAddr, nodes: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let weight = |node: &IpAddr| {
        let mut hasher = DefaultHasher::new();
        (machine, to, node).hash(&mut hasher);
        hasher.finish()
    };
    nodes.iter().copied().max_by_key(weight)
}

/// The numbers that Services have, by UID.
#[derive(Debug, Default)]
pub struct Numbers {
    given: BTreeMap<String, u8>,
    last: u8,
}

impl Numbers {
    /// The Service's number, which it keeps. New ones go round, so that an address comes back as late as can be.
    pub fn of(&mut self, uid: &str) -> Result<u8> {
        if let Some(number) = self.given.get(uid) {
            return Ok(*number);
        }
        let taken: BTreeSet<u8> = self.given.values().copied().collect();
        let number = (self.last.saturating_add(1)..255).chain(1..255).find(|number| !taken.contains(number));
        self.last = number.context("the pool has no address left")?;
        self.given.insert(uid.to_owned(), self.last);
        Ok(self.last)
    }

    /// Takes back the numbers of all Services but these.
    pub fn keep(&mut self, uids: &BTreeSet<String>) {
        self.given.retain(|uid, _| uids.contains(uid));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::IpAddr;

    use k8s_openapi::api::core::v1::{Node, Service};
    use serde_json::json;

    use super::{Numbers, addresses, health_port, ingress, one_for, wants};

    fn service(spec: &serde_json::Value) -> Service {
        serde_json::from_value(json!({"metadata": {"name": "a", "uid": "u"}, "spec": spec})).unwrap()
    }

    #[test]
    fn a_balanced_service_gets_an_address_of_each_family_in_its_order() {
        let both = service(&json!({"type": "LoadBalancer", "ipFamilies": ["IPv6", "IPv4"]}));
        assert!(wants(&both));
        let given: Vec<String> = ingress(&both, 7).into_iter().filter_map(|entry| entry.ip).collect();
        assert_eq!(given, ["2001:db8:51::7", "198.51.100.7"]);
        assert!(!wants(&service(&json!({"type": "NodePort"}))));
        assert!(!wants(&service(&json!({"type": "LoadBalancer", "loadBalancerClass": "example.com/other"}))));
        let mut going = both;
        going.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        assert!(!wants(&going));
    }

    #[test]
    fn only_local_services_ask_for_a_nodes_health() {
        let spec = |policy: &str| json!({"type": "LoadBalancer", "externalTrafficPolicy": policy, "healthCheckNodePort": 30123});
        assert_eq!(health_port(&service(&spec("Local"))), Some(30123));
        assert_eq!(health_port(&service(&spec("Cluster"))), None);
    }

    #[test]
    fn only_ready_nodes_take_part() {
        let of = |ready: &str, labels: serde_json::Value| -> Node {
            serde_json::from_value(json!({"metadata": {"labels": labels}, "status": {
                "conditions": [{"type": "Ready", "status": ready}],
                "addresses": [{"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "10.0.0.1"}]}}))
            .unwrap()
        };
        assert_eq!(addresses(&of("True", json!({}))), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert!(addresses(&of("Unknown", json!({}))).is_empty());
        assert!(addresses(&of("True", json!({super::EXCLUDED: ""}))).is_empty());
    }

    #[test]
    fn a_number_is_kept_and_comes_back_last() {
        let mut numbers = Numbers::default();
        assert_eq!((numbers.of("a").unwrap(), numbers.of("b").unwrap(), numbers.of("a").unwrap()), (1, 2, 1));
        numbers.keep(&BTreeSet::from(["b".to_owned()]));
        assert_eq!(numbers.of("c").unwrap(), 3);
        for n in 0..252 {
            numbers.of(&n.to_string()).unwrap();
        }
        assert!(numbers.of("one too many").is_err());
    }

    #[test]
    fn a_client_stays_at_its_node_when_another_goes() {
        let nodes: BTreeSet<IpAddr> = (1..=4).map(|n| format!("10.0.0.{n}").parse().unwrap()).collect();
        let to = "198.51.100.1".parse().unwrap();
        let mine = one_for("cp", to, &nodes).unwrap();
        for other in nodes.iter().filter(|node| **node != mine) {
            let left: BTreeSet<IpAddr> = nodes.iter().copied().filter(|node| node != other).collect();
            assert_eq!(one_for("cp", to, &left), Some(mine));
        }
        assert_eq!(one_for("cp", to, &BTreeSet::new()), None);
    }
}
