//! A whole call, checked: nothing behind this point has to doubt what a runtime said.

use super::{CniError, Command, Env, NetConf, Version};
use crate::lease::{LeaseKey, PodRef};

/// What the runtime wants.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// ADD.
    Add {
        /// Configuration.
        conf: NetConf,
        /// Which attachment.
        key: LeaseKey,
        /// Path of the container's network namespace.
        netns: String,
        /// The pod.
        pod: PodRef,
    },
    /// DEL.
    Del {
        /// Configuration.
        conf: NetConf,
        /// Which attachment.
        key: LeaseKey,
    },
    /// CHECK.
    Check {
        /// Configuration, with a previous result.
        conf: NetConf,
        /// Which attachment.
        key: LeaseKey,
        /// Path of the container's network namespace.
        netns: String,
    },
    /// GC.
    Gc {
        /// Configuration.
        conf: NetConf,
        /// What to keep.
        valid: Vec<LeaseKey>,
    },
    /// STATUS.
    Status {
        /// Configuration.
        conf: NetConf,
    },
    /// VERSION.
    Version {
        /// The version that was asked in; the answer repeats it.
        asked: String,
    },
}

/// An error, and the version to say it in when that much was understood.
pub type Refusal = (CniError, Option<Version>);

impl Request {
    /// From the environment and stdin.
    ///
    /// # Errors
    /// Codes 1, 4, 6 and 7.
    pub fn parse(env: &Env, stdin: &[u8]) -> Result<Self, Refusal> {
        let object = NetConf::decode(stdin);
        let version = object.as_ref().ok().and_then(|o| NetConf::version(o).ok());
        Self::build(env, object).map_err(|e| (e, version))
    }

    fn build(
        env: &Env,
        object: Result<serde_json::Map<String, serde_json::Value>, CniError>,
    ) -> Result<Self, CniError> {
        let command = env.command()?;
        if command == Command::Version {
            // A runtime asks in its own newest version, which may be newer than ours: that is no error.
            let object = object?;
            let asked = object.get("cniVersion").and_then(|v| v.as_str()).unwrap_or(Version::NEWEST.as_str());
            return Ok(Request::Version { asked: asked.to_owned() });
        }
        let key = match command {
            Command::Add | Command::Del | Command::Check => Some(env.attachment(command)?),
            _ => None,
        };
        let mut conf = NetConf::parse(&object?, command)?;
        let netns = env.netns.clone();
        Ok(match (command, key) {
            (Command::Add, Some(key)) => Request::Add { conf, key, netns, pod: env.pod()?.pod },
            (Command::Del, Some(key)) => Request::Del { conf, key },
            (Command::Check, Some(key)) => Request::Check { conf, key, netns },
            (Command::Gc, _) => {
                let valid = conf.valid.take().unwrap_or_default();
                Request::Gc { conf, valid }
            }
            _ => Request::Status { conf },
        })
    }

    /// The plugin that the configuration's `type` means; VERSION comes without one.
    #[must_use]
    pub fn plugin(&self) -> Option<&str> {
        self.conf().map(|conf| conf.plugin.as_str())
    }

    /// The version to answer in.
    #[must_use]
    pub fn version(&self) -> Option<Version> {
        self.conf().map(|conf| conf.version)
    }

    fn conf(&self) -> Option<&NetConf> {
        match self {
            Request::Add { conf, .. }
            | Request::Del { conf, .. }
            | Request::Check { conf, .. }
            | Request::Gc { conf, .. }
            | Request::Status { conf } => Some(conf),
            Request::Version { .. } => None,
        }
    }
}
