//! Versions of the CNI specification.

use std::fmt;

/// A version that the plugin speaks. Ordered by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.1.
    V0_3_1,
    /// 0.4.0, which brought CHECK.
    V0_4_0,
    /// 1.0.0, where addresses lost their `version`.
    V1_0_0,
    /// 1.1.0, which brought GC, STATUS and an interface's `mtu`.
    V1_1_0,
}

impl Version {
    /// Every one, the oldest first.
    pub const ALL: [Version; 4] = [Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

    /// The newest.
    pub const NEWEST: Version = Version::V1_1_0;

    /// As written in `cniVersion`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    /// From `cniVersion`; `None` for one that the plugin does not speak.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.as_str() == text)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
