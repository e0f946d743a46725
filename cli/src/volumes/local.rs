//! Each volume of this node with all that can be known of it: from the driver's records, its socket, its pool and the
//! kernel's mount table. Nothing is changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use keelway_csi::LOCAL_DRIVER;
use keelway_csi::model::{BackendKind, Content, Record, Snapshot, State, VolumeId};
use keelway_csi::request::inline_name;
use keelway_csi::sys::mountinfo::{self, Mount};

use super::socket::{Driver, Health};
use super::storage::{Device, Storage, entries};

/// How long what looks like an orphan is looked at: a volume that is just being made or removed looks like one for a moment.
const MOMENT: Duration = Duration::from_secs(1);

/// Where to look.
#[derive(Clone, Debug)]
pub struct Places {
    /// The driver's records.
    pub state: PathBuf,
    /// The volumes' storage.
    pub pool: PathBuf,
    /// The kubelet's directory.
    pub kubelet: PathBuf,
    /// The devices of the volume group, as the driver was given them; else LVM looks at all but loop devices.
    pub lvm_devices: Vec<PathBuf>,
}

/// One volume.
#[derive(Clone, Debug)]
pub struct Volume {
    /// What the driver has written down of it.
    pub record: Record,
    /// Bytes that its storage takes of the pool; nothing when there is no file of it there.
    pub allocated: Option<u64>,
    /// Bytes that are used in it, where it is mounted and the driver answers.
    pub used: Option<u64>,
    /// The device that it is attached as.
    pub device: Option<PathBuf>,
    /// Its snapshots.
    pub snapshots: Vec<Snapshot>,
    /// What is wrong with it; nothing when nobody could be asked.
    pub health: Option<Vec<Health>>,
    /// Where it is.
    pub places: Vec<Place>,
}

/// A place where a volume is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The path.
    pub path: PathBuf,
    /// The pod whose directory it is in: `namespace/name`, or its UID where the node has no logs of it.
    pub pod: Option<String>,
}

/// Something that belongs to no volume, or a volume that something belongs to no more.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Orphan {
    /// What.
    pub what: String,
    /// How that comes, and what can be done.
    pub why: String,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Listing {
    /// The volumes, oldest first.
    pub volumes: Vec<Volume>,
    /// What has no owner.
    pub orphans: Vec<Orphan>,
}

/// Looks at everything.
pub async fn gather(places: &Places, driver: &Driver) -> Result<Listing> {
    let mut listing = look(places)?;
    if !listing.orphans.is_empty() {
        tokio::time::sleep(MOMENT).await;
        let again = look(places)?;
        listing.orphans.retain(|orphan| again.orphans.contains(orphan));
    }
    let mut health = driver.health().await;
    for volume in &mut listing.volumes {
        let id = volume.record.id.as_str();
        volume.health = health.as_mut().map(|health| health.remove(id).unwrap_or_default());
        // Of a block device only its user knows.
        if volume.record.content != Content::Raw
            && let Some(place) = volume.places.iter().find(|place| place.pod.is_some()).or(volume.places.first())
        {
            volume.used = driver.used(id, &place.path).await;
        }
    }
    Ok(listing)
}

fn look(places: &Places) -> Result<Listing> {
    let mut orphans = Vec::new();
    let storage = Storage::look(places)?;
    let mut records = records(&places.state.join("volumes"), Record::parse, &mut orphans)?;
    records.sort_by_key(|record| record.seq);
    let snapshots = self::records(&places.state.join("snapshots"), Snapshot::parse, &mut orphans)?;
    let mounts = mountinfo::read()?;
    let known: Vec<&str> =
        records.iter().map(|r| r.id.as_str()).chain(snapshots.iter().map(|s| s.id.as_str())).collect();
    orphans.extend(storage.unknown(&known)?);
    orphans.extend(snapshots.iter().filter_map(|snapshot| storage.missing_of(snapshot)));
    let names: Vec<&str> = records.iter().map(|record| record.name.as_str()).collect();
    orphans.extend(captured(&mounts, &places.kubelet, &known, &names));
    let mut volumes = Vec::new();
    for record in records {
        let device = storage.device(&record)?;
        let file = storage.file(record.id.as_str()).map(|(name, _)| name);
        let places: Vec<Place> = mounts
            .iter()
            .filter(|mount| mount.target.starts_with(&places.kubelet))
            .filter(|mount| is_of(mount, &record, file, device.as_ref()))
            .map(|mount| Place { path: mount.target.clone(), pod: pod(&mount.target, &places.kubelet) })
            .collect();
        // Other devices than loop devices are there all the time.
        if let (Some(device), true, Content::Filesystem(_), BackendKind::Image) =
            (&device, places.is_empty(), record.content, record.parameters.backend)
        {
            orphans.push(Orphan {
                what: format!("{} of volume {}", device.path.display(), record.id),
                why: "attached, and mounted nowhere that can be seen from here: somebody else holds it, as a mount \
                      namespace that captured it; it goes with its last holder"
                    .to_owned(),
            });
        }
        orphans.extend(storage.missing(&record));
        volumes.push(Volume {
            allocated: storage.allocated(&record),
            used: None,
            device: device.map(|device| device.path),
            snapshots: snapshots.iter().filter(|snapshot| snapshot.volume == record.id).cloned().collect(),
            health: None,
            places,
            record,
        });
    }
    orphans.sort();
    Ok(Listing { volumes, orphans })
}

fn records<T>(path: &Path, parse: impl Fn(&str) -> Result<T, String>, orphans: &mut Vec<Orphan>) -> Result<Vec<T>> {
    let mut records = Vec::new();
    for entry in entries(path)? {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let Ok(text) = fs::read_to_string(&path) else { continue };
        match parse(&text) {
            Ok(record) => records.push(record),
            Err(error) => orphans.push(Orphan {
                what: path.display().to_string(),
                why: format!("not a record that this build understands: {error}; the driver does not start with it"),
            }),
        }
    }
    Ok(records)
}

fn is_of(mount: &Mount, record: &Record, file: Option<&str>, device: Option<&Device>) -> bool {
    if let Some(device) = device {
        return device.is_at(mount);
    }
    if record.content == Content::Tree
        && let Some(name) = file
    {
        // Its name is an id of ours, which nothing else on this machine has.
        return mount.root.file_name().is_some_and(|root| root == name);
    }
    // Where its storage is gone, it is known by the kubelet's paths.
    let path = mount.target.to_string_lossy();
    path.ends_with(&format!("/kubernetes.io~csi/{}/mount", record.name))
        || handle(&mount.target).is_some_and(|handle| handle == record.id.as_str())
}

/// The volume that the kubelet mounted at a path, by the file that it writes beside it.
fn handle(target: &Path) -> Option<String> {
    let text = fs::read_to_string(target.parent()?.join("vol_data.json")).ok()?;
    let data: serde_json::Value = serde_json::from_str(&text).ok()?;
    (data["driverName"] == LOCAL_DRIVER).then(|| data["volumeHandle"].as_str().map(str::to_owned)).flatten()
}

/// Mounts that the kubelet says are ours, of volumes that no record names.
fn captured(mounts: &[Mount], kubelet: &Path, known: &[&str], names: &[&str]) -> Vec<Orphan> {
    let below = mounts.iter().filter(|mount| mount.target.starts_with(kubelet));
    let ours = below.filter_map(|mount| handle(&mount.target).map(|handle| (mount, handle)));
    // Inline volumes have handles of the kubelet's making, by which the driver names them.
    let is_lost = |handle: &str| match inline_name(handle) {
        Some(name) => !names.contains(&name.as_str()),
        None => handle.parse::<VolumeId>().is_ok() && !known.contains(&handle),
    };
    let lost = ours.filter(|(_, handle)| is_lost(handle));
    lost.map(|(mount, handle)| Orphan {
        what: format!("the mount at {}", mount.target.display()),
        why: format!("of volume {handle}, which no record names; it goes with its pod"),
    })
    .collect()
}

/// The pod in whose directory a path is, or whose device it is.
fn pod(target: &Path, kubelet: &Path) -> Option<String> {
    let parts: Vec<_> = target.strip_prefix(kubelet).ok()?.iter().map(|part| part.to_string_lossy()).collect();
    let uid = match &parts[..] {
        [pods, uid, ..] if pods == "pods" => uid,
        [.., devices, publish, _, uid] if devices == "volumeDevices" && publish == "publish" => uid,
        [.., devices, _, dev, uid] if devices == "volumeDevices" && dev == "dev" => uid,
        _ => return None,
    };
    let logs = fs::read_dir("/var/log/pods").into_iter().flatten().flatten();
    let named = logs.map(|entry| entry.file_name().to_string_lossy().into_owned()).find_map(|name| {
        let (rest, found) = name.rsplit_once('_')?;
        (found == uid).then(|| rest.replacen('_', "/", 1))
    });
    Some(named.unwrap_or_else(|| uid.to_string()))
}

/// Whether a volume was ever handed out.
pub fn is_blank(record: &Record) -> bool {
    record.state() != State::Formatted
}

#[cfg(test)]
mod tests {
    use keelway_csi::model::SnapshotId;

    use super::super::storage::MARK;
    use super::*;

    #[test]
    fn a_path_tells_the_pod() {
        let kubelet = Path::new("/k");
        let found = |path: &str| pod(Path::new(path), kubelet);
        assert_eq!(found("/k/pods/u1/volumes/kubernetes.io~csi/pvc-1/mount").as_deref(), Some("u1"));
        assert_eq!(found("/k/plugins/kubernetes.io/csi/volumeDevices/publish/pvc-1/u2").as_deref(), Some("u2"));
        assert_eq!(found("/k/plugins/kubernetes.io/csi/volumeDevices/pvc-1/dev/u3").as_deref(), Some("u3"));
        assert_eq!(found("/k/plugins/kubernetes.io/csi/d/abc/globalmount"), None);
        assert_eq!(found("/elsewhere/pods/u1"), None);
    }

    #[test]
    fn what_the_pool_holds_and_nobody_knows_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, snapshot) = (VolumeId::new([1; 16]), SnapshotId::new([2; 16]));
        for name in [format!("{volume}.img"), format!("{snapshot}.snap"), "core".into(), MARK.into()] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        let places = Places {
            state: dir.path().join("none"),
            pool: dir.path().into(),
            kubelet: dir.path().into(),
            lvm_devices: Vec::new(),
        };
        let listing = look(&places).unwrap();
        assert!(listing.volumes.is_empty());
        let words: Vec<_> = listing.orphans.iter().map(|orphan| orphan.why.split(',').next().unwrap()).collect();
        assert_eq!(words, ["not made by the driver", "a volume's", "a snapshot's"]);
    }
}
