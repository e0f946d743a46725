//! Links, namespaces and sysctl against the kernel. Needs root.

mod common;

use common::Ns;
use keelway_netlink::{AddrGenMode, Error, Handle, Netns, OnMismatch, Veth, Vxlan, netns, sysctl};
use nix::errno::Errno;

const NEAR: [u8; 6] = [0x02, 1, 2, 3, 4, 5];
const FAR: [u8; 6] = [0x06, 5, 4, 3, 2, 1];

fn pair<'a>(name: &'a str, peer_name: &'a str, peer_netns: Option<&'a Netns>) -> Veth<'a> {
    Veth { name, mac: Some(NEAR), peer_name, peer_mac: Some(FAR), peer_netns, mtu: 1450 }
}

#[tokio::test]
async fn a_veth_is_born_with_its_far_end_in_the_other_namespace() {
    let (a, b) = (Ns::new(), Ns::new());
    let (near, far) = (a.handle().await, b.handle().await);
    near.create_veth(&pair("kwa", "eth0", Some(&b.open()))).await.unwrap();

    let seen = a.json("link show dev kwa");
    assert_eq!(seen[0]["address"], "02:01:02:03:04:05");
    assert_eq!(seen[0]["mtu"], 1450);
    assert_eq!(seen[0]["linkinfo"]["info_kind"], "veth");
    let peer = b.json("link show dev eth0");
    assert_eq!(peer[0]["address"], "06:05:04:03:02:01");
    assert_eq!(peer[0]["mtu"], 1450);
    assert_eq!(a.json("link show").as_array().unwrap().len(), 2, "lo and kwa only: the far end never was here");

    let link = near.link("kwa").await.unwrap().expect("kwa");
    let other = far.link("eth0").await.unwrap().expect("eth0");
    assert_eq!((link.mac, link.mtu, link.kind.as_str(), link.up), (Some(NEAR), 1450, "veth", false));
    assert_eq!((link.peer_index, other.peer_index), (Some(other.index), Some(link.index)));
    assert!(link.peer_netnsid.is_some());
    assert_eq!(near.link_by_index(link.index).await.unwrap(), Some(link.clone()));
    assert_eq!(near.links().await.unwrap().iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["lo", "kwa"]);

    let again = near.create_veth(&pair("kwa", "eth1", Some(&b.open()))).await.unwrap_err();
    assert_eq!(again.errno(), Some(Errno::EEXIST), "{again}");
    assert!(again.to_string().contains("kwa"), "{again}");

    assert!(near.delete_link("kwa").await.unwrap());
    assert!(!near.delete_link("kwa").await.unwrap(), "absent is fine and said");
    assert_eq!(far.link("eth0").await.unwrap(), None);
    assert_eq!(near.link_by_index(link.index).await.unwrap(), None);
    assert!(matches!(near.require_link("kwa").await, Err(Error::NoLink { .. })));
    assert!(matches!(near.link("kw/a").await, Err(Error::BadName(_))));
}

#[tokio::test]
async fn a_link_is_changed() {
    let ns = Ns::new();
    let handle = ns.handle().await;
    handle.create_veth(&pair("kwa", "kwb", None)).await.unwrap();
    let index = handle.require_link("kwa").await.unwrap().index;
    handle.set_mtu(index, 1280).await.unwrap();
    handle.set_mac(index, FAR).await.unwrap();
    handle.set_arp(index, false).await.unwrap();
    handle.set_addr_gen_mode(index, AddrGenMode::None).await.unwrap();
    handle.rename(index, "kwc").await.unwrap();
    handle.set_up(index, true).await.unwrap();

    let seen = ns.json("link show dev kwc")[0].clone();
    assert_eq!(seen["mtu"], 1280);
    assert_eq!(seen["address"], "06:05:04:03:02:01");
    assert_eq!(seen["inet6_addr_gen_mode"], "none");
    let flags = seen["flags"].as_array().unwrap();
    assert!(flags.contains(&"NOARP".into()) && flags.contains(&"UP".into()), "{flags:?}");
    assert!(flags.contains(&"NO-CARRIER".into()), "its peer is down: {flags:?}");
    let link = handle.require_link("kwc").await.unwrap();
    assert!(link.up && !link.carrier && !link.arp);

    handle.set_arp(index, true).await.unwrap();
    handle.set_up(index, false).await.unwrap();
    let link = handle.require_link("kwc").await.unwrap();
    assert!(!link.up && link.arp);
    let refused = handle.set_mtu(index, 10).await.unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::EINVAL));
    assert!(refused.to_string().contains("mtu less than device minimum"), "the kernel's own words: {refused}");
    assert!(handle.set_mtu(9999, 1400).await.unwrap_err().is_absent());
}

#[tokio::test]
async fn the_vxlan_device_is_kept_when_it_fits_and_named_when_it_does_not() {
    let ns = Ns::new();
    let handle = ns.handle().await;
    let mut wanted = Vxlan { name: "kwvx", port: 18472, mtu: 1450, mac: Some(NEAR) };
    let first = handle.ensure_vxlan(&wanted, OnMismatch::Fail).await.unwrap();
    let seen = ns.json("link show dev kwvx")[0].clone();
    let data = &seen["linkinfo"]["info_data"];
    assert_eq!(data["external"], true, "{data}");
    assert_eq!(data["port"], 18472);
    assert_eq!(data["udp_zero_csum6_tx"], true);
    assert_eq!(data["udp_zero_csum6_rx"], true);
    assert_eq!(data["learning"], false);
    assert_eq!((seen["mtu"].clone(), seen["address"].clone()), (1450.into(), "02:01:02:03:04:05".into()));
    assert!(seen["flags"].as_array().unwrap().contains(&"UP".into()));
    // Both underlays: the device listens on both.
    let sockets = ns.exec("ss -Hlnu");
    assert!(sockets.contains("0.0.0.0:18472") && sockets.contains("[::]:18472"), "{sockets}");

    wanted.mtu = 1400;
    let kept = handle.ensure_vxlan(&wanted, OnMismatch::Fail).await.unwrap();
    assert_eq!((kept.index, kept.mtu, kept.up), (first.index, 1400, true));

    wanted.port = 18473;
    let differs = handle.ensure_vxlan(&wanted, OnMismatch::Fail).await.unwrap_err();
    assert_eq!(differs.to_string(), r#"link "kwvx" exists with port = 18472, wanted 18473"#);
    let made = handle.ensure_vxlan(&wanted, OnMismatch::Recreate).await.unwrap();
    assert_ne!(made.index, first.index);
    assert_eq!(ns.json("link show dev kwvx")[0]["linkinfo"]["info_data"]["port"], 18473);

    handle.create_veth(&pair("kwa", "kwb", None)).await.unwrap();
    let foreign = Vxlan { name: "kwa", ..wanted };
    let differs = handle.ensure_vxlan(&foreign, OnMismatch::Fail).await.unwrap_err();
    assert!(matches!(differs, Error::LinkDiffers { field: "kind", .. }), "{differs}");
}

#[tokio::test]
async fn namespaces_are_told_apart() {
    let (a, b) = (Ns::new(), Ns::new());
    assert_eq!(a.open().id().unwrap(), a.open().id().unwrap());
    assert_ne!(a.open().id().unwrap(), b.open().id().unwrap());
    let inode = a.exec("readlink /proc/self/ns/net");
    assert_eq!(inode.trim(), format!("net:[{}]", a.open().id().unwrap().ino));

    let (ca, cb) = (a.open().cookie().await.unwrap(), b.open().cookie().await.unwrap());
    assert_ne!(ca, cb);
    assert_eq!(ca, a.open().cookie().await.unwrap());
    let own = netns::own_cookie().unwrap();
    assert!(own != ca && own != cb, "the caller's thread stayed where it was");
    assert_eq!(Netns::current().unwrap().cookie().await.unwrap(), own);

    assert!(matches!(Netns::open("/run/netns/kwnc-none"), Err(Error::NetnsAbsent { .. })));
    assert!(matches!(Netns::open("/etc/passwd"), Err(Error::Netns { .. })));
    let wrong_kind = Netns::open("/proc/self/ns/uts").unwrap();
    let refused = Handle::open_in(&wrong_kind).await.unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::EINVAL), "{refused}");
    let panicked = a.open().run(|| -> keelway_netlink::Result<()> { panic!("on purpose") }).await.unwrap_err();
    assert!(matches!(panicked, Error::Broken { .. }));
}

#[tokio::test]
async fn a_handle_closes_its_socket_when_dropped() {
    let sockets = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        links.filter(|f| std::fs::read_link(f.path()).is_ok_and(|t| t.to_string_lossy().starts_with("socket:"))).count()
    };
    let ns = Ns::new();
    let before = sockets();
    let handle = ns.handle().await;
    let clone = handle.clone();
    drop(handle);
    assert_eq!(clone.links().await.unwrap().len(), 1, "the clone still works");
    assert!(sockets() > before);
    drop(clone);
    for _ in 0..6000 {
        if sockets() <= before {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("the handle's socket is still open");
}

#[tokio::test]
async fn sysctl_is_the_namespaces_own() {
    let ns = Ns::new();
    let key = "net/ipv4/ip_forward";
    let before = sysctl::read(key).unwrap();
    let other = if before == "1" { "0" } else { "1" };
    sysctl::write_in(&ns.open(), vec![(key.into(), other.into())]).await.unwrap();
    assert_eq!(sysctl::read_in(&ns.open(), key).await.unwrap(), other);
    assert_eq!(ns.exec("cat /proc/sys/net/ipv4/ip_forward").trim(), other);
    assert_eq!(sysctl::read(key).unwrap(), before, "ours did not change");

    let missing = sysctl::read_in(&ns.open(), "net/ipv4/conf/nodev/rp_filter").await.unwrap_err();
    assert_eq!(
        missing.to_string(),
        "sysctl net/ipv4/conf/nodev/rp_filter: read: No such file or directory (os error 2)"
    );
    let refused = sysctl::write_in(&ns.open(), vec![(key.into(), "many".into())]).await.unwrap_err();
    assert_eq!(refused.to_string(), r#"sysctl net/ipv4/ip_forward: write "many": Invalid argument (os error 22)"#);
}
