//! NetworkPolicies.

use k8s_openapi::api::networking::v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use keelway_policy::model;

use super::{ConvertError, Protocol, name, namespace_of, port, prefix, protocol, wrong};

/// A NetworkPolicy.
///
/// # Errors
/// The first field that cannot be used.
pub fn network_policy(policy: &v1::NetworkPolicy) -> Result<model::NetworkPolicy, ConvertError> {
    let empty = v1::NetworkPolicySpec::default();
    let spec = policy.spec.as_ref().unwrap_or(&empty);
    let (ingress, egress) = directions(spec)?;
    let ingress_rules =
        spec.ingress.iter().flatten().map(|entry| {
            rule("spec.ingress[]", "from", entry.from.as_deref().unwrap_or_default(), entry.ports.as_deref())
        });
    let egress_rules = spec
        .egress
        .iter()
        .flatten()
        .map(|entry| rule("spec.egress[]", "to", entry.to.as_deref().unwrap_or_default(), entry.ports.as_deref()));
    // Rules of a direction that the policy does not govern are checked all the same.
    let (ingress_rules, egress_rules) =
        (ingress_rules.collect::<Result<Vec<_>, _>>()?, egress_rules.collect::<Result<Vec<_>, _>>()?);
    Ok(model::NetworkPolicy {
        name: object_name(&policy.metadata)?,
        pods: spec
            .pod_selector
            .as_ref()
            .map(|labels| selector("spec.podSelector", labels))
            .transpose()?
            .unwrap_or_default(),
        ingress: ingress.then_some(ingress_rules),
        egress: egress.then_some(egress_rules),
    })
}

/// What stands for a policy that cannot be understood: it selects what it can be seen to select, else its whole namespace,
/// and allows nothing. `None` without a name to report it under.
pub fn deny_all(policy: &v1::NetworkPolicy) -> Option<model::NetworkPolicy> {
    let pods = policy.spec.as_ref().and_then(|spec| spec.pod_selector.as_ref());
    let pods = pods.and_then(|labels| selector("spec.podSelector", labels).ok()).unwrap_or_default();
    let governed = policy.spec.as_ref().map_or(Ok((true, true)), directions);
    let (ingress, egress) = governed.unwrap_or((true, true));
    Some(model::NetworkPolicy {
        name: object_name(&policy.metadata).ok()?,
        pods,
        ingress: ingress.then(Vec::new),
        egress: egress.then(Vec::new),
    })
}

fn object_name(metadata: &ObjectMeta) -> Result<model::ObjectName, ConvertError> {
    Ok(model::ObjectName::new(namespace_of(metadata), name(metadata)?))
}

/// Whether the policy governs ingress and egress. Without `policyTypes`: ingress always, egress where there are rules.
fn directions(spec: &v1::NetworkPolicySpec) -> Result<(bool, bool), ConvertError> {
    let types = spec.policy_types.as_deref().unwrap_or_default();
    if types.is_empty() {
        return Ok((true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty())));
    }
    if let Some(other) = types.iter().find(|text| !matches!(text.as_str(), "Ingress" | "Egress")) {
        return Err(wrong("spec.policyTypes[]", other, "Ingress or Egress"));
    }
    let has = |direction: &str| types.iter().any(|text| text == direction);
    Ok((has("Ingress"), has("Egress")))
}

fn rule(
    field: &str,
    peers_field: &str,
    peers: &[v1::NetworkPolicyPeer],
    ports: Option<&[v1::NetworkPolicyPort]>,
) -> Result<model::Rule, ConvertError> {
    let peers_field = format!("{field}.{peers_field}[]");
    let ports_field = format!("{field}.ports[]");
    Ok(model::Rule {
        peers: peers.iter().map(|entry| peer(&peers_field, entry)).collect::<Result<_, _>>()?,
        ports: ports
            .unwrap_or_default()
            .iter()
            .map(|entry| policy_port(&ports_field, entry))
            .collect::<Result<_, _>>()?,
    })
}

fn peer(field: &str, peer: &v1::NetworkPolicyPeer) -> Result<model::Peer, ConvertError> {
    match (&peer.ip_block, &peer.namespace_selector, &peer.pod_selector) {
        (Some(block), None, None) => ip_block(field, block),
        (Some(_), _, _) => Err(wrong(field, "ipBlock with a selector", "either an ipBlock or selectors")),
        (None, None, None) => Err(wrong(field, "", "an ipBlock, a namespaceSelector or a podSelector")),
        (None, namespaces, pods) => {
            let one = |name: &str, labels: &Option<LabelSelector>| {
                labels.as_ref().map(|labels| selector(&format!("{field}.{name}"), labels)).transpose()
            };
            Ok(model::Peer::Pods { namespaces: one("namespaceSelector", namespaces)?, pods: one("podSelector", pods)? })
        }
    }
}

fn ip_block(field: &str, block: &v1::IPBlock) -> Result<model::Peer, ConvertError> {
    let cidr = prefix(format!("{field}.ipBlock.cidr"), &block.cidr)?;
    let one = |text: &String| {
        let field = format!("{field}.ipBlock.except[]");
        match prefix(field.as_str(), text) {
            Ok(except) if !cidr.contains(&except) => Err(wrong(field, text, "a prefix within the block's cidr")),
            parsed => parsed,
        }
    };
    let except = block.except.iter().flatten().map(one).collect::<Result<_, _>>()?;
    Ok(model::Peer::IpBlock { cidr, except })
}

fn policy_port(field: &str, entry: &v1::NetworkPolicyPort) -> Result<model::PolicyPort, ConvertError> {
    let protocol = match protocol(format!("{field}.protocol"), entry.protocol.as_deref())? {
        Protocol::Tcp => model::Protocol::Tcp,
        Protocol::Udp => model::Protocol::Udp,
        Protocol::Sctp => model::Protocol::Sctp,
    };
    let end_field = || format!("{field}.endPort");
    let matched = match (&entry.port, entry.end_port) {
        (None, None) => model::PortMatch::Any,
        (Some(IntOrString::Int(first)), last) => {
            let first = port(format!("{field}.port"), *first)?;
            match last.map(|last| port(end_field(), last)).transpose()? {
                Some(last) if last < first => return Err(wrong(end_field(), last, "a port not below port")),
                last => model::PortMatch::Range(first, last.unwrap_or(first)),
            }
        }
        (Some(IntOrString::String(name)), None) if !name.is_empty() => model::PortMatch::Named(name.clone()),
        (Some(IntOrString::String(name)), None) => {
            return Err(wrong(format!("{field}.port"), name, "a port or its name"));
        }
        (_, Some(last)) => return Err(wrong(end_field(), last, "used with a port number")),
    };
    Ok(model::PolicyPort { protocol, port: matched })
}

fn selector(field: &str, labels: &LabelSelector) -> Result<model::Selector, ConvertError> {
    let exact = labels.match_labels.iter().flatten().map(|(key, value)| {
        Ok(model::Requirement { key: key.clone(), operator: model::Operator::In(vec![value.clone()]) })
    });
    let expressions = labels.match_expressions.iter().flatten().map(|entry| requirement(field, entry));
    Ok(model::Selector { requirements: exact.chain(expressions).collect::<Result<_, _>>()? })
}

fn requirement(field: &str, entry: &LabelSelectorRequirement) -> Result<model::Requirement, ConvertError> {
    let values = entry.values.clone().unwrap_or_default();
    let operator = match (entry.operator.as_str(), values.is_empty()) {
        ("In", false) => model::Operator::In(values),
        ("NotIn", false) => model::Operator::NotIn(values),
        ("Exists", true) => model::Operator::Exists,
        ("DoesNotExist", true) => model::Operator::DoesNotExist,
        ("In" | "NotIn", true) => {
            return Err(wrong(format!("{field}.matchExpressions[].values"), "", "a list of values for In and NotIn"));
        }
        ("Exists" | "DoesNotExist", false) => {
            let values = values.join(",");
            return Err(wrong(
                format!("{field}.matchExpressions[].values"),
                values,
                "empty for Exists and DoesNotExist",
            ));
        }
        (other, _) => {
            return Err(wrong(
                format!("{field}.matchExpressions[].operator"),
                other,
                "In, NotIn, Exists or DoesNotExist",
            ));
        }
    };
    Ok(model::Requirement { key: entry.key.clone(), operator })
}
