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

impl Backend {
    /// As an entry of a slice of one family.
    pub fn endpoint(&self, v6: bool) -> Value {
        json!({"addresses": [self.addresses[usize::from(v6)]], "conditions": self.conditions, "nodeName": self.node})
    }
}

/// A slice of one family of the Service `service` in `default`.
pub fn slice(name: &str, service: &str, v6: bool, ports: &Value, backends: &[Backend]) -> Value {
    let family = if v6 { "IPv6" } else { "IPv4" };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {"name": format!("{name}-{family}").to_lowercase(), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service}},
        "ports": ports, "endpoints": backends.iter().map(|backend| backend.endpoint(v6)).collect::<Vec<_>>(),
    })
}

impl Standalone {
    /// Writes (or replaces) a file of these objects.
    pub fn put_objects(&self, file: &str, objects: &[Value]) -> Result<()> {
        // JSON is YAML.
        let text: Vec<String> = objects.iter().map(Value::to_string).collect();
        self.write(file, &text.join("\n---\n"))
    }

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
        let port = backends.first().map_or(8080, |backend| backend.port);
        let ports = json!([{"name": "p", "protocol": protocol, "port": port}]);
        objects.extend([false, true].map(|v6| slice(name, name, v6, &ports, backends)));
        self.put_objects(&format!("service-{name}"), &objects)
    }
}
