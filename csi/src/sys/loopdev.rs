//! Loop devices by ioctl. A device is recognised by the device and inode number of its backing file, never by the path
//! that sysfs shows: that path is of another mount namespace as often as not.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::{Dev, block};
use crate::error::{Context, Error, Result};

// linux/loop.h.
const LOOP_CLR_FD: u64 = 0x4C01;
const LOOP_GET_STATUS64: u64 = 0x4C05;
const LOOP_CONFIGURE: u64 = 0x4C0A;
const LOOP_CTL_GET_FREE: u64 = 0x4C82;
const LOOP_SET_CAPACITY: u64 = 0x4C07;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// The longest that the kernel may take to unbind a device that nobody has open any more.
const UNBINDING: Duration = Duration::from_secs(2);

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const NO_INFO: LoopInfo = LoopInfo {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    size_limit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; 64],
    crypt_name: [0; 64],
    encrypt_key: [0; 32],
    init: [0; 2],
};

/// The requests as functions, named as in the kernel's headers.
mod raw {
    #![allow(missing_docs)]
    use super::*;

    nix::ioctl_none_bad!(loop_ctl_get_free, LOOP_CTL_GET_FREE);
    nix::ioctl_none_bad!(loop_clr_fd, LOOP_CLR_FD);
    nix::ioctl_none_bad!(loop_set_capacity, LOOP_SET_CAPACITY);
    nix::ioctl_read_bad!(loop_get_status64, LOOP_GET_STATUS64, LoopInfo);
    nix::ioctl_write_ptr_bad!(loop_configure, LOOP_CONFIGURE, LoopConfig);
}

/// A bound loop device, held open: as long as this value lives, the device is that one.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    file: File,
    dev: Dev,
}

/// How to bind a device.
#[derive(Clone, Copy, Debug)]
pub struct Binding {
    /// Refuse writes.
    pub read_only: bool,
    /// Unbind by itself when nobody has the device open or mounted any more.
    pub autoclear: bool,
}

impl LoopDevice {
    /// Binds a free device to `backing`, with direct I/O where the pool's filesystem can.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn bind(backing: &File, binding: Binding) -> Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control");
        let control = control.context(|| "open /dev/loop-control")?;
        let mut flags = LO_FLAGS_DIRECT_IO;
        if binding.read_only {
            flags |= LO_FLAGS_READ_ONLY;
        }
        if binding.autoclear {
            flags |= LO_FLAGS_AUTOCLEAR;
        }
        // Another process may bind the free device first; then there is another free one.
        for _ in 0..64 {
            // SAFETY: takes no argument and writes no memory of ours.
            let number =
                unsafe { raw::loop_ctl_get_free(control.as_raw_fd()) }.context(|| "find a free loop device")?;
            let number = number.unsigned_abs();
            let file = open(number, true)?;
            let fd = backing.as_raw_fd().unsigned_abs();
            let config = LoopConfig { fd, block_size: 0, info: LoopInfo { flags, ..NO_INFO }, reserved: [0; 8] };
            // SAFETY: `config` is the struct that this request reads, and outlives the call.
            match unsafe { raw::loop_configure(file.as_raw_fd(), &config) } {
                Ok(_) => {
                    let device = Self::named(number, file)?;
                    // Whoever had the device before may have left it read-only; binding does not change that.
                    if !binding.read_only && device.read_only()? {
                        device.set_read_only(false)?;
                    }
                    return Ok(device);
                }
                Err(nix::Error::EBUSY) => {}
                Err(error) => return Err(Error::io(format!("bind {}", path(number).display()), error)),
            }
        }
        Err(Error::io("bind a loop device", io::Error::other("64 devices in a row were taken by others")))
    }

    /// The device bound to the file with this device and inode number, if there is one.
    ///
    /// # Errors
    /// [`Error::Io`], also when a bound device has no node in /dev: then one that is ours could go unseen.
    pub fn find(device: u64, inode: u64) -> Result<Option<Self>> {
        for number in bound()? {
            let Some(file) = open_bound(number)? else { continue };
            if let Some(info) = status(&file).context(|| format!("look at {}", path(number).display()))?
                && (info.device, info.inode) == (device, inode)
            {
                return Self::named(number, file).map(Some);
            }
        }
        Ok(None)
    }

    fn named(number: u32, file: File) -> Result<Self> {
        let meta = file.metadata().context(|| format!("stat {}", path(number).display()))?;
        Ok(Self { number, file, dev: Dev::from_raw(meta.rdev()) })
    }

    /// The device's number: of the mounts of its filesystem, and of its nodes.
    pub fn dev(&self) -> Dev {
        self.dev
    }

    /// Its node.
    pub fn path(&self) -> PathBuf {
        path(self.number)
    }

    /// The name of the file that it is bound to, without its directory, also when that was removed.
    pub fn file_name(&self) -> Option<String> {
        // The path itself is of another mount namespace as often as not; the name is the same in all.
        let path = std::fs::read_to_string(sysfs(self.number).join("backing_file")).ok()?;
        let path = path.trim_end_matches('\n');
        path.strip_suffix(" (deleted)").unwrap_or(path).rsplit('/').next().map(str::to_owned)
    }

    /// Its node's name below /dev, with a slash: what mount tables show as the root of a bind mount of it.
    pub fn root(&self) -> String {
        format!("/loop{}", self.number)
    }

    /// Whether the device refuses writes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_only(&self) -> Result<bool> {
        block::read_only(&self.file)
    }

    /// Makes the device refuse writes, or accept them again.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_read_only(&self, read_only: bool) -> Result<()> {
        block::set_read_only(&self.file, read_only)
    }

    /// Bytes that the device has.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn size(&self) -> Result<u64> {
        block::size(&self.file)
    }

    /// Makes the device as large as its file has become.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn take_size(&self) -> Result<()> {
        // SAFETY: takes no argument and writes no memory of ours.
        unsafe { raw::loop_set_capacity(self.file.as_raw_fd()) }
            .context(|| format!("make {} as large as its file", self.path().display()))?;
        Ok(())
    }

    /// Sets how much is read ahead.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_ahead(&self, kib: u32) -> Result<()> {
        block::set_read_ahead(&self.file, kib)
    }

    /// Brings what is in the device's own cache to its file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush(&self) -> Result<()> {
        self.file.sync_all().context(|| format!("sync {}", self.path().display()))
    }

    /// Unbinds the device and waits until it is gone. One that others have open goes when they close it.
    ///
    /// # Errors
    /// [`Error::Io`]. `Ok(false)` when it is still bound after `wait`.
    pub fn unbind(self, wait: Duration) -> Result<bool> {
        let info = status(&self.file).context(|| format!("look at {}", self.path().display()))?;
        // It would stay read-only for the next file that anyone binds to it.
        if self.read_only()? && info.is_none_or(|info| info.flags & LO_FLAGS_READ_ONLY == 0) {
            self.set_read_only(false)?;
        }
        // SAFETY: takes no argument and writes no memory of ours.
        match unsafe { raw::loop_clr_fd(self.file.as_raw_fd()) } {
            Ok(_) | Err(nix::Error::ENXIO) => {}
            Err(error) => return Err(Error::io(format!("unbind {}", self.path().display()), error)),
        }
        drop(self.file);
        match info {
            Some(info) => wait_gone(info.device, info.inode, wait),
            None => Ok(true),
        }
    }
}

/// Waits until no loop device is bound to the file. `Ok(false)` when one still is after `wait`.
///
/// # Errors
/// [`Error::Io`].
fn wait_gone(device: u64, inode: u64, wait: Duration) -> Result<bool> {
    let start = Instant::now();
    loop {
        if LoopDevice::find(device, inode)?.is_none() {
            return Ok(true);
        }
        if start.elapsed() >= wait {
            return Ok(false);
        }
        // An unbind finishes when the last user closes the device, a moment after the unmount.
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn status(file: &File) -> io::Result<Option<LoopInfo>> {
    let mut info = NO_INFO;
    // SAFETY: `info` is the struct that this request writes.
    match unsafe { raw::loop_get_status64(file.as_raw_fd(), &mut info) } {
        Ok(_) => Ok(Some(info)),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn bound() -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/sys/block").context(|| "list /sys/block")? {
        let name = entry.context(|| "list /sys/block")?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop")).and_then(|digits| digits.parse().ok());
        // The kernel shows this directory for bound devices only.
        if let Some(number) = number.filter(|&number| sysfs(number).exists()) {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

/// Opens a device that was bound a moment ago. `None` when it no longer is.
fn open_bound(number: u32) -> Result<Option<File>> {
    let start = Instant::now();
    loop {
        match open(number, false) {
            Ok(file) => return Ok(Some(file)),
            Err(_) if !sysfs(number).exists() => return Ok(None),
            // It is being unbound: the kernel refuses to open it until that is over, and only then is its file free.
            Err(Error::Io { source, .. })
                if source.raw_os_error() == Some(libc::ENXIO) && start.elapsed() < UNBINDING =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error),
        }
    }
}

fn sysfs(number: u32) -> PathBuf {
    format!("/sys/block/loop{number}/loop").into()
}

fn path(number: u32) -> PathBuf {
    format!("/dev/loop{number}").into()
}

fn open(number: u32, write: bool) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path(number)).context(|| format!("open {}", path(number).display()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_kernels_size() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
