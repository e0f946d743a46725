//! Attaching to a device by a filter at one fixed place, which outlives the process by itself: the only way before Linux 6.6,
//! and the one for pods on every kernel.

use std::io;
use std::os::fd::AsRawFd as _;

use aya::programs::tc::{NlOptions, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

/// Ours: before the usual ones, which count down from 49152.
const PRIORITY: u16 = 75;
const HANDLE: u32 = 75;

pub fn attach(program: &mut SchedClassifier, device: &str, direction: TcAttachType) -> Result<(), ProgramError> {
    // The qdisc is there for the other direction, or is another's: it is shared.
    exists_is_fine(qdisc_add_clsact(device).map_err(ProgramError::from))?;
    let options = NlOptions { priority: PRIORITY, handle: TcHandle::from(HANDLE), ..NlOptions::default() };
    match program.attach_with_options(device, direction, TcAttachOptions::Netlink(options)) {
        // Dropping it would detach the filter, which is to stay.
        Ok(link) => {
            std::mem::forget(program.take_link(link)?);
            Ok(())
        }
        // The filter of an earlier start: it stays.
        Err(error) => exists_is_fine(Err(error)),
    }
}

fn exists_is_fine(result: Result<(), ProgramError>) -> Result<(), ProgramError> {
    match result {
        Err(ProgramError::TcError(TcError::NetlinkError(error))) if error.raw_os_error() == Some(libc::EEXIST) => {
            Ok(())
        }
        other => other,
    }
}

/// Whether our filter is at its place. A device that is gone has none.
pub fn is_attached(device: &str, direction: TcAttachType) -> bool {
    nix::net::if_::if_nametoindex(device)
        .map_err(io::Error::from)
        .and_then(|index| has_filter(index, direction))
        .unwrap_or(false)
}

/// Lists the filters of our priority (`RTM_GETTFILTER`, rtnetlink(7)) and looks for our handle among them.
fn has_filter(index: u32, direction: TcAttachType) -> io::Result<bool> {
    const RTM_NEWTFILTER: u16 = 44;
    const RTM_GETTFILTER: u16 = 46;
    const REQUEST_AND_DUMP: u16 = 0x1 | 0x300;
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    /// `nlmsghdr` and `tcmsg`.
    const HEADERS: usize = 16 + 20;
    let parent: u32 = if direction == TcAttachType::Ingress { 0xffff_fff2 } else { 0xffff_fff3 };
    let mut request = Vec::with_capacity(HEADERS);
    request.extend((HEADERS as u32).to_ne_bytes());
    request.extend(RTM_GETTFILTER.to_ne_bytes());
    request.extend(REQUEST_AND_DUMP.to_ne_bytes());
    request.extend([0; 8 + 4]);
    // Index, handle (all), parent, and the priority above the protocol (all).
    for word in [index, 0, parent, u32::from(PRIORITY) << 16] {
        request.extend(word.to_ne_bytes());
    }
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut found = false;
    let mut buffer = vec![0; 32768];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while rest.len() >= 16 {
            let word = |at: usize| rest.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
            let length = (word(0) as usize).clamp(16, rest.len());
            match u16::from_ne_bytes([rest[4], rest[5]]) {
                NLMSG_DONE | NLMSG_ERROR => return Ok(found),
                // Behind the header: family and padding, index, handle, parent, priority and protocol.
                RTM_NEWTFILTER => found |= word(16 + 8) == HANDLE && word(16 + 16) >> 16 == u32::from(PRIORITY),
                _ => {}
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
    }
}

/// Removes our filters from a device, of both directions; there may be none.
pub fn detach(device: &str) {
    for parent in ["ingress", "egress"] {
        let priority = PRIORITY.to_string();
        let _ = std::process::Command::new("tc")
            .args(["filter", "del", "dev", device, parent, "pref", &priority])
            .stderr(std::process::Stdio::null())
            .status();
    }
}
