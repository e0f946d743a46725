//! Answers for programs: the messages of the agent's API with camel-case keys. Keys are added, never renamed.

use keelway_api::v1::{Backend, NodeStatusResponse, ServiceState};
use serde_json::{Value, json};

use crate::volumes::Volumes;

/// `keelway status -o json`.
pub fn node_status(status: &NodeStatusResponse, volumes: &Volumes) -> Value {
    let (driver, listed) = match volumes {
        Volumes::NoDriver => ("none", &[][..]),
        Volumes::Listed(listed) => ("running", &listed[..]),
        Volumes::Unwell(_) => ("unwell", &[][..]),
    };
    let mut problems = status.problems.clone();
    problems.extend(crate::status::volume_problem(volumes));
    let counts = status.counts.unwrap_or_default();
    json!({
        "version": status.version,
        "layoutVersion": status.layout_version,
        "node": status.node,
        "source": status.source,
        "synced": status.synced,
        "uptimeSeconds": status.uptime_seconds,
        "podCIDRs": status.pod_cidrs,
        "routing": status.routing,
        "loadBalancerMode": status.load_balancer_mode,
        "xdp": status.xdp,
        "xdpPackets": status.xdp_packets,
        "mtu": status.mtu,
        "generation": status.generation,
        "counts": {
            "services": counts.services,
            "servicesLeftOut": counts.services_left_out,
            "frontends": counts.frontends,
            "backends": counts.backends,
            "endpoints": counts.endpoints,
            "identities": counts.identities,
            "policies": counts.policies,
            "policyRules": counts.policy_rules,
            "nodes": counts.nodes,
        },
        "kinds": status.kinds.iter().map(|kind| json!({
            "kind": kind.kind, "synced": kind.synced, "objects": kind.objects,
        })).collect::<Vec<_>>(),
        "hooks": status.hooks.iter().map(|hook| json!({
            "hook": hook.hook, "device": hook.device, "mechanism": hook.mechanism,
            "linkId": hook.link_id, "programId": hook.program_id, "attached": hook.attached,
        })).collect::<Vec<_>>(),
        "maps": status.maps.iter().map(|map| json!({
            "name": map.name, "entries": map.entries, "capacity": map.capacity, "lru": map.lru,
        })).collect::<Vec<_>>(),
        "drops": status.drops.iter().map(|drop| json!({
            "reason": drop.reason, "hook": drop.hook, "packets": drop.packets, "bytes": drop.bytes,
        })).collect::<Vec<_>>(),
        "volumeDriver": driver,
        "volumes": listed.iter().map(|volume| json!({
            "id": volume.id, "capacityBytes": volume.capacity,
        })).collect::<Vec<_>>(),
        "problems": problems,
    })
}

fn backend(backend: &Backend) -> Value {
    json!({
        "address": backend.address, "port": backend.port, "state": crate::services::state(backend),
        "local": backend.local, "connections": backend.connections,
    })
}

/// `keelway services -o json`.
pub fn services(services: &[ServiceState]) -> Value {
    let frontends = |service: &ServiceState| -> Vec<Value> {
        let one = |f: &keelway_api::v1::Frontend| {
            json!({
                "kind": f.kind, "address": f.address, "port": f.port, "protocol": f.protocol,
                "clients": crate::services::clients(f), "trafficPolicy": f.policy,
                "affinitySeconds": f.affinity_seconds, "flags": f.flags, "restricted": f.restricted,
                "sourceRanges": f.source_ranges, "backends": f.backends.iter().map(backend).collect::<Vec<_>>(),
            })
        };
        service.frontends.iter().map(one).collect()
    };
    let one = |service: &ServiceState| {
        json!({
            "namespace": service.namespace, "name": service.name, "frontends": frontends(service),
            "problems": service.problems,
        })
    };
    json!({ "services": services.iter().map(one).collect::<Vec<_>>() })
}

/// `keelway endpoints -o json`.
pub fn endpoints(services: &[ServiceState]) -> Value {
    let one = |row: crate::services::Endpoint<'_>| {
        let mut value = backend(row.backend);
        value["namespace"] = row.service.namespace.as_str().into();
        value["service"] = row.service.name.as_str().into();
        value["protocol"] = row.protocol.into();
        value["frontends"] = row.frontends.into();
        value
    };
    json!({ "endpoints": crate::services::rows(services).into_iter().map(one).collect::<Vec<_>>() })
}
