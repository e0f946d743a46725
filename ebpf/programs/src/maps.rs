//! The maps, all pinned; names, keys and values are the layout's.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, LruPerCpuHashMap, PerCpuArray, ProgramArray, RingBuf};
use keelway_layout::{
    Addr, Affinity, AffinityKey, Backend, Counter, CtEntry, CtKey, Endpoint, EndpointDropKey, FragKey, FragPorts,
    Frontend, FrontendKey, Identity, NatEntry, NetnsPod, NodeConfig, NodeState, SlotKey, SockBackend, SockFrontend,
    SockKey, Tunnel, maps as m,
};

// Without preallocation a table costs what it holds, not what it may hold.
const GROWS: u32 = BPF_F_NO_PREALLOC;

#[map(name = "kw_frontends")]
pub static FRONTENDS: HashMap<FrontendKey, Frontend> = HashMap::pinned(m::MAX_FRONTENDS, GROWS);
#[map(name = "kw_slots")]
pub static SLOTS: HashMap<SlotKey, u32> = HashMap::pinned(m::MAX_SLOTS, GROWS);
#[map(name = "kw_backends")]
pub static BACKENDS: HashMap<u32, Backend> = HashMap::pinned(m::MAX_BACKENDS, GROWS);
#[map(name = "kw_src_ranges")]
pub static SOURCE_RANGES: LpmTrie<[u32; 5], u32> = LpmTrie::pinned(m::MAX_SOURCE_RANGES, 0);
#[map(name = "kw_affinity")]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::pinned(m::MAX_AFFINITY, 0);
#[map(name = "kw_netns")]
pub static NETNS: HashMap<u64, NetnsPod> = HashMap::pinned(m::MAX_NETNS, GROWS);
#[map(name = "kw_sock_rev")]
pub static SOCK_REVERSE: LruHashMap<SockKey, SockFrontend> = LruHashMap::pinned(m::MAX_SOCK_REVERSE, 0);
#[map(name = "kw_sock_fwd")]
pub static SOCK_FORWARD: LruHashMap<SockKey, SockBackend> = LruHashMap::pinned(m::MAX_SOCK_FORWARD, 0);
#[map(name = "kw_endpoints")]
pub static ENDPOINTS: HashMap<Addr, Endpoint> = HashMap::pinned(m::MAX_ENDPOINTS, 0);
// The key types of the tries name only what follows the prefix length.
#[map(name = "kw_identities")]
pub static IDENTITIES: LpmTrie<[u32; 4], Identity> = LpmTrie::pinned(m::MAX_IDENTITIES, 0);
#[map(name = "kw_tunnels")]
pub static TUNNELS: LpmTrie<[u32; 4], Tunnel> = LpmTrie::pinned(m::MAX_TUNNELS, 0);
#[map(name = "kw_rules")]
pub static RULES: LpmTrie<[u32; 3], u32> = LpmTrie::pinned(m::MAX_RULES, 0);
#[map(name = "kw_cidrs")]
pub static CIDRS: LpmTrie<[u32; 6], u32> = LpmTrie::pinned(m::MAX_CIDRS, 0);
#[map(name = "kw_conntrack")]
pub static CONNTRACK: LruHashMap<CtKey, CtEntry> = LruHashMap::pinned(m::MAX_CONNTRACK, 0);
#[map(name = "kw_nat")]
pub static NAT: LruHashMap<CtKey, NatEntry> = LruHashMap::pinned(m::MAX_NAT, 0);
#[map(name = "kw_claims")]
pub static CLAIMS: HashMap<CtKey, u32> = HashMap::pinned(m::MAX_CLAIMS, 0);
#[map(name = "kw_fragments")]
pub static FRAGMENTS: LruHashMap<FragKey, FragPorts> = LruHashMap::pinned(m::MAX_FRAGMENTS, 0);
#[map(name = "kw_node")]
pub static NODE: Array<NodeConfig> = Array::pinned(1, 0);
#[map(name = "kw_state")]
pub static STATE: Array<NodeState> = Array::pinned(1, 0);
#[map(name = "kw_counters")]
pub static COUNTERS: PerCpuArray<Counter> = PerCpuArray::pinned(m::MAX_COUNTERS, 0);
#[map(name = "kw_ep_drops")]
pub static ENDPOINT_DROPS: LruPerCpuHashMap<EndpointDropKey, Counter> =
    LruPerCpuHashMap::pinned(m::MAX_ENDPOINT_DROPS, 0);
#[map(name = "kw_events")]
pub static EVENTS: RingBuf = RingBuf::pinned(m::EVENTS_BYTES, 0);

/// Where a tc program keeps the packet that it works on, and the one that an ICMP error carries: the stack is too small for all of
/// it. Not pinned.
#[map(name = "kw_scratch")]
pub static SCRATCH: PerCpuArray<crate::parse::Packet> = PerCpuArray::with_max_entries(2, 0);
/// Where a tc program makes an entry of a flow before it is written. Not pinned.
#[map(name = "kw_draft")]
pub static DRAFT: PerCpuArray<crate::ct::Draft> = PerCpuArray::with_max_entries(1, 0);
/// Where a packet's way into the tunnel is kept until it takes it. Not pinned.
#[map(name = "kw_outer")]
pub static OUTER: PerCpuArray<crate::encap::Outer> = PerCpuArray::with_max_entries(1, 0);

macro_rules! program_arrays {
    ($($name:ident = $text:literal;)*) => { $(
        #[map(name = $text)]
        pub static $name: ProgramArray = ProgramArray::pinned(m::PROGRAM_SLOTS, 0);
    )* };
}

// One a hook: the kernel wants all programs of an array to be of one attach type.
program_arrays! {
    POD_INGRESS = "kwp_pod_in";
    POD_EGRESS = "kwp_pod_out";
    NODE_INGRESS = "kwp_node_in";
    NODE_EGRESS = "kwp_node_out";
    NODE_XDP = "kwp_node_xdp";
    VXLAN_INGRESS = "kwp_vxlan_in";
    VXLAN_EGRESS = "kwp_vxlan_out";
    CONNECT4 = "kwp_connect4";
    CONNECT6 = "kwp_connect6";
    SENDMSG4 = "kwp_sendmsg4";
    SENDMSG6 = "kwp_sendmsg6";
    RECVMSG4 = "kwp_recvmsg4";
    RECVMSG6 = "kwp_recvmsg6";
    GETPEERNAME4 = "kwp_peername4";
    GETPEERNAME6 = "kwp_peername6";
    BIND4 = "kwp_bind4";
    BIND6 = "kwp_bind6";
}
