//! Services and EndpointSlices.

use std::net::IpAddr;
use std::time::SystemTime;

use ipnet::IpNet;
use k8s_openapi::api::{core::v1, discovery::v1 as discovery};
use k8s_openapi::jiff::Timestamp;
use keelway_proxy::model;

use super::{ConvertError, Protocol, address, label, name, namespace_of, port, prefix, protocol, wrong};

const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
const LOAD_BALANCING_ANNOTATION: &str = "keelway.dev/load-balancing";
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Kubernetes' default `sessionAffinityConfig.clientIP.timeoutSeconds`: three hours.
const AFFINITY_SECONDS: i32 = 10_800;
/// Entries of an object that are named one by one.
const FLAWS: usize = 8;

/// What of an object cannot be used and is left out, as kube-proxy leaves it out. The API server checks few of these fields.
#[derive(Default)]
struct Flaws {
    named: Vec<String>,
    more: usize,
}

impl Flaws {
    fn note(&mut self, problem: String) {
        match self.named.len() {
            0..FLAWS => self.named.push(problem),
            _ => self.more += 1,
        }
    }

    /// An entry, unless it cannot be used.
    fn usable<T>(&mut self, entry: Result<T, ConvertError>) -> Option<T> {
        entry.map_err(|error| self.note(error.to_string())).ok()
    }

    fn usable_addresses<'a>(&mut self, field: &str, texts: impl Iterator<Item = &'a str>) -> Vec<IpAddr> {
        texts.filter_map(|text| self.usable(address(field, text))).collect()
    }

    fn into_problems(mut self) -> Vec<String> {
        self.named.extend((self.more > 0).then(|| format!("{} more", self.more)));
        self.named
    }
}

/// A Service. Entries of lists that cannot be used are left out and named among its problems.
///
/// # Errors
/// The first field, of those that the whole depends on, that cannot be used.
pub fn service(service: &v1::Service) -> Result<model::Service, ConvertError> {
    let empty = v1::ServiceSpec::default();
    let spec = service.spec.as_ref().unwrap_or(&empty);
    let listed = spec.cluster_ips.clone().unwrap_or_default();
    let only = spec.cluster_ip.clone().into_iter();
    let cluster_ips: Vec<String> = if listed.is_empty() { only.collect() } else { listed };
    let external_ips = spec.external_ips.as_deref().unwrap_or_default();
    let mut flaws = Flaws::default();
    let cluster_ips = cluster_ips.iter().map(String::as_str).filter(|text| !text.is_empty() && *text != "None");
    Ok(model::Service {
        name: model::ObjectName::new(namespace_of(&service.metadata), name(&service.metadata)?),
        service_type: match spec.type_.as_deref() {
            None | Some("ClusterIP") => model::ServiceType::ClusterIp,
            Some("NodePort") => model::ServiceType::NodePort,
            Some("LoadBalancer") => model::ServiceType::LoadBalancer,
            Some("ExternalName") => model::ServiceType::ExternalName,
            Some(other) => {
                return Err(wrong("spec.type", other, "ClusterIP, NodePort, LoadBalancer or ExternalName"));
            }
        },
        cluster_ips: cluster_ips.map(|text| address("spec.clusterIPs[]", text)).collect::<Result<_, _>>()?,
        external_ips: flaws.usable_addresses("spec.externalIPs[]", external_ips.iter().map(String::as_str)),
        load_balancer_ips: flaws.usable_addresses("status.loadBalancer.ingress[].ip", load_balancer_ips(service)),
        ports: spec.ports.iter().flatten().filter_map(|entry| service_port(entry, &mut flaws)).collect(),
        affinity_seconds: affinity(spec)?,
        internal_traffic_policy: traffic_policy("spec.internalTrafficPolicy", &spec.internal_traffic_policy)?,
        external_traffic_policy: traffic_policy("spec.externalTrafficPolicy", &spec.external_traffic_policy)?,
        source_ranges: source_ranges(spec, &mut flaws),
        health_check_node_port: number("spec.healthCheckNodePort", spec.health_check_node_port, &mut flaws),
        load_balancing: load_balancing(service, &mut flaws),
        problems: flaws.into_problems(),
        other_proxy: label(&service.metadata, PROXY_NAME_LABEL).is_some(),
    })
}

/// A port that there need not be; 0 for none.
fn number(field: &str, number: Option<i32>, flaws: &mut Flaws) -> u16 {
    let given = number.filter(|number| *number != 0);
    given.and_then(|number| flaws.usable(port(field, number))).unwrap_or(0)
}

/// Who may use the load balancer's addresses. The API lets white space through, and kube-proxy trims it; a range of nothing is
/// none. One that cannot be read lets nobody in; the others hold.
fn source_ranges(spec: &v1::ServiceSpec, flaws: &mut Flaws) -> Option<Vec<IpNet>> {
    let given = spec.load_balancer_source_ranges.iter().flatten().map(|text| text.trim());
    let given: Vec<&str> = given.filter(|text| !text.is_empty()).collect();
    let read = |text: &&str| flaws.usable(prefix("spec.loadBalancerSourceRanges[]", text));
    (!given.is_empty()).then(|| given.iter().filter_map(read).collect())
}

fn load_balancing(service: &v1::Service, flaws: &mut Flaws) -> model::LoadBalancing {
    let annotations = service.metadata.annotations.as_ref();
    match annotations.and_then(|annotations| annotations.get(LOAD_BALANCING_ANNOTATION)).map(String::as_str) {
        None | Some("random") => model::LoadBalancing::Random,
        Some("maglev") => model::LoadBalancing::Maglev,
        Some(other) => {
            let field = format!("metadata.annotations[{LOAD_BALANCING_ANNOTATION}]");
            flaws.note(format!("{}; random is in force", wrong(field, other, "random or maglev")));
            model::LoadBalancing::Random
        }
    }
}

/// Addresses of the status whose mode is VIP, which is the default: `Proxy` ones terminate elsewhere.
fn load_balancer_ips(service: &v1::Service) -> impl Iterator<Item = &str> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
    ingress
        .iter()
        .filter(|entry| entry.ip_mode.as_deref().unwrap_or("VIP") == "VIP")
        .filter_map(|entry| entry.ip.as_deref().filter(|ip| !ip.is_empty()))
}

fn service_port(entry: &v1::ServicePort, flaws: &mut Flaws) -> Option<model::ServicePort> {
    Some(model::ServicePort {
        name: entry.name.clone().unwrap_or_default(),
        protocol: flaws.usable(model_protocol("spec.ports[].protocol", entry.protocol.as_deref()))?,
        port: flaws.usable(port("spec.ports[].port", entry.port))?,
        node_port: number("spec.ports[].nodePort", entry.node_port, flaws),
    })
}

fn affinity(spec: &v1::ServiceSpec) -> Result<Option<u32>, ConvertError> {
    match spec.session_affinity.as_deref() {
        None | Some("None" | "") => Ok(None),
        Some("ClientIP") => {
            let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
            let seconds = client_ip.and_then(|client_ip| client_ip.timeout_seconds).unwrap_or(AFFINITY_SECONDS);
            match u32::try_from(seconds) {
                Ok(seconds) if (1..=86_400).contains(&seconds) => Ok(Some(seconds)),
                _ => Err(wrong(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                    seconds,
                    "a number from 1 to 86400",
                )),
            }
        }
        Some(other) => Err(wrong("spec.sessionAffinity", other, "None or ClientIP")),
    }
}

fn traffic_policy(field: &str, text: &Option<String>) -> Result<model::TrafficPolicy, ConvertError> {
    match text.as_deref() {
        None | Some("Cluster" | "") => Ok(model::TrafficPolicy::Cluster),
        Some("Local") => Ok(model::TrafficPolicy::Local),
        Some(other) => Err(wrong(field, other, "Cluster or Local")),
    }
}

fn model_protocol(field: &str, text: Option<&str>) -> Result<model::Protocol, ConvertError> {
    Ok(match protocol(field, text)? {
        Protocol::Tcp => model::Protocol::Tcp,
        Protocol::Udp => model::Protocol::Udp,
        Protocol::Sctp => model::Protocol::Sctp,
    })
}

/// An EndpointSlice, with the time of the change that it reports. `None`: a slice that no proxy of the standard kind reads
/// (of a headless Service, of no Service, of names instead of addresses). Entries that cannot be used are left out and named
/// among its problems.
///
/// # Errors
/// The first field, of those that the whole depends on, that cannot be used.
pub fn endpoint_slice(
    slice: &discovery::EndpointSlice,
) -> Result<Option<(model::EndpointSlice, Option<SystemTime>)>, ConvertError> {
    let metadata = &slice.metadata;
    let name = model::ObjectName::new(namespace_of(metadata), name(metadata)?);
    let is_ipv6 = match slice.address_type.as_str() {
        "IPv4" => false,
        "IPv6" => true,
        "FQDN" => return Ok(None),
        other => return Err(wrong("addressType", other, "IPv4 or IPv6")),
    };
    let service = match label(metadata, SERVICE_LABEL) {
        Some(service) if label(metadata, HEADLESS_LABEL).is_none() && !service.is_empty() => service.to_owned(),
        _ => return Ok(None),
    };
    let mut flaws = Flaws::default();
    let ports = slice.ports.iter().flatten().filter_map(|entry| {
        Some(model::EndpointPort {
            name: entry.name.clone().unwrap_or_default(),
            protocol: flaws.usable(model_protocol("ports[].protocol", entry.protocol.as_deref()))?,
            port: match entry.port {
                Some(number) => Some(flaws.usable(port("ports[].port", number))?),
                None => None,
            },
        })
    });
    let ports = ports.collect();
    let mut endpoints = Vec::with_capacity(slice.endpoints.as_ref().map_or(0, Vec::len));
    for endpoint in slice.endpoints.iter().flatten() {
        let converted = slice_endpoint(endpoint, is_ipv6, &mut flaws);
        endpoints.extend(flaws.usable(converted));
    }
    // Of what is kept, most is endpoints.
    endpoints.shrink_to_fit();
    let slice = model::EndpointSlice { name, service, ports, endpoints, problems: flaws.into_problems() };
    Ok(Some((slice, triggered(metadata))))
}

/// An endpoint without those of its addresses that cannot be used.
///
/// # Errors
/// That the first, which is the one that counts, is among them.
fn slice_endpoint(
    endpoint: &discovery::Endpoint,
    is_ipv6: bool,
    flaws: &mut Flaws,
) -> Result<model::SliceEndpoint, ConvertError> {
    let conditions = endpoint.conditions.as_ref();
    let hints = endpoint.hints.as_ref();
    let one = |text: &String| match address("endpoints[].addresses[]", text) {
        Ok(address) if address.is_ipv6() != is_ipv6 => {
            Err(wrong("endpoints[].addresses[]", text, "an address of the slice's addressType"))
        }
        parsed => parsed,
    };
    let mut addresses = Vec::with_capacity(endpoint.addresses.len());
    for (index, text) in endpoint.addresses.iter().enumerate() {
        match (index, one(text)) {
            (0, address) => addresses.push(address?),
            (_, address) => addresses.extend(flaws.usable(address)),
        }
    }
    Ok(model::SliceEndpoint {
        addresses,
        ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        node_name: endpoint.node_name.clone(),
        zone: endpoint.zone.clone(),
        zone_hints: hints
            .and_then(|hints| hints.for_zones.as_ref())
            .into_iter()
            .flatten()
            .map(|zone| zone.name.clone())
            .collect(),
        node_hints: hints
            .and_then(|hints| hints.for_nodes.as_ref())
            .into_iter()
            .flatten()
            .map(|node| node.name.clone())
            .collect(),
    })
}

/// The annotation is a hint for a metric: nonsense in it is no error.
fn triggered(metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Option<SystemTime> {
    let text = metadata.annotations.as_ref()?.get(TRIGGER_ANNOTATION)?;
    text.parse::<Timestamp>().ok().map(SystemTime::from)
}
