//! Where volumes are staged and published, and how: what the kernel's mount table does not tell.
//!
//! It is about this boot only, and so is never synced: what was mounted before is gone, and what a power cut damaged is of
//! an earlier boot. It does not say that something is mounted; only, of what is, how it was asked for. Of block devices it
//! also says that they are staged, since nothing is mounted for that.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::durable::write_for_this_boot;
use crate::error::{Context, Error, Result};
use crate::model::{Use, VolumeId};

const DIRECTORY: &str = "uses";
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// All uses of the volumes of one state directory.
#[derive(Debug)]
pub struct Uses {
    directory: PathBuf,
    boot: String,
    all: Mutex<BTreeMap<VolumeId, Vec<Use>>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OfBoot {
    boot: String,
    uses: Vec<Use>,
}

impl Uses {
    /// Reads what an earlier driver of this boot wrote down.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(state_dir: &Path) -> Result<Self> {
        let boot = std::fs::read_to_string(BOOT).context(|| format!("read {BOOT}"))?;
        Self::of_boot(state_dir, boot.trim())
    }

    fn of_boot(state_dir: &Path, boot: &str) -> Result<Self> {
        let directory = state_dir.join(DIRECTORY);
        let what = || format!("read {}", directory.display());
        std::fs::create_dir_all(&directory).context(what)?;
        let mut all = BTreeMap::new();
        for entry in std::fs::read_dir(&directory).context(what)? {
            let path = entry.context(what)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".json"));
            let id = name.and_then(|name| name.parse::<VolumeId>().ok());
            let found = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<OfBoot>(&text).ok());
            match (id, found) {
                (Some(id), Some(of)) if of.boot == boot => drop(all.insert(id, of.uses)),
                // Also what was written beside its name and never renamed.
                _ => std::fs::remove_file(&path).context(|| format!("remove {}", path.display()))?,
            }
        }
        Ok(Self { directory, boot: boot.to_owned(), all: Mutex::new(all) })
    }

    /// How a volume is used, at all paths.
    pub fn of(&self, id: &VolumeId) -> Vec<Use> {
        self.lock().get(id).cloned().unwrap_or_default()
    }

    /// How a volume is used at a path.
    pub fn at(&self, id: &VolumeId, path: &Path) -> Option<Use> {
        self.lock().get(id)?.iter().find(|used| used.path == path).cloned()
    }

    /// Writes down how a volume is used at a path. The caller has the volume's guard.
    ///
    /// # Errors
    /// [`Error::Io`]; then it counts as before.
    pub fn put(&self, id: &VolumeId, used: Use) -> Result<()> {
        let mut uses = self.of(id);
        uses.retain(|other| other.path != used.path);
        uses.push(used);
        self.write(id, &uses)?;
        self.lock().insert(id.clone(), uses);
        Ok(())
    }

    /// Forgets what was at a path. When that cannot be written down, a later driver may believe it once more.
    pub fn remove(&self, id: &VolumeId, path: &Path) {
        let mut uses = self.of(id);
        let before = uses.len();
        uses.retain(|other| other.path != path);
        if uses.is_empty() {
            self.forget(id);
        } else if uses.len() < before {
            if let Err(error) = self.write(id, &uses) {
                tracing::warn!(%id, %error, "that a volume is no longer used at a path could not be written down");
            }
            self.lock().insert(id.clone(), uses);
        }
    }

    /// Forgets all uses of a volume.
    pub fn forget(&self, id: &VolumeId) {
        if self.lock().remove(id).is_some()
            && let Err(error) = std::fs::remove_file(self.directory.join(file_name(id)))
        {
            tracing::warn!(%id, %error, "that a volume is no longer used could not be written down");
        }
    }

    fn write(&self, id: &VolumeId, uses: &[Use]) -> Result<()> {
        let name = file_name(id);
        let of = OfBoot { boot: self.boot.clone(), uses: uses.to_vec() };
        let corrupt =
            |error: serde_json::Error| Error::Corrupt { path: self.directory.join(&name), why: error.to_string() };
        write_for_this_boot(&self.directory, &name, &serde_json::to_vec(&of).map_err(corrupt)?)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Vec<Use>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn file_name(id: &VolumeId) -> String {
    format!("{id}.json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Access, Stop};

    fn used(path: &str) -> Use {
        let (path, access, options) = (path.into(), Access::Writer, String::new());
        Use { path, stop: Stop::Staged, access, options, group: None, read_only: false }
    }

    #[test]
    fn they_outlive_a_driver_and_not_a_boot() {
        let (dir, id) = (tempfile::tempdir().unwrap(), VolumeId::new([1; 16]));
        let files = || std::fs::read_dir(dir.path().join(DIRECTORY)).unwrap().count();
        let uses = Uses::of_boot(dir.path(), "one").unwrap();
        uses.put(&id, used("/a")).unwrap();
        uses.put(&id, used("/b")).unwrap();
        uses.put(&id, Use { read_only: true, ..used("/a") }).unwrap();
        uses.remove(&id, Path::new("/b"));
        let again = Uses::of_boot(dir.path(), "one").unwrap();
        assert_eq!(again.of(&id), [Use { read_only: true, ..used("/a") }]);
        assert_eq!((again.at(&id, Path::new("/b")), files()), (None, 1));
        assert!(Uses::of_boot(dir.path(), "two").unwrap().of(&id).is_empty());
        assert_eq!(files(), 0);
    }

    #[test]
    fn nothing_is_left_of_the_last_one_nor_of_a_torn_one() {
        let (dir, id) = (tempfile::tempdir().unwrap(), VolumeId::new([1; 16]));
        let uses = Uses::of_boot(dir.path(), "one").unwrap();
        uses.put(&id, used("/a")).unwrap();
        uses.remove(&id, Path::new("/a"));
        std::fs::write(dir.path().join(DIRECTORY).join(file_name(&id)), "{\"boot\":\"on").unwrap();
        let whole = serde_json::to_vec(&OfBoot { boot: "one".into(), uses: vec![used("/a")] }).unwrap();
        std::fs::write(dir.path().join(DIRECTORY).join(format!("{id}.tmp")), whole).unwrap();
        assert!(Uses::of_boot(dir.path(), "one").unwrap().of(&id).is_empty());
        assert_eq!(std::fs::read_dir(dir.path().join(DIRECTORY)).unwrap().count(), 0);
    }
}
