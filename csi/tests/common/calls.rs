//! What is asked of a driver: one volume's requests, and what they are made of.

use keelway_csi::csi::volume_capability::access_mode::Mode;
use keelway_csi::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use keelway_csi::csi::volume_content_source::{SnapshotSource, Type, VolumeSource};
use keelway_csi::csi::{self, VolumeCapability};

use super::Driver;

/// A volume that is a whole device.
pub const RAW: &[(&str, &str)] = &[("backend", "raw")];
/// One that is a subvolume with a limit.
pub const BTRFS: &[(&str, &str)] = &[("backend", "btrfs"), ("capacity", "quota")];
/// One that is a directory without one.
pub const DIRECTORY: &[(&str, &str)] = &[("backend", "directory"), ("capacity", "unenforced")];

pub fn mount(fs: &str) -> VolumeCapability {
    capability(AccessType::Mount(MountVolume { fs_type: fs.into(), ..Default::default() }))
}

pub fn block() -> VolumeCapability {
    capability(AccessType::Block(BlockVolume {}))
}

fn capability(access_type: AccessType) -> VolumeCapability {
    let access_mode = Some(AccessMode { mode: Mode::SingleNodeWriter as i32 });
    VolumeCapability { access_type: Some(access_type), access_mode }
}

/// The same for another access mode.
pub fn as_mode(mode: Mode, of: &VolumeCapability) -> VolumeCapability {
    VolumeCapability { access_mode: Some(AccessMode { mode: mode as i32 }), ..of.clone() }
}

pub fn create(
    name: &str,
    size: i64,
    capability: &VolumeCapability,
    parameters: &[(&str, &str)],
) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest {
        name: name.into(),
        capacity_range: at_least(size),
        volume_capabilities: vec![capability.clone()],
        parameters: parameters.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        ..Default::default()
    }
}

/// The same with what is in a snapshot or another volume.
pub fn filled(from: Option<Type>, request: csi::CreateVolumeRequest) -> csi::CreateVolumeRequest {
    let volume_content_source = from.map(|kind| csi::VolumeContentSource { r#type: Some(kind) });
    csi::CreateVolumeRequest { volume_content_source, ..request }
}

pub fn snapshot(id: &str) -> Option<Type> {
    Some(Type::Snapshot(SnapshotSource { snapshot_id: id.into() }))
}

pub fn volume(id: &str) -> Option<Type> {
    Some(Type::Volume(VolumeSource { volume_id: id.into() }))
}

/// So many bytes, or more.
pub fn at_least(size: i64) -> Option<csi::CapacityRange> {
    Some(csi::CapacityRange { required_bytes: size, limit_bytes: 0 })
}

/// One volume's requests, at fixed paths.
#[derive(Clone, Debug)]
pub struct Calls {
    pub id: String,
    pub staging: String,
    pub target: String,
    pub capability: VolumeCapability,
}

impl Calls {
    pub fn new(driver: &Driver, id: &str, capability: VolumeCapability) -> Self {
        let (staging, target) = (driver.kubelet("staging"), driver.kubelet("pods/target"));
        Self { id: id.into(), staging, target, capability }
    }

    /// At paths of the volume's own.
    pub fn named(driver: &Driver, name: &str, id: &str, capability: VolumeCapability) -> Self {
        let (staging, target) = (driver.kubelet(&format!("staging/{name}")), driver.kubelet(&format!("pods/{name}")));
        Self { id: id.into(), staging, target, capability }
    }

    pub fn stage(&self) -> csi::NodeStageVolumeRequest {
        csi::NodeStageVolumeRequest {
            volume_id: self.id.clone(),
            staging_target_path: self.staging.clone(),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        }
    }

    pub fn publish(&self) -> csi::NodePublishVolumeRequest {
        csi::NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            staging_target_path: self.staging.clone(),
            target_path: self.target.clone(),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        }
    }

    pub fn unpublish(&self) -> csi::NodeUnpublishVolumeRequest {
        csi::NodeUnpublishVolumeRequest { volume_id: self.id.clone(), target_path: self.target.clone() }
    }

    pub fn unstage(&self) -> csi::NodeUnstageVolumeRequest {
        csi::NodeUnstageVolumeRequest { volume_id: self.id.clone(), staging_target_path: self.staging.clone() }
    }

    pub fn delete(&self) -> csi::DeleteVolumeRequest {
        csi::DeleteVolumeRequest { volume_id: self.id.clone(), secrets: Default::default() }
    }

    pub fn snapshot(&self, name: &str) -> csi::CreateSnapshotRequest {
        csi::CreateSnapshotRequest { name: name.into(), source_volume_id: self.id.clone(), ..Default::default() }
    }

    pub fn expand(&self, size: i64) -> csi::ControllerExpandVolumeRequest {
        csi::ControllerExpandVolumeRequest {
            volume_id: self.id.clone(),
            capacity_range: at_least(size),
            ..Default::default()
        }
    }

    pub fn node_expand(&self, size: i64) -> csi::NodeExpandVolumeRequest {
        csi::NodeExpandVolumeRequest {
            volume_id: self.id.clone(),
            volume_path: self.target.clone(),
            staging_target_path: self.staging.clone(),
            capacity_range: at_least(size),
            ..Default::default()
        }
    }

    pub fn stats(&self) -> csi::NodeGetVolumeStatsRequest {
        csi::NodeGetVolumeStatsRequest {
            volume_id: self.id.clone(),
            volume_path: self.target.clone(),
            ..Default::default()
        }
    }
}

pub fn group(name: &str, of: &[&Calls]) -> csi::CreateVolumeGroupSnapshotRequest {
    csi::CreateVolumeGroupSnapshotRequest {
        name: name.into(),
        source_volume_ids: of.iter().map(|calls| calls.id.clone()).collect(),
        ..Default::default()
    }
}

pub fn members(group: &csi::VolumeGroupSnapshot) -> Vec<String> {
    group.snapshots.iter().map(|snapshot| snapshot.snapshot_id.clone()).collect()
}

pub fn delete_group(group: &csi::VolumeGroupSnapshot) -> csi::DeleteVolumeGroupSnapshotRequest {
    csi::DeleteVolumeGroupSnapshotRequest {
        group_snapshot_id: group.group_snapshot_id.clone(),
        snapshot_ids: members(group),
        ..Default::default()
    }
}
