//! Services with everything that their objects can say, written as an API server and the EndpointSlice controller would.
use std::net::IpAddr;

use anyhow::Result;
use serde_json::{Value, json};

use crate::standalone::{Pod, Standalone};

/// One endpoint of a Service.
#[derive(Clone, Debug)]
pub struct Backend {
    /// IPv4 and IPv6.
    pub addresses: [IpAddr; 2],
    /// The node's name.
    pub node: String,
    /// `conditions`.
    pub conditions: Value,
    /// Its port.
    pub port: u16,
}

impl Backend {
    /// A pod that is ready, at the probe's port.
    pub fn pod(s: &Standalone, pod: &Pod) -> Self {
        Self {
            addresses: [pod.address(false), pod.address(true)],
            node: s.node(pod.node).name.clone(),
            conditions: json!({"ready": true, "serving": true, "terminating": false}),
            port: 8080,
        }
    }

    /// A server in a node's own network.
    pub fn host(s: &Standalone, number: usize, port: u16) -> Self {
        let node = s.node(number);
        Self {
            addresses: [node.v4.into(), node.v6.into()],
            node: node.name.clone(),
            conditions: json!({"ready": true, "serving": true, "terminating": false}),
            port,
        }
    }

    /// The same on its way out.
    pub fn terminating(mut self, serving: bool) -> Self {
        self.conditions = json!({"ready": false, "serving": serving, "terminating": true});
        self
    }
}

impl Standalone {
    /// Writes the dual-stack Service `name` in `default` with one port named `p`; `spec` is merged over what every Service has, and
    /// `status` is its status. All backends are of one port.
    pub fn put_service(&self, name: &str, spec: &Value, status: &Value, backends: &[Backend]) -> Result<()> {
        let protocol = spec["ports"][0]["protocol"].as_str().unwrap_or("TCP");
        let annotations = spec.get("annotations").cloned().unwrap_or(json!({}));
        let mut full =
            json!({"type": "ClusterIP", "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"});
        for (key, value) in spec.as_object().into_iter().flatten().filter(|(key, _)| *key != "annotations") {
            full[key] = value.clone();
        }
        full["ports"][0]["name"] = json!("p");
        let metadata = json!({"name": name, "namespace": "default", "annotations": annotations});
        let mut objects =
            vec![json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": full, "status": status})];
        for (index, family) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let endpoints: Vec<_> = backends
                .iter()
                .map(|b| json!({"addresses": [b.addresses[index]], "conditions": b.conditions, "nodeName": b.node}))
                .collect();
            let labels = json!({"kubernetes.io/service-name": name});
            objects.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {"name": format!("{name}-{family}").to_lowercase(), "namespace": "default", "labels": labels},
                "ports": [{"name": "p", "protocol": protocol, "port": backends.first().map_or(8080, |b| b.port)}],
                "endpoints": endpoints,
            }));
        }
        // JSON is YAML.
        let text: Vec<String> = objects.iter().map(Value::to_string).collect();
        self.write(&format!("service-{name}"), &text.join("\n---\n"))
    }
}
