//! Wrong calls: each gets the code that runtimes expect, and words that name what is wrong.

use serde_json::{Value, json};

use crate::{about, conf, run};

#[track_caller]
fn refused(env: &[(&str, &str)], stdin: &[u8], code: u64, words: &str) {
    let (found, message) = run(env, stdin).error();
    assert!(found == code && message.contains(words), "wanted {code} {words:?}, got {found} {message:?}");
}

fn good() -> Vec<u8> {
    conf(std::path::Path::new("/nonexistent"), "1.1.0", json!({}))
}

#[test]
fn the_environment_is_checked() {
    let without = |name: &str| about("ADD", "/x").into_iter().filter(|(k, _)| *k != name).collect::<Vec<_>>();
    refused(&[], &good(), 4, "CNI_COMMAND is missing");
    refused(&about("FROB", "/x"), &good(), 4, r#"CNI_COMMAND "FROB": expected ADD, DEL"#);
    refused(&without("CNI_CONTAINERID"), &good(), 4, "ADD needs CNI_CONTAINERID");
    refused(&without("CNI_NETNS"), &good(), 4, "ADD needs CNI_NETNS");
    refused(&[("CNI_COMMAND", "ADD")], &good(), 4, "ADD needs CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS");
    refused(&[("CNI_COMMAND", "DEL")], &good(), 4, "DEL needs CNI_CONTAINERID, CNI_IFNAME|");
    let with = |name: &'static str, value: &'static str| {
        let mut env = about("ADD", "/x");
        env.iter_mut().filter(|(k, _)| *k == name).for_each(|(_, v)| *v = value);
        env
    };
    for id in ["-c", "a/b", "a b", "..", "ü"] {
        refused(&with("CNI_CONTAINERID", id), &good(), 4, &format!("CNI_CONTAINERID {id:?}: expected"));
    }
    for name in ["..", "a/b", "a:b", "a b", "sixteen-bytes-ab"] {
        refused(&with("CNI_IFNAME", name), &good(), 4, &format!("CNI_IFNAME {name:?}: expected"));
    }
    refused(&with("CNI_ARGS", "K8S_POD_NAME"), &good(), 4, r#"CNI_ARGS part "K8S_POD_NAME": expected key=value"#);
    refused(&with("CNI_ARGS", "COLOR=blue"), &good(), 4, r#"CNI_ARGS key "COLOR" is unknown"#);
}

#[test]
fn stdin_is_checked() {
    refused(&about("ADD", "/x"), b"", 6, "EOF");
    refused(&about("ADD", "/x"), b"{\"cniVersion\": ", 6, "read the configuration on stdin");
    refused(&about("ADD", "/x"), b"[]", 6, "expected a JSON object");
    refused(&about("ADD", "/x"), b"{\"cniVersion\": 1}", 6, "cniVersion 1: expected a string");
    refused(&about("ADD", "/x"), b"{}", 1, "cniVersion is missing");
    refused(&about("ADD", "/x"), b"{\"cniVersion\": \"0.2.0\"}", 1, r#"cniVersion "0.2.0": expected one of 0.3.1"#);
    refused(&[("CNI_COMMAND", "VERSION")], b"nonsense", 6, "read the configuration");
    let long = format!("{{\"cniVersion\": \"1.1.0\", \"name\": \"{}\"}}", "x".repeat(5 << 20));
    refused(&about("ADD", "/x"), long.as_bytes(), 6, "EOF");
}

#[test]
fn the_configuration_is_checked() {
    let with = |more: Value| conf(std::path::Path::new("/nonexistent"), "1.1.0", more);
    let add = about("ADD", "/x");
    for (more, words) in [
        (json!({ "sockets": "/x" }), r#"unknown key "sockets""#),
        (json!({ "MTU": 1500 }), r#"unknown key "MTU""#),
        (json!({ "name": "" }), r#"network name "": expected"#),
        (json!({ "name": "a/b" }), r#"network name "a/b": expected"#),
        (json!({ "name": 7 }), "name 7: expected a string"),
        (json!({ "mtu": 100 }), "mtu 100: expected 0 or 1280 to 65535"),
        (json!({ "mtu": "big" }), r#"mtu "big": expected a whole number"#),
        (json!({ "mtu": -1 }), "mtu -1: expected a whole number"),
        (json!({ "socket": "agent.sock" }), r#"socket "agent.sock": expected an absolute path"#),
        (json!({ "stateDir": 1 }), "stateDir 1: expected a string"),
        (json!({ "statusGraceSeconds": 1.5 }), "statusGraceSeconds 1.5: expected a whole number"),
        (json!({ "prevResult": [] }), "prevResult: expected an object"),
        (
            json!({ "prevResult": { "ips": [{ "address": "10.0.0.1" }] } }),
            r#"address "10.0.0.1": expected address/length"#,
        ),
    ] {
        refused(&add, &with(more), 7, words);
    }
    let check = about("CHECK", "/x");
    refused(&check, &with(json!({})), 7, "prevResult is missing");
    let other = json!({ "prevResult": { "interfaces": [{ "name": "eth1", "sandbox": "/x" }], "ips": [] } });
    refused(&check, &with(other), 7, "prevResult has no address of interface eth0");
    let gc = [("CNI_COMMAND", "GC")];
    refused(&gc, &with(json!({})), 7, "cni.dev/valid-attachments is missing");
    refused(&gc, &with(json!({ "cni.dev/valid-attachments": [{ "containerID": "c1" }] })), 7, "expected a list of");
    refused(&gc, &with(json!({ "cni.dev/valid-attachments": "all" })), 7, "expected a list of");
}

#[test]
fn commands_are_refused_in_versions_that_lack_them() {
    for (command, version, since) in
        [("CHECK", "0.3.1", "0.4.0"), ("GC", "1.0.0", "1.1.0"), ("STATUS", "0.4.0", "1.1.0")]
    {
        let stdin = conf(std::path::Path::new("/nonexistent"), version, json!({}));
        let words = format!("{command} needs cniVersion {since}, the configuration has {version}");
        refused(&about(command, "/x"), &stdin, 1, &words);
    }
}

#[test]
fn what_runtimes_add_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let more = json!({
        "args": { "cni": {} }, "ipMasq": true, "ipam": {}, "dns": {}, "runtimeConfig": {}, "capabilities": {},
        "cni.dev/whatever": 1, "loadOnlyInlinedPlugins": false, "disableCheck": false, "prevResult": null,
    });
    let (code, message) = run(&about("ADD", "/x"), &conf(dir.path(), "1.1.0", more)).error();
    assert_eq!(code, 11, "understood, and then the agent is away: {message}");
}

#[test]
fn an_error_is_in_the_version_of_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let answer = run(&about("ADD", "/x"), &conf(dir.path(), version, json!({ "odd": 1 })));
        assert_eq!(answer.json()["cniVersion"], version);
    }
}
