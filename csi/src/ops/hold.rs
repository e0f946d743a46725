//! Volumes held still while their content is taken.

use super::Volumes;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::{Content, Record, State};
use crate::sys::freeze::Frozen;

/// A volume whose content does not change, or whose content can be taken in a moment.
pub struct Hold(Option<Frozen>);

impl Hold {
    /// Whether a copy may go on.
    ///
    /// # Errors
    /// That a filesystem was held still for too long.
    pub fn go_on(&self) -> std::io::Result<()> {
        self.0.as_ref().map_or(Ok(()), Frozen::go_on)
    }

    /// Lets the volume go.
    ///
    /// # Errors
    /// [`Error::Io`] when it was let go earlier: what was taken is of no use.
    pub fn release(self) -> Result<()> {
        self.0.map_or(Ok(()), Frozen::thaw)
    }
}

impl Volumes {
    /// Holds a volume still; the caller has its guard. `alone`: what is taken need not be of the same moment as another's.
    ///
    /// # Errors
    /// [`Error::InUse`] when it is in use in a way that cannot be held still, [`Error::Io`].
    pub(super) fn hold(&self, record: &Record, backend: &dyn Backend, alone: bool) -> Result<Hold> {
        if record.state() == State::Formatting {
            return Err(Error::Busy { what: format!("volume {} (it is being formatted)", record.id) });
        }
        let Some(device) = backend.attached(record)? else { return Ok(Hold(None)) };
        let in_use = |by: &str| Err(Error::InUse { id: record.id.clone(), by: by.into() });
        if !alone && record.content.filesystem().is_none() && !device.read_only()? {
            // Each such snapshot is of one moment, but not all of the same one.
            if let Some(mount) = self.mounts(device.as_ref())?.first() {
                let target = mount.target.display();
                return in_use(&format!(
                    "it is mounted at {target}; of {}, a group's moment cannot be had",
                    record.content
                ));
            }
        }
        match record.content {
            // A subvolume's snapshot is of one moment.
            Content::Tree => Ok(Hold(None)),
            Content::Raw => {
                device.flush()?;
                if !backend.snapshots_at_once() && !device.read_only()? {
                    return in_use(
                        "it is a block device, attached and writable, and the pool's filesystem cannot share blocks",
                    );
                }
                Ok(Hold(None))
            }
            Content::Filesystem(_) if alone && backend.holds_still() => Ok(Hold(None)),
            Content::Filesystem(_) => match self.open_root(device.as_ref())? {
                Some(root) => Frozen::new(root).map(|frozen| Hold(Some(frozen))),
                None => in_use("it is mounted where this driver cannot see it"),
            },
        }
    }
}
