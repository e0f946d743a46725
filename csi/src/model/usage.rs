//! How a volume is used at a path, as its caller said: what the same call has to agree with when it comes again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The access modes that a volume of one node can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Reading and writing, as callers say it who do not know the two modes below: at one target.
    Writer,
    /// Reading only, at one target.
    Reader,
    /// Reading and writing, at exactly one target.
    SingleWriter,
    /// Reading and writing, at one or several targets.
    MultiWriter,
}

/// What a volume is used for at a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// It is staged there.
    Staged,
    /// It is published there, from where it is staged.
    Published(PathBuf),
}

/// How a volume is used at a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Use {
    /// The path.
    pub path: PathBuf,
    /// Staged or published.
    pub stop: Stop,
    /// Who may use it how.
    pub access: Access,
    /// Mount options, as [`super::MountOptions::canonical`] says them.
    pub options: String,
    /// The group that it was given to.
    pub group: Option<u32>,
    /// Whether nothing may be written by way of it.
    pub read_only: bool,
}

impl Use {
    /// Whether it is staged at the path.
    pub fn is_staged(&self, at: &Path) -> bool {
        self.stop == Stop::Staged && self.path == at
    }

    /// Whether this, asked for where that is, is there already. A staging does not differ by who writes, nor by the group,
    /// which each publication gives for itself: the kubelet stages one volume for several pods, and after it was started
    /// anew, for another one of them.
    pub fn agrees(&self, has: &Self) -> bool {
        let mounted = self.read_only == has.read_only && self.options == has.options;
        mounted && (self.stop == Stop::Staged || (self.access == has.access && self.group == has.group))
    }

    /// What of it counts, for messages.
    pub fn describe(&self) -> String {
        let mode = if self.read_only { "read-only" } else { "read-write" };
        let group = self.group.map(|gid| format!(", group {gid}")).unwrap_or_default();
        format!("{mode}, {:?}, options {:?}{group}", self.access, self.options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staged() -> Use {
        let (path, options) = ("/k/stage".into(), "noatime".to_owned());
        Use { path, stop: Stop::Staged, access: Access::MultiWriter, options, group: Some(1), read_only: false }
    }

    #[test]
    fn a_staging_is_for_all_pods_and_a_publication_for_one() {
        let other = Use { access: Access::SingleWriter, group: Some(2), ..staged() };
        assert!(other.agrees(&staged()));
        let published = |of: Use| Use { stop: Stop::Published("/k/stage".into()), ..of };
        assert!(!published(other).agrees(&published(staged())));
        assert!(!Use { read_only: true, ..staged() }.agrees(&staged()));
        assert!(!Use { options: String::new(), ..staged() }.agrees(&staged()));
    }
}
