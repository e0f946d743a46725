//! What a volume goes through, each step of which has to succeed unless its name says that it is a try.

use keelway_csi::csi::volume_content_source::Type;
use keelway_csi::csi::{self, VolumeCapability};
use tonic::Status;

use super::{Calls, Driver, create, delete_group, filled, group};

/// A volume, with what is in a snapshot or another volume or with nothing, at paths of its own.
pub async fn try_made(
    driver: &Driver,
    name: &str,
    size: i64,
    kind: &VolumeCapability,
    class: &[(&str, &str)],
    from: Option<Type>,
) -> Result<Calls, Status> {
    let request = filled(from, create(name, size, kind, class));
    let source = request.volume_content_source.clone();
    let made = driver.controller().await.create_volume(request).await?.into_inner().volume.unwrap();
    assert_eq!(made.content_source, source);
    Ok(Calls::named(driver, name, &made.volume_id, kind.clone()))
}

pub async fn made(driver: &Driver, name: &str, size: i64, kind: &VolumeCapability, class: &[(&str, &str)]) -> Calls {
    try_made(driver, name, size, kind, class, None).await.unwrap()
}

/// Stages and publishes.
pub async fn bring(driver: &Driver, calls: &Calls) {
    let mut node = driver.node().await;
    node.node_stage_volume(calls.stage()).await.unwrap();
    node.node_publish_volume(calls.publish()).await.unwrap();
}

/// Unpublishes and unstages; the staging path goes, too, as the kubelet has it.
pub async fn take_away(driver: &Driver, calls: &Calls) {
    let mut node = driver.node().await;
    node.node_unpublish_volume(calls.unpublish()).await.unwrap();
    node.node_unstage_volume(calls.unstage()).await.unwrap();
    let _ = std::fs::remove_dir(&calls.staging);
}

pub async fn delete(driver: &Driver, calls: &Calls) {
    driver.controller().await.delete_volume(calls.delete()).await.unwrap();
}

/// Takes away and deletes.
pub async fn end(driver: &Driver, calls: &Calls) {
    take_away(driver, calls).await;
    delete(driver, calls).await;
}

pub async fn try_take(driver: &Driver, name: &str, of: &Calls) -> Result<csi::Snapshot, Status> {
    let taken = driver.controller().await.create_snapshot(of.snapshot(name)).await;
    taken.map(|taken| taken.into_inner().snapshot.unwrap())
}

pub async fn take(driver: &Driver, name: &str, of: &Calls) -> csi::Snapshot {
    try_take(driver, name, of).await.unwrap()
}

pub async fn drop_snapshot(driver: &Driver, id: &str) {
    let request = csi::DeleteSnapshotRequest { snapshot_id: id.into(), ..Default::default() };
    driver.controller().await.delete_snapshot(request).await.unwrap();
}

pub async fn try_take_group(driver: &Driver, name: &str, of: &[&Calls]) -> Result<csi::VolumeGroupSnapshot, Status> {
    let taken = driver.groups().await.create_volume_group_snapshot(group(name, of)).await;
    taken.map(|taken| taken.into_inner().group_snapshot.unwrap())
}

pub async fn take_group(driver: &Driver, name: &str, of: &[&Calls]) -> csi::VolumeGroupSnapshot {
    try_take_group(driver, name, of).await.unwrap()
}

pub async fn drop_group(driver: &Driver, group: &csi::VolumeGroupSnapshot) {
    driver.groups().await.delete_volume_group_snapshot(delete_group(group)).await.unwrap();
}

/// How many bytes of a class there are.
pub async fn available(driver: &Driver, class: &[(&str, &str)]) -> i64 {
    let parameters = class.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    let request = csi::GetCapacityRequest { parameters, ..Default::default() };
    driver.controller().await.get_capacity(request).await.unwrap().into_inner().available_capacity
}
