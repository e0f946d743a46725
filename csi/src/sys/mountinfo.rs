//! The mount table, as far as it is needed: which mounts there are of one device.

use std::path::{Path, PathBuf};

use super::Dev;
use crate::error::{Context, Error, Result};

/// A line of `/proc/thread-self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount's number.
    pub id: u64,
    /// The filesystem's device.
    pub dev: Dev,
    /// What of the filesystem is mounted.
    pub root: PathBuf,
    /// Where.
    pub target: PathBuf,
    /// The filesystem's type.
    pub fs_type: String,
    /// Where the filesystem is from, as whoever mounted it said.
    pub source: String,
    /// Whether the filesystem itself, and not only this mount, refuses writes.
    pub read_only: bool,
}

impl Mount {
    /// Whether this is a bind mount of the node of a loop device; `root` as [`super::loopdev::LoopDevice::root`] says it.
    pub fn is_node(&self, root: &str) -> bool {
        matches!(self.fs_type.as_str(), "devtmpfs" | "tmpfs") && self.root == Path::new(root)
    }
}

/// The mounts of this thread's mount namespace.
///
/// # Errors
/// [`Error::Io`], [`Error::Corrupt`].
pub fn read() -> Result<Vec<Mount>> {
    let path = "/proc/thread-self/mountinfo";
    let text = std::fs::read_to_string(path).context(|| format!("read {path}"))?;
    let line = |line: &str| {
        parse(line).ok_or_else(|| Error::Corrupt { path: path.into(), why: format!("not a mount: {line:?}") })
    };
    text.lines().map(line).collect()
}

fn parse(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let id = left.next()?.parse().ok()?;
    let mut left = left.skip(1);
    let (major, minor) = left.next()?.split_once(':')?;
    let dev = Dev { major: major.parse().ok()?, minor: minor.parse().ok()? };
    let (root, target) = (unescape(left.next()?), unescape(left.next()?));
    let mut right = right.split(' ');
    let (fs_type, source) = (right.next()?.to_owned(), right.next()?.to_owned());
    let read_only = right.next()?.split(',').any(|option| option == "ro");
    Some(Mount { id, dev, root, target, fs_type, source, read_only })
}

/// The kernel writes blanks, tabs, newlines and backslashes as three octal digits.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.get(..3)).flatten();
        let octal = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        let line = r"36 35 7:3 / /var/lib/kubelet/a\040b\134c rw,nosuid shared:1 master:2 - ext4 /dev/loop3 rw";
        let want = Mount {
            id: 36,
            dev: Dev { major: 7, minor: 3 },
            root: "/".into(),
            target: r"/var/lib/kubelet/a b\c".into(),
            fs_type: "ext4".into(),
            source: "/dev/loop3".into(),
            read_only: false,
        };
        assert_eq!(parse(line), Some(want));
        let node = parse("40 35 0:6 /loop3 /target rw - devtmpfs devtmpfs rw").unwrap();
        assert!(node.is_node("/loop3") && !node.is_node("/loop33"));
        assert_eq!(parse("36 35 7:3 /"), None);
    }

    #[test]
    fn this_machines_table_is_understood() {
        assert!(read().unwrap().iter().any(|mount| mount.target == Path::new("/")));
    }
}
