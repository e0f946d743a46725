//! The flows that are past their time, removed while the agent runs. Nothing depends on it: programs take such an entry for
//! absent. It frees room before the kernel has to evict, and tells flows from what is left of them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use keelway_maps::{Sweep, Swept};

use crate::engine::Handle;

/// How often a slice is read.
const PERIOD: Duration = Duration::from_secs(1);
/// Entries of a slice: under 5 ms of a CPU in the second, and full tables are gone over in less than two minutes.
const SLICE: usize = 4096;

/// What the sweep has found so far, shared with those who show it.
#[derive(Clone, Debug, Default)]
pub struct Flows(Arc<Mutex<Vec<Swept>>>);

impl Flows {
    /// Of each table of flows, what the last whole pass found; nothing before the first.
    pub fn found(&self) -> Vec<Swept> {
        let found = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        found.iter().filter(|table| table.passes > 0).copied().collect()
    }

    fn set(&self, found: &[Swept]) {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = found.to_vec();
    }
}

/// Sweeps until the agent ends. It begins when this build's programs run: those of one before may not know of claims.
pub async fn run(mut sweep: Sweep, engine: Handle, flows: Flows) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        ticks.tick().await;
        if !engine.is_synced() {
            continue;
        }
        let step = tokio::task::spawn_blocking(move || {
            let result = sweep.step(SLICE);
            (sweep, result)
        });
        let Ok((returned, result)) = step.await else { return };
        sweep = returned;
        flows.set(&sweep.found());
        match result {
            Ok(()) => failing = false,
            Err(error) if !failing => {
                tracing::warn!(%error, "flows that are past their time cannot be removed");
                failing = true;
            }
            Err(_) => {}
        }
    }
}
