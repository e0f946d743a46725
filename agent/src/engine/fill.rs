//! How full the tables are, without counting a full one at every look: what the agent writes, its mirrors know; flows are
//! counted by the sweep; the rest is counted at most once a minute.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use keelway_layout::maps as m;
use keelway_maps::{Fill, TableError};
use keelway_policy::Table as PolicyTable;
use keelway_proxy::Table as ProxyTable;

use super::Engine;

/// How old a count of a table may be that somebody else writes.
const COUNT_PERIOD: Duration = Duration::from_secs(60);

/// Counts that are not known otherwise, and when they were made.
#[derive(Default)]
pub struct Counted {
    entries: BTreeMap<&'static str, u64>,
    at: Option<Instant>,
}

impl Engine {
    pub(super) fn fill(&mut self) -> Result<Vec<Fill>, TableError> {
        let mut known: BTreeMap<&str, u64> = BTreeMap::new();
        for (table, used, _) in self.services.usage().into_iter().flatten() {
            let name = match table {
                ProxyTable::Frontends => m::FRONTENDS,
                ProxyTable::Slots => m::SLOTS,
                ProxyTable::Backends => m::BACKENDS,
                ProxyTable::SourceRanges => m::SOURCE_RANGES,
            };
            known.insert(name, used as u64);
        }
        for (table, used, _) in self.policies.model.usage() {
            let name = match table {
                PolicyTable::Identities => m::IDENTITIES,
                PolicyTable::Rules => m::RULES,
                PolicyTable::Cidrs => m::CIDRS,
            };
            known.insert(name, used as u64);
        }
        known.insert(m::ENDPOINTS, self.endpoints.entries() as u64);
        known.extend(self.tunnels.map(|tunnels| (m::TUNNELS, tunnels as u64)));
        known.extend(self.flows.found().iter().map(|table| (table.name, table.live + table.expired)));
        let fresh = self.counted.at.is_some_and(|at| at.elapsed() < COUNT_PERIOD);
        let counted = |name: &str| self.counted.entries.get(name).copied().filter(|_| fresh);
        let fill = self.datapath.tables.fill(|name| known.get(name).copied().or_else(|| counted(name)))?;
        if !fresh {
            let entries = fill.iter().filter(|fill| !known.contains_key(fill.name));
            self.counted.entries = entries.map(|fill| (fill.name, fill.entries)).collect();
            self.counted.at = Some(Instant::now());
        }
        Ok(fill)
    }
}
