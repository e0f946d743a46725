use std::time::{Duration, SystemTime};

use keelway_policy::model as policy_model;
use keelway_proxy::model as proxy_model;
use serde::de::DeserializeOwned;

use super::*;

fn read<T: DeserializeOwned>(yaml: &str) -> T {
    serde_norway::from_str(yaml).unwrap()
}

#[test]
fn a_service_of_a_file_gets_the_api_servers_defaults() {
    let yaml = "
metadata: {name: web}
spec:
  clusterIP: 10.96.0.010
  sessionAffinity: ClientIP
  ports: [{port: 80}]
";
    let converted = service(&read(yaml)).unwrap();
    assert_eq!(converted.name, proxy_model::ObjectName::new("default", "web"));
    assert_eq!(converted.cluster_ips, ["10.96.0.10".parse::<IpAddr>().unwrap()]);
    assert_eq!(converted.affinity_seconds, Some(10_800));
    assert_eq!(converted.service_type, proxy_model::ServiceType::ClusterIp);
    let port =
        proxy_model::ServicePort { name: String::new(), protocol: proxy_model::Protocol::Tcp, port: 80, node_port: 0 };
    assert_eq!(converted.ports, [port]);
    assert!(converted.is_served());
}

#[test]
fn load_balancer_addresses_count_unless_their_mode_is_proxy() {
    let yaml = "
metadata: {name: web, namespace: ns, labels: {service.kubernetes.io/service-proxy-name: other}}
spec: {type: LoadBalancer, clusterIPs: [10.96.0.1, 'fd00::1'], externalTrafficPolicy: Local, ports: [{port: 53, protocol: UDP, nodePort: 30053}]}
status:
  loadBalancer:
    ingress: [{ip: 192.0.2.1}, {ip: 192.0.2.2, ipMode: Proxy}, {ip: 192.0.2.3, ipMode: VIP}, {hostname: lb.example}]
";
    let converted = service(&read(yaml)).unwrap();
    let expected: Vec<IpAddr> = vec!["192.0.2.1".parse().unwrap(), "192.0.2.3".parse().unwrap()];
    assert_eq!(converted.load_balancer_ips, expected);
    assert_eq!(converted.external_traffic_policy, proxy_model::TrafficPolicy::Local);
    assert_eq!(converted.ports[0].node_port, 30053);
    assert!(converted.other_proxy && !converted.is_served());
}

#[test]
fn parts_of_a_service_that_cannot_be_read_are_named_and_the_rest_holds() {
    let yaml = "
metadata: {name: web, annotations: {keelway.dev/load-balancing: ring}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  ports: [{port: 80}]
  externalTrafficPolicy: Local
  healthCheckNodePort: 32000
  loadBalancerSourceRanges: [' 203.0.113.9/24 ', nonsense, 'fd00::/8']
";
    let converted = service(&read(yaml)).unwrap();
    let ranges: Vec<IpNet> = vec!["203.0.113.0/24".parse().unwrap(), "fd00::/8".parse().unwrap()];
    assert_eq!(converted.source_ranges, Some(ranges));
    assert_eq!(converted.health_check_node_port, 32000);
    assert_eq!(converted.load_balancing, proxy_model::LoadBalancing::Random);
    let expected = [
        r#"spec.loadBalancerSourceRanges[]: "nonsense" is not a prefix such as 10.0.0.0/8 or fd00::/8"#,
        r#"metadata.annotations[keelway.dev/load-balancing]: "ring" is not random or maglev; random is in force"#,
    ];
    assert_eq!(converted.problems, expected);

    let only_nonsense = yaml.replace("' 203.0.113.9/24 ', nonsense, 'fd00::/8'", "nonsense").replace("ring", "maglev");
    let converted = service(&read(&only_nonsense)).unwrap();
    assert_eq!(converted.source_ranges, Some(vec![]), "nobody, rather than everybody");
    assert_eq!(converted.load_balancing, proxy_model::LoadBalancing::Maglev);
    let empty = yaml.replace("' 203.0.113.9/24 ', nonsense, 'fd00::/8'", "");
    assert_eq!(service(&read(&empty)).unwrap().source_ranges, None);
    let nothing = yaml.replace("' 203.0.113.9/24 ', nonsense, 'fd00::/8'", "'', ' '");
    assert_eq!(service(&read(&nothing)).unwrap().source_ranges, None, "a range of nothing is none");
}

#[test]
fn entries_that_cannot_be_used_are_left_out_and_the_object_changes_all_the_same() {
    let yaml = "
metadata: {name: web}
spec:
  type: NodePort
  clusterIPs: [10.96.0.1, 'fd00::1']
  externalIPs: ['', 198.51.100.1, 198.51.100.300]
  ports: [{name: a, port: 80, nodePort: 30080}, {name: b, port: 0}, {name: c, port: 81, nodePort: 70000}, {name: d, port: 82, protocol: ICMP}]
  healthCheckNodePort: -1
status: {loadBalancer: {ingress: [{ip: 192.0.2.1}, {ip: everywhere}]}}
";
    let converted = service(&read(yaml)).unwrap();
    let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect::<Vec<_>>();
    assert_eq!(converted.external_ips, addresses(&["198.51.100.1"]));
    assert_eq!(converted.load_balancer_ips, addresses(&["192.0.2.1"]));
    let ports: Vec<_> = converted.ports.iter().map(|port| (&*port.name, port.port, port.node_port)).collect();
    assert_eq!(ports, [("a", 80, 30080), ("c", 81, 0)]);
    assert_eq!(converted.health_check_node_port, 0);
    let fields: Vec<_> = converted.problems.iter().map(|problem| problem.split(": ").next().unwrap()).collect();
    let expected = [
        "spec.externalIPs[]",
        "spec.externalIPs[]",
        "status.loadBalancer.ingress[].ip",
        "spec.ports[].port",
        "spec.ports[].nodePort",
        "spec.ports[].protocol",
        "spec.healthCheckNodePort",
    ];
    assert_eq!(fields, expected);
    // Who the Service is, is no entry among others.
    let error = service(&read(&yaml.replace("fd00::1", "fd00::zz"))).unwrap_err();
    assert_eq!(error.field, "spec.clusterIPs[]");

    let endpoints = "[{addresses: [10.0.0.1, nonsense]}, {addresses: ['fd00::1']}, {addresses: [nonsense, 10.0.0.2]}, {addresses: []}]";
    let yaml = slice_yaml("", endpoints)
        .replace("[{port: 8080}", "[{port: 8080}, {name: zero, port: 0}, {name: n, port: 65536}");
    let (slice, _) = endpoint_slice(&read(&yaml)).unwrap().unwrap();
    assert_eq!(slice.ports.iter().map(|port| port.port).collect::<Vec<_>>(), [Some(8080), None]);
    let kept: Vec<_> = slice.endpoints.iter().map(|endpoint| endpoint.addresses.clone()).collect();
    assert_eq!(kept, [addresses(&["10.0.0.1"]), vec![]]);
    assert_eq!(slice.problems.len(), 5, "{:?}", slice.problems);
    assert_eq!(slice.problems[0], r#"ports[].port: "0" is not a port from 1 to 65535"#);

    // However many there are, what is said stays short.
    let many = slice_yaml("", &format!("[{}]", "{addresses: [x]}, ".repeat(100)));
    let (slice, _) = endpoint_slice(&read(&many)).unwrap().unwrap();
    assert_eq!((slice.problems.len(), slice.problems[8].as_str()), (9, "92 more"));
}

#[test]
fn headless_services_are_not_served() {
    let converted = service(&read("{metadata: {name: db}, spec: {clusterIP: None, clusterIPs: [None]}}")).unwrap();
    assert!(converted.cluster_ips.is_empty() && !converted.is_served());
    // The label is the slices' affair: a Service with an address is served all the same.
    let labelled = "{metadata: {name: db, labels: {service.kubernetes.io/headless: ''}}, spec: {clusterIP: 10.96.0.1}}";
    assert!(service(&read(labelled)).unwrap().is_served());
}

fn slice_yaml(extra_label: &str, endpoints: &str) -> String {
    format!(
        "
addressType: IPv4
metadata:
  name: web-1
  namespace: ns
  labels: {{kubernetes.io/service-name: web{extra_label}}}
  annotations: {{endpoints.kubernetes.io/last-change-trigger-time: '2026-01-02T03:04:05Z'}}
ports: [{{port: 8080}}, {{name: any, protocol: UDP}}]
endpoints: {endpoints}
"
    )
}

#[test]
fn absent_conditions_have_their_defaults() {
    let endpoints = "
- {addresses: [10.0.0.1]}
- {addresses: [10.0.0.2], conditions: {ready: false, terminating: true}}
- {addresses: [10.0.0.3], conditions: {ready: false, serving: true, terminating: true}, zone: z, nodeName: n, hints: {forZones: [{name: z}], forNodes: [{name: n}]}}
";
    let (slice, triggered) = endpoint_slice(&read(&slice_yaml("", endpoints))).unwrap().unwrap();
    let conditions: Vec<_> = slice.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating)).collect();
    assert_eq!(conditions, [(true, true, false), (false, true, true), (false, true, true)]);
    assert_eq!(slice.service, "web");
    assert_eq!((slice.ports[0].port, slice.ports[0].protocol), (Some(8080), proxy_model::Protocol::Tcp));
    assert_eq!((slice.ports[1].port, &*slice.ports[1].name), (None, "any"));
    assert_eq!(slice.endpoints[2].zone_hints, ["z"]);
    assert_eq!(slice.endpoints[2].node_hints, ["n"]);
    assert_eq!(triggered, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_323_045)));
}

#[test]
fn slices_that_no_proxy_reads_are_passed_over() {
    let headless = slice_yaml(", service.kubernetes.io/headless: ''", "[]");
    assert_eq!(endpoint_slice(&read(&headless)).unwrap(), None);
    // Whose a Service is, it says itself, as for kube-proxy.
    let another_proxys = slice_yaml(", service.kubernetes.io/service-proxy-name: x", "[]");
    assert!(endpoint_slice(&read(&another_proxys)).unwrap().is_some());
    let fqdn = slice_yaml("", "[{addresses: [a.example]}]").replace("IPv4", "FQDN");
    assert_eq!(endpoint_slice(&read(&fqdn)).unwrap(), None);
    let (wrong_family, _) = endpoint_slice(&read(&slice_yaml("", "[{addresses: ['fd00::1']}]"))).unwrap().unwrap();
    let problem = r#"endpoints[].addresses[]: "fd00::1" is not an address of the slice's addressType"#;
    assert_eq!((wrong_family.endpoints.len(), wrong_family.problems), (0, vec![problem.to_owned()]));
}

#[test]
fn nodes() {
    let yaml = "
metadata: {name: n1, labels: {topology.kubernetes.io/zone: a}}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, 'fd00:1::/64']}
status: {addresses: [{type: Hostname, address: n1}, {type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: 'fd00::1'}]}
";
    let converted = node(&read(yaml)).unwrap();
    assert_eq!(converted.pod_cidrs, ["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse::<IpNet>().unwrap()]);
    assert_eq!(converted.internal_addresses.len(), 2);
    assert!(converted.eligible);
    let only = node(&read("{metadata: {name: n}, spec: {podCIDR: 10.1.0.0/24}}")).unwrap();
    assert_eq!(only.pod_cidrs, ["10.1.0.0/24".parse::<IpNet>().unwrap()]);
    let taint = "{metadata: {name: n}, spec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}}";
    assert!(!node(&read(taint)).unwrap().eligible);
    let deleted = "{metadata: {name: n, deletionTimestamp: '2026-01-02T03:04:05Z'}}";
    assert!(!node(&read(deleted)).unwrap().eligible);
}

#[test]
fn terminated_pods_have_no_addresses() {
    let yaml = |phase: &str| {
        format!(
            "
metadata: {{name: p, uid: u, labels: {{app: a}}}}
spec:
  nodeName: n
  hostNetwork: true
  initContainers:
  - {{name: i, ports: [{{name: init, containerPort: 1}}]}}
  - {{name: s, restartPolicy: Always, ports: [{{name: side, containerPort: 2}}]}}
  containers: [{{name: c, ports: [{{name: web, containerPort: 80}}, {{containerPort: 81}}, {{name: dns, containerPort: 53, protocol: UDP}}]}}]
status: {{phase: {phase}, podIP: 10.0.0.1, podIPs: [{{ip: 10.0.0.1}}, {{ip: 'fd00::1'}}]}}
"
        )
    };
    let running = pod(&read(&yaml("Running"))).unwrap();
    assert_eq!(running.addresses.len(), 2);
    assert_eq!((&*running.uid, &*running.node_name, running.host_network), ("u", "n", true));
    let names: Vec<_> = running.named_ports.iter().map(|port| (port.name.as_str(), port.port)).collect();
    assert_eq!(names, [("dns", 53), ("side", 2), ("web", 80)]);
    for phase in ["Succeeded", "Failed"] {
        assert!(pod(&read(&yaml(phase))).unwrap().addresses.is_empty(), "{phase}");
    }
}

#[test]
fn namespaces_carry_their_name_as_a_label() {
    let converted = namespace(&read("{metadata: {name: prod, labels: {team: a}}}")).unwrap();
    assert_eq!(converted.labels["kubernetes.io/metadata.name"], "prod");
    assert_eq!(converted.labels["team"], "a");
}

fn directions_of(spec: &str) -> (Option<usize>, Option<usize>) {
    let converted =
        network_policy(&read(&format!("{{metadata: {{name: p}}, spec: {{podSelector: {{}}, {spec}}}}}"))).unwrap();
    (converted.ingress.map(|rules| rules.len()), converted.egress.map(|rules| rules.len()))
}

#[test]
fn absent_policy_types_mean_ingress_and_egress_where_there_are_rules() {
    assert_eq!(directions_of(""), (Some(0), None));
    assert_eq!(directions_of("egress: []"), (Some(0), None));
    assert_eq!(directions_of("egress: [{}]"), (Some(0), Some(1)));
    assert_eq!(directions_of("policyTypes: [Egress]"), (None, Some(0)));
    assert_eq!(directions_of("policyTypes: [Ingress], egress: [{}], ingress: [{}]"), (Some(1), None));
}

const POLICY: &str = "
metadata: {name: p, namespace: ns}
spec:
  podSelector: {matchLabels: {app: a}, matchExpressions: [{key: tier, operator: NotIn, values: [x, y]}]}
  ingress:
  - from:
    - podSelector: {}
    - namespaceSelector: {matchExpressions: [{key: k, operator: Exists}]}
    - ipBlock: {cidr: 10.1.2.3/8, except: [10.2.0.0/16]}
    ports: [{port: 80}, {port: 1000, endPort: 2000, protocol: UDP}, {port: web}, {protocol: SCTP}]
";

#[test]
fn policies() {
    use policy_model::{Operator, Peer, PolicyPort, PortMatch, Protocol, Requirement, Selector};
    let converted = network_policy(&read(POLICY)).unwrap();
    let requirement = |key: &str, operator| Requirement { key: key.to_owned(), operator };
    let expected = Selector {
        requirements: vec![
            requirement("app", Operator::In(vec!["a".to_owned()])),
            requirement("tier", Operator::NotIn(vec!["x".to_owned(), "y".to_owned()])),
        ],
    };
    assert_eq!(converted.pods, expected);
    let rule = &converted.ingress.unwrap()[0];
    let exists = Selector { requirements: vec![requirement("k", Operator::Exists)] };
    let block = Peer::IpBlock { cidr: "10.0.0.0/8".parse().unwrap(), except: vec!["10.2.0.0/16".parse().unwrap()] };
    let own = Peer::Pods { namespaces: None, pods: Some(Selector::default()) };
    assert_eq!(rule.peers, [own, Peer::Pods { namespaces: Some(exists), pods: None }, block]);
    let port = |protocol, port| PolicyPort { protocol, port };
    let expected = [
        port(Protocol::Tcp, PortMatch::Range(80, 80)),
        port(Protocol::Udp, PortMatch::Range(1000, 2000)),
        port(Protocol::Tcp, PortMatch::Named("web".to_owned())),
        port(Protocol::Sctp, PortMatch::Any),
    ];
    assert_eq!(rule.ports, expected);
}

#[test]
fn a_policy_that_cannot_be_understood_is_named_and_denies() {
    for (from, to, error) in [
        ("operator: Exists", "operator: Gt", "spec.ingress[].from[].namespaceSelector.matchExpressions[].operator"),
        ("except: [10.2.0.0/16]", "except: [11.0.0.0/16]", "spec.ingress[].from[].ipBlock.except[]"),
        ("endPort: 2000", "endPort: 20", "spec.ingress[].ports[].endPort"),
        ("{port: web}", "{port: 0}", "spec.ingress[].ports[].port"),
        ("podSelector: {}", "{}", "spec.ingress[].from[]"),
    ] {
        let text = POLICY.replace(from, to).replace("- {}\n", "- {podSelector: null}\n");
        let policy = read(&text);
        assert_eq!(network_policy(&policy).unwrap_err().field, error);
        let denied = deny_all(&policy).unwrap();
        assert_eq!((denied.ingress, denied.egress), (Some(vec![]), None));
        assert_eq!(denied.pods.requirements.len(), 2);
    }
    let selector = POLICY.replace("NotIn", "Near");
    let denied = deny_all(&read(&selector)).unwrap();
    assert!(denied.pods.requirements.is_empty(), "a selector that cannot be read selects all pods of the namespace");
}

#[test]
fn a_static_pod_has_the_uid_that_runtimes_are_told() {
    let yaml = "
metadata:
  name: etcd-node1
  uid: 7a5a1f0e-0000-4000-8000-000000000001
  annotations:
    kubernetes.io/config.hash: 0123456789abcdef0123456789abcdef
    kubernetes.io/config.mirror: 0123456789abcdef0123456789abcdef
    kubernetes.io/config.source: file
spec: {nodeName: node1, containers: []}
";
    assert_eq!(pod(&read(yaml)).unwrap().uid, "0123456789abcdef0123456789abcdef");
    let ordinary = yaml.replace("config.mirror", "config.other");
    assert_eq!(pod(&read(&ordinary)).unwrap().uid, "7a5a1f0e-0000-4000-8000-000000000001");
}
