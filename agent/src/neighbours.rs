//! Who else does this agent's work on the node: a kube-proxy's rules in the kernel, another plugin's configuration where the
//! container runtime looks. Named, not removed: they are somebody's.

use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::Duration;

use keelway_cni::install::{BINARY_FILE, CONFLIST_FILE};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use tokio::sync::watch;

use crate::install;

/// Where runtimes look for plugins' configurations.
pub const CONF_DIR: &str = "/etc/cni/net.d";
const PERIOD: Duration = Duration::from_secs(30);

/// Looks around from time to time; `found` holds what was seen last, in words.
pub async fn watch(found: watch::Sender<Vec<String>>) {
    loop {
        let look = || kube_proxy().into_iter().chain(configurations(Path::new(CONF_DIR))).collect::<Vec<_>>();
        let now = tokio::task::spawn_blocking(look).await.unwrap_or_default();
        for new in now.iter().filter(|new| !found.borrow().contains(new)) {
            tracing::warn!("{new}");
        }
        found.send_replace(now);
        tokio::time::sleep(PERIOD).await;
    }
}

/// What a kube-proxy has put into this network namespace, if anything. Rules of iptables' old back end are not seen.
pub fn kube_proxy() -> Option<String> {
    // Without nftables in the kernel there is nothing to find; anything else that goes wrong says no more than that.
    let chains = chains().unwrap_or_default();
    let is_its = |(table, chain): &&(String, String)| table == "kube-proxy" || chain == "KUBE-SERVICES";
    let (table, chain) = chains.iter().find(is_its)?;
    let place = if table == "kube-proxy" { "nftables".to_owned() } else { format!("iptables, {table} {chain}") };
    Some(format!(
        "kube-proxy runs on this node or has run and left its rules ({place}): they translate Services too; stop it, then \
         `kube-proxy --cleanup` removes them"
    ))
}

/// Other plugins' configurations that a runtime would take before ours, and one that took our file's name.
pub fn configurations(dir: &Path) -> Vec<String> {
    let (before, _) = install::foreign(dir).unwrap_or_default();
    let before = before.into_iter().map(|file| format!("sorts before {CONFLIST_FILE}: {file}"));
    let replaced =
        install::foreign_owner(dir).map(|network| format!("is in the place of ours: {CONFLIST_FILE} ({network})"));
    let what = "the container runtime uses another network plugin's configuration, which";
    before.chain(replaced).map(|which| format!("{}: {what} {which}; ours names {BINARY_FILE}", dir.display())).collect()
}

// `<linux/netfilter/nf_tables.h>`, `<linux/netfilter/nfnetlink.h>`, `<linux/netlink.h>`.
const GET_CHAIN: u16 = 10 << 8 | 4;
const NEW_CHAIN: u16 = 10 << 8 | 3;
const REQUEST_DUMP: u16 = 0x301;
const DONE: u16 = 3;
const ERROR: u16 = 2;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
/// Of a message (length, type, flags, sequence, port) and of nfnetlink's own header (family, version, resource).
const HEADER: usize = 16;
const GENERIC: usize = 4;

/// Table and name of every nftables chain of every family; iptables' usual back end keeps its rules there too.
fn chains() -> nix::Result<Vec<(String, String)>> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
    let mut request = Vec::with_capacity(HEADER + GENERIC);
    request.extend(((HEADER + GENERIC) as u32).to_ne_bytes());
    request.extend(GET_CHAIN.to_ne_bytes());
    request.extend(REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 8 + GENERIC]);
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let (mut found, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some((kind, body, after)) = message(rest) {
            match kind {
                NEW_CHAIN => found.extend(body.get(GENERIC..).and_then(chain)),
                DONE | ERROR => return Ok(found),
                _ => {}
            }
            rest = after;
        }
    }
}

/// The first message: its type, what it carries, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    Some((kind, bytes.get(HEADER..length)?, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn chain(mut attributes: &[u8]) -> Option<(String, String)> {
    let (mut table, mut name) = (None, None);
    while let Some(length) = attributes.get(..2) {
        let length = usize::from(u16::from_ne_bytes(length.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let text = || Some(String::from_utf8_lossy(attributes.get(4..length)?).trim_end_matches('\0').to_owned());
        match kind {
            CHAIN_TABLE => table = text(),
            CHAIN_NAME => name = text(),
            _ => {}
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..).unwrap_or_default();
    }
    table.zip(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, text: &str) -> Vec<u8> {
        let mut bytes = (text.len() as u16 + 5).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(text.bytes());
        bytes.resize(bytes.len() + 1, 0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn reads_chains_and_survives_what_is_cut() {
        let bytes =
            [attribute(CHAIN_TABLE, "nat"), attribute(2, "12345678"), attribute(CHAIN_NAME, "KUBE-SERVICES")].concat();
        assert_eq!(chain(&bytes), Some(("nat".into(), "KUBE-SERVICES".into())));
        for length in 0..bytes.len() {
            let _ = chain(&bytes[..length]);
        }
        assert_eq!(message(&[4, 0, 0, 0, 1, 0]), None);
        assert_eq!(message(&[0; 20]), None, "a length of nothing would be read for ever");
    }

    #[test]
    fn a_configuration_in_our_place_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(configurations(dir.path()), Vec::<String>::new());
        std::fs::write(dir.path().join("00-other.conf"), r#"{"name": "other"}"#).unwrap();
        let ours = dir.path().join(CONFLIST_FILE);
        std::fs::write(&ours, r#"{"name": "thief", "plugins": [{"type": "bridge"}]}"#).unwrap();
        let found = configurations(dir.path()).join("\n");
        assert!(
            found.contains(r#"00-other.conf (network "other")"#) && found.contains(r#"network "thief""#),
            "{found}"
        );
        std::fs::write(&ours, r#"{"name": "mine", "plugins": [{"type": "keelway-cni"}, {"type": "portmap"}]}"#)
            .unwrap();
        assert_eq!(configurations(dir.path()).len(), 1);
        // Cut by a crash of someone's editor: ours to write again, not another's.
        std::fs::write(&ours, r#"{"name": "mi"#).unwrap();
        assert_eq!(configurations(dir.path()).len(), 1);
    }
}
