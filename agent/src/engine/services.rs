//! Services: the model, its mirror of the tables, and the writes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::SystemTime;

use keelway_layout::maps;
use keelway_maps::TableError;
use keelway_proxy as proxy;
use keelway_proxy::TableFull;
use keelway_proxy::model::{EndpointSlice, ObjectName, Protocol};

use tokio::sync::mpsc::UnboundedSender;

use super::EngineError;
use crate::events::{Complaint, Note};
use crate::sockets::Gone;

/// Services that do not fit are named up to this number.
const PROBLEMS: usize = 8;

const LIMITS: proxy::Limits = proxy::Limits {
    frontends: maps::MAX_FRONTENDS as usize,
    slots: maps::MAX_SLOTS as usize,
    backends: maps::MAX_BACKENDS as usize,
    source_ranges: maps::MAX_SOURCE_RANGES as usize,
    maglev: proxy::maglev::SIZES,
};

/// A Service whose frontends did not fit.
struct LeftOut {
    /// In words.
    reason: String,
    table: proxy::Table,
    /// Entries that have to be free there before it is worth another try.
    room: usize,
}

impl LeftOut {
    fn new(error: &TableFull, tables: &proxy::Tables) -> Self {
        Self {
            reason: error.to_string(),
            table: error.table,
            room: error.needed.saturating_sub(used(tables, error.table)),
        }
    }

    fn may_fit(&self, tables: &proxy::Tables) -> bool {
        let limit = tables.usage().iter().find(|(table, ..)| *table == self.table).map_or(0, |(_, _, limit)| *limit);
        used(tables, self.table) + self.room <= limit
    }
}

fn used(tables: &proxy::Tables, wanted: proxy::Table) -> usize {
    tables.usage().iter().find(|(table, ..)| *table == wanted).map_or(0, |(_, used, _)| *used)
}

/// Where the entries of Services are kept: the kernel's maps, or what a test puts before them.
pub trait ServiceTables {
    /// Executes one write.
    ///
    /// # Errors
    /// What the kernel says.
    fn write(&mut self, op: &proxy::Op) -> Result<(), TableError>;

    /// Executes writes in an order that a packet cannot tell from theirs, up to the first that fails.
    ///
    /// # Errors
    /// What the kernel says.
    fn write_all(&mut self, ops: &[proxy::Op]) -> Result<(), TableError> {
        ops.iter().try_for_each(|op| self.write(op))
    }

    /// Everything that they hold.
    ///
    /// # Errors
    /// What the kernel says.
    fn dump(&self) -> Result<proxy::Dump, TableError>;

    /// A backend by its id.
    ///
    /// # Errors
    /// What the kernel says.
    fn backend(&self, id: u32) -> Result<Option<proxy::Backend>, TableError>;
}

/// The Services' part of the engine.
pub struct Services {
    /// The objects.
    pub model: proxy::Model,
    node: proxy::NodeInfo,
    mirror: Option<proxy::Tables>,
    left_out: BTreeMap<ObjectName, LeftOut>,
    /// When the changes that wait to be written happened.
    triggered: Vec<Triggered>,
    /// Changes of before are nobody's delay.
    started: SystemTime,
    /// Receives the backends that leave.
    gone: UnboundedSender<Gone>,
}

/// When an endpoint changed, and of which family it is where it has any address.
pub type Triggered = (SystemTime, Option<bool>);

impl Services {
    /// Of the node with this name; nothing is known of it yet. `gone` receives the backends that leave.
    pub fn new(node_name: &str, gone: UnboundedSender<Gone>) -> Self {
        let node = proxy::NodeInfo { name: node_name.into(), ..proxy::NodeInfo::default() };
        Self {
            model: proxy::Model::new(node.clone()),
            node,
            mirror: None,
            left_out: BTreeMap::new(),
            triggered: Vec::new(),
            started: SystemTime::now(),
            gone,
        }
    }

    /// The zone of the node, which topology hints name, and its own address of each family.
    pub fn set_place(&mut self, zone: Option<String>, ips: Vec<IpAddr>) {
        self.node.zone = zone;
        self.node.ips = ips;
        self.model.set_node(self.node.clone());
    }

    /// The addresses on which node ports answer; `true`: for processes of the host's network namespace only.
    pub fn set_addresses(&mut self, mut addresses: Vec<(IpAddr, bool)>) {
        addresses.sort_unstable();
        addresses.dedup();
        if self.node.addresses != addresses {
            self.node.addresses = addresses;
            self.model.set_node(self.node.clone());
        }
    }

    /// A Service went.
    pub fn service_gone(&mut self, namespace: &str, name: &str) {
        self.model.delete_service(&ObjectName::new(namespace, name));
    }

    /// A slice came or changed, at the time that it reports.
    pub fn slice_changed(&mut self, slice: EndpointSlice, triggered: Option<SystemTime>) {
        let first = slice.endpoints.iter().find_map(|endpoint| endpoint.addresses.first());
        let triggered = triggered.filter(|at| *at > self.started);
        self.triggered.extend(triggered.map(|at| (at, first.map(|address| address.to_canonical().is_ipv6()))));
        self.model.upsert_slice(slice);
    }

    /// A slice went.
    pub fn slice_gone(&mut self, namespace: &str, name: &str) {
        self.model.delete_slice(&ObjectName::new(namespace, name));
    }

    /// Entries in use.
    pub fn usage(&self) -> Option<[(proxy::Table, usize, usize); 4]> {
        self.mirror.as_ref().map(proxy::Tables::usage)
    }

    /// The number of a backend that is programmed.
    pub fn backend_id(&self, backend: &proxy::Backend) -> Option<u32> {
        self.mirror.as_ref()?.number_of(backend)
    }

    /// How many Services do not fit.
    pub fn left_out(&self) -> usize {
        self.left_out.len()
    }

    /// What is wrong with Services, in words: those that do not fit, the first few by name and how many more there are; parts
    /// that are not in force; addresses that another Service has.
    pub fn problems(&self) -> Vec<String> {
        let few = |mut all: Vec<String>, what: &str| {
            let more = all.len().saturating_sub(PROBLEMS);
            all.truncate(PROBLEMS);
            all.extend((more > 0).then(|| format!("{more} more services {what}")));
            all
        };
        let left_out = self.left_out.values().map(|left_out| left_out.reason.clone()).collect();
        let flaws = self.model.problems().map(|(name, problems)| format!("{name}: {}", problems.join("; "))).collect();
        let conflicts = self.mirror.as_ref().map(proxy::Tables::conflicts).unwrap_or_default();
        let lost = conflicts.iter().flat_map(|conflict| {
            let lose = |(loser, _): &(ObjectName, _)| format!("{loser}: {} is {}'s", conflict.key, conflict.winner);
            conflict.losers.iter().map(lose).collect::<Vec<_>>()
        });
        let lists = [
            few(left_out, "do not fit"),
            few(flaws, "are not wholly in force"),
            few(lost.collect(), "want an address that another has"),
        ];
        lists.concat()
    }

    /// What is wrong with which Service, all of it, for Events.
    pub fn complaints(&self) -> BTreeSet<Complaint> {
        let left_out = self.left_out.iter().map(|(name, one)| (name.clone(), Note::LeftOut, one.reason.clone()));
        let flaws = self.model.problems();
        let flaws = flaws.map(|(name, problems)| (name.clone(), Note::Invalid, problems.join("; ")));
        let conflicts = self.mirror.as_ref().map(proxy::Tables::conflicts).unwrap_or_default();
        let lost = conflicts.iter().flat_map(|conflict| {
            let words = format!("{} is {}'s", conflict.key, conflict.winner);
            conflict.losers.iter().map(move |(loser, _)| (loser.clone(), Note::Conflict, words.clone()))
        });
        left_out.chain(flaws).chain(lost).filter(|(name, ..)| !name.is_this_node()).collect()
    }

    /// What the maps should hold; none before the first sync.
    pub(super) fn mirror(&self) -> Option<&proxy::Tables> {
        self.mirror.as_ref()
    }

    /// Takes over what the maps hold and brings them to what is wanted.
    ///
    /// # Errors
    /// What the kernel says; to be called again then.
    pub fn restore(&mut self, tables: &mut impl ServiceTables) -> Result<(), EngineError> {
        let dump = tables.dump().map_err(kernel)?;
        let wanted = self.model.all();
        let (mirror, ops, errors) = proxy::Tables::restore(LIMITS, &dump, &wanted);
        let left_out = |error: &TableFull| (error.service.clone(), LeftOut::new(error, &mirror));
        self.left_out = errors.iter().map(left_out).collect();
        self.mirror = Some(mirror);
        self.execute(tables, &ops).map_err(kernel)
    }

    /// Writes what changed; answers when those changes happened.
    ///
    /// # Errors
    /// What the kernel says. What was to be written is lost then, and [`Self::restore`] makes up for it.
    pub fn apply(&mut self, tables: &mut impl ServiceTables) -> Result<Vec<Triggered>, EngineError> {
        let ops = self.plan()?;
        self.execute(tables, &ops).map_err(kernel)?;
        Ok(std::mem::take(&mut self.triggered))
    }

    fn execute(&mut self, tables: &mut impl ServiceTables, ops: &[proxy::Op]) -> Result<(), TableError> {
        let gone = leaving(tables, ops)?;
        tables.write_all(ops)?;
        for one in gone {
            // Nobody receives when the agent is stopping.
            let _ = self.gone.send(one);
        }
        Ok(())
    }

    /// The writes for what changed, and for what did not fit before and does now.
    fn plan(&mut self) -> Result<Vec<proxy::Op>, EngineError> {
        let Some(mirror) = &mut self.mirror else { return Err(EngineError::NotSynced) };
        let mut ops = Vec::new();
        loop {
            for change in self.model.take_changes() {
                match mirror.apply(&change) {
                    Ok(more) => {
                        self.left_out.remove(&change.service);
                        ops.extend(more);
                    }
                    Err(error) => {
                        let left_out = LeftOut::new(&error, mirror);
                        if self.left_out.insert(change.service, left_out).is_none() {
                            tracing::error!(service = %error.service, %error, "frontends left as they were");
                        }
                    }
                }
            }
            // One at a time, since the next one's room may go to it; each turn leaves one fewer, or raises what it asks for.
            let Some(name) = self.left_out.iter().find(|(_, one)| one.may_fit(mirror)).map(|(name, _)| name.clone())
            else {
                return Ok(ops);
            };
            self.model.touch(&name);
        }
    }
}

/// The backends that `ops` will remove, and of datagram ones those that a frontend will do without.
fn leaving(tables: &impl ServiceTables, ops: &[proxy::Op]) -> Result<Vec<Gone>, TableError> {
    use proxy::Op;
    let mut gone = Vec::new();
    for op in ops {
        let (id, is_member) = match op {
            Op::DeleteMember { backend, .. } => (*backend, true),
            Op::DeleteBackend { id } => (*id, false),
            _ => continue,
        };
        if let Some(backend) = tables.backend(id)?
            && is_member == (backend.proto == Protocol::Udp.number())
        {
            gone.push(Gone { backend: SocketAddr::new(backend.addr, backend.port), proto: backend.proto, id });
        }
    }
    Ok(gone)
}

fn kernel(error: TableError) -> EngineError {
    EngineError::Kernel(error.to_string())
}

#[cfg(test)]
mod tests {
    use crate::source::convert;

    use super::*;

    fn small() -> Services {
        let mut services = Services::new("node1", tokio::sync::mpsc::unbounded_channel().0);
        let limits = proxy::Limits { frontends: 100, slots: 100, backends: 4, ..LIMITS };
        services.mirror = Some(proxy::Tables::new(limits));
        services
    }

    /// A Service with an address of its own and so many backends, each its own.
    fn add(services: &mut Services, number: u8, backends: u8) {
        let yaml = format!(
            "metadata: {{name: s{number}}}\nspec: {{clusterIPs: [10.96.0.{number}], ports: [{{name: p, port: 80}}]}}\n"
        );
        services.model.upsert_service(convert::service(&serde_norway::from_str(&yaml).unwrap()).unwrap());
        let endpoints: Vec<String> =
            (1..=backends).map(|last| format!("{{addresses: [10.244.{number}.{last}]}}")).collect();
        let yaml = format!(
            "metadata: {{name: s{number}-1, labels: {{kubernetes.io/service-name: s{number}}}}}\naddressType: IPv4\n\
             ports: [{{name: p, port: 8080}}]\nendpoints: [{}]\n",
            endpoints.join(", ")
        );
        let slice = convert::endpoint_slice(&serde_norway::from_str(&yaml).unwrap()).unwrap().unwrap();
        services.slice_changed(slice.0, slice.1);
    }

    fn served(services: &Services, number: u8) -> bool {
        let key = proxy::FrontendKey::new([10, 96, 0, number].into(), 80, proxy::model::Protocol::Tcp);
        services.mirror.as_ref().unwrap().owner(&key).is_some()
    }

    #[test]
    fn what_did_not_fit_is_served_when_there_is_room() {
        let mut services = small();
        add(&mut services, 1, 3);
        add(&mut services, 2, 2);
        add(&mut services, 3, 2);
        add(&mut services, 4, 5);
        services.plan().unwrap();
        assert_eq!([1, 2, 3, 4].map(|number| served(&services, number)), [true, false, false, false]);
        assert_eq!(services.left_out(), 3);
        assert!(services.problems()[0].contains("default/s2"), "{:?}", services.problems());
        assert!(services.plan().unwrap().is_empty(), "nothing changed");

        // Another Service's deletion makes room for two, and not for the one that never fits.
        services.service_gone("default", "s1");
        let ops = services.plan().unwrap();
        let puts = ops.iter().filter(|op| matches!(op, proxy::Op::PutFrontend { key, .. } if key.port == 80)).count();
        assert_eq!(([1, 2, 3, 4].map(|number| served(&services, number)), puts), ([false, true, true, false], 2));
        assert_eq!(services.left_out(), 1);
        assert!(services.plan().unwrap().is_empty());

        // It is forgotten with its Service.
        services.service_gone("default", "s4");
        services.plan().unwrap();
        assert_eq!((services.left_out(), services.problems().len()), (0, 0));
    }

    #[test]
    fn what_shrinks_makes_room_too_and_the_problems_are_few() {
        let mut services = small();
        add(&mut services, 1, 4);
        for number in 2..20 {
            add(&mut services, number, 1);
        }
        services.plan().unwrap();
        assert_eq!((services.left_out(), services.problems().len()), (18, PROBLEMS + 1));
        assert_eq!(services.problems()[PROBLEMS], "10 more services do not fit");
        add(&mut services, 1, 1);
        services.plan().unwrap();
        assert_eq!((services.left_out(), services.usage().unwrap()[2].1), (15, 4));
    }
}
