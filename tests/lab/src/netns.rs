//! The lab's network: one switch in a namespace of its own, and a namespace for each machine plugged into it.
//!
//! Nothing of it but the namespaces' names is visible outside, so that any number of labs use the same addresses.
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::sh::run;

/// Host number of the machine outside, which is also everyone's default gateway.
pub const OUTSIDE: u8 = 1;
/// Host number of the control plane.
pub const CONTROL_PLANE: u8 = 10;
/// Where the outside machine answers as if it were far away: addresses that nodes reach through their gateway only.
pub const FAR_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// See [`FAR_V4`].
pub const FAR_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10);

/// IPv4 address of the machine with this host number, in a /24.
pub fn v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, number)
}

/// IPv6 address of the machine with this host number, in a /64.
pub fn v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, u16::from(number))
}

/// What every namespace of the lab `id` starts with.
pub fn prefix(id: &str) -> String {
    format!("kw-{id}-")
}

/// The namespace of `host` in the lab `id`.
pub fn name(id: &str, host: &str) -> String {
    format!("{}{host}", prefix(id))
}

/// Makes the lab's switch.
pub fn make_switch(id: &str) -> Result<()> {
    let ns = name(id, "switch");
    run(&["ip", "netns", "add", &ns])?;
    run(&["ip", "-n", &ns, "link", "add", "switch", "type", "bridge"])?;
    run(&["ip", "-n", &ns, "link", "set", "switch", "up"])?;
    Ok(())
}

/// Makes a namespace for `host` and plugs it into the switch, both families addressed by its host number.
pub fn plug(id: &str, host: &str, number: u8) -> Result<()> {
    let (ns, switch, port) = (name(id, host), name(id, "switch"), port(host));
    run(&["ip", "netns", "add", &ns])?;
    run(&["ip", "-n", &ns, "link", "set", "lo", "up"])?;
    run(&["ip", "-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &ns])?;
    // As a real card's, it is the same after a power cut: the neighbours still know it.
    run(&["ip", "-n", &ns, "link", "set", "eth0", "address", &format!("02:4b:57:00:00:{number:02x}")])?;
    run(&["ip", "-n", &switch, "link", "set", &port, "master", "switch", "up"])?;
    run(&["ip", "-n", &ns, "addr", "add", &format!("{}/24", v4(number)), "dev", "eth0"])?;
    run(&["ip", "-n", &ns, "addr", "add", &format!("{}/64", v6(number)), "dev", "eth0", "nodad"])?;
    run(&["ip", "-n", &ns, "link", "set", "eth0", "up"])?;
    if number == OUTSIDE {
        run(&["ip", "-n", &ns, "addr", "add", &format!("{FAR_V4}/32"), "dev", "lo"])?;
        run(&["ip", "-n", &ns, "addr", "add", &format!("{FAR_V6}/128"), "dev", "lo", "nodad"])?;
    } else {
        // Without a default route a host's own connection to a Service address finds no way out of the host.
        run(&["ip", "-n", &ns, "route", "add", "default", "via", &v4(OUTSIDE).to_string()])?;
        run(&["ip", "-n", &ns, "-6", "route", "add", "default", "via", &v6(OUTSIDE).to_string()])?;
    }
    let sysctls = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"];
    run(&["ip", "netns", "exec", &ns, "sysctl", "-qw", sysctls[0], sysctls[1]])?;
    Ok(())
}

/// Takes `host` off the switch and forgets its namespace, which ends with its last process.
pub fn unplug(id: &str, host: &str) -> Result<()> {
    run(&["ip", "-n", &name(id, "switch"), "link", "del", &port(host)])?;
    run(&["ip", "netns", "del", &name(id, host)])?;
    Ok(())
}

/// Unplugs the cable of `host` (`up` false), or plugs it in again.
pub fn set_link(id: &str, host: &str, up: bool) -> Result<()> {
    run(&["ip", "-n", &name(id, "switch"), "link", "set", &port(host), if up { "up" } else { "down" }]).map(drop)
}

/// The switch's port of `host`.
pub fn port(host: &str) -> String {
    format!("p-{host}")
}
