//! A plan against the kernel: pods in throw-away namespaces, packets between them, and the second opinion of `ip`.
//! Needs root. Run with `--features apply`.

#[path = "../../netlink/tests/common/mod.rs"]
mod common;

use std::future::Future;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::Ns;
use keelway_cni::apply::{ApplyError, Ends, apply, detach, verify};
use keelway_cni::plan::{Plan, node_sysctls};
use keelway_cni::{LeaseKey, plan};
use keelway_netlink::{AddressOptions, Handle, sysctl};

/// Runs `test` in a namespace that plays the node: forwarding, and with the node's addresses of the pod CIDRs.
fn on_a_node<F, Fut>(test: F)
where
    F: FnOnce(Ns, Handle) -> Fut + Send + 'static,
    Fut: Future<Output = ()>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let node = Ns::new();
        let netns = node.open();
        let done = netns.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let host = Handle::open()?;
                host.set_up(1, true).await?;
                for address in host_addresses() {
                    host.replace_address(1, address.into(), AddressOptions { nodad: true, noprefixroute: true })
                        .await?;
                }
                for (key, value) in node_sysctls(&host_addresses()) {
                    sysctl::write(&key, &value)?;
                }
                test(node, host).await;
                Ok(())
            })
        });
        done.await.unwrap();
    });
}

fn host_addresses() -> Vec<IpAddr> {
    ["10.244.1.1", "fd00:244:1::1"].map(|a| a.parse().unwrap()).to_vec()
}

fn plan_for(container: &str, last: u8) -> Plan {
    let addresses: Vec<IpAddr> =
        [format!("10.244.1.{last}"), format!("fd00:244:1::{last:x}")].map(|a| a.parse().unwrap()).to_vec();
    Plan::of(&LeaseKey::new(container, "eth0"), &addresses, 1450, &host_addresses())
}

/// Connects by TCP from `from` to `target`, which listens in `to`; the address that `to` sees.
async fn reach(from: &Ns, to: &Ns, target: &str) -> IpAddr {
    let target: IpAddr = target.parse().unwrap();
    let io = move |source| keelway_netlink::Error::Io { what: format!("reach {target}"), source };
    let listener = to.open().run(move || TcpListener::bind((target, 0)).map_err(io)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let dial = move || TcpStream::connect_timeout(&address, Duration::from_secs(30)).map_err(io);
    let _stream = from.open().run(dial).await.unwrap();
    listener.accept().unwrap().1.ip()
}

async fn no_hook(_: Ends) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    Ok(())
}

#[test]
fn a_pod_gets_what_was_planned_and_reaches_node_and_pods() {
    on_a_node(|node, host| async move {
        let (a, b) = (Ns::new(), Ns::new());
        let (plan_a, plan_b) = (plan_for("a1", 7), plan_for("b1", 8));
        let ends = apply(&plan_a, &host, &a.open(), no_hook).await.unwrap();
        apply(&plan_b, &host, &b.open(), no_hook).await.unwrap();

        assert_eq!(ends.netns_cookie, a.open().cookie().await.unwrap());
        let seen = node.json(&format!("link show dev {}", plan_a.host_ifname))[0].clone();
        assert_eq!((seen["ifindex"].as_u64(), seen["mtu"].as_u64()), (Some(ends.host_index.into()), Some(1450)));
        assert_eq!(seen["inet6_addr_gen_mode"], "none");
        let seen = a.json("addr show dev eth0")[0].clone();
        assert_eq!((seen["ifindex"].as_u64(), seen["operstate"].as_str()), (Some(ends.pod_index.into()), Some("UP")));
        assert_eq!(seen["address"], plan_a.pod_mac.to_string());
        let own: Vec<_> = seen["addr_info"].as_array().unwrap().iter().filter(|i| i["scope"] == "global").collect();
        assert_eq!((own[0]["local"].as_str(), own[0]["prefixlen"].as_u64()), (Some("10.244.1.7"), Some(32)));
        assert_eq!((own[1]["local"].as_str(), own[1]["prefixlen"].as_u64()), (Some("fd00:244:1::7"), Some(128)));
        // The pod's own address is usable at once. (The kernel gives the link-local one its moment, even without detection.)
        assert!(own.iter().all(|address| address["tentative"].is_null()), "duplicate address detection: {seen}");
        let route = a.json("-6 route show default")[0].clone();
        assert_eq!(route["gateway"], "fe80::1");
        let neighbour = a.json("neigh show 169.254.1.1")[0].clone();
        assert_eq!(neighbour["lladdr"], plan_a.host_mac.to_string());

        for (own, of_b, of_node) in
            [("10.244.1.7", "10.244.1.8", "10.244.1.1"), ("fd00:244:1::7", "fd00:244:1::8", "fd00:244:1::1")]
        {
            assert_eq!(reach(&a, &b, of_b).await.to_string(), own, "pod to pod");
            assert_eq!(reach(&a, &node, of_node).await.to_string(), own, "pod to node");
            assert_eq!(reach(&node, &a, own).await.to_string(), of_node, "node to pod, from its address of the CIDR");
        }
        assert_eq!(verify(&plan_a, &host, &a.open()).await.unwrap(), []);

        assert!(detach(&plan_a, &host).await.unwrap());
        assert!(!detach(&plan_a, &host).await.unwrap(), "absent is fine and said");
        assert_eq!(a.json("link show").as_array().unwrap().len(), 1, "only lo is left in the pod");
        assert!(!node.json("route show").to_string().contains("10.244.1.7"));
        assert_eq!(verify(&plan_b, &host, &b.open()).await.unwrap(), [], "the other pod was not touched");
    });
}

#[test]
fn the_hook_runs_before_the_pod_can_send_and_its_failure_leaves_nothing() {
    on_a_node(|node, host| async move {
        let pod = Ns::new();
        let plan = plan_for("c1", 9);
        let (name, pod_name, node_name) = (plan.host_ifname.clone(), pod.name.clone(), node.name.clone());
        let failed = apply(&plan, &host, &pod.open(), |ends| async move {
            let state = |ns: &str, dev: &str| common::sh(&format!("ip -n {ns} -o link show dev {dev}"));
            assert!(state(&node_name, &name).starts_with(&format!("{}:", ends.host_index)));
            assert!(state(&node_name, &name).contains(",UP"), "the host's end is up");
            assert!(!state(&pod_name, "eth0").contains("UP"), "the pod's end is not: {}", state(&pod_name, "eth0"));
            Err("no program today".into())
        })
        .await
        .unwrap_err();
        assert!(matches!(failed, ApplyError::Hook(_)));
        assert_eq!(failed.to_string(), "attach programs and policy: no program today");
        assert_eq!(pod.json("link show").as_array().unwrap().len(), 1);
        assert_eq!(node.json("link show").as_array().unwrap().len(), 1);
        assert!(!node.json("neigh show").to_string().contains("10.244.1.9"));
    });
}

#[test]
fn what_a_crashed_try_left_is_replaced_and_foreign_links_are_not() {
    on_a_node(|node, host| async move {
        let pod = Ns::new();
        let plan = plan_for("d1", 10);
        apply(&plan, &host, &pod.open(), no_hook).await.unwrap();
        node.ip("route del 10.244.1.10");
        apply(&plan, &host, &pod.open(), no_hook).await.unwrap();
        assert_eq!(verify(&plan, &host, &pod.open()).await.unwrap(), []);

        let other = plan_for("d2", 11);
        let refused = apply(&other, &host, &pod.open(), no_hook).await.unwrap_err();
        assert!(refused.to_string().contains("File exists") || refused.to_string().contains("EEXIST"), "{refused}");
        assert_eq!(verify(&plan, &host, &pod.open()).await.unwrap(), [], "the pod's first interface is as it was");
        assert_eq!(host.link(&other.host_ifname).await.unwrap(), None);

        // The pod's namespace goes away under us: the pair and its routes go with it, and detach says absent.
        drop(pod);
        for _ in 0..6000 {
            if host.link(&plan.host_ifname).await.unwrap().is_none() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert!(!detach(&plan, &host).await.unwrap());
    });
}

#[test]
fn verify_names_every_kind_of_damage() {
    on_a_node(|node, host| async move {
        let pod = Ns::new();
        let plan = plan_for("e1", 12);
        let name = plan.host_ifname.clone();
        type Damage = (&'static str, bool, String, &'static str);
        let damages: Vec<Damage> = vec![
            (
                "address",
                true,
                "addr del 10.244.1.12/32 dev eth0".into(),
                "address: wanted 10.244.1.12/32, found absent",
            ),
            ("mtu", true, "link set eth0 mtu 1400".into(), "mtu of eth0: wanted 1450, found 1400"),
            (
                "gateway",
                true,
                "route replace default via 169.254.1.9 dev eth0 onlink".into(),
                "route 0.0.0.0/0: wanted via 169.254.1.1, found via 169.254.1.9",
            ),
            (
                "neighbour",
                true,
                "neigh replace fe80::1 lladdr 02:00:00:00:00:01 dev eth0".into(),
                "neighbour fe80::1: wanted",
            ),
            ("down", true, "link set eth0 down".into(), "state of eth0: wanted up, found down"),
            (
                "host route",
                false,
                "route del 10.244.1.12".into(),
                "route 10.244.1.12/32: wanted direct src 10.244.1.1, found absent",
            ),
            ("host neighbour", false, format!("neigh del fd00:244:1::c dev {name}"), "neighbour fd00:244:1::c: wanted"),
            ("pair", false, format!("link del {name}"), "a veth, found absent"),
        ];
        for (what, in_pod, command, said) in damages {
            apply(&plan, &host, &pod.open(), no_hook).await.unwrap();
            assert_eq!(verify(&plan, &host, &pod.open()).await.unwrap(), [], "before: {what}");
            if in_pod {
                pod.ip(&command)
            } else {
                node.ip(&command)
            }
            let found = verify(&plan, &host, &pod.open()).await.unwrap();
            let text: Vec<_> = found.iter().map(ToString::to_string).collect();
            let side = if in_pod { "pod: " } else { "host: " };
            assert!(text.iter().any(|t| t.starts_with(side) && t.contains(said)), "{what}: {text:?}");
        }
    });
}

#[test]
fn one_family_is_enough() {
    on_a_node(|node, host| async move {
        for (container, address, target) in
            [("f4", "10.244.1.20", "10.244.1.1"), ("f6", "fd00:244:1::20", "fd00:244:1::1")]
        {
            let pod = Ns::new();
            let key = LeaseKey::new(container, "net1");
            let plan = Plan::of(&key, &[address.parse().unwrap()], 1500, &host_addresses());
            apply(&plan, &host, &pod.open(), no_hook).await.unwrap();
            assert_eq!(reach(&pod, &node, target).await.to_string(), address);
            assert_eq!(verify(&plan, &host, &pod.open()).await.unwrap(), []);
            detach(&plan, &host).await.unwrap();
        }
        assert_eq!(plan::gateway("10.0.0.1".parse().unwrap()).to_string(), "169.254.1.1");
    });
}

#[test]
fn how_long_an_attachment_takes() {
    on_a_node(|_, host| async move {
        let pod = Ns::new();
        let plan = plan_for("g1", 30);
        let (mut up, mut down) = (Vec::new(), Vec::new());
        for _ in 0..20 {
            let start = Instant::now();
            apply(&plan, &host, &pod.open(), no_hook).await.unwrap();
            up.push(start.elapsed());
            let start = Instant::now();
            detach(&plan, &host).await.unwrap();
            down.push(start.elapsed());
        }
        up.sort();
        down.sort();
        println!("apply median {:?} max {:?}; detach median {:?} max {:?}", up[10], up[19], down[10], down[19]);
        assert!(up[10].as_millis() < 500, "an attachment takes milliseconds, not {:?}", up[10]);
    });
}
