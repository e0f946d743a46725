//! `keelway services` and `keelway endpoints`: what is programmed on a node, with connections that are really there.
use anyhow::Context as _;
use keelway_lab::Host;
use keelway_lab::services::Backend;
use keelway_lab::sh::{self, SOON, wait_for};
use keelway_lab::standalone::{self, Standalone};
use serde_json::{Value, json};

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

/// A connection from outside that stays.
fn hold(host: &Host, target: &str, name: &str) -> keelway_lab::Process {
    let script = format!("sleep 300 | busybox nc {}", target.replace(':', " "));
    host.spawn(name, &["sh", "-c", &script]).unwrap()
}

#[test]
fn what_is_programmed_is_listed_with_its_backends_and_their_connections() {
    if let Some(reason) = standalone::missing() {
        println!("skipped: {reason}");
        return;
    }
    let s = Standalone::new(2, &[]).unwrap();
    let keelway = sh::own("keelway").unwrap().display().to_string();
    let node = s.node(1);
    let ask = |args: &[&str]| node.exec(&[&[keelway.as_str()], args].concat()).unwrap();
    let listed = |args: &[&str]| -> Value { serde_json::from_slice(&ask(args).stdout).unwrap() };
    let a = s.pod(1, "a", &[]).unwrap();
    let b = s.pod(2, "b", &[]).unwrap();
    let spec = json!({
        "type": "NodePort", "clusterIP": VIPS[0], "clusterIPs": VIPS, "externalTrafficPolicy": "Local",
        "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
        "ports": [{"port": 80, "nodePort": 30080, "targetPort": 8080}],
    });
    let both = [Backend::pod(&s, &a), Backend::pod(&s, &b)];
    s.put_service("web", &spec, &json!({}), &both).unwrap();
    wait_for("the Service to be listed", SOON, || {
        // Until the agent has read its file there is no such Service to show.
        let answer = ask(&["services", "web", "-o", "json"]);
        let found: Value = serde_json::from_slice(&answer.stdout).with_context(|| format!("{answer:?}"))?;
        anyhow::ensure!(found["services"][0]["frontends"].as_array().is_some_and(|all| all.len() == 6), "{found}");
        Ok(())
    })
    .unwrap();
    let found = listed(&["services", "default/web", "-o", "json"]);
    let frontends = found["services"][0]["frontends"].as_array().unwrap();
    let of = |kind: &str, clients: &str, v6: bool| {
        let is = |f: &&Value| {
            f["kind"] == kind && f["clients"] == clients && f["address"].as_str().unwrap().contains(':') == v6
        };
        frontends.iter().find(is).unwrap_or_else(|| panic!("{kind} {clients} {v6}: {found}"))
    };
    let addresses = |frontend: &Value| -> Vec<String> {
        let backends = frontend["backends"].as_array().unwrap().iter();
        let mut all: Vec<String> = backends.map(|b| b["address"].as_str().unwrap().to_owned()).collect();
        all.sort();
        all
    };
    for v6 in [false, true] {
        let (here, far) = (a.address(v6).to_string(), b.address(v6).to_string());
        let mut all = vec![here.clone(), far];
        all.sort();
        let cluster_ip = of("ClusterIP", "any", v6);
        assert_eq!(addresses(cluster_ip), all);
        assert_eq!((&cluster_ip["trafficPolicy"], &cluster_ip["affinitySeconds"]), (&json!("Cluster"), &json!(600)));
        assert_eq!(addresses(of("NodePort", "any", v6)), all);
        let outside = of("NodePort", "outside", v6);
        assert_eq!((addresses(outside), &outside["trafficPolicy"]), (vec![here], &json!("Local")));
        assert!(outside["flags"].as_array().unwrap().contains(&json!("keeps-source")), "{outside}");
    }

    // Two connections from outside, to this node's own backend.
    let target = format!("{}:30080", node.v4);
    let held = [hold(&s.lab.outside, &target, "held-1"), hold(&s.lab.outside, &target, "held-2")];
    let backend = |address: String| -> Value {
        let all = listed(&["endpoints", "-n", "default", "web", "-o", "json"]);
        let all = all["endpoints"].as_array().unwrap().clone();
        all.into_iter().find(|e| e["address"] == address.as_str()).unwrap_or(Value::Null)
    };
    wait_for("two connections", SOON, || {
        let found = backend(a.address(false).to_string());
        anyhow::ensure!(found["connections"] == 2, "{found}");
        Ok(())
    })
    .unwrap();
    let (near, far) = (backend(a.address(false).to_string()), backend(b.address(false).to_string()));
    assert_eq!((&near["state"], &near["local"]), (&json!("ready"), &json!(true)));
    assert_eq!((&far["local"], &far["connections"]), (&json!(false), &json!(0)));

    // It leaves: what it has goes on, and is shown.
    s.put_service("web", &spec, &json!({}), &[both[0].clone().terminating(true), both[1].clone()]).unwrap();
    wait_for("it to drain", SOON, || {
        // For clients outside it is the last resort; for all others it drains.
        let found = listed(&["services", "web", "-o", "json"]);
        let draining = found.to_string().contains("\"state\":\"draining\"");
        anyhow::ensure!(draining && backend(a.address(false).to_string())["connections"] == 2, "{found}");
        Ok(())
    })
    .unwrap();
    drop(held);

    // For people; and what cannot be answered is said.
    let page = String::from_utf8(ask(&["services"]).stdout).unwrap();
    assert!(page.contains("*:30080") && page.contains("[fd00:10:96::10]:80"), "{page}");
    let missing = ask(&["services", "default/nobody"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(sh::words(&missing).contains("no Service default/nobody"), "{}", sh::words(&missing));
    let away = ask(&["endpoints", "--socket", "/run/keelway/nobody.sock"]);
    assert_eq!(away.status.code(), Some(1));
    assert!(sh::words(&away).contains("no keelway-agent is running"), "{}", sh::words(&away));

    // Two Services of one address: who has not got it is told.
    let other = json!({"clusterIP": "10.96.0.11", "clusterIPs": ["10.96.0.11", "fd00:10:96::11"], "externalIPs": [VIPS[0]],
        "ports": [{"port": 80}]});
    s.put_service("late", &other, &json!({}), &both).unwrap();
    wait_for("the conflict", SOON, || {
        let answer = ask(&["services", "late"]);
        let page = sh::words(&answer);
        anyhow::ensure!(answer.status.code() == Some(3) && page.contains("default/web's"), "{page}");
        Ok(())
    })
    .unwrap();
}
