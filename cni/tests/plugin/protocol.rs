//! What the agent is asked, and the shape of each version's answer.

use std::time::Instant;

use serde_json::{Value, json};

use crate::fake_agent::FakeAgent;
use crate::{about, conf, run};

fn add(version: &str, more: Value) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let _agent = FakeAgent::default().serve(dir.path());
    let answer = run(&about("ADD", "/run/netns/x"), &conf(dir.path(), version, more));
    assert!(answer.success, "{answer:?}");
    answer.json()
}

#[test]
fn add_answers_in_the_shape_of_1_1_0() {
    assert_eq!(
        add("1.1.0", json!({})),
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                { "name": "kw0123456789abc", "mac": "02:00:00:00:00:01", "mtu": 1450 },
                { "name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1450, "sandbox": "/run/netns/x" },
            ],
            "ips": [
                { "address": "10.244.1.7/32", "gateway": "169.254.1.1", "interface": 1 },
                { "address": "fd00:244:1::7/128", "gateway": "fe80::1", "interface": 1 },
            ],
            "routes": [
                { "dst": "0.0.0.0/0", "gw": "169.254.1.1" },
                { "dst": "::/0", "gw": "fe80::1" },
            ],
        })
    );
}

#[test]
fn older_versions_have_their_own_shapes() {
    let newest = add("1.0.0", json!({}));
    assert_eq!(newest["cniVersion"], "1.0.0");
    assert_eq!(newest["interfaces"][1].get("mtu"), None, "mtu came with 1.1.0");
    assert_eq!(newest["ips"][0].get("version"), None);
    for version in ["0.3.1", "0.4.0"] {
        let old = add(version, json!({}));
        assert_eq!(old["cniVersion"], version);
        assert_eq!((old["ips"][0]["version"].clone(), old["ips"][1]["version"].clone()), ("4".into(), "6".into()));
        assert_eq!(old["dns"], json!({}));
        assert_eq!(old["interfaces"][0].get("mtu"), None);
    }
}

#[test]
fn behind_another_plugin_its_result_is_handed_on() {
    let prev = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{ "name": "lo", "sandbox": "/run/netns/x" }],
        "ips": [{ "address": "127.0.0.1/8", "interface": 0 }],
        "dns": { "nameservers": ["10.96.0.10"] },
    });
    let answer = add("1.0.0", json!({ "prevResult": prev }));
    assert_eq!(answer["interfaces"].as_array().unwrap().len(), 3);
    assert_eq!(answer["ips"][0], json!({ "address": "127.0.0.1/8", "interface": 0 }));
    assert_eq!(answer["ips"][1]["interface"], 2, "counted behind theirs");
    assert_eq!(answer["dns"]["nameservers"][0], "10.96.0.10");
}

#[test]
fn the_agent_is_asked_what_the_runtime_asked() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAgent::default().serve(dir.path());
    run(&about("ADD", "/run/netns/x"), &conf(dir.path(), "1.1.0", json!({ "mtu": 1400 })));
    assert_eq!(agent.asked(), ["ADD c1 eth0 /run/netns/x keelway ns/web-0/u-1 mtu 1400"]);
    let bare: Vec<_> = about("ADD", "/run/netns/x").into_iter().filter(|(k, _)| *k != "CNI_ARGS").collect();
    run(&bare, &conf(dir.path(), "1.1.0", json!({})));
    assert_eq!(agent.asked(), ["ADD c1 eth0 /run/netns/x keelway // mtu 0"]);

    run(&about("DEL", ""), &conf(dir.path(), "1.1.0", json!({}))).silent();
    assert_eq!(agent.asked(), ["DEL c1 eth0 keelway"]);
    assert!(!dir.path().join("cni-del").exists(), "nothing is queued while the agent is there");

    let prev = add("1.1.0", json!({}));
    run(&about("CHECK", "/run/netns/x"), &conf(dir.path(), "1.1.0", json!({ "prevResult": prev }))).silent();
    assert_eq!(agent.asked(), ["CHECK c1 eth0 /run/netns/x 10.244.1.7/32,fd00:244:1::7/128"]);
    let prev = add("0.4.0", json!({}));
    run(&about("CHECK", "/run/netns/x"), &conf(dir.path(), "0.4.0", json!({ "prevResult": prev }))).silent();
    assert_eq!(agent.asked(), ["CHECK c1 eth0 /run/netns/x 10.244.1.7/32,fd00:244:1::7/128"]);

    let valid = json!([{ "containerID": "c1", "ifname": "eth0" }, { "containerID": "c2", "ifname": "net1" }]);
    let gc = [("CNI_COMMAND", "GC"), ("CNI_PATH", "/opt/cni/bin")];
    for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        run(&gc, &conf(dir.path(), "1.1.0", json!({ key: valid }))).silent();
        assert_eq!(agent.asked(), ["GC keelway keep c1/eth0,c2/net1"], "{key}");
    }
    run(&gc, &conf(dir.path(), "1.1.0", json!({ "cni.dev/valid-attachments": [], "cni.dev/attachments": valid })))
        .silent();
    assert_eq!(agent.asked(), ["GC keelway keep "], "the specification's name wins");

    run(&[("CNI_COMMAND", "STATUS")], &conf(dir.path(), "1.1.0", json!({}))).silent();
    assert_eq!(agent.asked(), ["STATUS keelway"]);
}

#[test]
fn version_names_every_version() {
    for asked in ["0.3.1", "1.1.0", "1.2.0"] {
        let answer = run(&[("CNI_COMMAND", "VERSION")], json!({ "cniVersion": asked }).to_string().as_bytes());
        let wanted = json!({ "cniVersion": asked, "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] });
        assert_eq!((answer.success, answer.json()), (true, wanted));
    }
}

#[test]
fn the_agents_refusals_reach_the_runtime_with_their_code() {
    let dir = tempfile::tempdir().unwrap();
    let calls = |code: Option<u32>| {
        let _agent = FakeAgent { refusal: Some((code, "no room")), ..FakeAgent::default() }.serve(dir.path());
        let prev = json!({ "prevResult": {
            "interfaces": [{ "name": "eth0", "sandbox": "/x" }],
            "ips": [{ "address": "10.0.0.1/32", "interface": 0 }],
        }});
        let none = json!({ "cni.dev/valid-attachments": [] });
        [("ADD", json!({})), ("DEL", json!({})), ("CHECK", prev), ("GC", none), ("STATUS", json!({}))]
            .map(|(command, more)| run(&about(command, "/run/netns/x"), &conf(dir.path(), "1.1.0", more)).error())
    };
    for (code, message) in calls(Some(101)) {
        assert_eq!((code, message.as_str()), (101, "no room|"));
    }
    for (code, message) in calls(None) {
        assert_eq!((code, message.as_str()), (100, "no room|gRPC status Internal"));
    }
    assert!(!dir.path().join("cni-del").exists(), "a DEL that the agent refused is not queued");
}

#[test]
fn a_call_takes_milliseconds() {
    let dir = tempfile::tempdir().unwrap();
    let _agent = FakeAgent::default().serve(dir.path());
    let conf = conf(dir.path(), "1.1.0", json!({}));
    let mut took: Vec<_> = (0..20)
        .map(|_| {
            let start = Instant::now();
            assert!(run(&about("ADD", "/run/netns/x"), &conf).success);
            start.elapsed()
        })
        .collect();
    took.sort();
    println!("one ADD against the fake agent: median {:?}, worst {:?}", took[10], took[19]);
    assert!(took[10].as_millis() < 500, "{took:?}");
}
