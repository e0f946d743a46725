//! The environment of a call.

use super::error::{CniError, code};
use crate::lease::{LeaseKey, PodRef};

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the command of its name")]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    /// Every command.
    pub const ALL: [Command; 6] =
        [Command::Add, Command::Del, Command::Check, Command::Gc, Command::Status, Command::Version];

    /// As written in `CNI_COMMAND`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Gc => "GC",
            Command::Status => "STATUS",
            Command::Version => "VERSION",
        }
    }
}

/// Variables as they were found; an empty one counts as missing, as in the reference implementation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Env {
    /// `CNI_COMMAND`.
    pub command: String,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`: a path.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_ARGS`: `key=value;key=value`.
    pub args: String,
    /// `CNI_PATH`: not used, since nothing is delegated.
    pub path: String,
}

/// What `CNI_ARGS` says about the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodArgs {
    /// `K8S_POD_NAMESPACE`, `K8S_POD_NAME`, `K8S_POD_UID`.
    pub pod: PodRef,
}

impl Env {
    /// Reads the variables through `get`, which answers like `std::env::var`.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name| get(name).unwrap_or_default();
        Self {
            command: var("CNI_COMMAND"),
            container_id: var("CNI_CONTAINERID"),
            netns: var("CNI_NETNS"),
            ifname: var("CNI_IFNAME"),
            args: var("CNI_ARGS"),
            path: var("CNI_PATH"),
        }
    }

    /// The command.
    ///
    /// # Errors
    /// Code 4 when it is missing or unknown.
    pub fn command(&self) -> Result<Command, CniError> {
        let known = Command::ALL.into_iter().find(|c| c.as_str() == self.command);
        known.ok_or_else(|| match self.command.as_str() {
            "" => invalid("CNI_COMMAND is missing"),
            other => invalid(format!("CNI_COMMAND {other:?}: expected ADD, DEL, CHECK, GC, STATUS or VERSION")),
        })
    }

    /// The attachment that the call is about.
    ///
    /// # Errors
    /// Code 4 with every variable that is missing, or the first that is invalid.
    pub fn attachment(&self, command: Command) -> Result<LeaseKey, CniError> {
        let needs_netns = matches!(command, Command::Add | Command::Check);
        let mut missing = Vec::new();
        let required = [("CNI_CONTAINERID", &self.container_id), ("CNI_IFNAME", &self.ifname)];
        missing.extend(required.iter().filter(|(_, value)| value.is_empty()).map(|(name, _)| *name));
        if needs_netns && self.netns.is_empty() {
            missing.push("CNI_NETNS");
        }
        if !missing.is_empty() {
            return Err(invalid(format!("{} needs {}", command.as_str(), missing.join(", "))));
        }
        if !is_identifier(&self.container_id) {
            let expected = "expected a letter or digit, then letters, digits, '_', '.' or '-'";
            return Err(invalid(format!("CNI_CONTAINERID {:?}: {expected}", self.container_id)));
        }
        if !is_ifname(&self.ifname) {
            let expected = "expected 1 to 15 bytes without '/', ':' or white space, and not \".\" or \"..\"";
            return Err(invalid(format!("CNI_IFNAME {:?}: {expected}", self.ifname)));
        }
        Ok(LeaseKey::new(&self.container_id, &self.ifname))
    }

    /// What `CNI_ARGS` says. Unknown keys are an error unless `IgnoreUnknown` is true, as in the reference implementation.
    ///
    /// # Errors
    /// Code 4 with the part that is wrong.
    pub fn pod(&self) -> Result<PodArgs, CniError> {
        let mut args = PodArgs::default();
        let mut unknown = None;
        let mut ignore_unknown = false;
        for part in self.args.split(';').filter(|p| !p.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(invalid(format!("CNI_ARGS part {part:?}: expected key=value")));
            };
            match key {
                "K8S_POD_NAMESPACE" => args.pod.namespace = value.into(),
                "K8S_POD_NAME" => args.pod.name = value.into(),
                "K8S_POD_UID" => args.pod.uid = value.into(),
                "K8S_POD_INFRA_CONTAINER_ID" => {}
                "IgnoreUnknown" => ignore_unknown = matches!(value, "1" | "true" | "True" | "TRUE" | "t" | "T"),
                other => unknown = unknown.or(Some(other)),
            }
        }
        match unknown {
            Some(key) if !ignore_unknown => {
                Err(invalid(format!("CNI_ARGS key {key:?} is unknown, and IgnoreUnknown is not set")))
            }
            _ => Ok(args),
        }
    }
}

/// Container ids and network names.
pub(super) fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

pub(super) fn is_ifname(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 15
        && text != "."
        && text != ".."
        && !text.chars().any(|c| c == '/' || c == ':' || c == '\0' || c.is_whitespace())
}

fn invalid(msg: impl Into<String>) -> CniError {
    CniError::new(code::INVALID_ENVIRONMENT, msg)
}
