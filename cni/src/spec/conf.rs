//! The configuration on stdin.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use super::env::{is_identifier, is_ifname};
use super::error::{CniError, code};
use super::result::PrevResult;
use super::{Command, Version};
use crate::lease::LeaseKey;

/// Where DELs wait unless `stateDir` says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/keelway/cni-del";
/// How long STATUS holds without an agent unless `statusGraceSeconds` says otherwise.
pub const DEFAULT_STATUS_GRACE: Duration = Duration::from_secs(300);

/// Keys that the specification reserves or that runtimes pass along; they are accepted and mean nothing to us.
const STANDARD: [&str; 11] = [
    "args",
    "ipMasq",
    "ipam",
    "dns",
    "runtimeConfig",
    "capabilities",
    "disableCheck",
    "disableGC",
    "loadOnlyInlinedPlugins",
    "cniVersions",
    "plugins",
];
/// Prefix of keys that runtimes may add.
const RESERVED_PREFIX: &str = "cni.dev/";
/// How GC names the attachments to keep; the second is what the specification once said by mistake.
const VALID_ATTACHMENTS: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];

/// A configuration, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct NetConf {
    /// `cniVersion`: the shape of the answer.
    pub version: Version,
    /// `name` of the network.
    pub name: String,
    /// `type`: the plugin that is meant; may be empty.
    pub plugin: String,
    /// `socket`: the agent's.
    pub socket: PathBuf,
    /// `mtu` of pods in bytes; `None` is the agent's choice.
    pub mtu: Option<u32>,
    /// `stateDir`: where DELs wait while the agent is away.
    pub state_dir: PathBuf,
    /// `statusGraceSeconds`.
    pub status_grace: Duration,
    /// `prevResult`, of an earlier plugin of the list or of the ADD that CHECK and DEL are about.
    pub prev: Option<PrevResult>,
    /// `cni.dev/valid-attachments`.
    pub valid: Option<Vec<LeaseKey>>,
}

impl NetConf {
    /// The JSON object, before any of it is believed.
    ///
    /// # Errors
    /// Code 6 when it is none.
    pub fn decode(stdin: &[u8]) -> Result<Map<String, Value>, CniError> {
        let bad =
            |details: String| CniError::new(code::DECODE_FAILURE, "read the configuration on stdin").details(details);
        match serde_json::from_slice(stdin) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err(bad("expected a JSON object".into())),
            Err(e) => Err(bad(e.to_string())),
        }
    }

    /// `cniVersion`.
    ///
    /// # Errors
    /// Code 6 when it is no string, code 1 when it is missing or not spoken.
    pub fn version(object: &Map<String, Value>) -> Result<Version, CniError> {
        let supported = Version::ALL.map(Version::as_str).join(", ");
        let incompatible = |what: String| {
            CniError::new(code::INCOMPATIBLE_VERSION, format!("cniVersion {what}: expected one of {supported}"))
        };
        match object.get("cniVersion") {
            Some(Value::String(text)) => Version::parse(text).ok_or_else(|| incompatible(format!("{text:?}"))),
            Some(other) => Err(CniError::new(code::DECODE_FAILURE, format!("cniVersion {other}: expected a string"))),
            None => Err(incompatible("is missing".into())),
        }
    }

    /// The configuration, for `command`.
    ///
    /// # Errors
    /// Codes 1, 6 and 7, with the key and its value.
    pub fn parse(object: &Map<String, Value>, command: Command) -> Result<Self, CniError> {
        let version = Self::version(object)?;
        let since = match command {
            Command::Gc | Command::Status => Version::V1_1_0,
            Command::Check => Version::V0_4_0,
            Command::Add | Command::Del | Command::Version => Version::V0_3_1,
        };
        if version < since {
            let msg = format!("{} needs cniVersion {since}, the configuration has {version}", command.as_str());
            return Err(CniError::new(code::INCOMPATIBLE_VERSION, msg));
        }
        let mut conf = Self {
            version,
            name: String::new(),
            plugin: String::new(),
            socket: PathBuf::from(keelway_api::DEFAULT_SOCKET),
            mtu: None,
            state_dir: PathBuf::from(DEFAULT_STATE_DIR),
            status_grace: DEFAULT_STATUS_GRACE,
            prev: None,
            valid: None,
        };
        for (key, value) in object {
            match key.as_str() {
                "cniVersion" => {}
                "name" => conf.name = text(key, value)?,
                "type" => conf.plugin = value.as_str().unwrap_or_default().to_owned(),
                "socket" => conf.socket = absolute(key, value)?,
                "stateDir" => conf.state_dir = absolute(key, value)?,
                "mtu" => conf.mtu = mtu(value)?,
                "statusGraceSeconds" => conf.status_grace = Duration::from_secs(number(key, value)?),
                // DEL goes on without one: a container that cannot be removed helps nobody.
                "prevResult" if command == Command::Del => conf.prev = prev_result(value).unwrap_or(None),
                "prevResult" => conf.prev = prev_result(value)?,
                key if VALID_ATTACHMENTS.contains(&key) => {
                    // The current name wins when both are there.
                    if key == VALID_ATTACHMENTS[0] || conf.valid.is_none() {
                        conf.valid = attachments(key, value)?;
                    }
                }
                key if STANDARD.contains(&key) || key.starts_with(RESERVED_PREFIX) => {}
                unknown => {
                    let expected = "ours are socket, mtu, stateDir and statusGraceSeconds";
                    return Err(invalid(format!("unknown key {unknown:?} in the configuration: {expected}")));
                }
            }
        }
        if !is_identifier(&conf.name) {
            let expected = "expected a letter or digit, then letters, digits, '_', '.' or '-'";
            return Err(invalid(format!("network name {:?}: {expected}", conf.name)));
        }
        match command {
            Command::Check if conf.prev.is_none() => Err(invalid("prevResult is missing: CHECK compares with it")),
            Command::Gc if conf.valid.is_none() => {
                Err(invalid("cni.dev/valid-attachments is missing: without it GC would remove everything"))
            }
            _ => Ok(conf),
        }
    }
}

fn prev_result(value: &Value) -> Result<Option<PrevResult>, CniError> {
    if value.is_null() {
        return Ok(None);
    }
    PrevResult::parse(value).map(Some).map_err(|reason| invalid(format!("prevResult: {reason}")))
}

fn attachments(key: &str, value: &Value) -> Result<Option<Vec<LeaseKey>>, CniError> {
    let wrong = |what: &Value| {
        let expected = r#"expected a list of {"containerID": "...", "ifname": "..."}"#;
        invalid(format!("{key} {what}: {expected}"))
    };
    if value.is_null() {
        return Ok(None);
    }
    let entries = value.as_array().ok_or_else(|| wrong(value))?;
    let keys = entries.iter().map(|entry| {
        let part = |name: &str| entry.get(name).and_then(Value::as_str).ok_or_else(|| wrong(entry));
        let (container_id, ifname) = (part("containerID")?, part("ifname")?);
        if is_identifier(container_id) && is_ifname(ifname) {
            Ok(LeaseKey::new(container_id, ifname))
        } else {
            Err(wrong(entry))
        }
    });
    keys.collect::<Result<_, _>>().map(Some)
}

fn mtu(value: &Value) -> Result<Option<u32>, CniError> {
    // IPv6 asks for 1280; 0 leaves the choice to the agent.
    match number("mtu", value)? {
        0 => Ok(None),
        n @ 1280..=65535 => Ok(u32::try_from(n).ok()),
        n => Err(invalid(format!("mtu {n}: expected 0 or 1280 to 65535 bytes"))),
    }
}

fn number(key: &str, value: &Value) -> Result<u64, CniError> {
    value.as_u64().ok_or_else(|| invalid(format!("{key} {value}: expected a whole number, not negative")))
}

fn text(key: &str, value: &Value) -> Result<String, CniError> {
    value.as_str().map(str::to_owned).ok_or_else(|| invalid(format!("{key} {value}: expected a string")))
}

fn absolute(key: &str, value: &Value) -> Result<PathBuf, CniError> {
    let path = PathBuf::from(text(key, value)?);
    if path.is_absolute() { Ok(path) } else { Err(invalid(format!("{key} {value}: expected an absolute path"))) }
}

fn invalid(msg: impl Into<String>) -> CniError {
    CniError::new(code::INVALID_CONFIG, msg)
}
