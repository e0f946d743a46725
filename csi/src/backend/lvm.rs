//! Volumes as logical volumes of LVM: thick ones of a volume group, or thin ones of a thin pool of it.
//!
//! A volume's name is its id. It carries two tags: that it is ours, and the nonce of the intent that made it. Its record
//! knows it by LVM's identifiers of group and volume, which device-mapper shows as well: what is active is found and checked
//! without a program. Nobody but this driver activates it, so that nothing on the host looks into it. Once made it stays
//! active; after a boot its first staging activates it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::device::{Device, DeviceVolume, HEAD, is_taken, release};
use super::{Attached, Backend, Features, GoOn, Locked, Made, New, Origin, damaged, unsupported};
use crate::error::{Error, Result};
use crate::model::{BackendKind, Content, Nonce, Record, Snapshot, SnapshotId, VolumeId};
use crate::state::Store;
use crate::sys::block;
use crate::sys::lvm::{self, Logical, Lvm, Mapped};

/// The tag that every volume of ours carries.
pub const OURS: &str = "keelway";
/// What a volume is called that new room of another one comes from.
const ROOM: &str = "room";

/// Active now, and later when somebody says so, as nobody but we does.
const ACTIVE: [&str; 5] = ["--activate", "y", "--setactivationskip", "y", "--ignoreactivationskip"];

/// Where logical volumes are made.
#[derive(Clone, Debug, Default)]
pub struct LvmPlace {
    /// The volume group.
    pub group: Option<String>,
    /// The thin pool in it, for `lvm-thin`.
    pub pool: Option<String>,
    /// The devices of the group; all but loop devices are looked at where none is named.
    pub devices: Vec<PathBuf>,
    /// How much of what the pool has may be promised, in percent.
    pub overcommit: u32,
    /// How full the pool's data or metadata may be before nothing new is made in it, in percent.
    pub watermark: u32,
}

/// The lvm and the lvm-thin backend.
#[derive(Debug)]
pub struct LogicalVolumes {
    lvm: Lvm,
    group: String,
    /// Sizes are multiples of it.
    extent: u64,
    /// Of lvm-thin: the pool.
    pool: Option<String>,
    overcommit: u64,
    watermark: f64,
    /// Held while room is taken from one volume and given to another.
    giving: Mutex<()>,
}

impl LogicalVolumes {
    /// Volumes of the group, or of its thin pool when `thin`. What a killed LVM left suspended goes on.
    ///
    /// # Errors
    /// [`Error::State`] when group or pool are not named, not there or not fit; [`Error::Lvm`].
    pub fn new(place: &LvmPlace, state_dir: &Path, thin: bool) -> Result<Self> {
        let missing = |flag: &str| Error::State {
            what: flag.into(),
            expected: format!("a name, for the {} backend", if thin { "lvm-thin" } else { "lvm" }),
            found: "none".into(),
        };
        let group = named(place.group.as_ref().ok_or_else(|| missing("--lvm-volume-group"))?)?;
        let pool = match (thin, &place.pool) {
            (false, _) => None,
            (true, Some(pool)) => Some(named(pool)?),
            (true, None) => return Err(missing("--lvm-thin-pool")),
        };
        let lvm = Lvm::new(&place.devices, state_dir)?;
        let found = lvm.group(&group)?;
        let prefix = format!("LVM-{}", found.uuid);
        if lvm::mapped()?.iter().any(|device| device.suspended && device.uuid.starts_with(&prefix)) {
            tracing::warn!(group, "suspended volumes, as a killed LVM leaves them: they go on");
            lvm.run("vgchange", &["--refresh", "--", &group])?;
        }
        let (overcommit, watermark) = (place.overcommit.into(), place.watermark.into());
        let giving = Mutex::new(());
        let this = Self { lvm, group, extent: found.extent, pool, overcommit, watermark, giving };
        if let Some(pool) = &this.pool {
            this.lvm.run("lvchange", &["--activate", "y", "--", &this.path(pool)])?;
            let unfit = |found: &str| Error::State {
                what: format!("thin pool {}", this.path(pool)),
                expected: "one that zeroes what it hands out".into(),
                found: found.into(),
            };
            match this.lookup(pool)? {
                Some(pool) if pool.is_pool && pool.zeroes => {}
                Some(pool) if pool.is_pool => return Err(unfit("one that hands out what others have written")),
                Some(_) => return Err(unfit("a volume that is no thin pool")),
                None => return Err(unfit("no volume of that name")),
            }
        }
        Ok(this)
    }

    /// A volume as LVM's programs take it.
    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.group)
    }

    fn all(&self) -> Result<Vec<Logical>> {
        self.lvm.volumes(&self.group)
    }

    fn lookup(&self, name: &str) -> Result<Option<Logical>> {
        Ok(self.all()?.into_iter().find(|volume| volume.name == name))
    }

    /// The device of a volume that is active.
    fn mapped(&self, name: &str) -> Result<Option<Mapped>> {
        let wanted = lvm::name(&self.group, name);
        Ok(lvm::mapped()?.into_iter().find(|device| device.name == wanted))
    }

    /// Opens a volume that is active, and says what it is known by.
    fn open(&self, name: &str, exclusive: bool) -> Result<Option<(Device, String)>> {
        let Some(mapped) = self.mapped(name)? else { return Ok(None) };
        let Some(node) = block::node(mapped.dev) else { return Ok(None) };
        let device = Device::open(&node, exclusive)?;
        // Held open, the number is that device's; so what is now said of it holds.
        match self.mapped(name)? {
            Some(now) if now.dev == device.dev => Ok(Some((device, now.uuid))),
            _ => Err(Error::State {
                what: node.display().to_string(),
                expected: format!("{} as before", mapped.name),
                found: "another device".into(),
            }),
        }
    }

    /// The volume's device where it is active, checked.
    fn active(&self, record: &Record, exclusive: bool) -> Result<Option<Device>> {
        let Some((device, uuid)) = self.open(record.id.as_str(), exclusive)? else { return Ok(None) };
        verify(record, &uuid, device.size)?;
        Ok(Some(device))
    }

    /// The volume among these, checked, active or not.
    fn volume<'a>(&self, all: &'a [Logical], record: &Record) -> Result<&'a Logical> {
        let found = all.iter().find(|volume| volume.name == record.id.as_str());
        let found =
            found.ok_or_else(|| damaged(&record.id, "logical volume", self.path(record.id.as_str()), "none"))?;
        verify(record, &found.uuid, found.size)?;
        Ok(found)
    }

    fn picture(&self, snapshot: &Snapshot) -> Result<Logical> {
        let (id, name) = (&snapshot.volume, snapshot.id.as_str());
        let found = self.lookup(name)?.ok_or_else(|| damaged(id, "logical volume", self.path(name), "none"))?;
        if number(&found.uuid) != snapshot.inode {
            return Err(damaged(id, "identifier", snapshot.inode, number(&found.uuid)));
        }
        Ok(found)
    }

    /// Makes a volume of the group, active, with what its blocks held before.
    fn allocate(&self, name: &str, size: u64, nonce: &Nonce) -> Result<Device> {
        let (bytes, tag) = (format!("{size}b"), tag(nonce));
        let mut arguments = vec!["--yes", "--name", name, "--addtag", OURS, "--addtag", &tag];
        arguments.extend(ACTIVE);
        let pool;
        match &self.pool {
            Some(name) => {
                pool = self.path(name);
                arguments.extend(["--type", "thin", "--virtualsize", &bytes, "--thinpool", &pool]);
            }
            // Nothing is to look at what was there: it is zeroed by us.
            None => {
                arguments.extend(["--type", "linear", "--size", &bytes, "--zero", "n", "--wipesignatures", "n", "--"]);
                arguments.push(&self.group);
            }
        }
        self.lvm.run("lvcreate", &arguments)?;
        let made = self.open(name, false)?;
        made.map(|(device, _)| device).ok_or_else(|| self.inactive(name))
    }

    /// Makes a volume that shares its blocks with another one of the pool.
    fn share(&self, name: &str, of: &str, nonce: &Nonce, fixed: &[&str]) -> Result<()> {
        let (tag, of) = (tag(nonce), self.path(of));
        let ours = ["--yes", "--type", "thin", "--name", name, "--addtag", OURS, "--addtag", &tag];
        self.lvm.run("lvcreate", &[&ours[..], fixed, &["--", &of]].concat()).map(drop)
    }

    fn inactive(&self, name: &str) -> Error {
        let (what, found) = (format!("logical volume {}", self.path(name)), "none that device-mapper shows".into());
        Error::State { what, expected: "active".into(), found }
    }

    /// Removes the one of these volumes that has this name and nonce. `false` when there is none.
    fn remove(&self, all: &[Logical], name: &str, nonce: &Nonce, id: &str) -> Result<bool> {
        let Some(found) = all.iter().find(|volume| volume.name == name) else { return Ok(false) };
        if !found.tags.contains(&tag(nonce)) {
            let (what, expected) = (format!("the tags of {}", self.path(name)), tag(nonce));
            return Err(Error::State { what, expected, found: found.tags.join(", ") });
        }
        let in_use = |by: &str| match id.parse() {
            Ok(id) => Error::InUse { id, by: by.into() },
            Err(_) => Error::Busy { what: id.into() },
        };
        match self.open(name, true) {
            // Nobody's; a mkfs that outlived its driver has it open, and locked.
            Ok(Some((device, _))) => id.parse().map_or(Ok(()), |id| device.lock(&id))?,
            Ok(None) => {}
            Err(error) if is_taken(&error) => return Err(in_use("its device is mounted or taken by somebody")),
            Err(error) => return Err(error),
        }
        self.lvm.run("lvremove", &["--yes", "--force", "--", &self.path(name)])?;
        Ok(true)
    }

    /// Room for a block volume to grow by, which holds nothing of others' when it is seen: it is made a volume of its own,
    /// zeroed and let go. Where it is.
    fn zeroed_room(&self, record: &Record, bytes: u64) -> Result<Vec<String>> {
        let name = room(&record.id);
        let device = self.allocate(&name, bytes, &record.nonce)?;
        device.zero(bytes)?;
        drop(device);
        let ranges = self.lvm.ranges(&self.path(&name))?;
        self.remove(&self.all()?, &name, &record.nonce, record.id.as_str())?;
        Ok(ranges)
    }
}

/// A name of a group or pool; such a one is no option to a program either.
fn named(name: &str) -> Result<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
    if name.is_empty() || name.starts_with('-') || !name.chars().all(fits) {
        let (what, expected) = ("a name of LVM's".to_owned(), "letters, digits and +_.-".to_owned());
        return Err(Error::State { what, expected, found: format!("{name:?}") });
    }
    Ok(name.to_owned())
}

/// What new room for a volume is called.
fn room(id: &VolumeId) -> String {
    format!("{id}.{ROOM}")
}

fn tag(nonce: &Nonce) -> String {
    format!("{OURS}.nonce={}", nonce.as_str())
}

/// What a record knows a volume by.
fn number(uuid: &str) -> u64 {
    let digest = Sha256::digest(uuid);
    u64::from_be_bytes(digest[..8].try_into().expect("a digest has 32 bytes"))
}

fn verify(record: &Record, uuid: &str, size: u64) -> Result<()> {
    if number(uuid) != record.inode {
        return Err(damaged(&record.id, "identifier", record.inode, format!("{} ({uuid})", number(uuid))));
    }
    if !(record.size..=record.growing.unwrap_or(record.size)).contains(&size) {
        return Err(damaged(&record.id, "size", record.size, size));
    }
    Ok(())
}

impl Backend for LogicalVolumes {
    fn kind(&self) -> BackendKind {
        if self.pool.is_some() { BackendKind::LvmThin } else { BackendKind::Lvm }
    }

    fn store(&self) -> Store {
        if self.pool.is_some() { Store::ThinPool } else { Store::Group }
    }

    fn features(&self) -> Features {
        Features { snapshots: self.pool.is_some(), expand: true, modify: true, tracking: false }
    }

    fn granule(&self) -> u64 {
        self.extent
    }

    fn free(&self) -> Result<u64> {
        let Some(name) = &self.pool else { return Ok(self.lvm.group(&self.group)?.free) };
        let all = self.all()?;
        let pool = all.iter().find(|volume| volume.name == *name && volume.is_pool);
        let Some((pool, (data, metadata))) = pool.and_then(|pool| Some((pool, pool.full?))) else {
            return Err(self.inactive(name));
        };
        if data.max(metadata) >= self.watermark {
            tracing::warn!(pool = name, data, metadata, "at its watermark: nothing new is made in it");
            return Ok(0);
        }
        // Whose ever they are; a snapshot in full, too, since all that it shares may come to be written anew.
        let promised: u64 = all.iter().filter(|volume| volume.pool.as_ref() == Some(name)).map(|it| it.size).sum();
        Ok((pool.size / 100 * self.overcommit).saturating_sub(promised))
    }

    fn outstanding(&self, _: &Record) -> Result<u64> {
        // What a volume may come to take is no longer free once it is there.
        Ok(0)
    }

    fn create(&self, new: New<'_>, origin: Option<Origin<'_>>, _: GoOn<'_>) -> Result<Made> {
        let name = new.id.as_str();
        let of = match origin {
            None => None,
            Some(Origin::Snapshot(snapshot)) => Some((snapshot.id.as_str(), self.picture(snapshot)?.size)),
            Some(Origin::Volume(record)) => {
                self.check(record)?;
                Some((record.id.as_str(), record.size))
            }
        };
        match of {
            None => {
                let device = self.allocate(name, new.size, new.nonce)?;
                // A block volume is handed out as it is; over all else mkfs writes what is read.
                match (self.kind(), new.content) {
                    (BackendKind::LvmThin, _) => {}
                    (_, Content::Raw) => device.zero(device.size)?,
                    _ => device.zero(HEAD)?,
                }
            }
            Some((of, size)) => {
                self.share(name, of, new.nonce, &[&["--permission", "rw"][..], &ACTIVE].concat())?;
                if size < new.size {
                    let size = format!("{}b", new.size);
                    self.lvm.run("lvextend", &["--size", &size, "--", &self.path(name)])?;
                }
            }
        }
        let (device, uuid) = self.open(name, false)?.ok_or_else(|| self.inactive(name))?;
        Ok(Made { inode: number(&uuid), size: device.size })
    }

    fn erase(&self, id: &VolumeId, nonce: &Nonce) -> Result<bool> {
        let all = self.all()?;
        let room = self.remove(&all, &room(id), nonce, id.as_str())?;
        Ok(self.remove(&all, id.as_str(), nonce, id.as_str())? || room)
    }

    fn check(&self, record: &Record) -> Result<()> {
        match self.mapped(record.id.as_str())? {
            Some(_) => self.active(record, false).map(drop),
            None => self.volume(&self.all()?, record).map(drop),
        }
    }

    fn lock(&self, record: &Record) -> Result<Box<dyn Locked>> {
        if self.mapped(record.id.as_str())?.is_none() {
            self.check(record)?;
            let fixed = ["--activate", "y", "--ignoreactivationskip", "--"];
            self.lvm.run("lvchange", &[&fixed[..], &[&self.path(record.id.as_str())]].concat())?;
        }
        let device = self.active(record, false)?.ok_or_else(|| self.inactive(record.id.as_str()))?;
        device.lock(&record.id)?;
        Ok(Box::new(DeviceVolume { device, record: record.clone() }))
    }

    fn attached(&self, record: &Record) -> Result<Option<Box<dyn Attached>>> {
        let device = self.active(record, false)?;
        Ok(device.map(|device| Box::new(DeviceVolume { device, record: record.clone() }) as Box<dyn Attached>))
    }

    fn detach(&self, record: &Record) -> Result<()> {
        if self.mapped(record.id.as_str())?.is_none() {
            return Ok(());
        }
        release(record, || self.active(record, true)?.ok_or_else(|| self.inactive(record.id.as_str())))
    }

    fn resize(&self, record: &Record, to: u64) -> Result<()> {
        let _giving = self.giving.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, name) = (self.all()?, self.path(record.id.as_str()));
        let volume = self.volume(&all, record)?;
        // Of a growth that was cut short.
        self.remove(&all, &room(&record.id), &record.nonce, record.id.as_str())?;
        if volume.size > to {
            return Err(unsupported(self.kind(), "shrink", "what has been seen may have been written to"));
        }
        if volume.size == to {
            return Ok(());
        }
        let size = format!("{to}b");
        let mut arguments = vec!["--size", &size, "--", &name];
        let ranges = match (&self.pool, record.content) {
            (None, Content::Raw) => self.zeroed_room(record, to - volume.size)?,
            _ => Vec::new(),
        };
        arguments.extend(ranges.iter().map(String::as_str));
        self.lvm.run("lvextend", &arguments).map(drop)
    }

    fn snapshots_at_once(&self) -> bool {
        self.pool.is_some()
    }

    fn holds_still(&self) -> bool {
        self.pool.is_some()
    }

    fn snapshot(&self, record: &Record, id: &SnapshotId, nonce: &Nonce, _: GoOn<'_>) -> Result<u64> {
        if self.pool.is_none() {
            return Err(unsupported(self.kind(), "snapshot", "lvm-thin can"));
        }
        self.check(record)?;
        self.share(id.as_str(), record.id.as_str(), nonce, &["--permission", "r", "--setactivationskip", "y"])?;
        let made = self.lookup(id.as_str())?;
        made.map(|made| number(&made.uuid))
            .ok_or_else(|| damaged(&record.id, "snapshot", self.path(id.as_str()), "none"))
    }

    fn erase_snapshot(&self, id: &SnapshotId, nonce: &Nonce) -> Result<bool> {
        self.remove(&self.all()?, id.as_str(), nonce, id.as_str())
    }

    fn check_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        self.picture(snapshot).map(drop)
    }

    fn name(&self, id: &VolumeId) -> Option<String> {
        Some(id.to_string())
    }

    fn snapshot_name(&self, id: &SnapshotId) -> Option<String> {
        Some(id.to_string())
    }

    fn names(&self) -> Result<Vec<String>> {
        let mut all = self.all()?;
        all.retain(|volume| volume.pool == self.pool && volume.tags.iter().any(|tag| tag == OURS));
        Ok(all.into_iter().map(|volume| volume.name).collect())
    }
}
