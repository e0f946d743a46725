//! Where things are pinned, and whether what is pinned there is ours.

use std::path::{Path, PathBuf};

use aya::maps::MapInfo;
use keelway_layout::{
    Addr, Affinity, AffinityKey, Backend, CidrKey, Counter, CtEntry, CtKey, Endpoint, EndpointDropKey, FragKey,
    FragPorts, Frontend, FrontendKey, Identity, LAYOUT_VERSION, NatEntry, NetnsPod, NodeConfig, NodeState, PrefixKey,
    RuleKey, SlotKey, SockBackend, SockFrontend, SockKey, SourceRangeKey, Tunnel, maps as m,
};

use crate::error::Error;

/// The folders below one bpffs.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    pub fn below(bpffs: &Path) -> Self {
        Self { root: bpffs.join("keelway") }
    }
    pub fn root(&self) -> &Path {
        &self.root
    }
    pub fn maps(&self) -> PathBuf {
        self.root.join(format!("v{LAYOUT_VERSION}"))
    }
    pub fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// Makes the folders, once `bpffs` is known to be one and not a newer build's.
    pub fn prepare(&self, bpffs: &Path) -> Result<(), Error> {
        let stat =
            nix::sys::statfs::statfs(bpffs).map_err(|errno| Error::Io { path: bpffs.into(), source: errno.into() })?;
        if stat.filesystem_type() != nix::sys::statfs::BPF_FS_MAGIC {
            return Err(Error::NotBpffs { path: bpffs.into() });
        }
        if let Some((path, found)) = self.newest().filter(|(_, found)| *found > LAYOUT_VERSION) {
            return Err(Error::NewerLayout { path, found, ours: LAYOUT_VERSION });
        }
        for folder in [self.maps(), self.links()] {
            std::fs::create_dir_all(&folder).map_err(|source| Error::Io { path: folder, source })?;
        }
        Ok(())
    }

    fn newest(&self) -> Option<(PathBuf, u32)> {
        std::fs::read_dir(&self.root)
            .ok()?
            .flatten()
            .filter_map(|entry| {
                let version = entry.file_name().to_str()?.strip_prefix('v')?.parse().ok()?;
                Some((entry.path(), version))
            })
            .max_by_key(|(_, version)| *version)
    }

    /// Compares every pinned map with the layout.
    pub fn check_maps(&self) -> Result<(), Error> {
        for spec in specs() {
            let path = self.maps().join(spec.name);
            if !path.exists() {
                continue;
            }
            let info = MapInfo::from_pin(&path).map_err(|error| Error::ForeignMap {
                path: path.clone(),
                what: "the object",
                found: error.to_string(),
                expected: "a map".into(),
            })?;
            let differs = |what, found: String, expected: String| {
                (found != expected).then(|| Error::ForeignMap { path: path.clone(), what, found, expected })
            };
            let kind = info.map_type().map_or_else(|_| "unknown".into(), |kind| format!("{kind:?}"));
            let differences = [
                differs("its type", kind, spec.kind.into()),
                differs("its key size", info.key_size().to_string(), spec.key.to_string()),
                differs("its value size", info.value_size().to_string(), spec.value.to_string()),
                differs("its size", info.max_entries().to_string(), spec.entries.to_string()),
            ];
            if let Some(error) = differences.into_iter().flatten().next() {
                return Err(error);
            }
        }
        Ok(())
    }
}

/// The kernel's view of a map, as the layout wants it.
pub struct Spec {
    pub name: &'static str,
    kind: &'static str,
    key: usize,
    value: usize,
    entries: u32,
}

fn spec<K, V>(name: &'static str, kind: &'static str, entries: u32) -> Spec {
    Spec { name, kind, key: size_of::<K>(), value: size_of::<V>(), entries }
}

/// Every pinned map but the program arrays.
pub fn specs() -> Vec<Spec> {
    let mut specs = vec![
        spec::<FrontendKey, Frontend>(m::FRONTENDS, "Hash", m::MAX_FRONTENDS),
        spec::<SlotKey, u32>(m::SLOTS, "Hash", m::MAX_SLOTS),
        spec::<u32, Backend>(m::BACKENDS, "Hash", m::MAX_BACKENDS),
        spec::<SockKey, SockFrontend>(m::SOCK_REVERSE, "LruHash", m::MAX_SOCK_REVERSE),
        spec::<SockKey, SockBackend>(m::SOCK_FORWARD, "LruHash", m::MAX_SOCK_FORWARD),
        spec::<SourceRangeKey, u32>(m::SOURCE_RANGES, "LpmTrie", m::MAX_SOURCE_RANGES),
        spec::<AffinityKey, Affinity>(m::AFFINITY, "LruHash", m::MAX_AFFINITY),
        spec::<u64, NetnsPod>(m::NETNS, "Hash", m::MAX_NETNS),
        spec::<Addr, Endpoint>(m::ENDPOINTS, "Hash", m::MAX_ENDPOINTS),
        spec::<PrefixKey, Identity>(m::IDENTITIES, "LpmTrie", m::MAX_IDENTITIES),
        spec::<PrefixKey, Tunnel>(m::TUNNELS, "LpmTrie", m::MAX_TUNNELS),
        spec::<RuleKey, u32>(m::RULES, "LpmTrie", m::MAX_RULES),
        spec::<CidrKey, u32>(m::CIDRS, "LpmTrie", m::MAX_CIDRS),
        spec::<CtKey, CtEntry>(m::CONNTRACK, "LruHash", m::MAX_CONNTRACK),
        spec::<CtKey, NatEntry>(m::NAT, "LruHash", m::MAX_NAT),
        spec::<CtKey, u32>(m::CLAIMS, "Hash", m::MAX_CLAIMS),
        spec::<FragKey, FragPorts>(m::FRAGMENTS, "LruHash", m::MAX_FRAGMENTS),
        spec::<u32, NodeConfig>(m::NODE, "Array", 1),
        spec::<u32, NodeState>(m::STATE, "Array", 1),
        spec::<u32, Counter>(m::COUNTERS, "PerCpuArray", m::MAX_COUNTERS),
        spec::<EndpointDropKey, Counter>(m::ENDPOINT_DROPS, "LruPerCpuHash", m::MAX_ENDPOINT_DROPS),
        Spec { name: m::EVENTS, kind: "RingBuf", key: 0, value: 0, entries: m::EVENTS_BYTES },
    ];
    specs
        .extend(crate::loader::HOOKS.iter().map(|hook| spec::<u32, u32>(hook.array, "ProgramArray", m::PROGRAM_SLOTS)));
    specs
}
