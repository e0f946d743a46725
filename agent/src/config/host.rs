//! What the configuration asks of the host: the default file, the node's name, the cgroup v2 mount.

use std::path::{Path, PathBuf};

use super::DEFAULT_FILE;
use super::check::ConfigError;
use super::flags::Flags;

/// What defaults are made of.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// `$NODE_NAME`.
    pub node_name: Option<String>,
    /// The host name, as the kernel has it.
    pub hostname: String,
    /// The text of `/proc/self/mountinfo`.
    pub mountinfo: String,
}

impl Host {
    /// Reads them from this process's environment. What cannot be read stays empty and is asked for when it is needed.
    pub fn read() -> Self {
        Self {
            node_name: std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty()),
            hostname: nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default(),
            mountinfo: std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(),
        }
    }

    /// The mount point of the first cgroup v2 file system whose root is that of the hierarchy.
    pub fn cgroup2_mount(&self) -> Option<PathBuf> {
        self.mountinfo.lines().find_map(|line| {
            // proc(5): id parent major:minor root mount-point options [tags] - type source super-options
            let (mount, file_system) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            (root == "/" && file_system.split(' ').next() == Some("cgroup2")).then(|| unescape(point).into())
        })
    }
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
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
