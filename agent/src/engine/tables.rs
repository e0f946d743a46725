//! The kernel's maps as the tables of Services: one write after another, or many in one call.
//!
//! A call for each of a full sync's 250,000 entries costs more than the entries do. Writes that only put something in are therefore
//! collected by table, and the tables written in the order in which they lead to one another, last first: backends, then slots
//! and the index beside them, then source ranges, then frontends. Within a table the order stays. A packet between any two of
//! them finds what it would have found between two of the original list, or a slot or a frontend's new backends a little earlier.
//! What removes something, and what flags a backend, ends a collection.

use keelway_layout::{Backend, Frontend, FrontendKey, MEMBER_BIT, SlotKey, SourceRangeKey};
use keelway_maps::{Table as _, TableError, Tables};
use keelway_proxy as proxy;

use super::convert;
use super::services::ServiceTables;

/// So few are written one by one, as they come.
const WORTH_A_BATCH: usize = 64;
/// So many at most are collected.
const BATCH: usize = 65_536;

/// Whether a write only puts something in.
const fn joins(op: &proxy::Op) -> bool {
    use proxy::Op;
    match op {
        Op::PutBackend { draining, .. } => !*draining,
        Op::PutSlot { .. } | Op::PutMember { .. } | Op::PutSourceRange { .. } | Op::PutFrontend { .. } => true,
        _ => false,
    }
}

/// Writes that [`joins`] lets together, by table.
#[derive(Default)]
struct Batch {
    backends: Vec<(u32, Backend)>,
    /// And the index.
    slots: Vec<(SlotKey, u32)>,
    source_ranges: Vec<(SourceRangeKey, u32)>,
    frontends: Vec<(FrontendKey, Frontend)>,
}

impl Batch {
    fn of(ops: &[proxy::Op]) -> Self {
        use proxy::Op;
        let mut batch = Self::default();
        for op in ops {
            match op {
                Op::PutBackend { id, backend, draining } => {
                    batch.backends.push((*id, convert::backend(backend, *draining)));
                }
                Op::PutSlot { key, backend } => batch.slots.push((convert::slot_key(key), *backend)),
                Op::PutMember { frontend, backend, slot } => {
                    batch.slots.push((convert::member_key(*frontend, *backend), *slot));
                }
                Op::PutSourceRange { frontend, net } => {
                    batch.source_ranges.push((convert::source_range_key(*frontend, *net), 1));
                }
                Op::PutFrontend { key, frontend } => {
                    batch.frontends.push((convert::frontend_key(key), convert::frontend(frontend)));
                }
                _ => {}
            }
        }
        batch
    }

    fn write(self, tables: &mut Tables) -> Result<(), TableError> {
        tables.backends.put_all(&self.backends)?;
        tables.slots.put_all(&self.slots)?;
        tables.source_ranges.put_all(&self.source_ranges)?;
        tables.frontends.put_all(&self.frontends)
    }
}

impl ServiceTables for Tables {
    fn dump(&self) -> Result<proxy::Dump, TableError> {
        let mut dump = proxy::Dump::default();
        let frontends = self.frontends.dump()?;
        dump.frontends =
            frontends.iter().map(|(k, v)| (convert::from_frontend_key(k), convert::from_frontend(v))).collect();
        for (key, value) in self.slots.dump()? {
            if key.frontend & MEMBER_BIT == 0 {
                dump.slots.push((proxy::SlotKey { frontend: key.frontend, slot: key.slot }, value));
            } else {
                dump.members.push(((key.frontend & !MEMBER_BIT, key.slot), value));
            }
        }
        for (id, value) in self.backends.dump()? {
            let (backend, draining) = convert::from_backend(&value);
            dump.backends.push((id, backend, draining));
        }
        for (key, _) in self.source_ranges.dump()? {
            match convert::from_source_range_key(&key) {
                Some(range) => dump.source_ranges.push(range),
                None => tracing::warn!(?key, "a source range of no network"),
            }
        }
        Ok(dump)
    }

    fn backend(&self, id: u32) -> Result<Option<proxy::Backend>, TableError> {
        Ok(self.backends.get(&id)?.map(|value| convert::from_backend(&value).0))
    }

    fn write(&mut self, op: &proxy::Op) -> Result<(), TableError> {
        use proxy::Op;
        match op {
            Op::PutBackend { id, backend, draining } => {
                self.backends.put(id, &convert::backend(backend, *draining))?;
            }
            Op::PutSlot { key, backend } => self.slots.put(&convert::slot_key(key), backend)?,
            Op::PutMember { frontend, backend, slot } => {
                self.slots.put(&convert::member_key(*frontend, *backend), slot)?;
            }
            Op::PutSourceRange { frontend, net } => {
                self.source_ranges.put(&convert::source_range_key(*frontend, *net), &1)?;
            }
            Op::PutFrontend { key, frontend } => {
                self.frontends.put(&convert::frontend_key(key), &convert::frontend(frontend))?;
            }
            Op::DeleteFrontend { key } => self.frontends.delete(&convert::frontend_key(key))?,
            Op::DeleteSourceRange { frontend, net } => {
                self.source_ranges.delete(&convert::source_range_key(*frontend, *net))?;
            }
            Op::DeleteMember { frontend, backend } => {
                self.slots.delete(&convert::member_key(*frontend, *backend))?;
            }
            Op::DeleteSlot { key } => self.slots.delete(&convert::slot_key(key))?,
            Op::DeleteBackend { id } => self.backends.delete(id)?,
        }
        Ok(())
    }

    fn write_all(&mut self, ops: &[proxy::Op]) -> Result<(), TableError> {
        let mut rest = ops;
        while let Some(first) = rest.first() {
            let puts = rest.iter().take(BATCH).take_while(|op| joins(op)).count();
            if puts < WORTH_A_BATCH {
                self.write(first)?;
                rest = &rest[1..];
            } else {
                Batch::of(&rest[..puts]).write(self)?;
                rest = &rest[puts..];
            }
        }
        Ok(())
    }
}
