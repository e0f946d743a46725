//! Kubernetes objects as they are written, turned into the models of the pure crates. Both sources go through here, so
//! what the API server would default is defaulted here too: a file may leave it out.

mod cluster;
mod policy;
mod service;

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use cluster::{namespace, node, pod, service_cidr};
pub use policy::{deny_all, network_policy};
pub use service::{endpoint_slice, service};

/// The object cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} is not {expected}")]
pub struct ConvertError {
    /// Path of the field.
    pub field: String,
    /// What it says.
    pub value: String,
    /// What it should be.
    pub expected: &'static str,
}

fn wrong(field: impl Into<String>, value: impl ToString, expected: &'static str) -> ConvertError {
    ConvertError { field: field.into(), value: value.to_string(), expected }
}

/// `metadata.name`.
fn name(metadata: &ObjectMeta) -> Result<String, ConvertError> {
    match &metadata.name {
        Some(name) if !name.is_empty() => Ok(name.clone()),
        _ => Err(wrong("metadata.name", "", "a name")),
    }
}

/// `metadata.namespace`; files may leave it out as for kubectl.
fn namespace_of(metadata: &ObjectMeta) -> String {
    metadata.namespace.clone().filter(|namespace| !namespace.is_empty()).unwrap_or_else(|| "default".to_owned())
}

fn label<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.labels.as_ref()?.get(key).map(String::as_str)
}

/// An address. The API still holds IPv4 addresses with leading zeros, which mean decimal there.
fn address(field: impl Into<String>, text: &str) -> Result<IpAddr, ConvertError> {
    sloppy_address(text).ok_or_else(|| wrong(field, text, "an IP address"))
}

fn sloppy_address(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let octets: Vec<u8> = text
        .split('.')
        .map(|part| {
            let digits = (1..=3).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| part.parse().ok()).flatten()
        })
        .collect::<Option<_>>()?;
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?).into())
}

/// A prefix, host bits cleared.
fn prefix(field: impl Into<String>, text: &str) -> Result<IpNet, ConvertError> {
    let parsed = text.split_once('/').and_then(|(host, length)| {
        let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
        IpNet::new(sloppy_address(host)?, digits.then(|| length.parse().ok()).flatten()?).ok()
    });
    parsed.map(|net| net.trunc()).ok_or_else(|| wrong(field, text, "a prefix such as 10.0.0.0/8 or fd00::/8"))
}

/// A port number from 1 to 65535.
fn port(field: impl Into<String>, number: i32) -> Result<u16, ConvertError> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(wrong(field, number, "a port from 1 to 65535")),
    }
}

/// The three protocols that Kubernetes has.
enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// A protocol; TCP where none is named.
fn protocol(field: impl Into<String>, text: Option<&str>) -> Result<Protocol, ConvertError> {
    match text {
        None | Some("TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(wrong(field, other, "TCP, UDP or SCTP")),
    }
}

#[cfg(test)]
mod tests;
