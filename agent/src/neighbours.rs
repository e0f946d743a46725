//! Who else does this agent's work on the node: a kube-proxy's rules in the kernel, another plugin's configuration where the
//! container runtime looks. Named, not removed: they are somebody's.

use std::path::Path;
use std::time::Duration;

use keelway_cni::install::{BINARY_FILE, CONFLIST_FILE};
use nix::net::if_::if_nametoindex;
use tokio::sync::watch;

use crate::cleanup::kube_proxy::ipvs::DEVICE;
use crate::install;
use crate::netfilter::nft::{self, Chain};

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
    let chains = nft::chains().unwrap_or_default();
    let is_its = |chain: &&nft::Chain| match chain.table.name.as_str() {
        "kube-proxy" => true,
        "nat" | "filter" => chain.name == "KUBE-SERVICES",
        _ => false,
    };
    let place = match chains.iter().find(is_its) {
        Some(Chain { table, .. }) if table.name == "kube-proxy" => "nftables".to_owned(),
        Some(Chain { table, name, .. }) => format!("iptables, {} {name}", table.name),
        None if if_nametoindex(DEVICE).is_ok() => format!("IPVS, {DEVICE}"),
        None => return None,
    };
    Some(format!(
        "kube-proxy runs on this node or has run and left its rules ({place}): they translate Services too; stop it, then \
         `keelway-agent cleanup --kube-proxy` removes them"
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

#[cfg(test)]
mod tests {
    use super::*;

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
