//! The objects that describe Services, as this crate needs them: Kubernetes' own, less what no data plane reads.

use std::net::IpAddr;

use ipnet::IpNet;

/// Namespace and name of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace.
    pub namespace: String,
    /// The name within it.
    pub name: String,
}

impl ObjectName {
    /// `namespace/name`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// Owns the entries of this node's addresses. No object has an empty name.
    pub fn this_node() -> Self {
        Self::default()
    }

    /// Whether it is [`this_node`](Self::this_node).
    pub fn is_this_node(&self) -> bool {
        self.name.is_empty()
    }
}

impl std::fmt::Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.is_this_node() {
            true => f.write_str("this node's addresses"),
            false => write!(f, "{}/{}", self.namespace, self.name),
        }
    }
}

/// A transport protocol that Services can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// IANA protocol number 6.
    Tcp,
    /// IANA protocol number 17.
    Udp,
    /// IANA protocol number 132.
    Sctp,
}

impl Protocol {
    /// The IANA protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// `spec.type`, as far as it decides which addresses are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceType {
    /// Cluster IPs only.
    #[default]
    ClusterIp,
    /// Cluster IPs and a port on each node.
    NodePort,
    /// As `NodePort`, and the addresses of the load balancer's status.
    LoadBalancer,
    /// A DNS name; nothing for a data plane.
    ExternalName,
}

/// `internalTrafficPolicy` and `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// Any endpoint of the cluster.
    #[default]
    Cluster,
    /// Endpoints of this node only.
    Local,
}

/// How a connection's backend is picked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadBalancing {
    /// At random.
    #[default]
    Random,
    /// By the flow's hash over a Maglev table, alike on every node: connections from outside survive that their packets
    /// arrive at another node.
    Maglev,
}

/// One entry of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty for the only port of a Service that does not name it.
    pub name: String,
    /// The protocol; Kubernetes' default is TCP.
    pub protocol: Protocol,
    /// The port of the Service's addresses.
    pub port: u16,
    /// 0: none.
    pub node_port: u16,
}

/// A Service. Services that no proxy serves (headless, ExternalName, labelled for another proxy) are to be kept out by
/// [`Service::is_served`], not by the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Which one.
    pub name: ObjectName,
    /// `spec.type`.
    pub service_type: ServiceType,
    /// `spec.clusterIPs`; empty for headless Services.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` whose ipMode is VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// Seconds of ClientIP affinity; `None` without affinity.
    pub affinity_seconds: Option<u32>,
    /// `spec.internalTrafficPolicy`.
    pub internal_traffic_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_traffic_policy: TrafficPolicy,
    /// `spec.loadBalancerSourceRanges`: who may use the load balancer's addresses. `None` without any: everybody.
    pub source_ranges: Option<Vec<IpNet>>,
    /// `spec.healthCheckNodePort`; 0 without.
    pub health_check_node_port: u16,
    /// The annotation `keelway.dev/load-balancing`.
    pub load_balancing: LoadBalancing,
    /// What of the object is wrong and therefore not in force, in words.
    pub problems: Vec<String>,
    /// The label `service.kubernetes.io/service-proxy-name` is set: not ours.
    pub other_proxy: bool,
}

/// A port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    /// Matches [`ServicePort::name`].
    pub name: String,
    /// The protocol.
    pub protocol: Protocol,
    /// `None`: all ports, which no Service port can use.
    pub port: Option<u16>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its addresses; the first counts, as in kube-proxy.
    pub addresses: Vec<IpAddr>,
    /// `conditions.ready`; absent means true.
    pub ready: bool,
    /// `conditions.serving`; absent means true, whatever `ready` is.
    pub serving: bool,
    /// `conditions.terminating`; absent means false.
    pub terminating: bool,
    /// The node it runs on.
    pub node_name: Option<String>,
    /// The zone of that node.
    pub zone: Option<String>,
    /// `hints.forZones`.
    pub zone_hints: Vec<String>,
    /// `hints.forNodes`.
    pub node_hints: Vec<String>,
}

/// An EndpointSlice of one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Which one.
    pub name: ObjectName,
    /// The Service, from the label `kubernetes.io/service-name` (same namespace).
    pub service: String,
    /// Ports, common to all endpoints.
    pub ports: Vec<EndpointPort>,
    /// Endpoints.
    pub endpoints: Vec<SliceEndpoint>,
    /// What of the object is wrong and therefore not in force, in words.
    pub problems: Vec<String>,
}

impl Service {
    /// Whether a proxy of the standard kind programs this Service at all.
    pub fn is_served(&self) -> bool {
        !self.other_proxy && self.service_type != ServiceType::ExternalName && !self.cluster_ips.is_empty()
    }

    /// Whether it is served in a family: it has a cluster IP there. What else it has of a family depends on that, as in
    /// kube-proxy.
    pub fn has_family(&self, ipv6: bool) -> bool {
        self.cluster_ips.iter().any(|addr| addr.to_canonical().is_ipv6() == ipv6)
    }
}
