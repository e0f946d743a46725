//! The mount options that a PersistentVolume may ask for: an allow-list, so that nothing else reaches the kernel.

use super::FsType;
use super::id::printable;
use crate::error::{Error, Result};

/// Parsed mount options: what belongs to the mount, and what belongs to the filesystem.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// No writes.
    pub read_only: bool,
    /// Set-uid bits count. Off unless asked for.
    pub suid: bool,
    /// No program may be started from the volume.
    pub noexec: bool,
    /// Access times: `noatime`.
    pub noatime: bool,
    /// Access times: `strictatime`.
    pub strictatime: bool,
    /// `nodiratime`.
    pub nodiratime: bool,
    /// Options of the filesystem, with a value where they have one.
    pub filesystem: Vec<(&'static str, Option<String>)>,
}

/// Flags that every filesystem takes.
const COMMON: [&str; 3] = ["sync", "dirsync", "lazytime"];
/// Flags of ext4, XFS and btrfs.
const EXT4: [&str; 4] = ["discard", "nodiscard", "delalloc", "nodelalloc"];
const XFS: [&str; 5] = ["discard", "nodiscard", "largeio", "inode64", "swalloc"];
const BTRFS: [&str; 4] = ["discard", "nodiscard", "autodefrag", "flushoncommit"];

impl MountOptions {
    /// Reads the flags of a volume capability. An element may hold several options, separated by commas. Without a
    /// filesystem of its own (a directory of the host's), a volume has the options of the mount only.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming the option.
    pub fn parse(flags: &[String], fs: Option<FsType>) -> Result<Self> {
        let mut options = Self::default();
        for option in flags.iter().flat_map(|flag| flag.split(',')).map(str::trim).filter(|option| !option.is_empty()) {
            match option {
                "ro" => options.read_only = true,
                "suid" => options.suid = true,
                "noexec" => options.noexec = true,
                "noatime" => options.noatime = true,
                "strictatime" => options.strictatime = true,
                "nodiratime" => options.nodiratime = true,
                // What holds anyway.
                "defaults" | "rw" | "nosuid" | "nodev" | "exec" | "relatime" | "async" => {}
                _ => options.filesystem.push(filesystem_option(option, fs.ok_or_else(|| refused(option))?)?),
            }
        }
        if options.noatime && options.strictatime {
            return Err(refused("noatime with strictatime"));
        }
        Ok(options)
    }

    /// All of them in one order, separated by commas: the same text for what is the same to the kernel.
    pub fn canonical(&self) -> String {
        let flags = [
            ("ro", self.read_only),
            ("suid", self.suid),
            ("noexec", self.noexec),
            ("noatime", self.noatime),
            ("strictatime", self.strictatime),
            ("nodiratime", self.nodiratime),
        ];
        let mut all: Vec<String> = flags.into_iter().filter(|&(_, set)| set).map(|(name, _)| name.to_owned()).collect();
        let of_filesystem = self.filesystem.iter().map(|(name, value)| match value {
            Some(value) => format!("{name}={value}"),
            None => (*name).to_owned(),
        });
        all.extend(of_filesystem);
        all.sort();
        all.dedup();
        all.join(",")
    }
}

fn filesystem_option(option: &str, fs: FsType) -> Result<(&'static str, Option<String>)> {
    let own: &[&'static str] = match fs {
        FsType::Ext4 => &EXT4,
        FsType::Xfs => &XFS,
        FsType::Btrfs => &BTRFS,
    };
    if let Some(&flag) = COMMON.iter().chain(own).find(|&&flag| flag == option) {
        return Ok((flag, None));
    }
    let value = match (fs, option.split_once('=')) {
        (FsType::Ext4, Some(("commit", seconds))) if in_range(seconds, 1, 300) => ("commit", seconds),
        (FsType::Ext4, Some(("data", mode @ ("ordered" | "journal")))) => ("data", mode),
        (FsType::Btrfs, Some(("compress", how @ ("zlib" | "lzo" | "zstd" | "no")))) => ("compress", how),
        (FsType::Xfs, Some(("logbufs", count))) if in_range(count, 2, 8) => ("logbufs", count),
        (FsType::Xfs, Some(("logbsize", size @ ("16k" | "32k" | "64k" | "128k" | "256k")))) => ("logbsize", size),
        _ => return Err(refused(option)),
    };
    Ok((value.0, Some(value.1.to_owned())))
}

fn in_range(text: &str, least: u32, most: u32) -> bool {
    text.parse().is_ok_and(|number: u32| (least..=most).contains(&number))
}

fn refused(option: &str) -> Error {
    Error::Invalid {
        field: "volume_capability.mount.mount_flags",
        value: printable(option),
        expected: "on the list of mount options for this filesystem".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flags: &[&str], fs: FsType) -> Result<MountOptions> {
        MountOptions::parse(&flags.iter().map(|f| (*f).to_owned()).collect::<Vec<_>>(), Some(fs))
    }

    #[test]
    fn flags_are_sorted_into_mount_and_filesystem() {
        let options = parse(&["noatime,nodiratime", "commit=30", " discard "], FsType::Ext4).unwrap();
        assert!(options.noatime && options.nodiratime && !options.suid && !options.read_only);
        assert_eq!(options.filesystem, [("commit", Some("30".into())), ("discard", None)]);
        assert_eq!(parse(&["defaults,rw,,nodev"], FsType::Xfs).unwrap(), MountOptions::default());
        let other = parse(&["rw", "discard,commit=30", "nodiratime", "noatime"], FsType::Ext4).unwrap();
        assert_eq!(options.canonical(), "commit=30,discard,noatime,nodiratime");
        assert_eq!(options.canonical(), other.canonical());
    }

    #[test]
    fn what_could_reach_beyond_the_volume_is_refused() {
        for option in [
            "bind",
            "remount",
            "dev",
            "context=x",
            "errors=panic",
            "commit=0",
            "data=writeback",
            "sb=1",
            "source=/dev/sda",
        ] {
            let error = parse(&[option], FsType::Ext4).unwrap_err();
            assert!(error.to_string().contains(option), "{error}");
        }
        assert!(parse(&["logdev=/dev/sda"], FsType::Xfs).is_err());
        assert!(parse(&["nouuid"], FsType::Xfs).is_err());
        assert!(parse(&["noatime", "strictatime"], FsType::Xfs).is_err());
    }

    #[test]
    fn one_filesystem_does_not_take_the_others_options() {
        assert!(MountOptions::parse(&["noatime".into()], None).is_ok());
        assert!(MountOptions::parse(&["sync".into()], None).is_err());
        assert!(parse(&["compress=zstd"], FsType::Btrfs).is_ok() && parse(&["subvol=/"], FsType::Btrfs).is_err());
        assert!(parse(&["commit=30"], FsType::Xfs).is_err());
        assert!(parse(&["logbsize=64k"], FsType::Ext4).is_err());
    }
}
