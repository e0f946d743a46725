//! Making filesystems, by the programs whose work it is: no shell, fixed arguments, an empty environment.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};
use crate::model::{FsType, Parameters, VolumeId};

/// Where the programs may be; the first found is taken.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Makes a filesystem on `image`, which is locked: mkfs inherits the lock together with the descriptor (as its standard
/// input), and so holds it for as long as it runs, even when this process is gone.
///
/// # Errors
/// [`Error::Mkfs`], or [`Error::NotFound`] when the program is not installed.
pub fn run(image: &File, fs: FsType, parameters: &Parameters, id: &VolumeId) -> Result<()> {
    helper(image, program(fs), &arguments(fs, parameters), id)
}

/// Grows the ext4 on `image`, which is locked and attached nowhere, to the image's size. It is looked over first, as
/// resize2fs demands.
///
/// # Errors
/// As [`run`].
pub fn grow_ext4(image: &File, id: &VolumeId) -> Result<()> {
    let fd = "/proc/self/fd/0";
    // 1: it found something, and put it right.
    let preen = ["-f", "-p", fd].map(str::to_owned);
    match helper(image, "e2fsck", &preen, id) {
        Err(Error::Mkfs { code: Some(1), .. }) => {}
        other => other?,
    }
    helper(image, "resize2fs", &[fd.to_owned()], id)
}

/// Runs a program on `image`.
fn helper(image: &File, name: &'static str, arguments: &[String], id: &VolumeId) -> Result<()> {
    let path = find(name).ok_or_else(|| Error::NotFound {
        what: "program (of e2fsprogs, xfsprogs or btrfs-progs)",
        path: name.into(),
    })?;
    let stdin = image.try_clone().context(|| format!("hand the image of {id} to {name}"))?;
    let output = Command::new(&path)
        .args(arguments)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(stdin))
        .output()
        .context(|| format!("run {}", path.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let (code, end) = (output.status.code(), end_of(&output.stderr));
    Err(Error::Mkfs { program: name, id: id.clone(), code, output: format!("{}: {end}", output.status) })
}

/// Where a program is.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    DIRECTORIES.iter().map(|directory| Path::new(directory).join(name)).find(|path| path.exists())
}

/// The last lines of what a program said.
pub(super) fn end_of(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let lines: Vec<_> = said.trim().lines().map(str::trim).collect();
    lines[lines.len().saturating_sub(3)..].join("; ")
}

fn program(fs: FsType) -> &'static str {
    match fs {
        FsType::Ext4 => "mkfs.ext4",
        FsType::Xfs => "mkfs.xfs",
        FsType::Btrfs => "mkfs.btrfs",
    }
}

/// Not discarding keeps the image's blocks. Sectors of 4 KiB suit every disk that the pool can be on.
fn arguments(fs: FsType, parameters: &Parameters) -> Vec<String> {
    let fixed: &[&str] = match fs {
        // -F: a file is meant. -m 0: blocks kept for root are of no use in a pod's volume.
        FsType::Ext4 => &["-F", "-q", "-m", "0", "-b", "4096", "-E", "nodiscard"],
        FsType::Xfs => &["-f", "-q", "-K", "-s", "size=4096"],
        // One copy of metadata: two on one disk protect from little, and take room.
        FsType::Btrfs => &["-f", "-q", "-K", "-m", "single", "-d", "single"],
    };
    let mut arguments: Vec<String> = fixed.iter().map(|&argument| argument.to_owned()).collect();
    if let (FsType::Ext4, Some(bytes)) = (fs, parameters.bytes_per_inode) {
        arguments.extend(["-i".to_owned(), bytes.to_string()]);
    }
    arguments.push("/proc/self/fd/0".to_owned());
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_hold_nothing_that_a_caller_wrote() {
        let parameters = Parameters { bytes_per_inode: Some(8192), ..Parameters::default() };
        assert!(arguments(FsType::Ext4, &parameters).ends_with(&[
            "-i".into(),
            "8192".into(),
            "/proc/self/fd/0".into()
        ]));
        assert!(!arguments(FsType::Xfs, &parameters).contains(&"-i".to_owned()));
    }

    #[test]
    fn a_filesystem_is_made_on_the_descriptor() {
        for fs in [FsType::Ext4, FsType::Xfs, FsType::Btrfs] {
            let image = tempfile::tempfile().unwrap();
            image.set_len(300 << 20).unwrap();
            let made = run(&image, fs, &Parameters::default(), &VolumeId::new([1; 16]));
            if matches!(made, Err(Error::NotFound { .. })) {
                eprintln!("skipped: {} is not installed", program(fs));
                continue;
            }
            made.unwrap();
            // Its magic number at its place: nothing but the descriptor led there.
            let (at, magic): (u64, &[u8]) = match fs {
                FsType::Ext4 => (0x438, &[0x53, 0xef]),
                FsType::Xfs => (0, b"XFSB"),
                FsType::Btrfs => (0x10040, b"_BHRfS_M"),
            };
            let mut found = vec![0; magic.len()];
            std::os::unix::fs::FileExt::read_exact_at(&image, &mut found, at).unwrap();
            assert_eq!(found, magic);
        }
    }

    #[test]
    fn a_failure_says_why() {
        let image = tempfile::tempfile().unwrap();
        image.set_len(4096).unwrap();
        match run(&image, FsType::Ext4, &Parameters::default(), &VolumeId::new([1; 16])) {
            Err(Error::NotFound { .. }) => eprintln!("skipped: mkfs.ext4 is not installed"),
            Err(Error::Mkfs { output, .. }) => assert!(output.len() > 20, "{output}"),
            other => panic!("{other:?}"),
        }
    }
}
