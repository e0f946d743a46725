//! Where volumes' bytes are, as far as it can be seen without changing anything: files of the pool, devices that were claimed,
//! logical volumes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use keelway_csi::backend::LVM_TAG;
use keelway_csi::model::{BackendKind, Record, Snapshot, SnapshotId, VolumeId};
use keelway_csi::sys::loopdev::LoopDevice;
use keelway_csi::sys::lvm::{self, Mapped, Tagged};
use keelway_csi::sys::mountinfo::Mount;
use keelway_csi::sys::{Dev, block};

use super::local::{Orphan, Places};

/// The pool's own mark.
pub const MARK: &str = ".keelway-pool";

/// Everything that volumes may be stored in.
#[derive(Debug, Default)]
pub struct Storage {
    /// What is in the pool, but for its mark.
    pub files: BTreeMap<String, fs::Metadata>,
    /// What claims of devices say, by the name of their file.
    claims: BTreeMap<String, Claim>,
    /// What device-mapper shows.
    mapped: Vec<Mapped>,
    /// Logical volumes that carry the driver's tag, where LVM is there to tell.
    tagged: Option<Vec<Tagged>>,
    /// Why LVM did not tell.
    silent: Option<String>,
}

#[derive(Debug, Default)]
struct Claim {
    path: PathBuf,
    identity: String,
}

/// A volume's block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number.
    pub dev: Dev,
    /// Its node, by the kernel's name.
    pub path: PathBuf,
}

impl Device {
    /// Whether a line of the mount table is a mount of it, or of its node.
    pub fn is_at(&self, mount: &Mount) -> bool {
        let node = self.path.strip_prefix("/dev").map(|name| Path::new("/").join(name)).unwrap_or_default();
        mount.dev == self.dev || mount.is_node(&node.to_string_lossy()) || Path::new(&mount.source) == self.path
    }
}

impl Storage {
    /// Looks at all of it.
    pub fn look(places: &Places) -> Result<Self> {
        let mut storage = Self { files: pool(&places.pool)?, ..Self::default() };
        for name in storage.files.keys().filter(|name| name.ends_with(".dev")) {
            // One that goes at this moment is not there.
            let Ok(text) = fs::read(places.pool.join(name)) else { continue };
            let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
            let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
            storage.claims.insert(name.clone(), Claim { path: text("path").into(), identity: text("identity") });
        }
        storage.mapped = lvm::mapped().unwrap_or_default();
        match lvm::tagged(LVM_TAG, &places.lvm_devices) {
            Ok(tagged) => storage.tagged = tagged,
            // Told where it matters.
            Err(error) => storage.silent = Some(error.to_string()),
        }
        Ok(storage)
    }

    /// The file of the pool that a volume or snapshot has.
    pub fn file(&self, id: &str) -> Option<(&str, &fs::Metadata)> {
        self.files.iter().find(|(name, _)| stem(name) == id).map(|(name, file)| (name.as_str(), file))
    }

    /// Bytes that a volume takes of the pool.
    pub fn allocated(&self, record: &Record) -> Option<u64> {
        // A claim of a device is no storage.
        let (_, file) = self.file(record.id.as_str()).filter(|_| record.parameters.backend != BackendKind::Raw)?;
        Some(file.blocks() * 512)
    }

    /// The device that a volume has, or is attached as.
    pub fn device(&self, record: &Record) -> Result<Option<Device>> {
        let id = record.id.as_str();
        match record.parameters.backend {
            BackendKind::Image => self.file(id).map_or(Ok(None), |(_, file)| attached(file)),
            BackendKind::Raw => Ok(self.claims.get(&format!("{id}.dev")).and_then(|claim| device_at(&claim.path))),
            BackendKind::Lvm | BackendKind::LvmThin => Ok(self.mapped_as(id)),
            BackendKind::Btrfs | BackendKind::Directory => Ok(None),
        }
    }

    /// The logical volume of this name where it is active.
    fn mapped_as(&self, id: &str) -> Option<Device> {
        // Whatever the group is called; an id of ours has nothing else on this machine.
        let end = lvm::name("", id);
        let found = self.mapped.iter().find(|it| it.name.ends_with(&end) && it.uuid.starts_with("LVM-"))?;
        Some(Device { dev: found.dev, path: block::node(found.dev)? })
    }

    /// Whether there is a logical volume of this name. `None` where nobody can tell.
    fn logical(&self, id: &str) -> Option<bool> {
        if self.mapped_as(id).is_some() {
            return Some(true);
        }
        self.tagged.as_ref().map(|tagged| tagged.iter().any(|volume| volume.name == id))
    }

    /// What is missing of a volume.
    pub fn missing(&self, record: &Record) -> Option<Orphan> {
        let id = record.id.as_str();
        let orphan = |why: &str| Some(Orphan { what: format!("the record of volume {id}"), why: why.to_owned() });
        match record.parameters.backend {
            BackendKind::Image | BackendKind::Btrfs | BackendKind::Directory if self.file(id).is_none() => {
                orphan("its storage is not in the pool: somebody removed it, and its data are lost")
            }
            BackendKind::Lvm | BackendKind::LvmThin if self.logical(id).is_none() => self
                .silent
                .as_ref()
                .and_then(|why| orphan(&format!("whether its logical volume is there is not known: {why}"))),
            BackendKind::Lvm | BackendKind::LvmThin if self.logical(id) == Some(false) => orphan(
                "there is no logical volume of its name: somebody removed it, and its data are lost, or its devices are not \
                 there (or not among --lvm-devices)",
            ),
            BackendKind::Raw => match self.claims.get(&format!("{id}.dev")) {
                None => orphan("its claim on a device is not in the pool: nobody knows any more which device it has"),
                Some(claim) => match device_at(&claim.path) {
                    None => orphan(&format!("its device, {}, is not there", claim.path.display())),
                    Some(found) if block::identity(found.dev).as_ref() != Some(&claim.identity) => orphan(&format!(
                        "{} is another device than it was, by its identifier; the driver does not touch it",
                        claim.path.display()
                    )),
                    Some(_) => None,
                },
            },
            _ => None,
        }
    }

    /// What is missing of a snapshot.
    pub fn missing_of(&self, snapshot: &Snapshot) -> Option<Orphan> {
        let id = snapshot.id.as_str();
        let there = match snapshot.parameters.backend {
            BackendKind::Lvm | BackendKind::LvmThin => self.logical(id).unwrap_or(true),
            _ => self.file(id).is_some(),
        };
        (!there).then(|| Orphan {
            what: format!("the record of snapshot {id}"),
            why: format!(
                "its storage is gone: somebody removed it; nothing can be restored from it (volume {})",
                snapshot.volume
            ),
        })
    }

    /// What no record names.
    pub fn unknown(&self, known: &[&str]) -> Result<Vec<Orphan>> {
        let mut orphans = Vec::new();
        for (name, file) in self.files.iter().filter(|(name, _)| !known.contains(&stem(name))) {
            let device = attached(file)?.map(|device| format!(", attached as {}", device.path.display()));
            let claim = self.claims.get(name).map(|claim| format!(", a claim on {}", claim.path.display()));
            let more = device.or(claim).unwrap_or_default();
            let what = format!("{name} in the pool, {} bytes{more}", file.blocks() * 512);
            orphans.push(Orphan { what, why: whose(stem(name)).to_owned() });
        }
        for volume in self.tagged.iter().flatten().filter(|volume| !known.contains(&stem(&volume.name))) {
            let what = format!("logical volume {}/{}, {} bytes", volume.group, volume.name, volume.size);
            orphans.push(Orphan { what, why: whose(stem(&volume.name)).to_owned() });
        }
        Ok(orphans)
    }
}

/// How something comes to be that no record names.
fn whose(id: &str) -> &'static str {
    if id.parse::<VolumeId>().is_ok() {
        "a volume's, by its name, and no record names it, as after the state directory was replaced; the driver removes nothing \
         that it has no record of. When no PersistentVolume has this id as its volumeHandle, it can be removed"
    } else if id.parse::<SnapshotId>().is_ok() {
        "a snapshot's, by its name, and no record names it; the driver removes nothing that it has no record of. When no \
         VolumeSnapshotContent has this id as its snapshotHandle, it can be removed"
    } else {
        "not made by the driver, which leaves it alone; it takes room that volumes could have"
    }
}

/// The id that a name in the pool begins with.
fn stem(name: &str) -> &str {
    name.split_once('.').map_or(name, |(stem, _)| stem)
}

fn pool(path: &Path) -> Result<BTreeMap<String, fs::Metadata>> {
    let mut files = BTreeMap::new();
    for entry in entries(path)? {
        let name = entry.file_name().to_string_lossy().into_owned();
        // Removed since: no orphan.
        if let Ok(file) = entry.metadata()
            && name != MARK
        {
            files.insert(name, file);
        }
    }
    Ok(files)
}

/// What is in a directory, which need not be there.
pub fn entries(path: &Path) -> Result<Vec<fs::DirEntry>> {
    match fs::read_dir(path) {
        Ok(entries) => Ok(entries.flatten().collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// The loop device that a file of the pool is attached as.
fn attached(file: &fs::Metadata) -> Result<Option<Device>> {
    let found = if file.is_file() { LoopDevice::find(file.dev(), file.ino())? } else { None };
    Ok(found.map(|device| Device { dev: device.dev(), path: device.path() }))
}

/// The block device that a path leads to.
fn device_at(path: &Path) -> Option<Device> {
    let meta = fs::metadata(path).ok().filter(|meta| meta.file_type().is_block_device())?;
    let dev = Dev::from_raw(meta.rdev());
    Some(Device { dev, path: block::node(dev)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tagged(name: &str) -> Tagged {
        Tagged { group: "data".into(), name: name.into(), size: 4 << 20 }
    }

    #[test]
    fn logical_volumes_that_nobody_names_are_told_apart() {
        let (volume, snapshot) = (VolumeId::new([1; 16]), SnapshotId::new([2; 16]));
        let known = VolumeId::new([3; 16]);
        let names = [volume.as_str(), snapshot.as_str(), known.as_str(), &format!("{known}.room"), "stray"];
        let storage = Storage { tagged: Some(names.map(tagged).into()), ..Storage::default() };
        let orphans = storage.unknown(&[known.as_str()]).unwrap();
        let words: Vec<_> = orphans.iter().map(|orphan| orphan.why.split(',').next().unwrap()).collect();
        assert_eq!(words, ["a volume's", "a snapshot's", "not made by the driver"]);
        assert!(orphans[0].what.starts_with(&format!("logical volume data/{volume}, 4194304")), "{}", orphans[0].what);
    }

    #[test]
    fn an_active_logical_volume_is_known_by_its_name() {
        let id = VolumeId::new([1; 16]);
        let mapped = |name: String, uuid: &str| Mapped {
            dev: Dev { major: 7, minor: 0 },
            name,
            uuid: uuid.into(),
            suspended: false,
        };
        let active = mapped(lvm::name("data-1", id.as_str()), "LVM-abc");
        let mut storage = Storage { mapped: vec![active.clone()], ..Storage::default() };
        assert_eq!(storage.logical(id.as_str()), Some(block::node(active.dev).is_some()).filter(|&is| is));
        storage.mapped = vec![mapped(lvm::name("data", VolumeId::new([2; 16]).as_str()), "LVM-abc")];
        assert_eq!(storage.logical(id.as_str()), None, "without LVM nobody can tell");
        storage.tagged = Some(Vec::new());
        assert_eq!(storage.logical(id.as_str()), Some(false));
        storage.tagged = Some(vec![tagged(id.as_str())]);
        assert_eq!(storage.logical(id.as_str()), Some(true));
    }
}
