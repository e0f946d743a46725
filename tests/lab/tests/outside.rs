//! What asks a node from outside of it (load balancers, dashboards, people) is answered as a real kube-proxy answers it.
mod kube;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::small_api::SmallApi;
use keelway_lab::{Lab, Node};
use nix::sys::signal::Signal;
use serde_json::Value;

const METRICS: &str = "127.0.0.1:10249";

/// `lb`: one endpoint here, health check on 32100. `taken`: its health check's port is somebody's. `a`, `b`: one address. `far`:
/// Local, and its endpoint is elsewhere.
fn services(node: &str, here: &str) -> String {
    // As exact as the API server's own: in whole seconds a change after somebody's start may seem to be of before it.
    let now = sh::run(&["date", "-u", "+%FT%T.%NZ"]).unwrap();
    let now = now.trim();
    let balancer = |name: &str, port: u16| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, externalTrafficPolicy: Local, \
             healthCheckNodePort: {port}, ipFamilyPolicy: RequireDualStack, ports: [{{port: 80}}]}}\n---\n"
        )
    };
    let external = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{externalIPs: [198.51.100.7], ports: [{{port: 80}}]}}\n---\n"
        )
    };
    let slice = |service: &str, family: &str, addresses: &[&str], node: &str| {
        let endpoints: Vec<Value> = addresses
            .iter()
            .map(|address| serde_json::json!({"addresses": [address], "conditions": {"ready": true}, "nodeName": node}))
            .collect();
        let (lower, endpoints) = (family.to_lowercase(), serde_json::to_string(&endpoints).unwrap());
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n\
             metadata: {{name: {service}-{lower}, labels: {{kubernetes.io/service-name: {service}}}, annotations: \
             {{endpoints.kubernetes.io/last-change-trigger-time: \"{now}\"}}}}\n\
             ports: [{{port: 8080}}]\nendpoints: {endpoints}\n---\n"
        )
    };
    [
        balancer("lb", 32100),
        slice("lb", "IPv4", &["10.244.1.10", "10.244.1.11"], here),
        slice("lb", "IPv6", &["fd00:10:244:1::10"], node),
        // One of them twice, and one that is not ready: neither counts.
        slice("lb", "IPv4", &["10.244.1.10"], here).replace("name: lb-ipv4", "name: lb-again"),
        slice("lb", "IPv4", &["10.244.1.12"], here)
            .replace("name: lb-ipv4", "name: lb-unready")
            .replace("true", "false"),
        balancer("taken", 32101),
        external("a"),
        external("b"),
        balancer("far", 32102).replace("externalTrafficPolicy", "internalTrafficPolicy: Local, externalTrafficPolicy"),
        slice("far", "IPv4", &["10.244.2.10"], "elsewhere"),
    ]
    .concat()
}

/// Status, the headers that a load balancer looks at, and the body.
fn get(lab: &Lab, url: &str) -> Result<(u16, BTreeMap<String, String>, String)> {
    let text = lab.outside.run(&["curl", "-gsi", "--max-time", "30", url])?;
    let (head, body) = text.split_once("\r\n\r\n").context("no body")?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).context("no status")?.parse()?;
    let kept = ["content-type", "x-content-type-options", "x-load-balancing-endpoint-weight"];
    let headers =
        lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    Ok((status, headers.filter(|(name, _)| kept.contains(&name.as_str())).collect(), body.to_owned()))
}

/// Every series whose name begins so, by the rest of it, names of its labels, and bound, where it has one.
fn series(node: &Node, prefix: &str) -> Result<BTreeSet<String>> {
    let text = node.run(&["curl", "-sf", &format!("http://{METRICS}/metrics")])?;
    let one_back_end = ["nftables_", "conntrack_reconciler_"];
    let lines = text.lines().filter_map(|line| line.strip_prefix(prefix));
    let lines = lines.filter(|line| !one_back_end.iter().any(|it| line.contains(it)));
    let series = lines.map(|line| {
        let (name, labels) =
            line.rsplit_once(' ').map_or((line, ""), |(series, _)| series.split_once('{').unwrap_or((series, "")));
        let labels = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty());
        let mut labels: Vec<String> = labels
            .filter_map(|label| label.split_once('='))
            .map(|(name, value)| match (name, value.trim_matches('"')) {
                ("le", "+Inf") => "le=inf".to_owned(),
                ("le", bound) => format!("le={:?}", bound.parse::<f64>().expect("a bound")),
                ("ip_family" | "traffic_policy", value) => format!("{name}={value}"),
                _ => name.to_owned(),
            })
            .collect();
        labels.sort_unstable();
        format!("{name} {labels:?}")
    });
    Ok(series.collect())
}

fn no_local(node: &Node) -> Result<BTreeMap<String, f64>> {
    let text = node.run(&["curl", "-sf", &format!("http://{METRICS}/metrics")])?;
    let mut found = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("kubeproxy_sync_proxy_rules_no_local_endpoints_total{")) {
        let (labels, value) = line.rsplit_once(' ').context("a value")?;
        let mut labels: Vec<&str> = labels.split(['{', '}', ',']).skip(1).filter(|label| !label.is_empty()).collect();
        labels.sort_unstable();
        found.insert(labels.join(","), value.parse()?);
    }
    Ok(found)
}

/// Who was asked, the status, the headers and the verdicts of the body.
type Health = (String, u16, BTreeMap<String, String>, Vec<(String, Value)>);

/// What was seen of whoever serves the node.
#[derive(Debug, PartialEq)]
struct Seen {
    checks: Vec<(String, u16, BTreeMap<String, String>, String)>,
    health: Vec<Health>,
    no_local: BTreeMap<String, f64>,
}

/// Health as JSON: kube-proxy's keys, its verdicts, and whether the times are as they should be.
fn verdicts(body: &str) -> Vec<(String, Value)> {
    let body: Value = serde_json::from_str(body).unwrap();
    let mut found = Vec::new();
    for key in ["nodeEligible", "healthy"] {
        found.push((key.to_owned(), body.get(key).cloned().unwrap_or(Value::Null)));
    }
    for family in ["IPv4", "IPv6"] {
        let status = &body["status"][family];
        assert!(status["lastUpdated"].as_str().is_some_and(|time| time.starts_with("20")), "{body}");
        found.push((family.to_owned(), status["healthy"].clone()));
    }
    for key in ["lastUpdated", "currentTime"] {
        assert!(body[key].as_str().is_some_and(|time| time.starts_with("20") && time.contains('T')), "{body}");
    }
    // To the second: a good answer says that it is up to date now.
    let second = |key: &str| body[key].as_str().unwrap()[..17].to_owned();
    found.push(("up to date now".into(), (second("lastUpdated") == second("currentTime")).into()));
    found
}

fn health(lab: &Lab, seen: &mut Seen, what: &str, wanted: u16) {
    let node = lab.node(1);
    let url = |path: &str| format!("http://{}:10256/{path}", node.v4);
    wait_for(&format!("/healthz with {what}"), SOON, || {
        let (status, ..) = get(lab, &url("healthz"))?;
        ensure!(status == wanted, "{status}");
        Ok(())
    })
    .unwrap();
    for path in ["healthz", "livez"] {
        let (status, headers, body) = get(lab, &url(path)).unwrap();
        let mut verdicts = verdicts(&body);
        if status != 200 {
            verdicts.pop();
        }
        seen.health.push((format!("{path} {what}"), status, headers, verdicts));
    }
}

fn check(lab: &Lab, seen: &mut Seen, what: &str, v6: bool, local: usize) {
    let node = lab.node(1);
    let url = if v6 { format!("http://[{}]:32100/", node.v6) } else { format!("http://{}:32100/any/path", node.v4) };
    let found = wait_for(&format!("health check {what} v6 {v6}"), SOON, || {
        let found = get(lab, &url)?;
        ensure!(found.2.contains(&format!("\"localEndpoints\": {local},")), "{found:?}");
        Ok(found)
    })
    .unwrap();
    seen.checks.push((format!("{what} {v6}"), found.0, found.1, found.2));
}

/// Puts the node and its Services through what they go through, and asks meanwhile.
fn story(lab: &Lab, api: &SmallApi<'_>) -> Seen {
    let node = lab.node(1);
    let mut seen = Seen { checks: Vec::new(), health: Vec::new(), no_local: BTreeMap::new() };
    check(lab, &mut seen, "two here", false, 2);
    check(lab, &mut seen, "one here", true, 1);
    api.kubectl(&["apply", "-f", "-"], &services(&node.name, "elsewhere")).unwrap();
    check(lab, &mut seen, "none here", false, 0);
    seen.no_local = wait_for("ports without an endpoint here", SOON, || {
        let found = no_local(node)?;
        ensure!(found.values().sum::<f64>() >= 3.0, "{found:?}");
        Ok(found)
    })
    .unwrap();
    health(lab, &mut seen, "all well", 200);
    let taint = ["taint", "node", &node.name];
    api.kubectl(&[&taint[..], &["ToBeDeletedByClusterAutoscaler=1:NoSchedule"]].concat(), "").unwrap();
    health(lab, &mut seen, "the autoscaler's taint", 503);
    api.kubectl(&[&taint[..], &["ToBeDeletedByClusterAutoscaler-"]].concat(), "").unwrap();
    health(lab, &mut seen, "no taint any more", 200);
    // Being deleted, as long as somebody holds it.
    let held = |finalizers: &str| {
        let patch = format!("{{\"metadata\": {{\"finalizers\": {finalizers}}}}}");
        api.kubectl(&["patch", "node", &node.name, "--type=merge", "-p", &patch], "").unwrap();
    };
    held("[\"keelway.dev/test\"]");
    api.kubectl(&["delete", "node", &node.name, "--wait=false"], "").unwrap();
    health(lab, &mut seen, "being deleted", 503);
    held("[]");
    seen
}

fn events(api: &SmallApi<'_>, controller: &str) -> Result<Vec<Value>> {
    let list: Value = serde_json::from_str(&api.kubectl(&["get", "events.events.k8s.io", "-o", "json"], "")?)?;
    let all = list["items"].as_array().context("items")?.iter();
    Ok(all.filter(|event| event["reportingController"] == controller).cloned().collect())
}

fn summary(event: &Value) -> [&str; 5] {
    ["/type", "/reason", "/action", "/regarding/kind", "/regarding/name"]
        .map(|path| event.pointer(path).and_then(Value::as_str).unwrap_or_default())
}

#[test]
fn load_balancers_dashboards_and_people_see_what_kube_proxy_shows() {
    if let Some(reason) = kube::missing() {
        println!("skipped: {reason}");
        return;
    }
    let lab = Lab::new(1).unwrap();
    let node = lab.node(1);
    let probe = sh::own("keelway-probe").unwrap().display().to_string();
    let mut thief = node.spawn("thief", &[&probe, "serve", "--name", "thief", "--port", "32101"]).unwrap();
    let api = SmallApi::start(&lab, "pods").unwrap();
    kube::node(&api, node);
    api.create(&services(&node.name, &node.name)).unwrap();

    let mut proxy = kube::proxy(&lab, &api, "nftables", false);
    let theirs = story(&lab, &api);
    let their_series = series(node, "kubeproxy_").unwrap();
    let taken = |events: &[Value]| {
        let port = events.iter().find(|event| summary(event)[1] == "FailedToStartServiceHealthcheck");
        port.map(|event| summary(event).map(str::to_owned))
    };
    let their_event = taken(
        &wait_for("kube-proxy's Event", SOON, || {
            let found = events(&api, "kube-proxy")?;
            ensure!(taken(&found).is_some(), "{found:?}");
            Ok(found)
        })
        .unwrap(),
    );
    proxy.stop(Signal::SIGTERM).unwrap();

    kube::node(&api, node);
    api.kubectl(&["apply", "-f", "-"], &services(&node.name, &node.name)).unwrap();
    let mut agent = kube::agent(&lab, &api, &["--metrics-addr", METRICS, "--kube-proxy-metrics"]);
    // People first: while the port is taken.
    let ours = wait_for("our Events", SOON, || {
        let found = events(&api, "keelway-agent")?;
        ensure!(found.len() >= 2, "{found:?}");
        Ok(found)
    })
    .unwrap();
    assert_eq!(taken(&ours), their_event);
    let conflict = ours.iter().find(|event| summary(event)[1] == "ServiceAddressConflict").expect("the conflict");
    assert_eq!(summary(conflict)[4], "b", "{conflict}");
    assert!(conflict["note"].as_str().is_some_and(|note| note.contains("198.51.100.7") && note.contains("default/a")));
    let described = api.kubectl(&["describe", "service", "taken"], "").unwrap();
    assert!(
        described.contains("FailedToStartServiceHealthcheck") && described.contains("keelway-agent"),
        "{described}"
    );
    let status = || {
        let keelway = sh::own("keelway").unwrap().display().to_string();
        String::from_utf8(node.exec(&[&keelway, "status", "-o", "json"]).unwrap().stdout).unwrap()
    };
    assert!(status().contains("default/taken: healthCheckNodePort: cannot listen on"), "{}", status());
    thief.stop(Signal::SIGKILL).unwrap();
    wait_for("the port that is free again", SOON, || {
        let (code, _, body) = get(&lab, &format!("http://{}:32101/", node.v4))?;
        ensure!(code == 503 && body.contains("\"taken\""), "{code} {body}");
        ensure!(!status().contains("healthCheckNodePort"), "{}", status());
        Ok(())
    })
    .unwrap();

    let ours = story(&lab, &api);
    assert_eq!(ours, theirs);
    let our_series = series(node, "kubeproxy_").unwrap();
    let missing: Vec<_> = their_series.difference(&our_series).collect();
    assert!(missing.is_empty() && their_series.len() > 100, "of {}: {missing:#?}", their_series.len());
    let more: Vec<_> = our_series.difference(&their_series).collect();
    assert!(more.is_empty(), "{more:#?}");
    let by_our_name = series(node, "keelway_").unwrap();
    let missing: Vec<_> = their_series.difference(&by_our_name).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    // However often the port was tried: one Event, and few of all.
    let written = events(&api, "keelway-agent").unwrap();
    let about = written.iter().filter(|event| summary(event)[4] == "taken").count();
    assert_eq!((about, written.len() <= 4), (1, true), "{written:#?}");

    // A port leaves with its Service (calico#8112), and with the policy that asked for it.
    api.kubectl(&["delete", "service", "lb"], "").unwrap();
    api.kubectl(&["patch", "service", "taken", "-p", r#"{"spec": {"externalTrafficPolicy": "Cluster"}}"#], "").unwrap();
    wait_for("the ports to be given back", SOON, || {
        let open = node.run(&["ss", "-Hltn"])?;
        ensure!(!open.contains(":32100 ") && !open.contains(":32101 ") && open.contains(":32102 "), "{open}");
        Ok(())
    })
    .unwrap();

    // The API server lets ports through that are none: what of a Service's slices is not in force, its Events tell.
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
        metadata: {name: a-1, labels: {kubernetes.io/service-name: a}}\n\
        ports: [{port: 0}]\nendpoints: [{addresses: [10.244.1.10]}]\n";
    api.create(slice).unwrap();
    wait_for("an Event of the slice", SOON, || {
        let found = events(&api, "keelway-agent")?;
        let told = |event: &&Value| {
            summary(event)[1] == "ServiceNotWhollyInForce"
                && summary(event)[4] == "a"
                && event["note"].as_str().is_some_and(|note| note.contains("EndpointSlice a-1: ports[].port: \"0\""))
        };
        ensure!(found.iter().any(|event| told(&event)), "{found:?}");
        Ok(())
    })
    .unwrap();
    assert!(status().contains("EndpointSlice a-1"), "{}", status());
    agent.stop(Signal::SIGTERM).unwrap();
}
