//! What the driver knows and must not forget, under `--state-dir`:
//!
//! ```text
//! lock              held while a driver runs
//! pool              the mark of the pool directory that belongs to this state
//! journal           intents that were begun, and which of them ended
//! journal.spare     zeros: the journal's next file
//! volumes/<id>.json one record a volume
//! snapshots/<id>.json one record a snapshot
//! uses/<id>.json   where a volume is staged and published, of this boot
//! ```

mod durable;
mod guard;
mod intent;
mod journal;
mod lines;
mod promises;
mod records;
mod uses;

pub use durable::{lock_directory, write_durably};
pub use guard::{Guard, Guards};
pub use intent::Intent;
pub use journal::{Journal, Open};
pub use promises::{Promise, Promises, Store};
pub use records::{Entry, Records};
pub use uses::Uses;
