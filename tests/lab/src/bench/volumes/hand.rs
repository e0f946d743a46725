//! The peer: what an administrator would type for the same volume.
use std::fs;
use std::time::Instant;

use anyhow::Result;

use super::{Kind, Place, Times, times};
use crate::sh;

/// Makes a volume, brings it to a pod's directory, and undoes both.
pub fn cycle(place: &Place, kind: Kind, name: &str) -> Result<Times> {
    let (image, staging) = (place.path(&format!("hand/{name}.img")), place.path(&format!("hand/{name}.staging")));
    let target = place.path(&format!("hand/{name}.target"));
    let tree = place.base(kind).join(format!("bare/{name}")).to_string_lossy().into_owned();
    let start = Instant::now();
    fs::create_dir(&target)?;
    let mut device = String::new();
    match kind {
        Kind::Directory => fs::create_dir(&tree)?,
        Kind::Btrfs => drop(sh::run(&["btrfs", "-q", "subvolume", "create", &tree])?),
        Kind::Image => {
            fs::create_dir(&staging)?;
            sh::run(&["fallocate", "-l", "64M", &image])?;
            device = sh::run(&["losetup", "--find", "--show", "--direct-io=on", &image])?.trim().to_owned();
            sh::run(&["mkfs.ext4", "-q", &device])?;
            sh::run(&["mount", &device, &staging])?;
        }
    }
    let source = if kind == Kind::Image { &staging } else { &tree };
    sh::run(&["mount", "--bind", source, &target])?;
    let there = start.elapsed();
    sh::run(&["umount", &target])?;
    match kind {
        Kind::Directory => fs::remove_dir(&tree)?,
        Kind::Btrfs => drop(sh::run(&["btrfs", "-q", "subvolume", "delete", &tree])?),
        Kind::Image => {
            sh::run(&["umount", &staging])?;
            sh::run(&["losetup", "--detach", &device])?;
            fs::remove_file(&image)?;
            fs::remove_dir(&staging)?;
        }
    }
    fs::remove_dir(&target)?;
    Ok(times(there, start.elapsed()))
}
