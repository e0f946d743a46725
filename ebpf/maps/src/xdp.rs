//! The hook of the node's devices before the kernel's stack (XDP). A device runs one such program: where another's is, it stays,
//! and packets take tc's hook as they do without.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use aya::programs::links::FdLink;
use aya::programs::{ProgramError, Xdp};
use aya::sys::SyscallError;
use keelway_layout::Hook;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

use crate::attach::{Mechanism, failed, living, loaded_program, with_cause};
use crate::error::Error;
use crate::loader::Datapath;
use crate::sys::{LinkTarget, detach_pinned_link};

/// Who runs the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum XdpMode {
    /// The device's driver, before there is a socket buffer.
    Native,
    /// The kernel, for any device.
    Generic,
}

impl XdpMode {
    const ALL: [Self; 2] = [Self::Native, Self::Generic];

    const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
    const fn mechanism(self) -> Mechanism {
        match self {
            Self::Native => Mechanism::XdpNative,
            Self::Generic => Mechanism::XdpGeneric,
        }
    }
    const fn flags(self) -> aya::programs::XdpMode {
        match self {
            Self::Native => aya::programs::XdpMode::Driver,
            Self::Generic => aya::programs::XdpMode::Skb,
        }
    }
}

const ENTRY: &str = "node_xdp";

/// The kernel does not tell a link's mode: the pin's name does.
pub fn pin(links: &Path, device: &str, mode: XdpMode) -> PathBuf {
    links.join(format!("xdp-{}-{device}", mode.name()))
}

impl Datapath {
    /// Brings the XDP hooks to what is wanted: of each device the first of its modes that the kernel takes, of all other
    /// devices none. What is attached in one of them stays. That a device takes none is no error but a problem, shown by
    /// [`Self::others`].
    ///
    /// # Errors
    /// Of the file system, or that the kernel does not know the program.
    pub fn attach_xdp(&mut self, wanted: &BTreeMap<String, Vec<XdpMode>>) -> Result<(), Error> {
        let links = self.attachments.pins().links();
        self.detach_xdp_but(wanted, &links)?;
        let mut problems = Vec::new();
        for (device, modes) in wanted {
            let index = nix::net::if_::if_nametoindex(device.as_str()).map_err(|e| failed(Hook::NodeXdp, device, e))?;
            let target = LinkTarget::Device(index);
            let held = modes.iter().copied().find(|mode| living(&pin(&links, device, *mode), target).is_some());
            let mut refusals = Vec::new();
            let attached = held.or_else(|| {
                modes.iter().copied().find(|mode| match self.attach_one(device, index, *mode, &links) {
                    Ok(()) => true,
                    Err(refusal) => {
                        refusals.push(format!("{}: {refusal}", mode.name()));
                        false
                    }
                })
            });
            match attached.and_then(|mode| Some((mode, living(&pin(&links, device, mode), target)?))) {
                Some((mode, (link, program))) => {
                    self.remember(Hook::NodeXdp, device, mode.mechanism(), link, program);
                }
                None => problems.extend(
                    (!modes.is_empty()).then(|| format!("{device}: no XDP, all goes by tc: {}", refusals.join("; "))),
                ),
            }
        }
        self.attachments.problems = problems;
        Ok(())
    }

    fn attach_one(&mut self, device: &str, index: u32, mode: XdpMode, links: &Path) -> Result<(), String> {
        if let Some(id) = program_of(index).map_err(|error| error.to_string())? {
            let name = loaded_program(id).unwrap_or_else(|| "?".to_owned());
            return Err(format!("program {name:?} (id {id}) is another's, and is left alone"));
        }
        let program = self.xdp_program(ENTRY).map_err(|error| error.to_string())?;
        let link = program.attach_to_if_index(index, mode.flags()).map_err(|error| refusal(&error))?;
        let link = program.take_link(link).map_err(|error| with_cause(&error))?;
        let link = FdLink::try_from(link).map_err(|error| with_cause(&error))?;
        let path = pin(links, device, mode);
        // One whose device is gone.
        let _ = std::fs::remove_file(&path);
        link.pin(path).map(drop).map_err(|error| with_cause(&error))
    }

    /// Detaches what is not wanted, at once: it would be in the way of what is.
    fn detach_xdp_but(&mut self, wanted: &BTreeMap<String, Vec<XdpMode>>, links: &Path) -> Result<(), Error> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { path, source }
        };
        for entry in std::fs::read_dir(links).map_err(io(links))? {
            let entry = entry.map_err(io(links))?;
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_prefix("xdp-")) else { continue };
            let is_wanted = XdpMode::ALL.into_iter().any(|mode| {
                let device = name.strip_prefix(mode.name()).and_then(|rest| rest.strip_prefix('-'));
                device.and_then(|device| wanted.get(device)).is_some_and(|modes| modes.contains(&mode))
            });
            if !is_wanted {
                // Of a device that is gone there is nothing to detach.
                let _ = detach_pinned_link(&entry.path());
                std::fs::remove_file(entry.path()).map_err(io(&entry.path()))?;
            }
        }
        self.forget(Hook::NodeXdp);
        Ok(())
    }

    fn xdp_program(&mut self, name: &str) -> Result<&mut Xdp, Error> {
        let refused = |reason: String| Error::Refused { what: format!("program {name}"), reason };
        let program = self.ebpf.program_mut(name).ok_or_else(|| refused("not in the object".into()))?;
        program.try_into().map_err(|error: ProgramError| refused(error.to_string()))
    }
}

/// In the kernel's word, but for the one that says nothing.
fn refusal(error: &ProgramError) -> String {
    match error {
        ProgramError::SyscallError(SyscallError { io_error, .. })
            if io_error.raw_os_error() == Some(libc::EOPNOTSUPP) =>
        {
            "the device's driver has no XDP".to_owned()
        }
        other => with_cause(other),
    }
}

/// The XDP program of a device, whoever attached it (`RTM_GETLINK`, rtnetlink(7); `IFLA_XDP` of include/uapi/linux/if_link.h).
fn program_of(index: u32) -> io::Result<Option<u32>> {
    const RTM_GETLINK: u16 = 18;
    const NLM_F_REQUEST: u16 = 1;
    const NLMSG_ERROR: u16 = 2;
    /// `nlmsghdr` and `ifinfomsg`.
    const HEADERS: usize = 16 + 16;
    const IFLA_XDP: u16 = 43;
    const IFLA_XDP_PROG_ID: u16 = 4;
    let mut request = Vec::with_capacity(HEADERS);
    request.extend((HEADERS as u32).to_ne_bytes());
    request.extend(RTM_GETLINK.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 8 + 4]);
    request.extend(index.to_ne_bytes());
    request.extend([0; 8]);
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut buffer = vec![0; 32768];
    let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    let message = &buffer[..length];
    if message.len() < HEADERS || u16::from_ne_bytes([message[4], message[5]]) == NLMSG_ERROR {
        return Err(io::Error::other("the kernel does not tell about the device"));
    }
    let id = attribute(&message[HEADERS..], IFLA_XDP).and_then(|xdp| attribute(xdp, IFLA_XDP_PROG_ID));
    Ok(id.and_then(|id| Some(u32::from_ne_bytes(id.get(..4)?.try_into().ok()?))).filter(|id| *id != 0))
}

/// What an attribute among these holds (netlink(7)).
fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    const TYPE: u16 = 0x3fff;
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]])).clamp(4, rest.len());
        if u16::from_ne_bytes([rest[2], rest[3]]) & TYPE == wanted {
            return Some(&rest[4..length]);
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    None
}
