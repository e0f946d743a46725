//! `keelway volumes`, for people and for programs.

use serde_json::{Value, json};

use super::Volumes;
use super::local::{Listing, Volume, is_blank};
use crate::table;

/// Whether nothing is wrong.
pub fn is_well(listing: &Listing, driver: &Volumes) -> bool {
    let healthy = |volume: &Volume| volume.health.as_ref().is_none_or(Vec::is_empty);
    listing.orphans.is_empty() && !matches!(driver, Volumes::Unwell(_)) && listing.volumes.iter().all(healthy)
}

/// A page of tables.
pub fn table(listing: &Listing, driver: &Volumes) -> String {
    let state = match driver {
        Volumes::NoDriver => "not running; what follows is from its records".to_owned(),
        Volumes::Listed(_) => "running".to_owned(),
        Volumes::Unwell(reason) => reason.clone(),
    };
    let mut page = table::pairs(&[("Driver", state)]);
    let rows = listing.volumes.iter().map(row).collect::<Vec<_>>();
    let heading = ["CLAIM", "VOLUME", "BACKEND", "AS", "SIZE", "USED", "SNAPSHOTS", "HEALTH", "PODS"];
    page += &section("Volumes", &heading, rows);
    let mut places = Vec::new();
    for volume in &listing.volumes {
        for place in &volume.places {
            places.push(vec![label(volume), place.path.display().to_string()]);
        }
    }
    page += &section("Mounts", &["VOLUME", "AT"], places);
    let snapshots = listing.volumes.iter().flat_map(|volume| {
        let line = |snapshot: &keelway_csi::model::Snapshot| {
            vec![one_line(&snapshot.name), label(volume), size(snapshot.size), snapshot.id.to_string()]
        };
        volume.snapshots.iter().map(line)
    });
    page += &section("Snapshots", &["SNAPSHOT", "OF", "SIZE", "ID"], snapshots.collect());
    let mut problems = Vec::new();
    for volume in &listing.volumes {
        for health in volume.health.iter().flatten() {
            problems.push(format!("{}: {}: {} ({})", label(volume), health.status, health.message, health.reason));
        }
    }
    problems.extend(listing.orphans.iter().map(|orphan| format!("{}: {}", orphan.what, orphan.why)));
    page += "\nProblems\n";
    if problems.is_empty() {
        page += "  none\n";
    }
    problems.iter().for_each(|problem| page += &format!("  {problem}\n"));
    page
}

fn section(title: &str, heading: &[&str], rows: Vec<Vec<String>>) -> String {
    match rows.is_empty() {
        true => format!("\n{title}\n  none\n"),
        false => format!("\n{title}\n{}", table::render(heading, &rows)),
    }
}

fn row(volume: &Volume) -> Vec<String> {
    let record = &volume.record;
    let health = match &volume.health {
        None => "?".to_owned(),
        Some(found) => found.first().map_or("good", |health| health.status).to_owned(),
    };
    let mut pods: Vec<&str> = volume.places.iter().filter_map(|place| place.pod.as_deref()).collect();
    pods.sort_unstable();
    pods.dedup();
    vec![
        record.claim.clone().unwrap_or_else(|| "-".into()),
        one_line(&record.name),
        record.parameters.backend.as_str().to_owned(),
        shape(volume),
        size(record.size),
        volume.used.map_or_else(|| "-".to_owned(), size),
        volume.snapshots.len().to_string(),
        health,
        if pods.is_empty() { "-".to_owned() } else { pods.join(", ") },
    ]
}

/// What a volume is handed out as.
fn shape(volume: &Volume) -> String {
    use keelway_csi::model::Content;
    let shape = match volume.record.content {
        Content::Raw => "block",
        Content::Filesystem(fs) => fs.as_str(),
        Content::Tree => "directory",
    };
    if is_blank(&volume.record) { format!("{shape}, unused") } else { shape.to_owned() }
}

/// A name may have tabs and ends of lines.
fn one_line(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn label(volume: &Volume) -> String {
    volume.record.claim.clone().unwrap_or_else(|| one_line(&volume.record.name))
}

/// In the largest binary unit of which there is at least one.
fn size(bytes: u64) -> String {
    let units = [("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
    match units.into_iter().find(|&(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) if bytes.trailing_zeros() >= shift => format!("{}{unit}", bytes >> shift),
        Some((unit, shift)) => format!("{:.1}{unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => bytes.to_string(),
    }
}

/// For programs. Keys are added, never renamed.
pub fn json(listing: &Listing, driver: &Volumes) -> Value {
    let state = match driver {
        Volumes::NoDriver => "none",
        Volumes::Listed(_) => "running",
        Volumes::Unwell(_) => "unwell",
    };
    let volume = |volume: &Volume| {
        let record = &volume.record;
        json!({
            "id": record.id.as_str(),
            "name": record.name,
            "claim": record.claim,
            "backend": record.parameters.backend.as_str(),
            "as": shape(volume),
            "capacityBytes": record.size,
            "allocatedBytes": volume.allocated,
            "usedBytes": volume.used,
            "device": volume.device,
            "health": volume.health.as_ref().map(|found| found.iter().map(|health| json!({
                "status": health.status, "reason": health.reason, "message": health.message,
            })).collect::<Vec<_>>()),
            "snapshots": volume.snapshots.iter().map(|snapshot| json!({
                "id": snapshot.id.as_str(), "name": snapshot.name, "bytes": snapshot.size,
            })).collect::<Vec<_>>(),
            "mounts": volume.places.iter().map(|place| json!({"path": place.path, "pod": place.pod})).collect::<Vec<_>>(),
        })
    };
    json!({
        "driver": state,
        "volumes": listing.volumes.iter().map(volume).collect::<Vec<_>>(),
        "orphans": listing.orphans.iter().map(|orphan| json!({"what": orphan.what, "why": orphan.why})).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use keelway_csi::model::{Content, FsType, Nonce, Parameters, Record, VolumeId};

    use super::super::local::{Orphan, Place};
    use super::super::socket::Health;
    use super::*;

    fn listing() -> Listing {
        let id = VolumeId::new([7; 16]);
        let content = Content::Filesystem(FsType::Ext4);
        let parameters = Parameters::default();
        let mut record =
            Record::blank(1, id, "pvc-1".into(), 64 << 20, content, parameters, 1, Nonce::new([1; 16])).formatted();
        record.claim = Some("shop/data-db-0".into());
        let place = Place { path: "/k/pods/u/m".into(), pod: Some("shop/db-0".into()) };
        let volume = Volume {
            record,
            allocated: Some(64 << 20),
            used: Some(3 << 19),
            device: None,
            snapshots: Vec::new(),
            health: Some(Vec::new()),
            places: vec![place],
        };
        Listing { volumes: vec![volume], orphans: Vec::new() }
    }

    #[test]
    fn a_line_says_whose_it_is_and_where() {
        let page = table(&listing(), &Volumes::Listed(Vec::new()));
        let line = "  shop/data-db-0  pvc-1   image    ext4  64Mi  1.5Mi          0  good    shop/db-0";
        assert!(page.lines().any(|found| found == line), "{line:?} is missing from\n{page}");
        assert!(page.ends_with("Problems\n  none\n") && is_well(&listing(), &Volumes::NoDriver));
    }

    #[test]
    fn a_name_takes_one_line() {
        let mut listing = listing();
        listing.volumes[0].record.claim = None;
        let before = table(&listing, &Volumes::NoDriver).lines().count();
        listing.volumes[0].record.name = "a\tb\nc".into();
        let page = table(&listing, &Volumes::NoDriver);
        assert!(page.lines().count() == before && page.contains("a\u{fffd}b\u{fffd}c"), "{page}");
    }

    #[test]
    fn what_is_wrong_is_said_in_full() {
        let mut listing = listing();
        let health = Health { status: "data loss", reason: "R".into(), message: "gone".into() };
        listing.volumes[0].health = Some(vec![health]);
        listing.orphans.push(Orphan { what: "x.img".into(), why: "nobody's".into() });
        let page = table(&listing, &Volumes::NoDriver);
        assert!(page.contains("  shop/data-db-0: data loss: gone (R)\n  x.img: nobody's\n"), "{page}");
        assert!(!is_well(&listing, &Volumes::NoDriver));
        assert_eq!(json(&listing, &Volumes::NoDriver)["orphans"][0]["what"], "x.img");
    }

    #[test]
    fn sizes_are_read_by_people() {
        for (bytes, text) in [(5, "5"), (64 << 20, "64Mi"), (3 << 19, "1.5Mi"), (1 << 40, "1Ti")] {
            assert_eq!(size(bytes), text);
        }
    }
}
