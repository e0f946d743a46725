//! Paths that a caller names, as text. Whether they lead where they seem to is `sys::target`'s to find out.

use std::path::{Component, Path, PathBuf};

use super::string;
use crate::error::{Error, Result};

/// A path below the kubelet's directory, kept relative to it, without `.`, `..` or repeated separators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetPath {
    root: PathBuf,
    relative: PathBuf,
}

impl TargetPath {
    /// Reads an absolute path that must lie below `root`.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Invalid`], naming `field`.
    pub fn parse(field: &'static str, text: &str, root: &Path) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::Missing { field });
        }
        let invalid = || Error::Invalid {
            field,
            value: string(text),
            expected: format!("an absolute path below {}, without . and ..", root.display()),
        };
        if text.len() >= 4096 || text.contains('\0') || text.split('/').any(|part| part == "." || part == "..") {
            return Err(invalid());
        }
        let relative = Path::new(text).strip_prefix(root).map_err(|_| invalid())?;
        if relative.components().next().is_none() || !relative.components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(invalid());
        }
        // Collected again, so that `a//b/` becomes `a/b`.
        Ok(Self { root: root.to_owned(), relative: relative.components().collect() })
    }

    /// The directory that it must not leave.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path from there.
    pub fn relative(&self) -> &Path {
        &self.relative
    }

    /// The whole path, as it stands in mount tables.
    pub fn absolute(&self) -> PathBuf {
        self.root.join(&self.relative)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<TargetPath> {
        TargetPath::parse("target_path", text, Path::new("/var/lib/kubelet"))
    }

    #[test]
    fn a_path_below_the_root() {
        let path = parse("/var/lib/kubelet//pods/1/mount/").unwrap();
        assert_eq!(path.relative(), Path::new("pods/1/mount"));
        assert_eq!(path.absolute(), Path::new("/var/lib/kubelet/pods/1/mount"));
    }

    #[test]
    fn what_leads_elsewhere_is_refused() {
        for text in [
            "/etc",
            "/var/lib/kubelet",
            "/var/lib/kubelet/",
            "/var/lib/kubelet2/x",
            "/var/lib/kubelet/../x",
            "/var/lib/kubelet/a/./b",
            "/var/lib/kubelet/a/../../../etc",
            "pods/1",
            "/var/lib/kubelet/a\0b",
        ] {
            assert!(matches!(parse(text), Err(Error::Invalid { .. })), "{text:?}");
        }
        assert!(parse(&format!("/var/lib/kubelet/{}", "a".repeat(4096))).is_err());
        assert!(matches!(parse(""), Err(Error::Missing { field: "target_path" })));
    }
}
