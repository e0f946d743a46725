//! keelway-agent: the one composition root of a node's network. Sources of desired state in, kernel tables out.

#![deny(unsafe_code)]

pub mod config;
pub mod http;
pub mod source;
