//! keelway-agent: the one composition root of a node's network. Sources of desired state in, kernel tables out.

#![deny(unsafe_code)]

pub mod attachments;
pub mod cleanup;
pub mod config;
pub mod engine;
pub mod events;
pub mod gate;
pub mod health_checks;
pub mod host;
pub mod http;
pub mod inspect;
pub mod install;
pub mod neighbours;
pub mod netfilter;
pub mod proc_sys;
pub mod run;
mod services;
pub mod sockets;
pub mod source;
pub mod sweep;
