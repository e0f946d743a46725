use aya::Ebpf;
use aya::maps::{Array, MapData, MapError, PerCpuArray, PerCpuHashMap};
use keelway_layout::{
    Addr, Affinity, AffinityKey, Backend, CidrKey, CtEntry, CtKey, Endpoint, Frontend, FrontendKey, Identity, NatEntry,
    NetnsPod, NodeConfig, NodeState, PrefixKey, RuleKey, SlotKey, SockBackend, SockFrontend, SockKey, SourceRangeKey,
    Tunnel, maps as m,
};

use crate::error::{Error, TableError};
use crate::raw::Raw;
use crate::table::{CounterTable, KernelTable, Table};

/// How full a map is.
#[derive(Clone, Debug)]
pub struct Fill {
    /// The map's name.
    pub name: &'static str,
    /// Entries in it.
    pub entries: u64,
    /// Entries that it can hold.
    pub capacity: u32,
    /// Whether a full map evicts its least recently used entry instead of refusing.
    pub lru: bool,
}

/// Every map that the agent reads or writes. The agent is the only writer of all but the flows', which programs write.
pub struct Tables {
    /// Frontends by address and port.
    pub frontends: KernelTable<FrontendKey, Frontend>,
    /// Backend ids by frontend and slot.
    pub slots: KernelTable<SlotKey, u32>,
    /// Backends by id.
    pub backends: KernelTable<u32, Backend>,
    /// Clients that frontends with ranges serve.
    pub source_ranges: KernelTable<SourceRangeKey, u32>,
    /// Backends that clients stay with (written by programs).
    pub affinity: KernelTable<AffinityKey, Affinity>,
    /// Local pods by the cookie of their network namespace.
    pub netns: KernelTable<u64, NetnsPod>,
    /// Local pods by address.
    pub endpoints: KernelTable<Addr, Endpoint>,
    /// Identities by prefix.
    pub identities: KernelTable<PrefixKey, Identity>,
    /// Nodes by prefix.
    pub tunnels: KernelTable<PrefixKey, Tunnel>,
    /// Rules.
    pub rules: KernelTable<RuleKey, u32>,
    /// `ipBlock` sets by prefix.
    pub cidrs: KernelTable<CidrKey, u32>,
    /// Flows (written by programs).
    pub conntrack: KernelTable<CtKey, CtEntry>,
    /// Masqueraded flows (written by programs).
    pub nat: KernelTable<CtKey, NatEntry>,
    /// What sockets dialled (written by programs).
    pub sock_reverse: KernelTable<SockKey, SockFrontend>,
    /// What unconnected sockets were given (written by programs).
    pub sock_forward: KernelTable<SockKey, SockBackend>,
    /// Counters (written by programs).
    pub counters: CounterTable,
    node: Array<MapData, Raw<NodeConfig>>,
    state: Array<MapData, Raw<NodeState>>,
}

fn refused(name: &str) -> impl Fn(MapError) -> Error {
    move |error| Error::Refused { what: format!("map {name}"), reason: error.to_string() }
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<aya::maps::Map, Error> {
    ebpf.take_map(name)
        .ok_or_else(|| Error::Refused { what: format!("map {name}"), reason: "not in the object".into() })
}

macro_rules! open {
    ($ebpf:ident, $kind:ident, $name:expr, $max:expr) => {
        KernelTable::$kind($name, $max, take($ebpf, $name)?).map_err(refused($name))?
    };
}

impl Tables {
    pub(crate) fn open(ebpf: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            frontends: open!(ebpf, hash, m::FRONTENDS, m::MAX_FRONTENDS),
            slots: open!(ebpf, hash, m::SLOTS, m::MAX_SLOTS),
            backends: open!(ebpf, hash, m::BACKENDS, m::MAX_BACKENDS),
            source_ranges: open!(ebpf, prefix, m::SOURCE_RANGES, m::MAX_SOURCE_RANGES),
            affinity: open!(ebpf, hash, m::AFFINITY, m::MAX_AFFINITY),
            netns: open!(ebpf, hash, m::NETNS, m::MAX_NETNS),
            endpoints: open!(ebpf, hash, m::ENDPOINTS, m::MAX_ENDPOINTS),
            identities: open!(ebpf, prefix, m::IDENTITIES, m::MAX_IDENTITIES),
            tunnels: open!(ebpf, prefix, m::TUNNELS, m::MAX_TUNNELS),
            rules: open!(ebpf, prefix, m::RULES, m::MAX_RULES),
            cidrs: open!(ebpf, prefix, m::CIDRS, m::MAX_CIDRS),
            conntrack: open!(ebpf, hash, m::CONNTRACK, m::MAX_CONNTRACK),
            nat: open!(ebpf, hash, m::NAT, m::MAX_NAT),
            sock_reverse: open!(ebpf, hash, m::SOCK_REVERSE, m::MAX_SOCK_REVERSE),
            sock_forward: open!(ebpf, hash, m::SOCK_FORWARD, m::MAX_SOCK_FORWARD),
            counters: CounterTable {
                by_hook: PerCpuArray::try_from(take(ebpf, m::COUNTERS)?).map_err(refused(m::COUNTERS))?,
                by_endpoint: PerCpuHashMap::try_from(take(ebpf, m::ENDPOINT_DROPS)?)
                    .map_err(refused(m::ENDPOINT_DROPS))?,
            },
            node: Array::try_from(take(ebpf, m::NODE)?).map_err(refused(m::NODE))?,
            state: Array::try_from(take(ebpf, m::STATE)?).map_err(refused(m::STATE))?,
        })
    }

    /// Tells the programs about their node.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_node(&mut self, node: &NodeConfig) -> Result<(), TableError> {
        self.node.set(0, Raw(*node), 0).map_err(|error| other(m::NODE, &error))
    }

    /// The words that change while traffic flows.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn state(&self) -> Result<NodeState, TableError> {
        self.state.get(&0, 0).map(|raw| raw.0).map_err(|error| other(m::STATE, &error))
    }

    /// Writes them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_state(&mut self, state: NodeState) -> Result<(), TableError> {
        self.state.set(0, Raw(state), 0).map_err(|error| other(m::STATE, &error))
    }

    /// Has every flow evaluated again at its next packet.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bump_epoch(&mut self) -> Result<(), TableError> {
        let state = self.state()?;
        self.set_state(NodeState { epoch: state.epoch.wrapping_add(1), ..state })
    }

    /// How full the maps are. Those are counted, key by key, of which `known` does not say how many entries they hold.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn fill(&self, known: impl Fn(&str) -> Option<u64>) -> Result<Vec<Fill>, TableError> {
        let of = Filler(known);
        Ok(vec![
            of.fill(&self.frontends, false)?,
            of.fill(&self.slots, false)?,
            of.fill(&self.backends, false)?,
            of.fill(&self.source_ranges, false)?,
            of.fill(&self.affinity, true)?,
            of.fill(&self.netns, false)?,
            of.fill(&self.endpoints, false)?,
            of.fill(&self.identities, false)?,
            of.fill(&self.tunnels, false)?,
            of.fill(&self.rules, false)?,
            of.fill(&self.cidrs, false)?,
            of.fill(&self.conntrack, true)?,
            of.fill(&self.nat, true)?,
            of.fill(&self.sock_reverse, true)?,
            of.fill(&self.sock_forward, true)?,
        ])
    }
}

struct Filler<F>(F);

impl<F: Fn(&str) -> Option<u64>> Filler<F> {
    fn fill<K, V>(&self, table: &impl Table<K, V>, lru: bool) -> Result<Fill, TableError> {
        let entries = (self.0)(table.name()).map_or_else(|| table.len(), Ok)?;
        Ok(Fill { name: table.name(), entries, capacity: table.capacity(), lru })
    }
}

fn other(table: &'static str, error: &MapError) -> TableError {
    TableError::Other { table, reason: error.to_string() }
}
