//! Services: the model, its mirror of the tables, and the writes.

use std::collections::BTreeMap;
use std::time::SystemTime;

use keelway_layout::maps;
use keelway_maps::{Table as _, TableError, Tables};
use keelway_proxy as proxy;
use keelway_proxy::model::{EndpointSlice, ObjectName};

use super::{EngineError, convert};

const LIMITS: proxy::Limits = proxy::Limits {
    frontends: maps::MAX_FRONTENDS as usize,
    slots: maps::MAX_SLOTS as usize,
    backends: maps::MAX_BACKENDS as usize,
};

pub struct Services {
    pub model: proxy::Model,
    node: proxy::NodeInfo,
    mirror: Option<proxy::Tables>,
    /// Services whose frontends did not fit, and why.
    pub errors: BTreeMap<ObjectName, String>,
    /// When the changes that wait to be written happened.
    triggered: Vec<SystemTime>,
}

impl Services {
    pub fn new(node_name: &str) -> Self {
        let node = proxy::NodeInfo { name: node_name.into(), zone: None };
        Self {
            model: proxy::Model::new(node.clone()),
            node,
            mirror: None,
            errors: BTreeMap::new(),
            triggered: Vec::new(),
        }
    }

    pub fn set_zone(&mut self, zone: Option<String>) {
        self.node.zone = zone;
        self.model.set_node(self.node.clone());
    }

    pub fn service_gone(&mut self, namespace: &str, name: &str) {
        self.model.delete_service(&ObjectName::new(namespace, name));
    }

    pub fn slice_changed(&mut self, slice: EndpointSlice, triggered: Option<SystemTime>) {
        self.model.upsert_slice(slice);
        self.triggered.extend(triggered);
    }

    pub fn slice_gone(&mut self, namespace: &str, name: &str) {
        self.model.delete_slice(&ObjectName::new(namespace, name));
    }

    /// Entries in use.
    pub fn usage(&self) -> Option<[(proxy::Table, usize, usize); 3]> {
        self.mirror.as_ref().map(proxy::Tables::usage)
    }

    /// Takes over what the maps hold and brings them to what is wanted.
    pub fn restore(&mut self, tables: &mut Tables) -> Result<(), EngineError> {
        let dump = dump(tables).map_err(kernel)?;
        let wanted = self.model.all();
        let (mirror, ops, errors) = proxy::Tables::restore(LIMITS, &dump, &wanted);
        self.mirror = Some(mirror);
        self.errors = errors.into_iter().map(|error| (error.service.clone(), error.to_string())).collect();
        execute(tables, &ops).map_err(kernel)
    }

    /// Writes what changed; answers when those changes happened.
    pub fn apply(&mut self, tables: &mut Tables) -> Result<Vec<SystemTime>, EngineError> {
        let Some(mirror) = &mut self.mirror else { return Err(EngineError::NotSynced) };
        for change in self.model.take_changes() {
            match mirror.apply(&change) {
                Ok(ops) => {
                    self.errors.remove(&change.service);
                    execute(tables, &ops).map_err(kernel)?;
                }
                Err(error) => {
                    tracing::error!(service = %change.service, %error, "frontends left as they were");
                    self.errors.insert(change.service, error.to_string());
                }
            }
        }
        Ok(std::mem::take(&mut self.triggered))
    }
}

fn kernel(error: TableError) -> EngineError {
    EngineError::Kernel(error.to_string())
}

fn dump(tables: &Tables) -> Result<proxy::Dump, TableError> {
    Ok(proxy::Dump {
        frontends: tables
            .frontends
            .dump()?
            .iter()
            .map(|(key, value)| (convert::from_frontend_key(key), convert::from_frontend(value)))
            .collect(),
        slots: tables
            .slots
            .dump()?
            .into_iter()
            .map(|(key, backend)| (proxy::SlotKey { frontend: key.frontend, slot: key.slot }, backend))
            .collect(),
        backends: tables.backends.dump()?.iter().map(|(id, value)| (*id, convert::from_backend(value))).collect(),
        // Replies are told by what each flow remembers: there is no such map.
        revnat: Vec::new(),
    })
}

fn execute(tables: &mut Tables, ops: &[proxy::Op]) -> Result<(), TableError> {
    use proxy::Op;
    for op in ops {
        match op {
            Op::PutBackend { id, backend } => tables.backends.put(id, &convert::backend(backend))?,
            Op::PutSlot { key, backend } => tables.slots.put(&convert::slot_key(key), backend)?,
            Op::PutFrontend { key, frontend } => {
                tables.frontends.put(&convert::frontend_key(key), &convert::frontend(frontend))?;
            }
            Op::DeleteFrontend { key } => tables.frontends.delete(&convert::frontend_key(key))?,
            Op::DeleteSlot { key } => tables.slots.delete(&convert::slot_key(key))?,
            Op::DeleteBackend { id } => tables.backends.delete(id)?,
            Op::PutRevNat { .. } | Op::DeleteRevNat { .. } => {}
        }
    }
    Ok(())
}
