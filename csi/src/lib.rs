//! Keelway's CSI driver: volumes of a node's own disk, as images in a pool directory.
//!
//! ```text
//! gRPC -> service/*   -> request   -> ops/*            -> backend/* -> sys/*
//!         (tonic)        (validate)   (guard, journal)    (images)     (loop, mount, targets)
//!                                        |
//!                                        +-> state/*  (records, journal, capacity; all fsynced)
//! ```
//!
//! `model` is pure. Everything that blocks runs on tokio's blocking threads, in a task of its own that a caller who goes
//! away cannot cut short; mkfs waits for one of a few slots first. `ops::recover` runs before the sockets are there.
#![deny(unsafe_code)]

pub mod authority;
pub mod backend;
pub mod error;
pub mod model;
pub mod ops;
pub mod request;
pub mod server;
pub mod service;
pub mod state;
pub mod sys;

/// Messages and services of CSI, as far as they are served here.
#[allow(missing_docs, clippy::all)]
pub mod csi {
    tonic::include_proto!("csi.v1");
    include!(concat!(env!("OUT_DIR"), "/redacted.rs"));
}

/// The kubelet's plugin registration API.
#[allow(missing_docs, clippy::all)]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}

/// The name of the driver for local volumes.
pub const LOCAL_DRIVER: &str = "local.csi.keelway.dev";

/// The topology key of local volumes: a volume is where its node is.
pub const TOPOLOGY_KEY: &str = "topology.local.csi.keelway.dev/node";
