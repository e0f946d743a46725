//! The CNI specification as types: what a runtime hands a plugin, and what it wants back.
//!
//! Environment and stdin become a [`Request`]; [`Outcome`] and [`CniError`] become the one JSON object on stdout, in the shape
//! of the version that the configuration names. Source: the CNI specification, versions 0.3.1 to 1.1.0.

mod conf;
mod env;
mod error;
mod request;
mod result;
mod version;

pub use conf::{DEFAULT_STATE_DIR, DEFAULT_STATUS_GRACE, NetConf};
pub use env::{Command, Env, PodArgs};
pub use error::{CniError, code};
pub use request::Request;
pub use result::{Interface, IpConfig, Outcome, PrevResult, RouteConfig, render, version_answer};
pub use version::Version;
