//! The API servers' real addresses, from the endpoints of the Service `default/kubernetes`, kept in the state directory:
//! the in-cluster address is a Service that this agent is to serve, and after a reboot nobody serves it yet.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use keelway_proxy::model::EndpointSlice;
use serde::{Deserialize, Serialize};

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    servers: Vec<SocketAddr>,
}

/// The addresses as last seen, and the file that holds them.
#[derive(Debug)]
pub(super) struct Remembered {
    path: PathBuf,
    /// The in-cluster URL, dialled last.
    last_resort: String,
    servers: Vec<SocketAddr>,
    /// By slice: there is one a family.
    slices: BTreeMap<String, BTreeSet<SocketAddr>>,
}

impl Remembered {
    /// Reads what is known. A file that cannot be used is as good as none, and is said so.
    pub(super) fn open(state_dir: &Path, last_resort: String) -> Self {
        let path = state_dir.join("api-servers.json");
        let read = std::fs::read_to_string(&path)
            .and_then(|text| serde_json::from_str::<File>(&text).map_err(std::io::Error::other));
        let servers = match read {
            Ok(file) => file.servers,
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    tracing::warn!(path = %path.display(), %error, "cannot use the last known API servers");
                }
                Vec::new()
            }
        };
        Self { path, last_resort, servers, slices: BTreeMap::new() }
    }

    /// What to dial, in this order.
    pub(super) fn urls(&self) -> Vec<String> {
        let own = self.servers.iter().map(|server| format!("https://{server}"));
        own.chain([self.last_resort.clone()]).collect()
    }

    /// Looks at a slice; `Some` when the API servers are others now, with what to dial. Slices that lost all their
    /// endpoints change nothing: the last known address is better than none.
    pub(super) fn note(&mut self, slice: &EndpointSlice) -> Option<Vec<String>> {
        if slice.name.namespace != "default" || slice.service != "kubernetes" {
            return None;
        }
        let https = slice.ports.iter().find(|port| port.name == "https" || slice.ports.len() == 1);
        let port = https.and_then(|port| port.port)?;
        let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
        let found: BTreeSet<_> =
            ready.flat_map(|endpoint| &endpoint.addresses).map(|address| SocketAddr::new(*address, port)).collect();
        if found.is_empty() {
            return None;
        }
        self.slices.insert(slice.name.name.clone(), found);
        let all: BTreeSet<SocketAddr> = self.slices.values().flatten().copied().collect();
        let all: Vec<SocketAddr> = all.into_iter().collect();
        if all == self.servers {
            return None;
        }
        self.servers = all;
        if let Err(error) = self.save() {
            tracing::warn!(path = %self.path.display(), %error, "cannot save the API servers' addresses");
        }
        Some(self.urls())
    }

    /// Whole or not at all, also when the machine stops.
    fn save(&self) -> std::io::Result<()> {
        let text = serde_json::to_string(&File { servers: self.servers.clone() })?;
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(dir)?;
        let next = self.path.with_extension("json.new");
        let mut file = std::fs::File::create(&next)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&next, &self.path)?;
        std::fs::File::open(dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use keelway_proxy::model::{EndpointPort, ObjectName, Protocol, SliceEndpoint};

    use super::*;

    fn slice(name: &str, addresses: &[&str]) -> EndpointSlice {
        let endpoint = |address: &&str| SliceEndpoint {
            addresses: vec![address.parse().unwrap()],
            ready: true,
            serving: true,
            terminating: false,
            node_name: None,
            zone: None,
            zone_hints: Vec::new(),
            node_hints: Vec::new(),
        };
        EndpointSlice {
            name: ObjectName::new("default", name),
            service: "kubernetes".to_owned(),
            ports: vec![EndpointPort { name: "https".to_owned(), protocol: Protocol::Tcp, port: Some(6443) }],
            endpoints: addresses.iter().map(endpoint).collect(),
            problems: Vec::new(),
        }
    }

    #[test]
    fn addresses_outlive_the_agent_and_never_run_out() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let open = || Remembered::open(&state, "https://10.96.0.1:443".to_owned());
        let mut remembered = open();
        assert_eq!(remembered.urls(), ["https://10.96.0.1:443"]);
        let urls = ["https://10.0.0.2:6443", "https://10.0.0.3:6443", "https://10.96.0.1:443"];
        assert_eq!(remembered.note(&slice("kubernetes", &["10.0.0.3", "10.0.0.2"])).unwrap(), urls);
        assert_eq!(remembered.note(&slice("kubernetes", &["10.0.0.2", "10.0.0.3"])), None, "no news");
        assert_eq!(remembered.note(&slice("kubernetes", &[])), None, "an empty slice takes nothing away");
        assert_eq!(open().urls(), urls);
        let six = remembered.note(&slice("kubernetes-6", &["fd00::2"])).unwrap();
        assert!(six.contains(&"https://[fd00::2]:6443".to_owned()), "{six:?}");
        assert_eq!(open().urls(), six);
    }

    #[test]
    fn other_services_and_a_broken_file_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("api-servers.json"), "{\"servers\": [\"nonsense\"]}").unwrap();
        let mut remembered = Remembered::open(dir.path(), "https://x".to_owned());
        assert_eq!(remembered.urls(), ["https://x"]);
        let mut other = slice("other", &["10.0.0.9"]);
        other.service = "other".to_owned();
        assert_eq!(remembered.note(&other), None);
    }
}
