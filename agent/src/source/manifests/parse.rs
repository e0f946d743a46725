//! One file's text, turned into objects or into an error that names the document and the field.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_norway::Value;

use crate::source::convert::{self, ConvertError};
use crate::source::{Kind, Object, ObjectRef, Times};

/// A file's text cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("document {document}: {reason}")]
pub struct ParseError {
    /// Counted from 1.
    pub document: usize,
    /// Where in it (an object, an item of a List) and what.
    pub reason: String,
}

/// Documents larger than this are refused: a directory of manifests holds no such thing.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// The objects in `text`, which may hold several documents, each an object or a List of objects. `None` stands for an
/// object that is understood but not ours to look at.
///
/// # Errors
/// The first document that is no YAML, holds an unknown kind or field, a field with a value that cannot be used, or an
/// object a second time.
pub fn parse(text: &str) -> Result<BTreeMap<ObjectRef, Object>, ParseError> {
    let mut objects = BTreeMap::new();
    for (index, document) in serde_norway::Deserializer::from_str(text).enumerate() {
        let fail = |reason: String| ParseError { document: index + 1, reason };
        let value = Value::deserialize(document).map_err(|error| fail(error.to_string()))?;
        let mut found = Vec::new();
        collect(value, "", &mut found).map_err(fail)?;
        for (reference, object) in found {
            let shown = reference.to_string();
            if objects.insert(reference, object).is_some() {
                return Err(fail(format!("{shown}: is in this file twice")));
            }
        }
    }
    Ok(objects.into_iter().filter_map(|(reference, object)| Some((reference, object?))).collect())
}

/// Adds the object of `value` to `found`, or the items where it is a List. `place` leads to it, for errors.
fn collect(value: Value, place: &str, found: &mut Vec<(ObjectRef, Option<Object>)>) -> Result<(), String> {
    if value.is_null() {
        return Ok(());
    }
    let text_of = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (version, kind) = (text_of("apiVersion"), text_of("kind"));
    if version == "v1" && kind == "List" {
        let Value::Mapping(mut list) = value else { return Ok(()) };
        let items = match list.remove("items") {
            Some(Value::Sequence(items)) => items,
            None | Some(Value::Null) => Vec::new(),
            Some(_) => return Err(format!("{place}items: expected a list")),
        };
        let mut items = items.into_iter().enumerate();
        return items.try_for_each(|(index, item)| collect(item, &format!("{place}items[{index}]."), found));
    }
    let one = match (version.as_str(), kind.as_str()) {
        ("v1", "Node") => typed(value, Kind::Node, place, |node| convert::node(node).map(Object::Node).map(Some)),
        ("networking.k8s.io/v1", "ServiceCIDR") => typed(value, Kind::ServiceCidr, place, |range| {
            convert::service_cidr(range).map(Object::ServiceCidr).map(Some)
        }),
        ("v1", "Namespace") => typed(value, Kind::Namespace, place, |namespace| {
            convert::namespace(namespace).map(Object::Namespace).map(Some)
        }),
        ("v1", "Service") => {
            typed(value, Kind::Service, place, |service| convert::service(service).map(Object::Service).map(Some))
        }
        ("v1", "Pod") => typed(value, Kind::Pod, place, |pod| convert::pod(pod).map(Object::Pod).map(Some)),
        ("discovery.k8s.io/v1", "EndpointSlice") => typed(value, Kind::EndpointSlice, place, |slice| {
            Ok(convert::endpoint_slice(slice)?
                .map(|(slice, happened)| Object::EndpointSlice(slice, Times::now(happened))))
        }),
        ("networking.k8s.io/v1", "NetworkPolicy") => typed(value, Kind::NetworkPolicy, place, |policy| {
            Ok(Some(Object::NetworkPolicy(convert::network_policy(policy)?, String::new())))
        }),
        _ => Err(format!(
            "{place}kind: {kind:?} of apiVersion {version:?} is not one of v1 Node, Namespace, Service, Pod or List, \
             discovery.k8s.io/v1 EndpointSlice, networking.k8s.io/v1 NetworkPolicy or ServiceCIDR"
        )),
    };
    found.push(one?);
    Ok(())
}

/// Decodes, refusing unknown fields, and converts.
fn typed<K>(
    value: Value,
    kind: Kind,
    place: &str,
    convert: impl FnOnce(&K) -> Result<Option<Object>, ConvertError>,
) -> Result<(ObjectRef, Option<Object>), String>
where
    K: DeserializeOwned + k8s_openapi::Metadata<Ty = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta>,
{
    let metadata = value.get("metadata").cloned().unwrap_or_default();
    let named = |key: &str| metadata.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let namespace = match (kind.is_cluster_scoped(), named("namespace")) {
        (true, _) => String::new(),
        (false, namespace) if namespace.is_empty() => "default".to_owned(),
        (false, namespace) => namespace,
    };
    let reference = ObjectRef { kind, namespace, name: named("name") };
    let mut unknown = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let decoded: Result<K, _> = {
        let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
        K::deserialize(serde_ignored::Deserializer::new(tracked, &mut |path| unknown.push(path.to_string())))
    };
    let object = decoded.map_err(|error| format!("{place}{reference}: {}: {error}", track.path()))?;
    if let Some(path) = unknown.first() {
        return Err(format!("{place}{reference}: {}: unknown field", path.replace(".?", "")));
    }
    let object = convert(&object).map_err(|error| format!("{place}{reference}: {error}"))?;
    Ok((reference, object))
}
