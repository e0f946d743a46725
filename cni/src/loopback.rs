//! The `loopback` plugin, which container runtimes that do not bring up `lo` themselves call for every pod.
//!
//! It belongs to the runtime and not to a network: nothing here asks the agent. The plugin is this one when its file is
//! called [`NAME`], or when the configuration's `type` says so. Works on `lo` alone, whatever `CNI_IFNAME` says.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

use crate::spec::{CniError, Interface, IpConfig, Outcome, Request, code, render, version_answer};

/// Name of the plugin's file, and its `type`.
pub const NAME: &str = "loopback";

const LO: &str = "lo";
/// `LOOPBACK_IFINDEX`: the same in every namespace.
const INDEX: u32 = 1;

/// Whether the program was started to be this plugin.
#[must_use]
pub fn is_meant(program: &Path, request: &Request) -> bool {
    program.file_name().is_some_and(|name| name == NAME) || request.plugin() == Some(NAME)
}

/// Does what the request asks. The calling thread stays in the pod's namespace: for a program that ends afterwards.
///
/// # Errors
/// The error for stdout: code 3 without the namespace, 102 for a CHECK that fails.
pub fn run(request: &Request, netns: &str) -> Result<String, CniError> {
    match request {
        Request::Version { asked } => Ok(version_answer(asked)),
        Request::Add { conf, .. } => {
            enter(netns).map_err(|error| unknown(netns, &error))?;
            set_up(true).map_err(|error| failed("set lo up", &error))?;
            let addresses = state().map_err(|error| failed("read the addresses of lo", &error))?.addresses;
            let ip = |address| IpConfig { address, gateway: None, interface: Some(0) };
            let outcome = Outcome {
                interfaces: vec![Interface {
                    name: LO.into(),
                    mac: "00:00:00:00:00:00".into(),
                    mtu: None,
                    sandbox: Some(netns.into()),
                }],
                ips: addresses.into_iter().map(ip).collect(),
                routes: Vec::new(),
            };
            Ok(render(&outcome, conf.version, conf.prev.as_ref()))
        }
        Request::Check { .. } => {
            enter(netns).map_err(|error| unknown(netns, &error))?;
            let state = state().map_err(|error| failed("read the addresses of lo", &error))?;
            let lacks_own = !state.addresses.iter().any(|address| address.addr().is_loopback());
            if !state.up || lacks_own {
                let msg = format!("lo is {}, with {:?}", if state.up { "up" } else { "down" }, state.addresses);
                return Err(CniError::new(code::CHECK_FAILED, msg));
            }
            Ok(String::new())
        }
        Request::Del { .. } => {
            // Without a namespace there is nothing left to take back.
            if !netns.is_empty() && enter(netns).is_ok() {
                set_up(false).map_err(|error| failed("set lo down", &error))?;
            }
            Ok(String::new())
        }
        Request::Gc { .. } | Request::Status { .. } => Ok(String::new()),
    }
}

struct State {
    up: bool,
    addresses: Vec<IpNet>,
}

fn enter(netns: &str) -> io::Result<()> {
    Ok(setns(File::open(netns)?, CloneFlags::CLONE_NEWNET)?)
}

/// Of `lo` in the namespace of the calling thread.
fn state() -> io::Result<State> {
    let mut state = State { up: false, addresses: Vec::new() };
    for entry in getifaddrs()?.filter(|entry| entry.interface_name == LO) {
        state.up = entry.flags.contains(InterfaceFlags::IFF_UP);
        let ip = |storage: Option<nix::sys::socket::SockaddrStorage>| -> Option<IpAddr> {
            let storage = storage?;
            let v4 = storage.as_sockaddr_in().map(|socket| IpAddr::V4(socket.ip()));
            v4.or_else(|| storage.as_sockaddr_in6().map(|socket| IpAddr::V6(socket.ip())))
        };
        if let (Some(address), Some(mask)) = (ip(entry.address), ip(entry.netmask)) {
            state.addresses.extend(IpNet::with_netmask(address, mask));
        }
    }
    Ok(state)
}

/// One `RTM_NEWLINK` for `lo`, with `IFF_UP` as wanted (rtnetlink(7)): the agent's netlink would be a large part of a plugin
/// that is started for every pod.
fn set_up(up: bool) -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const REQUEST_AND_ACK: u16 = 0x1 | 0x4;
    const LENGTH: u32 = 32;
    const IFF_UP: u32 = 1;
    let flags = if up { IFF_UP } else { 0 };
    let mut message = Vec::with_capacity(LENGTH as usize);
    // nlmsghdr: length, type, flags, sequence number, port.
    message.extend(LENGTH.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(REQUEST_AND_ACK.to_ne_bytes());
    message.extend([0; 8]);
    // ifinfomsg: family and device type unspecified, index, flags, which of them to change.
    message.extend([0; 4]);
    message.extend(INDEX.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    sendto(socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 512];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // nlmsgerr: a negative errno behind the header, 0 for done.
    match answer[..length].get(16..20).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's acknowledgement is too short")),
    }
}

fn unknown(netns: &str, error: &io::Error) -> CniError {
    CniError::new(code::UNKNOWN_CONTAINER, format!("CNI_NETNS {netns:?}")).details(error.to_string())
}

fn failed(what: &str, error: &io::Error) -> CniError {
    CniError::new(code::IO_FAILURE, what).details(error.to_string())
}
