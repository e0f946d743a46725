//! Names and sizes of the maps. Names are at most 15 bytes, the kernel's limit, so that `bpftool` shows them whole.

/// Frontends by address and port.
pub const FRONTENDS: &str = "kw_frontends";
/// Backend ids by frontend and slot.
pub const SLOTS: &str = "kw_slots";
/// Backends by id.
pub const BACKENDS: &str = "kw_backends";
/// Clients that frontends with ranges serve.
pub const SOURCE_RANGES: &str = "kw_src_ranges";
/// Backends that clients stay with.
pub const AFFINITY: &str = "kw_affinity";
/// Local pods by the cookie of their network namespace.
pub const NETNS: &str = "kw_netns";
/// What a socket dialled, by what it was given.
pub const SOCK_REVERSE: &str = "kw_sock_rev";
/// What an unconnected socket was given, by what it dialled.
pub const SOCK_FORWARD: &str = "kw_sock_fwd";
/// Local pods by address.
pub const ENDPOINTS: &str = "kw_endpoints";
/// Identities by prefix.
pub const IDENTITIES: &str = "kw_identities";
/// Nodes by prefix.
pub const TUNNELS: &str = "kw_tunnels";
/// Rules.
pub const RULES: &str = "kw_rules";
/// `ipBlock` sets by prefix.
pub const CIDRS: &str = "kw_cidrs";
/// Flows.
pub const CONNTRACK: &str = "kw_conntrack";
/// Masqueraded flows.
pub const NAT: &str = "kw_nat";
/// Keys of [`CONNTRACK`] and [`NAT`] of which one program is about to replace or remove an entry that is past its time.
pub const CLAIMS: &str = "kw_claims";
/// Ports of fragmented datagrams.
pub const FRAGMENTS: &str = "kw_fragments";
/// [`crate::NodeConfig`].
pub const NODE: &str = "kw_node";
/// [`crate::NodeState`].
pub const STATE: &str = "kw_state";
/// Per-CPU counters by hook and reason.
pub const COUNTERS: &str = "kw_counters";
/// Per-CPU drop counters by endpoint.
pub const ENDPOINT_DROPS: &str = "kw_ep_drops";
/// Samples of dropped packets.
pub const EVENTS: &str = "kw_events";

/// Entries of [`FRONTENDS`].
pub const MAX_FRONTENDS: u32 = 131_072;
/// Entries of [`SLOTS`].
pub const MAX_SLOTS: u32 = 1_048_576;
/// Entries of [`BACKENDS`].
pub const MAX_BACKENDS: u32 = 262_144;
/// Entries of [`SOURCE_RANGES`].
pub const MAX_SOURCE_RANGES: u32 = 65_536;
/// Entries of [`AFFINITY`].
pub const MAX_AFFINITY: u32 = 131_072;
/// Entries of [`NETNS`].
pub const MAX_NETNS: u32 = MAX_ENDPOINTS;
/// Entries of [`SOCK_REVERSE`].
pub const MAX_SOCK_REVERSE: u32 = 131_072;
/// Entries of [`SOCK_FORWARD`].
pub const MAX_SOCK_FORWARD: u32 = 65_536;
/// Entries of [`ENDPOINTS`].
pub const MAX_ENDPOINTS: u32 = 4_096;
/// Entries of [`IDENTITIES`].
pub const MAX_IDENTITIES: u32 = 524_288;
/// Entries of [`TUNNELS`].
pub const MAX_TUNNELS: u32 = 65_536;
/// Entries of [`RULES`].
pub const MAX_RULES: u32 = 262_144;
/// Entries of [`CIDRS`].
pub const MAX_CIDRS: u32 = 131_072;
/// Entries of [`CONNTRACK`].
pub const MAX_CONNTRACK: u32 = 262_144;
/// Entries of [`NAT`]; a flow takes two.
pub const MAX_NAT: u32 = 131_072;
/// Entries of [`CLAIMS`]; a CPU has at most two at a time.
pub const MAX_CLAIMS: u32 = 4_096;
/// Entries of [`FRAGMENTS`].
pub const MAX_FRAGMENTS: u32 = 8_192;
/// Entries of [`COUNTERS`].
pub const MAX_COUNTERS: u32 = crate::REASONS * 16;
/// Entries of [`ENDPOINT_DROPS`].
pub const MAX_ENDPOINT_DROPS: u32 = 16_384;
/// Bytes of [`EVENTS`].
pub const EVENTS_BYTES: u32 = 256 * 1024;

/// Slots of every hook's program array: two generations, so that one runs while the other is filled.
pub const PROGRAM_SLOTS: u32 = 2;
