//! A lease: the addresses of one interface of one container, and what has to be known about it after a restart.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What identifies an attachment, to the runtime and to us.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseKey {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

impl LeaseKey {
    /// From its parts.
    pub fn new(container_id: impl Into<String>, ifname: impl Into<String>) -> Self {
        Self { container_id: container_id.into(), ifname: ifname.into() }
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

/// The pod, as the runtime names it; all empty when there is no Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRef {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`.
    pub uid: String,
}

/// A lease as it is kept on disk. Names and hardware addresses are not in it: they follow from the key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Whose it is.
    pub key: LeaseKey,
    /// The CNI network's name.
    pub network: String,
    /// Path of the pod's network namespace, as the runtime gave it.
    pub netns: String,
    /// The pod.
    #[serde(default)]
    pub pod: PodRef,
    /// Of the interface, in bytes.
    pub mtu: u32,
    /// One per family, in the order of the pod CIDRs.
    pub addresses: Vec<IpAddr>,
}

/// A lease before it has addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRequest {
    /// Whose it will be.
    pub key: LeaseKey,
    /// The CNI network's name.
    pub network: String,
    /// Path of the pod's network namespace.
    pub netns: String,
    /// The pod.
    pub pod: PodRef,
    /// Of the interface, in bytes.
    pub mtu: u32,
}

impl LeaseRequest {
    pub(crate) fn with(&self, addresses: Vec<IpAddr>) -> Lease {
        let Self { key, network, netns, pod, mtu } = self.clone();
        Lease { key, network, netns, pod, mtu, addresses }
    }
}
