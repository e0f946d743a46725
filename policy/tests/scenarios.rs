//! Histories in words: what is written, in which order, when one thing changes; and the verdicts of the reference.

use std::net::IpAddr;

use keelway_policy::model::{
    Endpoint, Labels, NamedPort, Namespace, NetworkPolicy, Node, ObjectName, Operator, Peer, Pod, PolicyPort,
    PortMatch, Protocol, Requirement, Rule, Selector,
};
use keelway_policy::reference::{Flow, Objects, Reason, Verdict, allows};
use keelway_policy::{Config, Decision, Direction, Limits, Model, Op, PolicyError, Scope, Simulated, Table, identity};

const CONFIG: Config = Config { limits: Limits { identities: 100, rules: 100, cidrs: 100 }, implied_namespaces: false };
const TCP: u8 = 6;

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn namespace(name: &str) -> Namespace {
    Namespace { name: name.into(), labels: labels(&[("kubernetes.io/metadata.name", name)]) }
}

fn pod(name: &str, app: &str, addresses: &[&str]) -> Pod {
    Pod {
        name: ObjectName::new("x", name),
        uid: format!("uid-{name}"),
        labels: labels(&[("app", app)]),
        addresses: addresses.iter().map(|a| addr(a)).collect(),
        host_network: false,
        node_name: "n1".into(),
        named_ports: Vec::new(),
    }
}

fn app(value: &str) -> Selector {
    let requirement = Requirement { key: "app".into(), operator: Operator::In(vec![value.into()]) };
    Selector { requirements: vec![requirement] }
}

fn from_app(value: &str) -> Peer {
    Peer::Pods { namespaces: None, pods: Some(app(value)) }
}

fn port(port: u16) -> PolicyPort {
    PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Range(port, port) }
}

fn policy(name: &str, of: &str, ingress: Option<Vec<Rule>>, egress: Option<Vec<Rule>>) -> NetworkPolicy {
    NetworkPolicy { name: ObjectName::new("x", name), pods: app(of), ingress, egress }
}

fn rule(peers: Vec<Peer>, ports: Vec<PolicyPort>) -> Rule {
    Rule { peers, ports }
}

fn endpoint(name: &str, addresses: &[&str]) -> Endpoint {
    let addresses = addresses.iter().map(|a| addr(a)).collect();
    Endpoint { pod: ObjectName::new("x", name), uid: format!("uid-{name}"), addresses }
}

fn node(name: &str, is_local: bool, address: &str, cidr: &str) -> Node {
    Node { name: name.into(), is_local, addresses: vec![addr(address)], pod_cidrs: vec![cidr.parse().unwrap()] }
}

struct Agent {
    model: Model,
    kernel: Simulated,
}

impl Agent {
    /// A node with a web pod as endpoint, and a client pod on another node.
    fn new(config: Config) -> Self {
        let mut agent = Self { model: Model::new(config), kernel: Simulated::default() };
        agent.model.upsert_namespace(namespace("x"));
        agent.model.upsert_node(node("n1", true, "192.168.0.1", "10.244.1.0/24"));
        agent.model.upsert_node(node("n2", false, "192.168.0.2", "10.244.2.0/24"));
        agent.model.upsert_pod(pod("web", "web", &[]));
        agent.model.upsert_endpoint(endpoint("web", &["10.244.1.2"]));
        agent.model.upsert_pod(pod("client", "client", &["10.244.2.2"]));
        agent.flush();
        agent
    }

    fn flush(&mut self) -> Vec<Op> {
        let changes = self.model.take_changes();
        assert_eq!(changes.errors, []);
        changes.ops.iter().for_each(|op| self.kernel.execute(op));
        changes.ops
    }

    fn ingress(&self, from: &str, port: u16) -> bool {
        self.kernel.decide("uid-web", Direction::Ingress, addr(from), TCP, port).unwrap().passes()
    }
}

fn kinds(ops: &[Op]) -> Vec<&'static str> {
    let kind = |op: &Op| match op {
        Op::PutRule { .. } => "rule",
        Op::PutCidr { .. } => "cidr",
        Op::PutIdentity { .. } => "identity",
        Op::PutEndpoint(_) => "endpoint",
        Op::DeleteEndpoint { .. } => "-endpoint",
        Op::DeleteIdentity { .. } => "-identity",
        Op::DeleteCidr { .. } => "-cidr",
        Op::DeleteRule { .. } => "-rule",
        Op::Bump(Scope::All) => "bump all",
        Op::Bump(Scope::Subject(_)) => "bump",
    };
    ops.iter().map(kind).collect()
}

#[test]
fn a_policy_comes_before_its_enforcement_and_goes_after() {
    let mut agent = Agent::new(CONFIG);
    assert!(agent.ingress("10.244.2.2", 80) && agent.ingress("203.0.113.1", 80), "nothing isolates it yet");

    let allow = policy("allow", "web", Some(vec![rule(vec![from_app("client")], vec![port(80)])]), None);
    agent.model.upsert_policy(allow.clone());
    assert_eq!(kinds(&agent.flush()), ["rule", "endpoint", "bump"]);
    assert!(agent.ingress("10.244.2.2", 80));
    assert!(!agent.ingress("10.244.2.2", 81));
    assert!(!agent.ingress("203.0.113.1", 80));
    assert!(agent.ingress("192.168.0.1", 81), "its own node always reaches it");
    assert!(!agent.ingress("192.168.0.2", 80), "another node does not");

    let why = agent.model.explain("uid-web", Direction::Ingress, addr("10.244.2.2"), TCP, 80).unwrap();
    assert_eq!(why.rule.unwrap().to_string(), "x/allow ingress[0]");
    assert_eq!(why.peer_name, "x;kubernetes.io/metadata.name=x;app=client;");
    let why = agent.model.explain("uid-web", Direction::Ingress, addr("10.244.2.9"), TCP, 80).unwrap();
    assert_eq!((why.peer_name.as_str(), why.decision), ("unknown-pod", Decision::Denied));
    assert_eq!(why.isolated_by.first(), Some(&allow.name));

    agent.model.delete_policy(&allow.name);
    assert_eq!(kinds(&agent.flush()), ["endpoint", "-rule", "bump"]);
    assert!(agent.kernel.rules.is_empty());
}

#[test]
fn a_pod_event_writes_what_it_changes() {
    let mut agent = Agent::new(CONFIG);
    agent.model.upsert_policy(policy("p", "web", Some(vec![rule(vec![from_app("client")], vec![])]), None));
    agent.flush();

    agent.model.upsert_pod(pod("client2", "client", &["10.244.2.3"]));
    assert_eq!(kinds(&agent.flush()), ["identity"], "labels that are known");
    agent.model.upsert_pod(pod("other", "other", &["10.244.2.4"]));
    assert_eq!(kinds(&agent.flush()), ["identity"], "labels that no rule names");
    assert!(agent.ingress("10.244.2.3", 80) && !agent.ingress("10.244.2.4", 80));

    // Its rules are there before its address leads to them, and the old identity's flows are judged again.
    agent
        .model
        .upsert_pod(Pod { labels: labels(&[("app", "client"), ("v", "2")]), ..pod("other", "", &["10.244.2.4"]) });
    assert_eq!(kinds(&agent.flush()), ["rule", "identity", "bump all"]);
    assert!(agent.ingress("10.244.2.4", 80));

    agent.model.delete_pod(&ObjectName::new("x", "other"));
    assert_eq!(kinds(&agent.flush()), ["-identity", "-rule", "bump all"]);
    assert!(!agent.ingress("10.244.2.4", 80));

    agent.model.upsert_pod(pod("client2", "client", &["10.244.2.3"]));
    assert!(agent.flush().is_empty(), "an event without a change");
    agent.model.upsert_pod(pod("client2", "x", &["10.244.2.3"]));
    agent.model.upsert_pod(pod("client2", "client", &["10.244.2.3"]));
    assert!(agent.flush().is_empty(), "there and back between two writes");
}

#[test]
fn an_endpoint_without_its_pod_lets_nothing_pass() {
    let mut agent = Agent::new(CONFIG);
    let knows = |agent: &Agent, name: &str| agent.model.knows(&ObjectName::new("x", name), &format!("uid-{name}"));
    assert!(knows(&agent, "web") && !knows(&agent, "new"));
    agent.model.upsert_endpoint(endpoint("new", &["10.244.1.3"]));
    agent.flush();
    let decide = |agent: &Agent| agent.kernel.decide("uid-new", Direction::Egress, addr("203.0.113.1"), TCP, 80);
    assert_eq!(decide(&agent), Some(Decision::Denied));
    assert_eq!(agent.kernel.identity(addr("10.244.1.3")), identity::UNKNOWN_POD);

    // The pod of that name, but another one.
    agent.model.upsert_pod(Pod { uid: "uid-old".into(), ..pod("new", "web", &[]) });
    agent.flush();
    assert_eq!(decide(&agent), Some(Decision::Denied));
    agent.model.upsert_pod(pod("new", "web", &[]));
    agent.flush();
    assert_eq!(decide(&agent), Some(Decision::NotIsolated));
    assert_eq!(agent.kernel.identity(addr("10.244.1.3")), agent.kernel.identity(addr("10.244.1.2")));

    // A pod whose namespace is not known is no better.
    agent.model.delete_namespace("x");
    agent.flush();
    assert!(!knows(&agent, "new"));
    assert_eq!(decide(&agent), Some(Decision::Denied));
    let mut implied = Agent::new(Config { implied_namespaces: true, ..CONFIG });
    implied.model.delete_namespace("x");
    assert!(implied.flush().is_empty(), "unless namespaces are implied: then it has that one label");
    assert!(knows(&implied, "web"));
}

#[test]
fn an_address_with_two_claims_is_nobody_until_one_goes() {
    let mut agent = Agent::new(CONFIG);
    agent.model.upsert_policy(policy("p", "web", Some(vec![rule(vec![from_app("client")], vec![])]), None));
    agent.model.upsert_pod(pod("late", "other", &["10.244.2.2"]));
    agent.flush();
    assert_eq!(agent.kernel.identity(addr("10.244.2.2")), identity::UNKNOWN_POD);
    assert!(!agent.ingress("10.244.2.2", 80));
    agent.model.delete_pod(&ObjectName::new("x", "late"));
    agent.flush();
    assert!(agent.ingress("10.244.2.2", 80));

    // The lease of a local endpoint outweighs what the API says, and a node's own address outweighs both.
    agent.model.upsert_pod(pod("ghost", "client", &["10.244.1.2", "192.168.0.2"]));
    agent.flush();
    let web = agent.kernel.endpoints["uid-web"].subject;
    assert_eq!(agent.kernel.identity(addr("10.244.1.2")), web);
    assert_eq!(agent.kernel.identity(addr("192.168.0.2")), identity::REMOTE_NODE);
    assert_eq!(agent.kernel.identity(addr("192.168.0.1")), identity::HOST);
    assert_eq!(agent.kernel.identity(addr("203.0.113.1")), identity::WORLD);
}

#[test]
fn named_ports_are_those_of_the_receiver() {
    let mut agent = Agent::new(CONFIG);
    let named = |port| vec![NamedPort { name: "http".into(), protocol: Protocol::Tcp, port }];
    agent.model.upsert_pod(Pod { named_ports: named(8080), ..pod("web", "web", &[]) });
    agent.model.upsert_pod(Pod { named_ports: named(9090), ..pod("client", "client", &["10.244.2.2"]) });
    let http = PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Named("http".into()) };
    let rules = Some(vec![rule(vec![], vec![http])]);
    agent.model.upsert_policy(policy("p", "web", rules.clone(), rules));
    agent.flush();
    assert!(agent.ingress("203.0.113.1", 8080) && !agent.ingress("203.0.113.1", 9090));
    let egress =
        |to: &str, port| agent.kernel.decide("uid-web", Direction::Egress, addr(to), TCP, port).unwrap().passes();
    assert!(egress("10.244.2.2", 9090) && !egress("10.244.2.2", 8080));
    assert!(!egress("203.0.113.1", 8080) && !egress("203.0.113.1", 9090), "no pod, no names");
}

#[test]
fn what_does_not_fit_is_denied_named_and_tried_again() {
    let limits = Limits { identities: 100, rules: 2, cidrs: 2 };
    let mut agent = Agent::new(Config { limits, ..CONFIG });
    let ports = |count: u16| (0..count).map(|at| port(80 + 2 * at)).collect::<Vec<_>>();
    agent.model.upsert_policy(policy("p", "web", Some(vec![rule(vec![], ports(3))]), None));
    let changes = agent.model.take_changes();
    changes.ops.iter().for_each(|op| agent.kernel.execute(op));
    assert_eq!(changes.errors, [PolicyError::Full { table: Table::Rules, limit: 2, left_out: 1 }]);
    assert_eq!(agent.kernel.rules.len(), 2);
    assert!(agent.kernel.endpoints["uid-web"].enforce_ingress && agent.ingress("203.0.113.1", 80));
    assert!(!agent.ingress("203.0.113.1", 84));

    agent.model.upsert_policy(policy("p", "web", Some(vec![rule(vec![], ports(2))]), None));
    agent.flush();

    // Prefixes come all or none: without the exception its prefix would allow too much.
    let block = Peer::IpBlock {
        cidr: "10.0.0.0/8".parse().unwrap(),
        except: vec!["10.1.0.0/16".parse().unwrap(), "10.2.0.0/16".parse().unwrap()],
    };
    agent.model.upsert_policy(policy("p", "web", Some(vec![rule(vec![block], vec![])]), None));
    let changes = agent.model.take_changes();
    changes.ops.iter().for_each(|op| agent.kernel.execute(op));
    assert_eq!(changes.errors, [PolicyError::Full { table: Table::Cidrs, limit: 2, left_out: 3 }]);
    assert!(agent.kernel.cidrs.is_empty());
    assert_eq!(
        changes.errors[0].to_string(),
        "Cidrs is full: 3 entries do not fit in 2; what they would allow is denied"
    );
}

#[test]
fn numbers_survive_a_restart_and_bad_lines_are_named() {
    let mut agent = Agent::new(CONFIG);
    agent.model.upsert_policy(policy("p", "web", Some(vec![rule(vec![from_app("client")], vec![])]), None));
    agent.flush();
    let subject = agent.kernel.endpoints["uid-web"].subject;
    let lines = agent.model.numbers();
    assert!(lines.contains(&"+r 1 x;p;ingress;0".to_owned()), "{lines:?}");

    let mut again = Model::restore(CONFIG, lines.iter().map(String::as_str), &agent.kernel.dump()).unwrap();
    // While the agent was away, the client went and another pod came, first in order.
    again.upsert_namespace(namespace("x"));
    again.upsert_node(node("n1", true, "192.168.0.1", "10.244.1.0/24"));
    again.upsert_node(node("n2", false, "192.168.0.2", "10.244.2.0/24"));
    again.upsert_pod(pod("a", "a", &["10.244.2.7"]));
    again.upsert_pod(pod("web", "web", &[]));
    again.upsert_endpoint(endpoint("web", &["10.244.1.2"]));
    again.upsert_policy(policy("p", "web", Some(vec![rule(vec![from_app("client")], vec![])]), None));
    let ops = again.take_changes().ops;
    assert_eq!(kinds(&ops), ["identity", "-identity", "-rule", "bump all"]);
    ops.iter().for_each(|op| agent.kernel.execute(op));
    assert_eq!(agent.kernel.endpoints["uid-web"].subject, subject);

    let error = Model::restore(CONFIG, ["+i 256 a", "nonsense"], &Default::default()).unwrap_err();
    assert_eq!(error, PolicyError::BadNumberLine { line: 2, text: "nonsense".into() });
}

#[test]
fn the_reference_judges_both_ends() {
    let objects = Objects {
        namespaces: vec![namespace("x")],
        pods: vec![pod("web", "web", &["10.244.1.2"]), pod("client", "client", &["10.244.2.2"])],
        policies: vec![
            policy("in", "web", Some(vec![rule(vec![from_app("client")], vec![port(80)])]), None),
            policy("out", "client", None, Some(vec![rule(vec![from_app("web")], vec![port(80), port(81)])])),
        ],
        nodes: Vec::new(),
        implied_namespaces: false,
    };
    let flow = |src: &str, dst: &str, port| Flow { src: addr(src), dst: addr(dst), proto: TCP, port };
    let (web, client, world) = ("10.244.1.2", "10.244.2.2", "203.0.113.1");
    assert!(matches!(allows(&objects, &flow(client, web, 80)), Verdict::Allow(Reason::Rules(_))));
    let denied = |direction| Verdict::Deny(Reason::NoRule(direction));
    assert_eq!(allows(&objects, &flow(client, web, 81)), denied(Direction::Ingress));
    assert_eq!(allows(&objects, &flow(client, web, 82)), denied(Direction::Egress));
    assert_eq!(allows(&objects, &flow(client, world, 80)), denied(Direction::Egress));
    assert_eq!(allows(&objects, &flow(world, client, 80)), Verdict::Allow(Reason::NotIsolated));
    assert_eq!(allows(&objects, &flow(web, web, 1)), Verdict::Allow(Reason::Itself));
}

/// Whether the web pod lets each of these in, after every single write.
fn watch(agent: &mut Agent, from: &str, passes: bool) -> usize {
    let ops = agent.model.take_changes().ops;
    for op in &ops {
        agent.kernel.execute(op);
        assert_eq!(agent.ingress(from, 80), passes, "{from} after {op:?}");
    }
    ops.len()
}

#[test]
fn an_exception_holds_between_any_two_writes() {
    let mut agent = Agent::new(CONFIG);
    agent.model.upsert_policy(policy("deny", "web", Some(vec![]), None));
    agent.flush();
    let block = |cidr: &str, except: &[&str]| Peer::IpBlock {
        cidr: cidr.parse().unwrap(),
        except: except.iter().map(|except| except.parse().unwrap()).collect(),
    };
    let allow = |peers| policy("allow", "web", Some(vec![rule(peers, vec![])]), None);
    agent.model.upsert_policy(allow(vec![block("20.0.0.0/8", &["20.1.0.0/16"])]));
    assert!(watch(&mut agent, "20.1.0.1", false) > 3);
    assert!(agent.ingress("20.2.0.1", 80));
    agent.model.upsert_policy(allow(vec![block("20.0.0.0/7", &["20.0.0.0/8", "21.1.0.0/16"])]));
    assert!(watch(&mut agent, "20.1.0.1", false) > 3);
    assert!(agent.ingress("21.2.0.1", 80));
    agent.model.delete_policy(&ObjectName::new("x", "allow"));
    assert!(watch(&mut agent, "20.1.0.1", false) > 3);

    // Every IPv6 address is none of IPv4, which the kernel keeps inside of it.
    agent.model.upsert_policy(allow(vec![block("::/0", &[])]));
    assert!(watch(&mut agent, "198.51.100.1", false) > 2);
    assert!(agent.ingress("2001:db8::1", 80));
    agent.model.delete_policy(&ObjectName::new("x", "allow"));
    watch(&mut agent, "198.51.100.1", false);
}

#[test]
fn a_namespace_with_new_labels_stays_reachable_between_any_two_writes() {
    let mut agent = Agent::new(CONFIG);
    agent.model.upsert_policy(policy("p", "web", Some(vec![rule(vec![from_app("client")], vec![])]), None));
    agent.flush();
    let new_labels = labels(&[("kubernetes.io/metadata.name", "x"), ("team", "blue")]);
    agent.model.upsert_namespace(Namespace { name: "x".into(), labels: new_labels });
    assert!(watch(&mut agent, "10.244.2.2", true) > 3);
    assert_eq!(agent.kernel.rules.len(), 1, "the old identities' rules are gone");
}

/// A range of Services' addresses is known as that while somebody names it, and pods' and nodes' claims of the very prefix win.
#[test]
fn ranges_of_services_are_nobodys() {
    let mut agent = Agent::new(CONFIG);
    let of = |agent: &Agent, address: &str| agent.kernel.identity(addr(address));
    let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<ipnet::IpNet>>();
    agent.model.set_service_cidrs("kubernetes", &ranges(&["10.96.0.0/16", "fd00:10:96::/112"]));
    agent.model.set_service_cidrs("more", &ranges(&["10.97.0.0/24", "10.96.0.0/16"]));
    agent.model.upsert_node(node("n1", true, "10.96.0.9", "10.244.1.0/24"));
    agent.flush();
    for (address, wanted) in [
        ("10.96.1.1", identity::SERVICES),
        ("10.97.0.1", identity::SERVICES),
        ("fd00:10:96::7", identity::SERVICES),
        ("10.96.0.9", identity::HOST),
        ("10.98.0.1", identity::WORLD),
    ] {
        assert_eq!(of(&agent, address), wanted, "{address}");
    }
    agent.model.set_service_cidrs("kubernetes", &[]);
    agent.flush();
    assert_eq!(of(&agent, "10.96.1.1"), identity::SERVICES, "the other names it too");
    agent.model.set_service_cidrs("more", &ranges(&["10.97.0.0/24"]));
    agent.flush();
    assert_eq!([of(&agent, "10.96.1.1"), of(&agent, "10.97.0.1")], [identity::WORLD, identity::SERVICES]);
}
