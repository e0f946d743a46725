//! The objects of the bench: a Service for each side with a pod of that side, a node port of TCP and one of UDP; and any number of
//! Services beside them whose endpoints nobody asks.
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::site::{Side, Site};

/// The address of a side's Service.
pub(super) fn vip(side: Side) -> IpAddr {
    Ipv4Addr::new(10, 95, 0, if side == Side::Ours { 1 } else { 2 }).into()
}

/// The node port of a side's Service for TCP; that for UDP is the next one.
pub(super) const fn node_port(side: Side) -> u16 {
    match side {
        Side::Ours => 30_080,
        Side::Peer => 30_090,
    }
}

/// Nodes, the namespace, pods, and the Services of both sides.
pub(super) fn targets(site: &Site) -> Vec<Value> {
    let mut all = vec![json!({"kind": "Namespace", "metadata": {"name": "default"}})];
    for side in [Side::Ours, Side::Peer] {
        let node = site.node(side);
        all.push(json!({"kind": "Node", "metadata": {"name": node.name, "labels": {}},
            "spec": {"podCIDR": Site::cidr(side), "podCIDRs": [Site::cidr(side)]},
            "status": {"addresses": [{"type": "InternalIP", "address": node.v4.to_string()}]}}));
    }
    for name in ["client", "server"] {
        all.push(
            json!({"kind": "Pod", "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
            "spec": {"nodeName": site.node(Side::Ours).name, "containers": []}, "status": {"phase": "Pending"}}),
        );
    }
    all
}

/// A side's Service with the pod that serves it.
pub(super) fn target(side: Side, node: &str, server: &str) -> [Value; 2] {
    let (name, port) = (format!("target-{side:?}").to_lowercase(), node_port(side));
    let vip = vip(side).to_string();
    let service = json!({"kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"type": "NodePort", "clusterIP": vip, "clusterIPs": [vip], "ipFamilies": ["IPv4"],
            "internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Cluster", "sessionAffinity": "None",
            "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "tcp", "protocol": "TCP", "port": 80, "targetPort": 8080, "nodePort": port},
                {"name": "udp", "protocol": "UDP", "port": 80, "targetPort": 8080, "nodePort": port + 1}]},
        "status": {"loadBalancer": {}}});
    let slice = json!({"kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{name}-1"), "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"name": "tcp", "protocol": "TCP", "port": 8080}, {"name": "udp", "protocol": "UDP", "port": 8080}],
        "endpoints": [{"addresses": [server], "nodeName": node,
            "conditions": {"ready": true, "serving": true, "terminating": false}}]});
    [service, slice]
}

/// Services with `endpoints` each, that are not alike in anything, and their slices.
pub(super) fn fillers(numbers: Range<usize>, endpoints: usize) -> Vec<Value> {
    let services = numbers.clone().map(|number| {
        let vip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + number as u32).to_string();
        json!({"kind": "Service", "metadata": {"name": format!("filler-{number}"), "namespace": "default"},
            "spec": {"type": "ClusterIP", "clusterIP": vip, "clusterIPs": [vip], "ipFamilies": ["IPv4"],
                "internalTrafficPolicy": "Cluster", "sessionAffinity": "None", "ipFamilyPolicy": "SingleStack",
                "ports": [{"name": "p", "protocol": "TCP", "port": 80, "targetPort": 8080}]},
            "status": {"loadBalancer": {}}})
    });
    let slices = numbers.clone().map(|number| filler_slice(number, endpoints, 0));
    services.chain(slices).collect()
}

/// The slice of one of them; `shift` moves its last endpoint to another address. It says when it was changed: now.
pub(super) fn filler_slice(number: usize, endpoints: usize, shift: usize) -> Value {
    let base = u32::from(Ipv4Addr::new(10, 128, 0, 0));
    let address = |index: usize| {
        let moved = if index + 1 == endpoints { shift << 20 } else { 0 };
        Ipv4Addr::from(base + (number * endpoints + index + moved) as u32).to_string()
    };
    let endpoints: Vec<Value> = (0..endpoints)
        .map(|index| {
            json!({"addresses": [address(index)], "nodeName": format!("far-{}", number % 100), "zone": "zone-a",
                "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("filler-{number}-{index}")},
                "conditions": {"ready": true, "serving": true, "terminating": false}})
        })
        .collect();
    let name = format!("filler-{number}");
    json!({"kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{name}-1"), "namespace": "default", "labels": {"kubernetes.io/service-name": name},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": now()}},
        "ports": [{"name": "p", "protocol": "TCP", "port": 8080}], "endpoints": endpoints})
}

/// Now, in RFC 3339 with nanoseconds.
fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Howard Hinnant's days-to-civil, for dates after 1970.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", since.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn now_is_what_date_says() {
        let date = crate::sh::run(&["date", "-u", "+%Y-%m-%dT%H:%M"]).unwrap();
        let later = crate::sh::run(&["date", "-u", "+%Y-%m-%dT%H:%M"]).unwrap();
        let text = now();
        assert!(text.starts_with(date.trim()) || text.starts_with(later.trim()), "{text} is not {date}");
    }
}
