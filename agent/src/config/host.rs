//! What the configuration asks of the host: the default file, the node's name, the cgroup v2 mount.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::DEFAULT_FILE;
use super::cgroup::{NoMount, hierarchy};
use super::check::ConfigError;
use super::flags::Flags;

/// Inode of the machine's first cgroup namespace: PROC_CGROUP_INIT_INO of the kernel's `include/linux/proc_ns.h`.
const FIRST_CGROUP_NAMESPACE: u64 = 0xEFFF_FFFB;

/// What defaults are made of.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// `$NODE_NAME`.
    pub node_name: Option<String>,
    /// The host name, as the kernel has it.
    pub hostname: String,
    /// The text of `/proc/self/mountinfo`.
    pub mountinfo: String,
    /// The text of `/proc/self/cgroup`.
    pub cgroup: String,
    /// Whether this process is in the machine's first cgroup namespace.
    pub first_cgroup_namespace: bool,
}

impl Host {
    /// Reads them from this process's environment. What cannot be read stays empty and is asked for when it is needed.
    pub fn read() -> Self {
        Self {
            node_name: std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty()),
            hostname: nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default(),
            mountinfo: std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(),
            cgroup: std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default(),
            first_cgroup_namespace: std::fs::metadata("/proc/self/ns/cgroup")
                .is_ok_and(|namespace| namespace.ino() == FIRST_CGROUP_NAMESPACE),
        }
    }

    /// Where the node's whole cgroup v2 hierarchy is mounted.
    ///
    /// # Errors
    /// See [`NoMount`].
    pub(super) fn cgroup2_mount(&self) -> Result<PathBuf, NoMount> {
        hierarchy(&self.mountinfo, &self.cgroup, self.first_cgroup_namespace)
    }
}

/// The settings of a configuration file. The default file may be absent; one that is named must be there.
pub(super) fn read_file(named: Option<&Path>) -> Result<Flags, ConfigError> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    match std::fs::read_to_string(path) {
        Ok(text) => parse_file(path, &text),
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(Flags::default()),
        Err(error) => Err(ConfigError::Unreadable { path: path.to_owned(), reason: error.to_string() }),
    }
}

/// The settings in `text`, the content of `path`. An empty file says nothing.
pub(super) fn parse_file(path: &Path, text: &str) -> Result<Flags, ConfigError> {
    serde_norway::from_str::<Option<Flags>>(text)
        .map(Option::unwrap_or_default)
        .map_err(|error| ConfigError::File { path: path.to_owned(), reason: error.to_string() })
}
