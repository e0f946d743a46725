use std::path::Path;

use clap::{CommandFactory, Parser};

use super::*;

const MOUNTINFO: &str = "\
24 29 0:22 / /proc rw shared:5 - proc proc rw
30 29 0:26 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro
31 30 0:27 /sub /mnt/part rw - cgroup2 cgroup2 rw
32 30 0:27 / /sys/fs/cgroup/uni\\040fied rw shared:10 master:1 - cgroup2 cgroup2 rw,nsdelegate
";

fn host() -> Host {
    Host {
        node_name: None,
        hostname: "Node-A".to_owned(),
        mountinfo: MOUNTINFO.to_owned(),
        cgroup: "0::/system.slice/keelway-agent.service\n".to_owned(),
        first_cgroup_namespace: true,
    }
}

fn flags(arguments: &[&str]) -> Flags {
    Cli::parse_from(["keelway-agent"].iter().chain(arguments)).flags
}

fn both(arguments: &[&str], file: &str) -> Result<Config, ConfigError> {
    let file = host::parse_file(Path::new("agent.yaml"), file)?;
    check::check(&flags(arguments), &file, &host())
}

fn error(arguments: &[&str], file: &str) -> String {
    both(arguments, file).unwrap_err().to_string()
}

#[test]
fn defaults() {
    let config = both(&[], "").unwrap();
    assert_eq!(config.source, SourceConfig::InCluster { api_servers: vec![] });
    assert_eq!(config.node_name, "node-a");
    assert_eq!(config.cgroup_root, Path::new("/sys/fs/cgroup/uni fied"));
    assert_eq!(config.pin_dir(), Path::new("/sys/fs/bpf/keelway"));
    assert_eq!(config.socket(), Path::new("/run/keelway/agent.sock"));
    assert_eq!((config.routing, config.mtu, config.vxlan_port), (Routing::Vxlan, None, 8472));
    assert_eq!(config.snat_ports, PortRange { first: 61000, last: 64511 });
    assert_eq!(config.metrics_addr.unwrap().to_string(), "127.0.0.1:9965");
    assert_eq!(config.healthz_addr.unwrap().to_string(), ":10256");
    assert_eq!(config.status_grace, Duration::from_secs(300));
    assert!(config.devices.is_empty());
    assert_eq!(config.xdp, Xdp::Off);
}

#[test]
fn every_flag_is_a_key_and_flags_win() {
    let file = "
manifests: /m
node-name: from-file
cgroup-root: /cg
bpffs: /b
state-dir: /s
run-dir: /r
routing: routed
devices: [eth0, eth1]
mtu: 1400
vxlan-port: 4789
snat-ports: 30000-30001
metrics-addr: '[::1]:1'
healthz-addr: off
status-grace: 90s
";
    let config = both(&["--node-name", "from-flag", "--mtu", "9000"], file).unwrap();
    assert_eq!(config.source, SourceConfig::Manifests { dir: "/m".into() });
    assert_eq!((&*config.node_name, config.mtu), ("from-flag", Some(9000)));
    assert_eq!(config.devices, ["eth0", "eth1"]);
    assert_eq!(config.snat_ports, PortRange { first: 30000, last: 30001 });
    assert_eq!(config.metrics_addr.unwrap().to_string(), "[::1]:1");
    assert_eq!(config.healthz_addr, None);
    assert_eq!(config.status_grace, Duration::from_secs(90));
    for argument in Cli::command().get_arguments() {
        let name = argument.get_long().unwrap_or_default();
        if !matches!(name, "" | "config" | "help" | "version") {
            let line = format!("{name}: x");
            assert!(host::parse_file(Path::new("f"), &line).is_ok(), "--{name} is not a key of the file");
        }
    }
}

#[test]
fn a_flag_that_names_a_source_overrides_the_files_choice() {
    let config = both(&["--kubeconfig", "k"], "manifests: /m").unwrap();
    assert_eq!(config.source, SourceConfig::Kubeconfig { path: "k".into(), api_servers: vec![] });
    let config = both(&["--api-servers", "https://10.0.0.1:6443/, https://[fd00::1]"], "").unwrap();
    let api_servers = vec!["https://10.0.0.1:6443".to_owned(), "https://[fd00::1]".to_owned()];
    assert_eq!(config.source, SourceConfig::InCluster { api_servers });
}

#[test]
fn errors_name_the_field_the_value_and_what_was_expected() {
    for (arguments, expected) in [
        (["--mtu", "12"], r#"mtu: "12" is not auto or a number from 1280 to 65535"#),
        (["--vxlan-port", "0"], r#"vxlan-port: "0" is not a port from 1 to 65535"#),
        (["--snat-ports", "9-1"], r#"snat-ports: "9-1" is not a range FIRST-LAST of ports from 1024 to 65535"#),
        (["--routing", "bgp"], r#"routing: "bgp" is not vxlan or routed"#),
        (["--load-balancer-mode", "l2"], r#"load-balancer-mode: "l2" is not snat, dsr or hybrid"#),
        (["--xdp", "fast"], r#"xdp: "fast" is not off, native, generic or auto"#),
        (["--bpffs", "sys"], r#"bpffs: "sys" is not an absolute path"#),
        (["--status-grace", "5"], r#"status-grace: "5" is not a whole number with its unit, such as 90s, 5m or 1h"#),
        (["--metrics-addr", "9965"], r#"metrics-addr: "9965" is not IP:PORT, [IPv6]:PORT, :PORT or off"#),
        (
            ["--devices", "a/b"],
            r#"devices: "a/b" is not auto, or device names of 1 to 15 characters, separated by commas"#,
        ),
        (
            ["--node-name", "A_b"],
            r#"node-name: "A_b" is not a node name: lower case letters, digits, '-' and '.', at most 253 characters"#,
        ),
        (
            ["--api-servers", "10.0.0.1"],
            r#"api-servers: "10.0.0.1" is not a list of https://HOST[:PORT] URLs, separated by commas"#,
        ),
    ] {
        assert_eq!(error(&arguments, ""), expected);
    }
    let two = error(&["--kubeconfig", "k", "--manifests", "m"], "");
    assert_eq!(two, r#"kubeconfig ("k") and manifests ("m"): expected one source, not two"#);
}

#[test]
fn unknown_and_broken_keys_are_named_with_the_file() {
    let unknown = error(&[], "mtu: 1400\nmut: 1400\n");
    assert!(unknown.starts_with("agent.yaml: ") && unknown.contains("unknown field `mut`"), "{unknown}");
    let broken = error(&[], "mtu: {a: 1}\n");
    assert!(broken.starts_with("agent.yaml: mtu: "), "{broken}");
}

#[test]
fn a_named_file_must_be_there_and_a_host_without_cgroup_v2_is_named() {
    let error = Config::load(&flags(&["--config", "/nonexistent/agent.yaml"]), &host()).unwrap_err().to_string();
    assert!(error.starts_with("--config /nonexistent/agent.yaml: No such file"), "{error}");
    let bare = Host { mountinfo: String::new(), ..host() };
    let error = check::check(&flags(&[]), &Flags::default(), &bare).unwrap_err().to_string();
    assert!(error.starts_with("cgroup-root: not set, and no cgroup v2"), "{error}");
    let container = Host {
        mountinfo: "913 912 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n".to_owned(),
        cgroup: "0::/\n".to_owned(),
        first_cgroup_namespace: false,
        ..host()
    };
    let error = check::check(&flags(&[]), &Flags::default(), &container).unwrap_err().to_string();
    assert!(error.starts_with("cgroup-root: not set, and only this container's part"), "{error}");
}

#[test]
fn subcommands() {
    Cli::command().debug_assert();
    let run = Cli::parse_from(["keelway-agent", "run", "--mtu", "1400"]);
    assert!(matches!(run.command, Some(Command::Run(flags)) if flags.mtu == Some(Text("1400".to_owned()))));
    assert!(matches!(Cli::parse_from(["keelway-agent", "version"]).command, Some(Command::Version)));
    assert!(Cli::try_parse_from(["keelway-agent", "--mtu", "1400", "version"]).is_err());
    let install = Cli::parse_from(["keelway-agent", "install-cni", "--bin-dir", "/b"]);
    assert!(matches!(install.command, Some(Command::InstallCni(args)) if args.bin_dir == Path::new("/b")));
}

#[test]
fn node_port_addresses_are_told_for_each_family() {
    let all = |text: &str| {
        let addresses = both(&["--nodeport-addresses", text], "").unwrap().nodeport_addresses;
        [addresses.is_all(false), addresses.is_all(true)]
    };
    assert_eq!(all("all"), [true, true]);
    assert_eq!(all("primary"), [false, false]);
    assert_eq!(all("10.0.0.0/8"), [false, true], "nothing is said of IPv6");
    assert_eq!(all("fd00::/8"), [true, false]);
    assert_eq!(all("10.0.0.0/8,fd00::/8"), [false, false]);
    assert_eq!(all("10.0.0.0/8, 0.0.0.0/0, fd00::/8"), [true, false], "all of a family is all of it");
    assert_eq!(all("0.0.0.0/0"), [true, true]);
}
