//! Nodes, Namespaces and Pods.

use k8s_openapi::api::{core::v1, networking};
use keelway_policy::model;

use super::{ConvertError, Protocol, address, name, namespace_of, port, prefix, protocol};
use crate::source::{Node, ServiceCidr};

/// The cluster autoscaler's sign that a node is about to go; load balancers should stop sending to it.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// A Node.
///
/// # Errors
/// The first field that cannot be used.
pub fn node(node: &v1::Node) -> Result<Node, ConvertError> {
    let spec = node.spec.as_ref();
    let listed = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    let only = spec.and_then(|spec| spec.pod_cidr.clone()).into_iter();
    let pod_cidrs: Vec<String> = if listed.is_empty() { only.collect() } else { listed };
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    Ok(Node {
        name: name(&node.metadata)?,
        internal_addresses: addresses
            .iter()
            .filter(|address| address.type_ == "InternalIP")
            .map(|entry| address("status.addresses[].address", &entry.address))
            .collect::<Result<_, _>>()?,
        pod_cidrs: pod_cidrs.iter().map(|cidr| prefix("spec.podCIDRs[]", cidr)).collect::<Result<_, _>>()?,
        labels: node.metadata.labels.clone().unwrap_or_default(),
        eligible: node.metadata.deletion_timestamp.is_none() && taints.iter().all(|taint| taint.key != TO_BE_DELETED),
    })
}

/// A ServiceCIDR.
///
/// # Errors
/// The first field that cannot be used.
pub fn service_cidr(range: &networking::v1::ServiceCIDR) -> Result<ServiceCidr, ConvertError> {
    let cidrs = range.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    Ok(ServiceCidr {
        name: name(&range.metadata)?,
        cidrs: cidrs.iter().map(|cidr| prefix("spec.cidrs[]", cidr)).collect::<Result<_, _>>()?,
    })
}

/// On a mirror pod, which stands for a pod that a kubelet read from a file: the uid of that pod.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// A Namespace. The label `kubernetes.io/metadata.name`, which the API server gives to each, is added where it is missing.
///
/// # Errors
/// The first field that cannot be used.
pub fn namespace(namespace: &v1::Namespace) -> Result<model::Namespace, ConvertError> {
    let name = name(&namespace.metadata)?;
    let mut labels = namespace.metadata.labels.clone().unwrap_or_default();
    labels.entry("kubernetes.io/metadata.name".to_owned()).or_insert_with(|| name.clone());
    Ok(model::Namespace { name, labels })
}

/// A Pod. A terminated one has no addresses any more: another pod may have them.
///
/// The uid is the one that runtimes are told. For a static pod that is the file's, not that of its mirror in the API, which
/// changes when somebody deletes the mirror while the pod runs on (Kubernetes, `pkg/kubelet/types/pod_update.go`).
///
/// # Errors
/// The first field that cannot be used.
pub fn pod(pod: &v1::Pod) -> Result<model::Pod, ConvertError> {
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let annotations = pod.metadata.annotations.as_ref();
    let mirrored = annotations.and_then(|all| all.get(MIRROR)).filter(|uid| !uid.is_empty());
    let phase = status.and_then(|status| status.phase.as_deref());
    let addresses = match phase {
        Some("Succeeded" | "Failed") => Vec::new(),
        _ => {
            let listed = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
            let listed: Vec<&str> = listed.iter().map(|entry| entry.ip.as_str()).collect();
            let only = status.and_then(|status| status.pod_ip.as_deref()).into_iter();
            let texts = if listed.is_empty() { only.collect() } else { listed };
            let texts = texts.into_iter().filter(|text| !text.is_empty());
            texts.map(|text| address("status.podIPs[].ip", text)).collect::<Result<_, _>>()?
        }
    };
    Ok(model::Pod {
        name: model::ObjectName::new(namespace_of(&pod.metadata), name(&pod.metadata)?),
        uid: mirrored.or(pod.metadata.uid.as_ref()).cloned().unwrap_or_default(),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        addresses,
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
        node_name: spec.and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        named_ports: spec.map(named_ports).transpose()?.unwrap_or_default(),
    })
}

/// Named ports of containers that run for the pod's whole life: ordinary ones and sidecars.
fn named_ports(spec: &v1::PodSpec) -> Result<Vec<model::NamedPort>, ConvertError> {
    let init = spec.init_containers.as_deref().unwrap_or_default();
    let sidecars = init.iter().filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let mut named = Vec::new();
    for container in spec.containers.iter().chain(sidecars) {
        for entry in container.ports.as_deref().unwrap_or_default() {
            let Some(name) = entry.name.clone().filter(|name| !name.is_empty()) else { continue };
            named.push(model::NamedPort {
                name,
                protocol: match protocol("spec.containers[].ports[].protocol", entry.protocol.as_deref())? {
                    Protocol::Tcp => model::Protocol::Tcp,
                    Protocol::Udp => model::Protocol::Udp,
                    Protocol::Sctp => model::Protocol::Sctp,
                },
                port: port("spec.containers[].ports[].containerPort", entry.container_port)?,
            });
        }
    }
    named.sort();
    named.dedup();
    Ok(named)
}
