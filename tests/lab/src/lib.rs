//! The lab: machines made of namespaces on one machine, to run the data plane in and to watch it from outside.
//!
//! [`Lab`] is a switch with [`Node`]s and a machine outside. A node's programs are started with [`Host::run`] and
//! [`Host::spawn`]; [`Node::kill_node`] is a power cut and [`Node::boot_node`] the boot after it; [`Host::cut`] unplugs the
//! network. Everything a lab makes is found again by its id and is removed when the value is dropped, when the
//! owner panics, and when it is interrupted or killed (see [`clean`]).
//!
//! On top of it: [`containerd`] and [`cri`] start pods as a kubelet does, [`image`] makes images from local files,
//! [`standalone`] runs agents without Kubernetes, [`cluster`] is a real one, [`csi`] calls a storage driver, [`probe`] is the
//! traffic.
#![forbid(unsafe_code)]

pub mod bench;
pub mod boot;
pub mod cgroup;
pub mod clean;
pub mod cluster;
pub mod containerd;
pub mod cri;
pub mod csi;
pub mod demo;
pub mod enter;
mod host;
pub mod image;
mod lab;
pub mod load;
pub mod memory_api;
pub mod netns;
mod node;
pub mod plugin;
pub mod probe;
mod process;
pub mod services;
pub mod sh;
pub mod small_api;
pub mod standalone;
pub mod story;

pub use host::Host;
pub use lab::Lab;
pub use node::Node;
pub use process::Process;
