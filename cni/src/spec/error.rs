//! Errors as runtimes expect them.

use super::Version;

/// Error codes: those of the specification, and ours from 100 on.
pub mod code {
    /// The configuration's version is not spoken, or lacks the command.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// The configuration has a field that is not supported.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container is unknown or gone; the runtime need not clean up.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// An environment variable is missing or invalid.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Reading stdin or the like failed.
    pub const IO_FAILURE: u32 = 5;
    /// stdin is not what was expected, byte for byte.
    pub const DECODE_FAILURE: u32 = 6;
    /// The configuration is well-formed but wrong.
    pub const INVALID_CONFIG: u32 = 7;
    /// The same request may succeed later.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: no ADD can succeed now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// STATUS: no ADD can succeed now, and existing containers may have limited connectivity.
    pub const NOT_AVAILABLE_LIMITED: u32 = 51;
    /// The agent failed in a way that has no code of its own.
    pub const AGENT: u32 = 100;
    /// Every address of a pod CIDR is leased.
    pub const EXHAUSTED: u32 = 101;
    /// CHECK: the kernel's state is not the attachment's.
    pub const CHECK_FAILED: u32 = 102;
}

/// A failed command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("CNI error {code}: {msg}{}", if .details.is_empty() { String::new() } else { format!(": {}", .details) })]
pub struct CniError {
    /// One of [`code`], or what the agent said.
    pub code: u32,
    /// What went wrong, in one line.
    pub msg: String,
    /// More of it; may be empty.
    pub details: String,
}

impl CniError {
    /// An error without details.
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// Adds details.
    #[must_use]
    pub fn details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// The object for stdout. `version` is the configuration's, the newest when it could not be read.
    #[must_use]
    pub fn render(&self, version: Option<Version>) -> String {
        let version = version.unwrap_or(Version::NEWEST).as_str();
        let mut object = serde_json::json!({ "cniVersion": version, "code": self.code, "msg": self.msg });
        if !self.details.is_empty() {
            object["details"] = self.details.clone().into();
        }
        object.to_string()
    }
}
