//! Files that are there whole or not at all: the plugin's binary, its conflist, and `loopback` where nobody else brings one.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Name of the conflist; `05` sorts before what other plugins install, and a runtime takes the first.
pub const CONFLIST_FILE: &str = "05-keelway.conflist";
/// Name of the plugin's binary, which is also its `type` in the conflist.
pub const BINARY_FILE: &str = "keelway-cni";

/// What goes into the conflist. Keys that are `None` are left out and mean the plugin's default.
#[derive(Clone, Debug, Default)]
pub struct Conflist {
    /// The network's name; `keelway` when empty.
    pub network: String,
    /// The agent's socket.
    pub socket: Option<PathBuf>,
    /// Where DELs wait while the agent is away.
    pub state_dir: Option<PathBuf>,
    /// MTU of pods in bytes; `None` is the agent's choice.
    pub mtu: Option<u32>,
    /// How long STATUS holds without an agent, in seconds.
    pub status_grace_seconds: Option<u64>,
}

impl Conflist {
    /// The file's content. It carries 1.0.0, which every supported runtime reads, and offers the others.
    #[must_use]
    pub fn render(&self) -> String {
        let mut plugin = serde_json::Map::new();
        plugin.insert("type".into(), BINARY_FILE.into());
        let path = |p: &PathBuf| p.to_string_lossy().into_owned();
        plugin.extend(self.socket.as_ref().map(|p| ("socket".to_owned(), path(p).into())));
        plugin.extend(self.state_dir.as_ref().map(|p| ("stateDir".to_owned(), path(p).into())));
        plugin.extend(self.mtu.map(|mtu| ("mtu".to_owned(), mtu.into())));
        plugin.extend(self.status_grace_seconds.map(|s| ("statusGraceSeconds".to_owned(), s.into())));
        let network = if self.network.is_empty() { "keelway" } else { &self.network };
        let list = serde_json::json!({
            "cniVersion": "1.0.0",
            "cniVersions": crate::spec::Version::ALL.map(crate::spec::Version::as_str),
            "name": network,
            "plugins": [plugin],
        });
        format!("{list:#}\n")
    }
}

/// Installs the conflist into `directory` (usually `/etc/cni/net.d`).
///
/// # Errors
/// The system's, with the old file untouched.
pub fn install_conflist(directory: &Path, conflist: &Conflist) -> io::Result<PathBuf> {
    std::fs::create_dir_all(directory)?;
    let path = directory.join(CONFLIST_FILE);
    write_atomically(&path, conflist.render().as_bytes(), 0o644)?;
    Ok(path)
}

/// Copies the plugin's binary from `source` into `directory` (usually `/opt/cni/bin`), executable. A running copy goes on.
///
/// # Errors
/// The system's, with the old file untouched.
pub fn install_binary(source: &Path, directory: &Path) -> io::Result<PathBuf> {
    std::fs::create_dir_all(directory)?;
    let path = directory.join(BINARY_FILE);
    let content = std::fs::read(source)?;
    write_atomically(&path, &content, 0o755)?;
    Ok(path)
}

/// What became of the plugin that brings up `lo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loopback {
    /// Ours is there now, or is as new as the plugin again.
    Installed,
    /// Another's is there and stays.
    Foreign,
}

/// Copies `source` into `directory` as the plugin `loopback`, unless another's file has that name: containerd before 2.0
/// calls one for every pod. Ours is known by its content, that of the [`BINARY_FILE`] beside it: call this **before**
/// [`install_binary`] puts a newer one there.
///
/// A copy and no link: whoever copies another `loopback` over a link would write into the plugin.
///
/// # Errors
/// The system's, with what was there untouched.
pub fn install_loopback(source: &Path, directory: &Path) -> io::Result<Loopback> {
    std::fs::create_dir_all(directory)?;
    let path = directory.join(crate::loopback::NAME);
    let content = std::fs::read(source)?;
    // A run that ended between the two copies left the new one.
    if read_if_there(&path)?.as_ref() == Some(&content) {
        return Ok(Loopback::Installed);
    }
    if is_our_loopback(directory)? {
        write_atomically(&path, &content, 0o755)?;
        return Ok(Loopback::Installed);
    }
    let temporary = path.with_file_name(format!(".{}.{}.tmp", crate::loopback::NAME, std::process::id()));
    // Unlike a rename, a new link never takes a name that is in use, not even when it came to be this moment.
    let linked = write_synced(&temporary, &content, 0o755).and_then(|()| std::fs::hard_link(&temporary, &path));
    std::fs::remove_file(&temporary)?;
    match linked {
        Ok(()) => sync_dir(&path).map(|()| Loopback::Installed),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Loopback::Foreign),
        Err(error) => Err(error),
    }
}

/// Whether the `loopback` in `directory` is a copy of our plugin beside it.
///
/// # Errors
/// The system's, for anything but absence.
pub fn is_our_loopback(directory: &Path) -> io::Result<bool> {
    let own = read_if_there(&directory.join(BINARY_FILE))?;
    Ok(own.is_some() && read_if_there(&directory.join(crate::loopback::NAME))? == own)
}

fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes `path` so that a reader, or a start after a crash, finds the old content or the new.
///
/// # Errors
/// The system's; the temporary file (`.<name>.<pid>.tmp` beside it) is removed then.
pub fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::other(format!("{} names no file", path.display())))?;
    let temporary = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let result = write_synced(&temporary, content, mode).and_then(|()| std::fs::rename(&temporary, path));
    if result.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(&temporary);
    }
    result?;
    sync_dir(path)
}

fn write_synced(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file: File = OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(path)?;
    // The mode above passes the umask and does not apply to a file left over.
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()
}

/// Syncs the directory that holds `path`, so that a rename or removal in it survives the loss of power.
///
/// # Errors
/// The system's.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}
