//! The plan of an attachment: names, the order of its steps, and what goes into the conflist.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;

use keelway_cni::LeaseKey;
use keelway_cni::install::{Conflist, install_binary, install_conflist, write_atomically};
use keelway_cni::plan::{Mac, Plan, Side, Step, Undo, host_ifname, host_mac, node_sysctls, pod_mac};
use keelway_cni::spec::{Env, Request};
use proptest::prelude::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn plan(addresses: &[&str]) -> Plan {
    let addresses: Vec<_> = addresses.iter().map(|a| ip(a)).collect();
    Plan::of(&LeaseKey::new("c1", "eth0"), &addresses, 1450, &[ip("10.244.1.1"), ip("fd00:244:1::1")])
}

#[test]
fn names_never_change() {
    // Pinned: a new build must find what an old one made.
    let key = LeaseKey::new("c1", "eth0");
    let found = (host_ifname(&key), host_mac(&key).to_string(), pod_mac(&key).to_string());
    assert_eq!(found, ("kw047449ba7e88b".into(), "32:52:6b:ae:7a:e7".into(), "1a:da:49:0a:9f:5b".into()));
}

#[test]
fn steps_read_like_this() {
    let plan = plan(&["10.244.1.7", "fd00:244:1::7"]);
    let host = plan.host_ifname.clone();
    let lines: Vec<String> = plan.steps().iter().map(words).collect();
    let wanted = format!(
        "create
host net/ipv4/conf/{host}/forwarding=1
host net/ipv6/conf/{host}/disable_ipv6=0
host net/ipv6/conf/{host}/addr_gen_mode=1
host net/ipv6/conf/{host}/accept_ra=0
host net/ipv6/conf/{host}/accept_dad=0
host net/ipv6/conf/{host}/forwarding=1
host up
host neighbour 10.244.1.7 is the pod
host route 10.244.1.7/32 src 10.244.1.1
host neighbour fd00:244:1::7 is the pod
host route fd00:244:1::7/128 src fd00:244:1::1
pod net/ipv6/conf/eth0/disable_ipv6=0
pod net/ipv6/conf/eth0/accept_dad=0
pod net/ipv6/conf/eth0/accept_ra=0
pod address 10.244.1.7/32
pod address fd00:244:1::7/128
hook
pod up
pod neighbour 169.254.1.1 is the host
pod route 0.0.0.0/0 via 169.254.1.1
pod neighbour fe80::1 is the host
pod route ::/0 via fe80::1"
    );
    assert_eq!(lines.join("\n"), wanted);
    let addresses = [ip("10.244.1.7"), ip("fd00:244:1::7")];
    let expected: Vec<Undo> = addresses
        .iter()
        .rev()
        .flat_map(|&a| [Undo::DeleteRoute { to: a.into() }, Undo::DeleteNeighbour { address: a }])
        .chain([Undo::DeleteVeth])
        .collect();
    assert_eq!(plan.undo(), expected);

    fn words(step: &Step) -> String {
        let side = |side: &Side| if *side == Side::Host { "host" } else { "pod" };
        match step {
            Step::CreateVeth => "create".into(),
            Step::Hook => "hook".into(),
            Step::Up { side: s } => format!("{} up", side(s)),
            Step::Sysctl { side: s, key, value } => format!("{} {key}={value}", side(s)),
            Step::Address { side: s, address } => format!("{} address {address}", side(s)),
            Step::Neighbour { side: s, address, mac } => {
                let key = LeaseKey::new("c1", "eth0");
                let whose = if *mac == host_mac(&key) { "host" } else { "pod" };
                assert!(whose == "host" || *mac == pod_mac(&key));
                format!("{} neighbour {address} is the {whose}", side(s))
            }
            Step::Route { side: s, to, via, src } => {
                let via = via.map(|ip| format!(" via {ip}")).unwrap_or_default();
                let src = src.map(|ip| format!(" src {ip}")).unwrap_or_default();
                format!("{} route {to}{via}{src}", side(s))
            }
        }
    }
}

#[test]
fn one_family_leaves_the_other_alone() {
    let steps = format!("{:?}", plan(&["10.244.1.7"]).steps());
    assert!(!steps.contains("ipv6") && !steps.contains("fe80::1"), "{steps}");
    let steps = format!("{:?}", plan(&["fd00:244:1::7"]).steps());
    assert!(!steps.contains("ipv4") && !steps.contains("169.254.1.1"), "{steps}");
    assert_eq!(node_sysctls(&[ip("10.0.0.1")]), [("net/ipv4/ip_forward".to_owned(), "1".to_owned())]);
    assert_eq!(node_sysctls(&[ip("fd00::1")]), [("net/ipv6/conf/all/forwarding".to_owned(), "1".to_owned())]);
}

proptest! {
    #[test]
    fn names_are_names_and_macs_are_local(container in "[a-zA-Z0-9][a-zA-Z0-9_.-]{0,80}", ifname in "[a-z0-9]{1,15}") {
        let key = LeaseKey::new(container, ifname);
        let name = host_ifname(&key);
        prop_assert!(name.len() == 15 && name.starts_with("kw") && name.bytes().all(|b| b.is_ascii_alphanumeric()));
        for mac in [host_mac(&key), pod_mac(&key)] {
            prop_assert_eq!(mac.0[0] & 0x03, 0x02, "locally administered, not multicast");
            prop_assert_eq!(mac.to_string().parse::<Mac>(), Ok(mac));
        }
        prop_assert_ne!(host_mac(&key), pod_mac(&key));
    }

    /// Whatever a runtime says, the answer is a request or an error, never a panic.
    #[test]
    fn calls_are_judged_not_believed(
        command in prop_oneof![Just("ADD"), Just("DEL"), Just("CHECK"), Just("GC"), Just("STATUS"), Just("VERSION"), Just("x")],
        id in ".{0,20}", ifname in ".{0,20}", args in ".{0,40}",
        stdin in prop_oneof![
            any::<Vec<u8>>(),
            "\\{\"cniVersion\": \"1.1.0\", \"name\": \"a\", \"(mtu|socket|prevResult|cni.dev/attachments)\": .{0,20}\\}".prop_map(String::into_bytes),
        ],
    ) {
        let env = Env { command: command.into(), container_id: id, netns: "/x".into(), ifname, args, path: String::new() };
        match Request::parse(&env, &stdin) {
            Ok(request) => prop_assert!(request.version().is_some() || command == "VERSION"),
            Err((error, version)) => {
                prop_assert!([1, 4, 6, 7].contains(&error.code), "{}", error);
                serde_json::from_str::<serde_json::Value>(&error.render(version)).expect("JSON");
            }
        }
    }
}

#[test]
fn keys_do_not_run_together() {
    let names: BTreeSet<_> = [("a", "b"), ("ab", ""), ("", "ab"), ("a", "bb"), ("aa", "b")]
        .map(|(container, ifname)| host_ifname(&LeaseKey::new(container, ifname)))
        .into_iter()
        .collect();
    assert_eq!(names.len(), 5);
}

#[test]
fn bad_macs_are_named() {
    for bad in ["", "02:00", "02:00:00:00:00:0", "02:00:00:00:00:00:00", "02-00-00-00-00-00", "zz:00:00:00:00:00"] {
        assert!(bad.parse::<Mac>().unwrap_err().contains("expected six hex bytes"), "{bad:?}");
    }
}

#[test]
fn the_conflist_is_what_runtimes_read() {
    let minimal: serde_json::Value = serde_json::from_str(&Conflist::default().render()).unwrap();
    assert_eq!(
        minimal,
        serde_json::json!({
            "cniVersion": "1.0.0",
            "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
            "name": "keelway",
            "plugins": [{ "type": "keelway-cni" }],
        })
    );
    let full = Conflist {
        network: "pods".into(),
        socket: Some("/run/k/agent.sock".into()),
        state_dir: Some("/var/lib/k/cni-del".into()),
        mtu: Some(1400),
        status_grace_seconds: Some(60),
    };
    let full: serde_json::Value = serde_json::from_str(&full.render()).unwrap();
    assert_eq!(full["name"], "pods");
    // The plugin takes every key that the conflist can hold.
    let mut conf = full["plugins"][0].clone();
    conf["cniVersion"] = "1.1.0".into();
    conf["name"] = full["name"].clone();
    let env = Env { command: "STATUS".into(), ..Env::default() };
    let Ok(Request::Status { conf }) = Request::parse(&env, conf.to_string().as_bytes()) else {
        panic!("refused: {conf}")
    };
    assert_eq!(
        (conf.socket.to_str(), conf.mtu, conf.status_grace.as_secs()),
        (Some("/run/k/agent.sock"), Some(1400), 60)
    );
    assert_eq!(conf.state_dir.to_str(), Some("/var/lib/k/cni-del"));
}

#[test]
fn files_are_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (etc, bin) = (dir.path().join("etc/cni/net.d"), dir.path().join("opt/cni/bin"));
    for mtu in [1400, 1500] {
        let path = install_conflist(&etc, &Conflist { mtu: Some(mtu), ..Conflist::default() }).unwrap();
        assert_eq!(path, etc.join("05-keelway.conflist"));
        assert!(std::fs::read_to_string(&path).unwrap().contains(&format!("\"mtu\": {mtu}")));
    }
    // A copy that runs is replaced without ETXTBSY, and goes on.
    let source = dir.path().join("new");
    std::fs::copy("/bin/sleep", &source).unwrap();
    let path = install_binary(&source, &bin).unwrap();
    let mut running = std::process::Command::new(&path).arg("60").spawn().unwrap();
    std::fs::write(&source, "another build").unwrap();
    install_binary(&source, &bin).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "another build");
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o755);
    assert!(running.try_wait().unwrap().is_none(), "the old copy still runs");
    running.kill().unwrap();
    running.wait().unwrap();
    for directory in [&etc, &bin] {
        assert_eq!(std::fs::read_dir(directory).unwrap().count(), 1, "no temporary file is left");
    }
    // A target that cannot be replaced leaves nothing behind either.
    std::fs::create_dir(etc.join("taken")).unwrap();
    assert!(write_atomically(&etc.join("taken"), b"x", 0o600).is_err());
    assert_eq!(std::fs::read_dir(&etc).unwrap().count(), 2);
}
