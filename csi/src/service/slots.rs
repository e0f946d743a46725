//! Slots for what takes long: mkfs and copies.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::blocking;
use crate::error::{Error, Result};
use crate::state::Store;

/// How long a slot is kept where only one of several disks may hang: mkfs takes seconds, whatever the disk's size.
const KEPT: Duration = Duration::from_secs(20);

/// Slots of each store, so that a store that hangs holds up nobody but its own.
#[derive(Clone, Debug)]
pub struct Slots {
    of: Arc<[Arc<Semaphore>; Store::COUNT]>,
    kept: Duration,
}

impl Slots {
    /// So many for each store.
    pub fn new(each: usize) -> Self {
        Self { of: Arc::new(std::array::from_fn(|_| Arc::new(Semaphore::new(each)))), kept: KEPT }
    }

    /// Runs something on a thread that may block, when there is a slot for it. Copies of the pool keep theirs to the end;
    /// elsewhere it is given up when it takes long, since a disk that hangs would else take it for ever.
    ///
    /// # Errors
    /// As `act`.
    pub async fn run<T: Send + 'static>(
        &self,
        store: Store,
        act: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let closed = |_| Error::io("wait for a slot", std::io::Error::other("the driver is stopping"));
        let slot = self.of[store as usize].clone().acquire_owned().await.map_err(closed)?;
        let mut task = std::pin::pin!(blocking(act));
        match store {
            Store::Pool => task.await,
            Store::Devices | Store::Group | Store::ThinPool => match tokio::time::timeout(self.kept, &mut task).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    tracing::warn!(?store, "something takes long; others go on meanwhile");
                    drop(slot);
                    task.await
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[tokio::test]
    async fn who_hangs_gives_up_its_slot_and_a_copy_does_not() {
        let kept = Duration::from_millis(50);
        let slots = Slots { kept, ..Slots::new(1) };
        for (store, given_up) in [(Store::Devices, true), (Store::Pool, false)] {
            let (end, ended) = channel::<()>();
            let hangs = {
                let slots = slots.clone();
                tokio::spawn(async move { slots.run(store, move || Ok(ended.recv().is_ok())).await })
            };
            tokio::task::yield_now().await;
            let next = slots.run(store, || Ok(()));
            let patience = if given_up { kept * 1000 } else { kept * 4 };
            assert_eq!(tokio::time::timeout(patience, next).await.is_ok(), given_up, "{store:?}");
            slots.run(Store::Group, || Ok(())).await.unwrap();
            end.send(()).unwrap();
            assert!(hangs.await.unwrap().unwrap());
            slots.run(store, || Ok(())).await.unwrap();
        }
    }
}
