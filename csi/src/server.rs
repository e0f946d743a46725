//! Sockets, and a server's life: listening, serving, stopping.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};

use crate::authority::Connection;
use crate::error::{Context, Error, Result};

/// A listening Unix socket for root alone; its name goes when this is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: Option<UnixListener>,
}

impl Socket {
    /// Listens at `path`, in place of a socket that nobody listens at any more. The process's umask must keep others
    /// out: a socket is open to all from the moment that it is bound.
    ///
    /// # Errors
    /// [`Error::State`] when a driver listens there, or when something else than a socket is there; [`Error::Io`].
    pub fn listen(path: &Path) -> Result<Self> {
        let what = || format!("listen at {}", path.display());
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).context(|| format!("create {}", parent.display()))?;
        }
        if let Ok(meta) = std::fs::symlink_metadata(path) {
            let taken = |found: &str| {
                let what = path.display().to_string();
                Err(Error::State {
                    what,
                    expected: "no name yet, or a socket without a listener".into(),
                    found: found.into(),
                })
            };
            if !meta.file_type().is_socket() {
                return taken("something that is no socket");
            }
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return taken("a socket that somebody listens at");
            }
            std::fs::remove_file(path).context(what)?;
        }
        let listener = UnixListener::bind(path).context(what)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).context(what)?;
        Ok(Self { path: path.to_owned(), listener: Some(listener) })
    }

    /// The connections that come in.
    ///
    /// # Panics
    /// When called twice.
    pub fn incoming(&mut self) -> impl Stream<Item = std::io::Result<Connection>> + use<> {
        let listener = self.listener.take().expect("a socket is served once");
        UnixListenerStream::new(listener).map(|stream| stream.map(Connection::new))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The path in `unix:///path`, as CSI callers write it.
///
/// # Errors
/// [`Error::Invalid`].
pub fn socket_path(endpoint: &str) -> Result<PathBuf> {
    match endpoint.strip_prefix("unix://") {
        // 107 bytes and a NUL are what a socket address holds.
        Some(path) if path.starts_with('/') && path.len() <= 107 => Ok(path.into()),
        _ => Err(Error::Invalid {
            field: "--endpoint",
            value: endpoint.into(),
            expected: "unix:///absolute/path of at most 107 bytes".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        assert_eq!(socket_path("unix:///run/csi.sock").unwrap(), Path::new("/run/csi.sock"));
        for bad in
            ["", "/run/csi.sock", "unix://run/csi.sock", "tcp://1.2.3.4:1", &format!("unix:///{}", "a".repeat(107))]
        {
            assert!(socket_path(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let socket = Socket::listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Socket::listen(&path), Err(Error::State { .. })));
        drop(socket);
        assert!(!path.exists());
        std::fs::write(&path, "data").unwrap();
        assert!(Socket::listen(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
    }
}
