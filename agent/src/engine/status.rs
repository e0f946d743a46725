//! What the engine shows of itself.

use keelway_layout::{Counter, Hook, LAYOUT_VERSION, Reason};
use keelway_maps::{Fill, HookState};

use super::Engine;

/// A snapshot.
#[derive(Clone, Debug)]
pub struct EngineStatus {
    /// The tables are in step with the source.
    pub synced: bool,
    /// The version of the maps' layout.
    pub layout_version: u32,
    /// Counts changes of programs.
    pub generation: u32,
    /// Attached programs.
    pub hooks: Vec<HookState>,
    /// How full the maps are.
    pub fill: Vec<Fill>,
    /// Counters that are not zero.
    pub counters: Vec<(Hook, Reason, Counter)>,
    /// Services and slices known.
    pub services: usize,
    /// Services that do not fit into the tables.
    pub services_left_out: usize,
    /// Frontends programmed.
    pub frontends: usize,
    /// Backends programmed.
    pub backends: usize,
    /// Pods attached.
    pub endpoints: usize,
    /// Nodes known.
    pub nodes: usize,
    /// Seconds since the start.
    pub uptime_seconds: u64,
    /// What is wrong, in words.
    pub problems: Vec<String>,
}

impl Engine {
    /// What is wrong now, in words.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> =
            self.problems.iter().map(|(about, problem)| format!("{about}: {problem}")).collect();
        problems.extend(self.services.problems());
        problems.extend(self.policies.errors.iter().cloned());
        problems.extend(self.source.problems());
        problems
    }

    pub(super) fn status(&mut self) -> EngineStatus {
        let mut problems = self.problems();
        let fill = self.fill().unwrap_or_else(|error| {
            problems.push(error.to_string());
            Vec::new()
        });
        let tables = &self.datapath.tables;
        let counters = tables.counters.all().unwrap_or_else(|error| {
            problems.push(error.to_string());
            Vec::new()
        });
        problems.extend(self.datapath.others());
        let hooks = self.datapath.hooks();
        problems.extend(
            hooks
                .iter()
                .filter(|hook| !hook.alive)
                .map(|hook| format!("the program {} is no longer attached to {}", hook.hook.name(), hook.to)),
        );
        let [(_, frontends, _), _, (_, backends, _), _] = self.services.usage().unwrap_or([
            (keelway_proxy::Table::Frontends, 0, 0),
            (keelway_proxy::Table::Slots, 0, 0),
            (keelway_proxy::Table::Backends, 0, 0),
            (keelway_proxy::Table::SourceRanges, 0, 0),
        ]);
        EngineStatus {
            synced: self.is_synced(),
            layout_version: LAYOUT_VERSION,
            generation: tables.state().map_or(0, |state| state.generation),
            hooks,
            fill,
            counters,
            services: self.services.model.len().0,
            services_left_out: self.services.left_out(),
            frontends,
            backends,
            endpoints: self.endpoints.attached(),
            nodes: self.nodes.len(),
            uptime_seconds: self.started.elapsed().as_secs(),
            problems,
        }
    }
}
