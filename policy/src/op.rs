//! What the kernel's policy tables hold, and the single writes that change them.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::ObjectName;

/// Reserved identities and the ranges of the others.
pub mod identity {
    /// "Any peer" as the peer of a rule; never the identity of an address.
    pub const ANY: u32 = 0;
    /// This node. Its traffic to its own pods is always allowed.
    pub const HOST: u32 = 1;
    /// Another node of the cluster.
    pub const REMOTE_NODE: u32 = 2;
    /// Everything that IDENTITIES does not name: a lookup that finds nothing means this.
    pub const WORLD: u32 = 3;
    /// An address of a pod CIDR at which no pod is known, or at which two different ones claim to be.
    pub const UNKNOWN_POD: u32 = 4;
    /// In a range of Services' addresses: nobody is there but by a Service.
    pub const SERVICES: u32 = 5;
    /// The first identity of a pod.
    pub const FIRST_POD: u32 = 256;
    /// Set in a CIDR peer id.
    pub const CIDR_BIT: u32 = 0x8000_0000;
}

/// Which way a flow goes, seen from the subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Direction {
    /// To the subject.
    Ingress = 0,
    /// From the subject.
    Egress = 1,
}

impl Direction {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// A prefix over protocol (8 bits) and then destination port (16 bits, most significant first).
///
/// The derived order puts what covers before what is covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortPrefix {
    /// IANA protocol number; 0 when `bits` is 0.
    pub proto: u8,
    /// Port, host byte order, with the bits past the prefix 0.
    pub port: u16,
    /// How many of the 24 bits count: 0 (everything), 8 (all ports of a protocol), or up to 24.
    pub bits: u8,
}

/// Key of a rule; subject, direction and peer are always exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleKey {
    /// Identity of the local pod.
    pub subject: u32,
    /// Seen from the subject.
    pub direction: Direction,
    /// An identity, [`identity::ANY`], or a CIDR peer id.
    pub peer: u32,
    /// Protocol and port.
    pub port: PortPrefix,
}

/// Key of a CIDR entry; subject and direction are always exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CidrKey {
    /// Identity of the local pod.
    pub subject: u32,
    /// Seen from the subject.
    pub direction: Direction,
    /// The prefix, host bits 0.
    pub prefix: IpNet,
}

/// How packets of one local endpoint are judged.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EndpointPolicy {
    /// The pod.
    pub pod: ObjectName,
    /// Its `metadata.uid`, which names the endpoint.
    pub uid: String,
    /// Whose rules hold: [`RuleKey::subject`]. [`identity::UNKNOWN_POD`] has none, so that enforcing denies all.
    pub subject: u32,
    /// Some policy isolates it for ingress: what no rule allows is denied. Otherwise all is allowed.
    pub enforce_ingress: bool,
    /// The same for egress.
    pub enforce_egress: bool,
}

/// Whose live flows have to be judged again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Those of every endpoint: a known address changed its identity.
    All,
    /// Those of the endpoints with this subject: its rules changed.
    Subject(u32),
}

/// One write to one table. A list of them is to be executed in its order, each once the one before it has succeeded.
///
/// A packet that runs between two of them is judged by the state before the list or by the one after it (for the rules of
/// one subject and peer: by one of them or by both together).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// RULES\[key\] = rule id.
    PutRule {
        /// Key.
        key: RuleKey,
        /// For [`crate::Model::rule`].
        rule: u32,
    },
    /// CIDRS\[key\] = CIDR peer id, or 0 where no rule matches although a shorter prefix has some.
    PutCidr {
        /// Key.
        key: CidrKey,
        /// Peer for a second look-up in RULES.
        peer: u32,
    },
    /// IDENTITIES\[prefix\] = identity.
    PutIdentity {
        /// Host bits 0.
        prefix: IpNet,
        /// Identity.
        identity: u32,
    },
    /// The endpoint's subject and enforcement. Also its live flows are to be judged again.
    PutEndpoint(EndpointPolicy),
    /// The endpoint is no longer wanted.
    DeleteEndpoint {
        /// Its uid.
        uid: String,
    },
    /// Removes a prefix.
    DeleteIdentity {
        /// Key.
        prefix: IpNet,
    },
    /// Removes a CIDR entry.
    DeleteCidr {
        /// Key.
        key: CidrKey,
    },
    /// Removes a rule.
    DeleteRule {
        /// Key.
        key: RuleKey,
    },
    /// The policy generation has to move on, so that flows admitted before are judged again.
    Bump(Scope),
}

/// Everything the kernel's maps hold, as read back after a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dump {
    /// IDENTITIES.
    pub identities: Vec<(IpNet, u32)>,
    /// RULES.
    pub rules: Vec<(RuleKey, u32)>,
    /// CIDRS.
    pub cidrs: Vec<(CidrKey, u32)>,
    /// Endpoints; may be left empty, then each wanted endpoint is written once more.
    pub endpoints: Vec<EndpointPolicy>,
}

/// The prefix that holds one address only, IPv4-mapped addresses as IPv4.
pub fn host_prefix(addr: IpAddr) -> IpNet {
    IpNet::from(addr.to_canonical())
}
