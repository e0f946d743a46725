//! Results, in the shape of each version.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::Version;

/// An interface of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Hardware address; may be empty.
    pub mac: String,
    /// In bytes; written from 1.1.0 on.
    pub mtu: Option<u32>,
    /// The namespace's path; `None` for the host's.
    pub sandbox: Option<String>,
}

/// An address of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpConfig {
    /// With its prefix length.
    pub address: IpNet,
    /// Of the same family.
    pub gateway: Option<IpAddr>,
    /// Index into the result's interfaces.
    pub interface: Option<usize>,
}

/// A route of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteConfig {
    /// Destination.
    pub to: IpNet,
    /// Gateway.
    pub via: Option<IpAddr>,
}

/// What ADD did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Interfaces.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub ips: Vec<IpConfig>,
    /// Routes.
    pub routes: Vec<RouteConfig>,
}

/// An earlier result: read where it matters to us, and kept whole for what we hand on.
#[derive(Clone, Debug, PartialEq)]
pub struct PrevResult {
    /// As it came.
    pub raw: Map<String, Value>,
    /// Its interfaces' names, with their sandbox.
    pub interfaces: Vec<(String, Option<String>)>,
    /// Its addresses, with the index of their interface.
    pub ips: Vec<(IpNet, Option<usize>)>,
}

impl PrevResult {
    /// Reads it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(value: &Value) -> Result<Self, String> {
        let raw = value.as_object().ok_or("expected an object")?.clone();
        if let Some(own) = raw.get("cniVersion").filter(|v| !v.is_null()) {
            own.as_str().and_then(Version::parse).ok_or(format!("cniVersion {own} is not spoken"))?;
        }
        let list = |key: &str| match raw.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(entries)) => Ok(entries.clone()),
            Some(other) => Err(format!("{key} {other}: expected a list")),
        };
        let interfaces = list("interfaces")?.into_iter().map(|entry| {
            let name =
                entry.get("name").and_then(Value::as_str).ok_or(format!("interface {entry}: expected a name"))?;
            let sandbox = entry.get("sandbox").and_then(Value::as_str).filter(|s| !s.is_empty());
            Ok((name.to_owned(), sandbox.map(str::to_owned)))
        });
        let ips = list("ips")?.into_iter().map(|entry| {
            let text =
                entry.get("address").and_then(Value::as_str).ok_or(format!("ip {entry}: expected an address"))?;
            let address = text.parse().map_err(|_| format!("address {text:?}: expected address/length"))?;
            let index = entry.get("interface").and_then(Value::as_u64).and_then(|i| usize::try_from(i).ok());
            Ok((address, index))
        });
        let interfaces = interfaces.collect::<Result<_, String>>()?;
        let ips = ips.collect::<Result<_, String>>()?;
        Ok(Self { raw, interfaces, ips })
    }

    /// The addresses of the container's interface `ifname`.
    #[must_use]
    pub fn addresses_of(&self, ifname: &str) -> Vec<IpNet> {
        let is_it = |index: usize| self.interfaces.get(index).is_some_and(|(name, sb)| name == ifname && sb.is_some());
        self.ips.iter().filter(|(_, index)| index.is_some_and(is_it)).map(|(address, _)| *address).collect()
    }
}

/// The object for stdout. With `prev`, that of a plugin before us in the list, ours is added to it.
#[must_use]
pub fn render(outcome: &Outcome, version: Version, prev: Option<&PrevResult>) -> String {
    let mut object = prev.map(|p| p.raw.clone()).unwrap_or_default();
    let offset = prev.map_or(0, |p| p.interfaces.len());
    let interfaces = outcome.interfaces.iter().map(|i| interface(i, version));
    let ips = outcome.ips.iter().map(|ip| address(ip, version, offset));
    let routes = outcome.routes.iter().map(route);
    extend(&mut object, "interfaces", interfaces);
    extend(&mut object, "ips", ips);
    extend(&mut object, "routes", routes);
    object.insert("cniVersion".into(), version.as_str().into());
    if version < Version::V1_0_0 {
        // It became optional in 1.0.0.
        object.entry("dns").or_insert_with(|| json!({}));
    }
    Value::Object(object).to_string()
}

/// The answer to VERSION, in the version that was asked in.
#[must_use]
pub fn version_answer(asked: &str) -> String {
    json!({ "cniVersion": asked, "supportedVersions": Version::ALL.map(Version::as_str) }).to_string()
}

fn extend(object: &mut Map<String, Value>, key: &str, new: impl Iterator<Item = Value>) {
    let list = object.entry(key).or_insert(Value::Null);
    let mut entries = list.as_array().cloned().unwrap_or_default();
    entries.extend(new);
    *list = Value::Array(entries);
}

fn interface(interface: &Interface, version: Version) -> Value {
    let mut object = json!({ "name": interface.name, "mac": interface.mac });
    if let Some(mtu) = interface.mtu.filter(|_| version >= Version::V1_1_0) {
        object["mtu"] = mtu.into();
    }
    if let Some(sandbox) = &interface.sandbox {
        object["sandbox"] = sandbox.clone().into();
    }
    object
}

fn address(ip: &IpConfig, version: Version, offset: usize) -> Value {
    let mut object = json!({ "address": ip.address.to_string() });
    if version < Version::V1_0_0 {
        object["version"] = if ip.address.addr().is_ipv4() { "4" } else { "6" }.into();
    }
    if let Some(gateway) = ip.gateway {
        object["gateway"] = gateway.to_string().into();
    }
    if let Some(index) = ip.interface {
        object["interface"] = (index + offset).into();
    }
    object
}

fn route(route: &RouteConfig) -> Value {
    let mut object = json!({ "dst": route.to.to_string() });
    if let Some(via) = route.via {
        object["gw"] = via.to_string().into();
    }
    object
}
