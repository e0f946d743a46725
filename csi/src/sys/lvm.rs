//! LVM's own programs, and what device-mapper shows of its volumes: no shell, fixed arguments, an empty environment.
//!
//! What is configured on the host counts, but for what a driver in a container must not do: wait for the host's udev, start
//! daemons, write backups of metadata for each volume, discard what it removes.
//!
//! A command has a file as its standard input that is locked for as long as it runs: also when the driver that started it is
//! gone, so that the next one can wait for it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;

use super::{Dev, mkfs};
use crate::error::{Context, Error, Result};

/// What holds for each command.
const CONFIG: &str = "activation{udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0} \
    backup{archive=0 backup=0} devices{issue_discards=0 obtain_device_list_from_udev=0 scan_lvs=0} \
    global{use_lvmpolld=0 notify_dbus=0}";
/// Where nobody says which devices to look at: not at what pods may write to as they like.
const NOT_LOOP: &str = " devices{filter=[\"r|^/dev/loop|\",\"a|.*|\"]}";

const LV_FIELDS: &str = "vg_uuid,lv_uuid,lv_name,lv_size,lv_tags,lv_layout,pool_lv,data_percent,metadata_percent,zero";
const VG_FIELDS: &str = "vg_name,vg_uuid,vg_extent_size,vg_free";

/// LVM, as seen on some devices.
#[derive(Clone, Debug)]
pub struct Lvm {
    fixed: Vec<String>,
    lock: PathBuf,
}

/// A volume group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// LVM's identifier, without dashes.
    pub uuid: String,
    /// Sizes are multiples of this many bytes.
    pub extent: u64,
    /// Bytes that belong to no volume.
    pub free: u64,
}

/// A logical volume.
#[derive(Clone, Debug, PartialEq)]
pub struct Logical {
    /// Its name in the group.
    pub name: String,
    /// What device-mapper knows it by while it is active.
    pub uuid: String,
    /// Bytes.
    pub size: u64,
    /// What was written on it.
    pub tags: Vec<String>,
    /// The thin pool that it is in.
    pub pool: Option<String>,
    /// Whether it is a thin pool itself.
    pub is_pool: bool,
    /// How full data and metadata are, in percent; of thin pools that are active.
    pub full: Option<(f64, f64)>,
    /// Whether it zeroes what it hands out; of thin pools.
    pub zeroes: bool,
}

impl Lvm {
    /// LVM on these devices; on all but loop devices where none is named. Commands of an earlier driver of this state
    /// directory have ended.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(devices: &[PathBuf], state_dir: &Path) -> Result<Self> {
        let this = Self { fixed: fixed(devices), lock: state_dir.join("lvm") };
        let lock = this.lock_file()?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            tracing::warn!("waiting for LVM's commands of an earlier driver to end");
            flock(&lock, FlockOperation::LockExclusive).context(|| "wait for LVM's commands to end")?;
        }
        Ok(this)
    }

    fn lock_file(&self) -> Result<File> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        options.open(&self.lock).context(|| format!("open {}", self.lock.display()))
    }

    /// Runs a command; what it printed.
    ///
    /// # Errors
    /// [`Error::Lvm`], [`Error::NotFound`] when LVM is not installed, [`Error::Io`].
    pub fn run(&self, command: &'static str, arguments: &[&str]) -> Result<String> {
        let lvm = mkfs::find("lvm").ok_or(Error::NotFound { what: "program (of lvm2)", path: "lvm".into() })?;
        let locked = self.lock_file()?;
        flock(&locked, FlockOperation::LockShared).context(|| format!("lock {}", self.lock.display()))?;
        let output = Command::new(&lvm)
            .arg(command)
            .args(&self.fixed)
            .args(arguments)
            .env_clear()
            // thin_check and its like are looked for there.
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::from(locked))
            .output()
            .context(|| format!("run {}", lvm.display()))?;
        if !output.status.success() {
            let output = format!("{}: {}", output.status, mkfs::end_of(&output.stderr));
            return Err(Error::Lvm { command, output });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn report(&self, command: &'static str, fields: &str, of: &[&str]) -> Result<Vec<BTreeMap<String, String>>> {
        let fixed = ["--reportformat", "json", "--units", "b", "--nosuffix", "--options", fields];
        let text = self.run(command, &[&fixed[..], of].concat())?;
        rows(&text).map_err(|why| Error::Corrupt { path: command.into(), why })
    }

    /// The group of this name.
    ///
    /// # Errors
    /// [`Error::Lvm`] when there is none.
    pub fn group(&self, name: &str) -> Result<Group> {
        let rows = self.report("vgs", VG_FIELDS, &["--", name])?;
        let found: Vec<_> = rows.iter().filter_map(group).collect();
        match &found[..] {
            [one] => Ok(one.clone()),
            _ => Err(Error::Corrupt { path: "vgs".into(), why: format!("{} groups named {name}", found.len()) }),
        }
    }

    /// All volumes of a group.
    ///
    /// # Errors
    /// [`Error::Lvm`].
    pub fn volumes(&self, group: &str) -> Result<Vec<Logical>> {
        let rows = self.report("lvs", LV_FIELDS, &["--", group])?;
        let parse = |row| {
            logical(row).ok_or_else(|| Error::Corrupt { path: "lvs".into(), why: format!("not a volume: {row:?}") })
        };
        rows.iter().map(parse).collect()
    }

    /// Where on the group's devices a volume is, as LVM takes it for an allocation: `DEVICE:FIRST-LAST`.
    ///
    /// # Errors
    /// [`Error::Lvm`].
    pub fn ranges(&self, volume: &str) -> Result<Vec<String>> {
        let rows = self.report("lvs", "seg_pe_ranges", &["--segments", "--", volume])?;
        let ranges = rows.iter().filter_map(|row| row.get("seg_pe_ranges"));
        Ok(ranges.flat_map(|text| text.split_whitespace().map(str::to_owned)).collect())
    }
}

/// A logical volume that carries the driver's tag, of whichever group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tagged {
    /// Its group.
    pub group: String,
    /// Its name in the group.
    pub name: String,
    /// Bytes.
    pub size: u64,
}

/// All logical volumes that carry a tag, without taking a lock: for who only looks. `None` where LVM is not installed.
///
/// # Errors
/// [`Error::Lvm`], [`Error::Corrupt`], [`Error::Io`].
pub fn tagged(tag: &str, devices: &[PathBuf]) -> Result<Option<Vec<Tagged>>> {
    let Some(lvm) = mkfs::find("lvm") else { return Ok(None) };
    let fields = "vg_name,lv_name,lv_size,lv_tags";
    let output = Command::new(&lvm)
        .args(["lvs", "--readonly", "--reportformat", "json", "--units", "b", "--nosuffix", "--options", fields])
        .args(fixed(devices))
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .context(|| format!("run {}", lvm.display()))?;
    if !output.status.success() {
        let output = format!("{}: {}", output.status, mkfs::end_of(&output.stderr));
        return Err(Error::Lvm { command: "lvs", output });
    }
    let rows = rows(&String::from_utf8_lossy(&output.stdout));
    let rows = rows.map_err(|why| Error::Corrupt { path: "lvs".into(), why })?;
    Ok(Some(rows.iter().filter_map(|row| tagged_row(row, tag)).collect()))
}

fn tagged_row(row: &BTreeMap<String, String>, tag: &str) -> Option<Tagged> {
    let has = row.get("lv_tags")?.split(',').any(|other| other == tag);
    let (group, name) = (row.get("vg_name")?.clone(), row.get("lv_name")?.clone());
    Some(Tagged { group, name, size: row.get("lv_size")?.parse().ok()? }).filter(|_| has)
}

/// The first arguments of each command.
fn fixed(devices: &[PathBuf]) -> Vec<String> {
    if devices.is_empty() {
        return vec!["--config".to_owned(), format!("{CONFIG}{NOT_LOOP}")];
    }
    let list: Vec<_> = devices.iter().map(|path| path.to_string_lossy()).collect();
    vec!["--config".to_owned(), CONFIG.to_owned(), "--devices".to_owned(), list.join(",")]
}

#[derive(Deserialize)]
struct Report {
    report: Vec<BTreeMap<String, Vec<BTreeMap<String, String>>>>,
}

fn rows(text: &str) -> std::result::Result<Vec<BTreeMap<String, String>>, String> {
    let report: Report = serde_json::from_str(text).map_err(|error| format!("not a report: {error}"))?;
    Ok(report.report.into_iter().flat_map(BTreeMap::into_values).flatten().collect())
}

fn group(row: &BTreeMap<String, String>) -> Option<Group> {
    let number = |key: &str| row.get(key)?.parse().ok();
    let extent = number("vg_extent_size").filter(|&bytes: &u64| bytes > 0)?;
    Some(Group { uuid: row.get("vg_uuid")?.replace('-', ""), extent, free: number("vg_free")? })
}

fn logical(row: &BTreeMap<String, String>) -> Option<Logical> {
    let text = |key: &str| row.get(key).map(String::as_str);
    let percent = |key: &str| text(key)?.parse::<f64>().ok();
    let list = |key: &str| Some(text(key)?.split(',').filter(|part| !part.is_empty()).collect::<Vec<_>>());
    let layout = list("lv_layout")?;
    Some(Logical {
        name: text("lv_name")?.to_owned(),
        uuid: format!("LVM-{}{}", text("vg_uuid")?.replace('-', ""), text("lv_uuid")?.replace('-', "")),
        size: text("lv_size")?.parse().ok()?,
        tags: list("lv_tags")?.into_iter().map(str::to_owned).collect(),
        pool: text("pool_lv").filter(|pool| !pool.is_empty()).map(str::to_owned),
        is_pool: layout.contains(&"thin") && layout.contains(&"pool"),
        full: percent("data_percent").zip(percent("metadata_percent")),
        zeroes: text("zero") == Some("zero"),
    })
}

/// What device-mapper calls a volume of a group.
pub fn name(group: &str, volume: &str) -> String {
    format!("{}-{}", group.replace('-', "--"), volume.replace('-', "--"))
}

/// A device of device-mapper's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its number.
    pub dev: Dev,
    /// Its name.
    pub name: String,
    /// What made it knows it by this.
    pub uuid: String,
    /// Whether whatever is written to it waits.
    pub suspended: bool,
}

/// All devices of device-mapper's.
///
/// # Errors
/// [`Error::Io`].
pub fn mapped() -> Result<Vec<Mapped>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir("/sys/block").context(|| "list /sys/block")? {
        let entry = entry.context(|| "list /sys/block")?;
        if !entry.file_name().to_string_lossy().starts_with("dm-") {
            continue;
        }
        let read =
            |name: &str| std::fs::read_to_string(entry.path().join(name)).ok().map(|text| text.trim().to_owned());
        let dev = read("dev").and_then(|text| {
            let (major, minor) = text.split_once(':')?;
            Some(Dev { major: major.parse().ok()?, minor: minor.parse().ok()? })
        });
        // One that goes at this moment is not there.
        if let (Some(dev), Some(name), Some(uuid)) = (dev, read("dm/name"), read("dm/uuid")) {
            let suspended = read("dm/suspended").as_deref() == Some("1");
            all.push(Mapped { dev, name, uuid, suspended });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LVS: &str = r#"{ "report": [ { "lv": [
        {"vg_uuid":"lGQohQ-PLfa-EcR0-JujZ-AhD0-LFLs-CZbvwd", "lv_uuid":"3sEvKy-Dc5h-Y2Yb-8G0N-mZ2J-1111-abcdef",
         "lv_name":"pool", "lv_size":"67108864", "lv_tags":"", "lv_layout":"thin,pool", "pool_lv":"",
         "data_percent":"12.50", "metadata_percent":"10.94", "zero":"zero"},
        {"vg_uuid":"lGQohQ-PLfa-EcR0-JujZ-AhD0-LFLs-CZbvwd", "lv_uuid":"4sEvKy-Dc5h-Y2Yb-8G0N-mZ2J-1111-abcdef",
         "lv_name":"kwl-1", "lv_size":"33554432", "lv_tags":"keelway,keelway.nonce=00ff", "lv_layout":"thin,sparse",
         "pool_lv":"pool", "data_percent":"", "metadata_percent":"", "zero":"unknown"}
    ] } ] }"#;

    #[test]
    fn reports_are_understood() {
        let all: Vec<_> = rows(LVS).unwrap().iter().map(|row| logical(row).unwrap()).collect();
        assert!(all[0].is_pool && all[0].zeroes && all[0].pool.is_none() && all[0].tags.is_empty());
        assert_eq!(all[0].full, Some((12.5, 10.94)));
        assert_eq!(all[1].uuid, "LVM-lGQohQPLfaEcR0JujZAhD0LFLsCZbvwd4sEvKyDc5hY2Yb8G0NmZ2J1111abcdef");
        assert_eq!((all[1].size, all[1].pool.as_deref(), all[1].full), (32 << 20, Some("pool"), None));
        assert_eq!(all[1].tags, ["keelway", "keelway.nonce=00ff"]);
        assert!(!all[1].is_pool && !all[1].zeroes);
        let vgs =
            r#"{"report": [{"vg": [{"vg_name":"data", "vg_uuid":"a-b", "vg_extent_size":"4194304", "vg_free":"0"}]}]}"#;
        assert_eq!(group(&rows(vgs).unwrap()[0]), Some(Group { uuid: "ab".into(), extent: 4 << 20, free: 0 }));
        assert!(rows(r#"{"report": [{"lv": []}]}"#).unwrap().is_empty());
    }

    #[test]
    fn the_drivers_volumes_are_known_by_their_tag() {
        let all = rows(&LVS.replace("\"vg_uuid\"", "\"vg_name\":\"data\", \"vg_uuid\"")).unwrap();
        let found: Vec<_> = all.iter().filter_map(|row| tagged_row(row, "keelway")).collect();
        assert_eq!(found, [Tagged { group: "data".into(), name: "kwl-1".into(), size: 32 << 20 }]);
        assert!(all.iter().all(|row| tagged_row(row, "keel").is_none()));
    }

    #[test]
    fn what_is_no_report_is_an_error() {
        assert!(rows("").is_err() && rows("{}").is_err() && rows("  WARNING: something").is_err());
        let row = |text: &str| rows(text).unwrap().remove(0);
        assert_eq!(logical(&row(&LVS.replace("67108864", "64m"))), None);
        assert_eq!(
            group(&row(r#"{"report": [{"vg": [{"vg_uuid":"a", "vg_extent_size":"0", "vg_free":"0"}]}]}"#)),
            None
        );
    }

    #[test]
    fn names_are_as_device_mapper_writes_them() {
        assert_eq!(name("data-1", "kwl-0f-1"), "data--1-kwl--0f--1");
    }

    #[test]
    fn devices_that_pods_write_to_are_not_looked_at() {
        assert!(fixed(&[])[1].contains("r|^/dev/loop|"));
        let some = fixed(&["/dev/vdb".into(), "/dev/vdc".into()]);
        assert_eq!(some[2..], ["--devices", "/dev/vdb,/dev/vdc"]);
        assert!(!some[1].contains("filter"));
    }
}
