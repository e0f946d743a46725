//! `/proc/sys` of the calling thread's or another network namespace.

use std::path::{Path, PathBuf};

use crate::{Error, Netns, Result};

/// Reads `key` (slashes between its parts: `net/ipv4/conf/eth0/rp_filter`), trimmed.
///
/// # Errors
/// [`Error::Sysctl`] with the key.
pub fn read(key: &str) -> Result<String> {
    std::fs::read_to_string(path(key)?).map(|v| v.trim().to_owned()).map_err(|source| Error::Sysctl {
        key: key.into(),
        doing: "read".into(),
        source,
    })
}

/// Writes `key`, unless it already has that value: a read-only /proc/sys that is right is no error.
///
/// # Errors
/// [`Error::Sysctl`] with the key and the value.
pub fn write(key: &str, value: &str) -> Result<()> {
    let file = path(key)?;
    if std::fs::read_to_string(&file).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    std::fs::write(&file, value).map_err(|source| Error::Sysctl {
        key: key.into(),
        doing: format!("write {value:?}"),
        source,
    })
}

/// [`read`] in another namespace.
///
/// # Errors
/// As [`read`] and [`Netns::run`].
pub async fn read_in(netns: &Netns, key: impl Into<String>) -> Result<String> {
    let key = key.into();
    netns.run(move || read(&key)).await
}

/// [`write()`] of several keys, in order, in another namespace.
///
/// # Errors
/// As [`write()`] and [`Netns::run`]; the keys before the one that failed are written.
pub async fn write_in(netns: &Netns, pairs: Vec<(String, String)>) -> Result<()> {
    netns.run(move || pairs.iter().try_for_each(|(key, value)| write(key, value))).await
}

/// Keys come from names that others chose; none may climb out of /proc/sys.
fn path(key: &str) -> Result<PathBuf> {
    if key.is_empty() || key.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Error::Sysctl {
            key: key.into(),
            doing: "name".into(),
            source: std::io::Error::new(std::io::ErrorKind::InvalidInput, "expected parts joined by single slashes"),
        });
    }
    Ok(Path::new("/proc/sys").join(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stays_below_proc_sys() {
        for key in ["", "/etc/passwd", "net/../../etc/passwd", "net//ipv4", "."] {
            assert!(matches!(path(key), Err(Error::Sysctl { .. })), "{key:?}");
        }
        assert_eq!(path("net/ipv4/ip_forward").unwrap(), Path::new("/proc/sys/net/ipv4/ip_forward"));
    }
}
