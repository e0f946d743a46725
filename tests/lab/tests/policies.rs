//! What a NetworkPolicy can select and allow, on two nodes without Kubernetes: every assertion is about what pods saw.
use std::net::SocketAddr;
use std::time::Instant;

use keelway_lab::probe::Asked;
use keelway_lab::sh::SOON;
use keelway_lab::standalone::{self, Pod, Standalone};

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

fn namespace(team: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: other, labels: {{team: {team}}}}}\n")
}

/// On ingress to the pods with `app: server`.
fn ingress(rules: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: ingress, namespace: default}}\n\
         spec: {{podSelector: {{matchLabels: {{app: server}}}}, policyTypes: [Ingress], ingress: {rules}}}\n"
    )
}

/// Who is allowed is patient, on a busy machine; who is not waits in vain.
fn patience(allowed: bool) -> &'static str {
    if allowed { "5000" } else { "300" }
}

fn ask(s: &Standalone, from: &Pod, to: &Pod, v6: bool, udp: bool, allowed: bool) -> Asked {
    let at = SocketAddr::from((to.address(v6), 8080)).to_string();
    let mut args = vec!["ask", &at, "--count", "2", "--timeout", patience(allowed)];
    args.extend(udp.then_some("--udp"));
    s.probe(from, &args).unwrap()
}

/// Waits until who may reach `server` by TCP, over IPv4, is as said; then it holds over both families, and none may by UDP unless
/// `udp`.
#[track_caller]
fn reached_by(s: &Standalone, server: &Pod, expected: &[(&Pod, bool)], udp: bool) {
    let start = Instant::now();
    let now = |v6, by_udp: bool| -> Vec<bool> {
        let allowed = |it: bool| it && (udp || !by_udp);
        let got_in = |(from, it): &(&Pod, bool)| ask(s, from, server, v6, by_udp, allowed(*it)).answered() == 2;
        expected.iter().map(got_in).collect()
    };
    let wanted: Vec<bool> = expected.iter().map(|(_, allowed)| *allowed).collect();
    loop {
        let found = now(false, false);
        if found == wanted {
            break;
        }
        assert!(start.elapsed() < SOON, "{found:?}, expected {wanted:?}");
    }
    assert_eq!(now(true, false), wanted, "IPv6");
    let by_udp: Vec<bool> = wanted.iter().map(|allowed| *allowed && udp).collect();
    for v6 in [false, true] {
        assert_eq!(now(v6, true), by_udp, "UDP, IPv6: {v6}");
    }
}

#[test]
fn namespaces_ports_and_empty_selectors_select_as_specified_and_services_are_no_way_round() {
    if let Some(reason) = standalone::missing() {
        println!("skipped: {reason}");
        return;
    }
    let s = Standalone::new(2, &[]).unwrap();
    s.write("namespace", &namespace("blue")).unwrap();
    let server = s.pod(1, "server", &[("app", "server")]).unwrap();
    let near = s.pod(1, "near", &[("app", "client")]).unwrap();
    let far = s.pod_in("other", 2, "far", &[("app", "client")]).unwrap();
    let all = |near_may, far_may| [(&near, near_may), (&far, far_may)];
    s.service("tcp", VIPS, "TCP", 80, &[&server]).unwrap();
    reached_by(&s, &server, &all(true, true), true);

    // A namespace by its labels, and ports from one to another, of TCP alone.
    let blue = "{namespaceSelector: {matchLabels: {team: blue}}}";
    let range = "[{protocol: TCP, port: 8070, endPort: 8090}]";
    s.write("policy", &ingress(&format!("[{{from: [{blue}], ports: {range}}}]"))).unwrap();
    reached_by(&s, &server, &all(false, true), false);
    // Rules are about who the backend is and who asks, not about the address that was dialled: by sockets and past them.
    for vip in [format!("{}:80", VIPS[0]), format!("[{}]:80", VIPS[1])] {
        let args = |allowed| ["ask", &vip, "--count", "2", "--timeout", patience(allowed)];
        let answered = |report: Asked| report.answered();
        assert_eq!(answered(s.probe(&far, &args(true)).unwrap()), 2, "{vip}");
        assert_eq!(answered(s.probe_past_sockets(&far, &args(true)).unwrap()), 2, "{vip}");
        assert_eq!(answered(s.probe(&near, &args(false)).unwrap()), 0, "{vip}");
        assert_eq!(answered(s.probe_past_sockets(&near, &args(false)).unwrap()), 0, "{vip}");
    }
    // A namespace that is labelled otherwise is another.
    s.write("namespace", &namespace("red")).unwrap();
    reached_by(&s, &server, &all(false, false), false);
    s.write("namespace", &namespace("blue")).unwrap();
    reached_by(&s, &server, &all(false, true), false);
    // A range that ends before the port.
    s.write("policy", &ingress(&format!("[{{from: [{blue}], ports: [{{port: 8000, endPort: 8079}}]}}]"))).unwrap();
    reached_by(&s, &server, &all(false, false), false);

    // Both selectors of one peer have to hold; of two peers, one.
    let others = "{podSelector: {matchLabels: {app: nobody}}";
    let both = format!("{others}, namespaceSelector: {{matchLabels: {{team: blue}}}}}}");
    s.write("policy", &ingress(&format!("[{{from: [{both}]}}]"))).unwrap();
    reached_by(&s, &server, &all(false, false), false);
    s.write("policy", &ingress(&format!("[{{from: [{others}}}, {blue}]}}]"))).unwrap();
    reached_by(&s, &server, &all(false, true), true);
    // An empty podSelector is every pod of the policy's own namespace, an empty namespaceSelector every namespace.
    s.write("policy", &ingress("[{from: [{podSelector: {}}]}]")).unwrap();
    reached_by(&s, &server, &all(true, false), true);
    s.write("policy", &ingress("[{from: [{namespaceSelector: {}}]}]")).unwrap();
    reached_by(&s, &server, &all(true, true), true);
    // No rule allows nothing, an empty one everything.
    s.write("policy", &ingress("[]")).unwrap();
    reached_by(&s, &server, &all(false, false), false);
    s.write("policy", &ingress("[{}]")).unwrap();
    reached_by(&s, &server, &all(true, true), true);

    // An ipBlock is about addresses, pods' too, less those excepted.
    let block = |except: &str| {
        format!(
            "[{{from: [{{ipBlock: {{cidr: 10.244.0.0/16, except: [10.244.{except}.0/24]}}}}, \
             {{ipBlock: {{cidr: 'fd00:10:244::/56', except: ['fd00:10:244:{except}::/64']}}}}]}}]"
        )
    };
    s.write("policy", &ingress(&block("1"))).unwrap();
    reached_by(&s, &server, &all(false, true), true);
    s.write("policy", &ingress(&block("2"))).unwrap();
    reached_by(&s, &server, &all(true, false), true);
}
