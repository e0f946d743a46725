use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flags {
    /// The ingress rules of the subject are enforced.
    pub const ENFORCE_INGRESS: u32 = 1;
    /// The egress rules of the subject are enforced.
    pub const ENFORCE_EGRESS: u32 = 2;
}

/// A local interface of a pod; the key is its address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Endpoint {
    /// Index of the host's side of the veth pair.
    pub ifindex: u32,
    /// Number of the endpoint on this node, as counted and shown.
    pub id: u32,
    /// Differs between successive owners of one address.
    pub incarnation: u32,
    /// The identity whose rules hold for it.
    pub subject: u32,
    /// Counts changes of those rules; flows admitted under another value are evaluated again.
    pub policy_generation: u32,
    /// See [`endpoint_flags`].
    pub flags: u32,
    /// The pod's side of the veth pair.
    pub mac: [u8; 6],
    /// The host's side.
    pub host_mac: [u8; 6],
    /// Zero.
    pub reserved: u32,
}
