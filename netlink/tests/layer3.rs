//! Addresses, routes and neighbours against the kernel. Needs root.

mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::Ns;
use ipnet::IpNet;
use keelway_netlink::{
    AddressMonitor, AddressOptions, Handle, Neighbour, PROTOCOL_KEELWAY, Route, RouteFilter, RouteScope, TABLE_MAIN,
    Veth,
};
use nix::errno::Errno;

const ONCE: AddressOptions = AddressOptions { nodad: true, noprefixroute: true };

fn net(text: &str) -> IpNet {
    text.parse().expect("a CIDR")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A namespace with `kwa` and `kwb`, a pair that is up, and the index of `kwa`.
async fn with_pair() -> (Ns, Handle, u32) {
    let ns = Ns::new();
    let handle = ns.handle().await;
    let veth = Veth { name: "kwa", mac: None, peer_name: "kwb", peer_mac: None, peer_netns: None, mtu: 1500 };
    handle.create_veth(&veth).await.unwrap();
    for name in ["kwa", "kwb"] {
        let index = handle.require_link(name).await.unwrap().index;
        handle.set_up(index, true).await.unwrap();
    }
    let index = handle.require_link("kwa").await.unwrap().index;
    (ns, handle, index)
}

#[tokio::test]
async fn addresses_come_and_go() {
    let (ns, handle, index) = with_pair().await;
    for address in ["10.9.0.7/32", "fd00:9::7/128", "10.8.0.1/24"] {
        handle.replace_address(index, net(address), ONCE).await.unwrap();
        handle.replace_address(index, net(address), ONCE).await.unwrap();
    }
    let seen = ns.json("addr show dev kwa")[0]["addr_info"].clone();
    let of = |local: &str| seen.as_array().unwrap().iter().find(|a| a["local"] == local).cloned().expect("the address");
    assert_eq!(of("10.9.0.7")["prefixlen"], 32);
    assert_eq!(of("fd00:9::7")["prefixlen"], 128);
    assert_eq!(of("fd00:9::7")["nodad"], true);
    assert_eq!(of("fd00:9::7").get("tentative"), None);
    assert_eq!(of("10.8.0.1")["noprefixroute"], true);
    assert_eq!(ns.json("route show dev kwa").as_array().unwrap().len(), 0, "no prefix route for 10.8.0.0/24");

    let listed = handle.addresses(Some(index)).await.unwrap();
    let ours: Vec<_> = listed.iter().filter(|a| a.global).map(|a| a.address.to_string()).collect();
    assert_eq!(ours, ["10.9.0.7/32", "10.8.0.1/24", "fd00:9::7/128"]);
    assert!(listed.iter().filter(|a| a.global).all(|a| a.noprefixroute && !a.tentative && a.index == index));
    assert!(handle.addresses(None).await.unwrap().len() > listed.len(), "those of kwb and lo as well");

    assert!(handle.delete_address(index, net("fd00:9::7/128")).await.unwrap());
    assert!(!handle.delete_address(index, net("fd00:9::7/128")).await.unwrap());
    assert!(!ns.json("addr show dev kwa").to_string().contains("fd00:9::7"));
    assert!(handle.replace_address(9999, net("10.9.0.8/32"), ONCE).await.unwrap_err().is_absent());
    assert_eq!(handle.addresses(Some(9999)).await.unwrap(), []);
}

#[tokio::test]
async fn addresses_are_told_of_when_they_come_and_go() {
    let (ns, _handle, _index) = with_pair().await;
    let runtime = tokio::runtime::Handle::current();
    let netns = ns.open();
    let opened = netns.run(move || {
        let _entered = runtime.enter();
        AddressMonitor::open()
    });
    let mut monitor = opened.await.unwrap();
    for address in ["10.9.0.7/32", "fd00:9::7/128"] {
        for verb in ["add", "del"] {
            // Of others it says nothing, also while they change.
            ns.ip("addr add 10.7.0.1/32 dev kwb");
            ns.ip("addr del 10.7.0.1/32 dev kwb");
            ns.ip(&format!("addr {verb} {address} dev kwa"));
            let wanted = net(address).addr();
            let told = tokio::time::timeout(Duration::from_secs(60), monitor.changed(|it| *it == wanted)).await;
            assert_eq!(told, Ok(true), "{verb} {address}");
            // What IPv6 says more of it (that it is nobody else's) is over by the time that it is silent.
            while tokio::time::timeout(Duration::from_millis(1500), monitor.changed(|_| true)).await.is_ok() {}
        }
    }
    ns.ip("addr add 10.7.0.1/32 dev kwb");
    let silent = tokio::time::timeout(Duration::from_millis(200), monitor.changed(|it| *it == ip("10.7.0.2"))).await;
    assert!(silent.is_err(), "{silent:?}");
}

#[tokio::test]
async fn routes_come_and_go() {
    let (ns, handle, index) = with_pair().await;
    handle.replace_address(index, net("10.9.0.1/32"), ONCE).await.unwrap();
    handle.replace_address(index, net("fd00:9::1/128"), ONCE).await.unwrap();
    let direct4 = Route { src: Some(ip("10.9.0.1")), ..Route::dev(net("10.9.0.7/32"), index) };
    let direct6 = Route { src: Some(ip("fd00:9::1")), ..Route::dev(net("fd00:9::7/128"), index) };
    let default4 = Route::default_via(ip("169.254.1.1"), index);
    let default6 = Route::default_via(ip("fe80::1"), index);
    let tabled = Route { table: 1075, mtu: Some(1400), ..Route::via(net("10.7.0.0/16"), ip("192.0.2.1"), index) };
    let all = [&direct4, &direct6, &default4, &default6, &tabled];
    for route in all {
        handle.replace_route(route).await.unwrap();
        handle.replace_route(route).await.unwrap();
    }

    let v4 = ns.json("-4 route show").to_string();
    let seen = ns.json("-4 route show 10.9.0.7")[0].clone();
    assert_eq!((seen["dev"].as_str(), seen["scope"].as_str()), (Some("kwa"), Some("link")), "{v4}");
    assert_eq!((seen["prefsrc"].as_str(), seen["protocol"].as_str()), (Some("10.9.0.1"), Some("75")));
    let seen = ns.json("-4 route show default")[0].clone();
    assert_eq!((seen["gateway"].as_str(), seen["dev"].as_str()), (Some("169.254.1.1"), Some("kwa")));
    assert_eq!(seen["flags"], serde_json::json!(["onlink"]));
    let seen = ns.json("-6 route show default")[0].clone();
    assert_eq!((seen["gateway"].as_str(), seen["dev"].as_str()), (Some("fe80::1"), Some("kwa")));
    let seen = ns.json("-4 route show table 1075")[0].clone();
    assert_eq!((seen["dst"].as_str(), seen["gateway"].as_str()), (Some("10.7.0.0/16"), Some("192.0.2.1")));
    assert_eq!(seen["metrics"][0]["mtu"], 1400);

    let ours = handle.routes(RouteFilter { protocol: Some(PROTOCOL_KEELWAY), ..Default::default() }).await.unwrap();
    assert_eq!(ours.len(), all.len(), "{ours:#?}");
    let read_back = |route: &Route| ours.iter().find(|r| r.to == route.to && r.table == route.table).cloned();
    assert_eq!(read_back(&direct4), Some(direct4.clone()), "read back as written");
    assert_eq!(read_back(&default4), Some(default4.clone()));
    assert_eq!(read_back(&tabled), Some(tabled.clone()));
    let six = read_back(&direct6).unwrap();
    assert_eq!((six.src, six.priority), (direct6.src, Some(1024)));
    let main = RouteFilter { table: Some(TABLE_MAIN), index: Some(index), protocol: Some(PROTOCOL_KEELWAY) };
    assert_eq!(handle.routes(main).await.unwrap().len(), all.len() - 1);

    // A replacement replaces; it does not add.
    let other = Route { via: Some(ip("169.254.1.2")), ..default4.clone() };
    handle.replace_route(&other).await.unwrap();
    let defaults = ns.json("-4 route show default");
    assert_eq!((defaults.as_array().unwrap().len(), defaults[0]["gateway"].as_str()), (1, Some("169.254.1.2")));
    handle.replace_route(&default4).await.unwrap();

    for route in all {
        assert!(handle.delete_route(route).await.unwrap(), "{route:?}");
        assert!(!handle.delete_route(route).await.unwrap(), "absent is fine and said: {route:?}");
    }
    let left = RouteFilter { protocol: Some(PROTOCOL_KEELWAY), ..Default::default() };
    assert_eq!(handle.routes(left).await.unwrap(), []);
    let bad = Route { src: Some(ip("10.66.0.1")), ..direct4 };
    let refused = handle.replace_route(&bad).await.unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::EINVAL), "{refused}");
    assert!(refused.to_string().contains("10.66.0.1"), "names the route: {refused}");
}

#[tokio::test]
async fn scope_is_what_ip_says() {
    let (ns, handle, index) = with_pair().await;
    handle.replace_route(&Route { scope: RouteScope::Link, ..Route::dev(net("10.5.0.0/24"), index) }).await.unwrap();
    handle.replace_route(&Route { scope: RouteScope::Global, ..Route::dev(net("10.6.0.0/24"), index) }).await.unwrap();
    let link = ns.json("-4 route show 10.5.0.0/24")[0]["scope"].clone();
    let global = ns.json("-4 route show 10.6.0.0/24")[0].get("scope").cloned().unwrap_or("global".into());
    assert_eq!((link, global), ("link".into(), "global".into()));
}

#[tokio::test]
async fn neighbours_are_permanent() {
    let (ns, handle, index) = with_pair().await;
    let mac = [0x02, 9, 9, 9, 9, 9];
    for address in ["169.254.1.1", "fe80::1"] {
        handle.replace_neighbour(index, ip(address), [0x02, 1, 1, 1, 1, 1]).await.unwrap();
        handle.replace_neighbour(index, ip(address), mac).await.unwrap();
        let seen = ns.json(&format!("neigh show {address} dev kwa"))[0].clone();
        assert_eq!(seen["lladdr"], "02:09:09:09:09:09");
        assert_eq!(seen["state"], serde_json::json!(["PERMANENT"]));
        let listed = handle.neighbours(index).await.unwrap();
        let wanted = Neighbour { index, address: ip(address), mac: Some(mac), permanent: true };
        assert!(listed.contains(&wanted), "{listed:?}");
        assert!(handle.delete_neighbour(index, ip(address)).await.unwrap());
        assert!(!handle.delete_neighbour(index, ip(address)).await.unwrap());
    }
    assert!(handle.neighbours(index).await.unwrap().iter().all(|n| !n.permanent || n.address.is_multicast()));
}

#[tokio::test]
async fn a_missing_privilege_is_named() {
    // A child without capabilities, so that the test's own process keeps its own.
    if std::env::var_os("KEELWAY_UNPRIVILEGED").is_some() {
        let handle = Handle::open().unwrap();
        let refused = handle.delete_link("lo").await.unwrap_err();
        assert!(refused.to_string().contains("CAP_NET_ADMIN"), "{refused}");
        return;
    }
    let ns = Ns::new();
    let out = std::process::Command::new("setpriv")
        .args(["--bounding-set=-all", "--inh-caps=-all"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_missing_privilege_is_named", "--nocapture"])
        .env("KEELWAY_UNPRIVILEGED", "1")
        .output()
        .expect("setpriv of util-linux");
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.contains("1 passed"), "{}: {said}", ns.name);
}
