//! nfnetlink, and generic netlink for IPVS, as far as the agent needs them: what a kube-proxy left in the kernel is seen and
//! removed without its tools.
//!
//! Messages: `<linux/netlink.h>`, `<linux/netfilter/nfnetlink.h>`, `<linux/genetlink.h>`. Everything is of the network namespace of the thread that asks.

pub mod conntrack;
pub mod ipset;
pub mod ipvs;
mod message;
pub mod nft;

use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use message::{Attributes, Request};

/// IPv4 in nfnetlink's own header.
pub const IPV4: u8 = 2;
/// IPv6.
pub const IPV6: u8 = 10;

const FLAG_REQUEST: u16 = 1;
const FLAG_ACK: u16 = 4;
const FLAG_DUMP: u16 = 0x300;
const FLAG_CREATE: u16 = 0x400;
/// Set by the kernel: what is dumped changed meanwhile.
const FLAG_DUMP_INTERRUPTED: u16 = 0x10;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// A dump that changes under our eyes is tried so often.
const DUMPS: u32 = 5;

/// What the kernel said no to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {errno}")]
pub struct Refused {
    what: &'static str,
    /// Why.
    pub errno: Errno,
}

impl Refused {
    /// The kernel has nothing of this kind: no such module, no such object.
    pub fn is_absent(&self) -> bool {
        matches!(
            self.errno,
            Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT | Errno::EINVAL
        )
    }
}

struct Socket(OwnedFd);

impl Socket {
    fn open(protocol: SockProtocol) -> Result<Self, Refused> {
        let open = || -> nix::Result<Self> {
            let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(10))?;
            // Batches are one message to the kernel. Without the right to larger buffers the usual ones have to do.
            let _ = setsockopt(&socket, sockopt::SndBufForce, &(4 << 20));
            let _ = setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20));
            Ok(Self(socket))
        };
        open().map_err(|errno| Refused { what: "netlink", errno })
    }

    fn send(&self, bytes: &[u8]) -> nix::Result<()> {
        sendto(self.0.as_raw_fd(), bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty()).map(drop)
    }

    /// Reads messages until `each` says that it has seen the last one.
    fn read(&self, mut each: impl FnMut(message::Message<'_>) -> nix::Result<bool>) -> nix::Result<()> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some((message, after)) = message::first(rest) {
                if each(message)? {
                    return Ok(());
                }
                rest = after;
            }
        }
    }
}

/// Everything of one kind: `kind` asks, what comes of type `wanted` is `read`.
fn dump<T>(
    what: &'static str,
    request: Request,
    wanted: u16,
    read: impl Fn(u8, Attributes<'_>) -> Option<T>,
) -> Result<Vec<T>, Refused> {
    let bytes = request.to_bytes(FLAG_REQUEST | FLAG_DUMP, 1);
    let mut last = Errno::EINTR;
    for _ in 0..DUMPS {
        let socket = Socket::open(request.protocol)?;
        let (mut found, mut interrupted) = (Vec::new(), false);
        let done = socket.send(&bytes).and_then(|()| {
            socket.read(|message| {
                interrupted |= message.flags & FLAG_DUMP_INTERRUPTED != 0;
                match message.kind {
                    DONE => return Ok(true),
                    ERROR => message.error()?,
                    kind if kind == wanted => found.extend(read(message.family, message.attributes())),
                    _ => {}
                }
                Ok(false)
            })
        });
        match done {
            Ok(()) if !interrupted => return Ok(found),
            Ok(()) => {}
            Err(errno @ (Errno::EINTR | Errno::EBUSY)) => last = errno,
            Err(errno) => return Err(Refused { what, errno }),
        }
    }
    Err(Refused { what, errno: last })
}

/// The one object that `request` is answered with.
fn get<T>(
    what: &'static str,
    request: &Request,
    read: impl Fn(Attributes<'_>) -> Option<T>,
) -> Result<Option<T>, Refused> {
    let socket = Socket::open(request.protocol)?;
    let mut found = None;
    let done = socket.send(&request.to_bytes(FLAG_REQUEST, 1)).and_then(|()| {
        socket.read(|message| {
            if message.kind == ERROR {
                message.error()?;
            }
            found = read(message.attributes());
            Ok(true)
        })
    });
    done.map(|()| found).map_err(|errno| Refused { what, errno })
}

/// One change, done when this returns.
fn change(what: &'static str, request: Request, flags: u16) -> Result<(), Refused> {
    let socket = Socket::open(request.protocol)?;
    let bytes = request.to_bytes(FLAG_REQUEST | FLAG_ACK | flags, 1);
    let done = socket.send(&bytes).and_then(|()| {
        socket.read(|message| match message.kind {
            ERROR => message.error().map(|()| true),
            _ => Ok(false),
        })
    });
    done.map_err(|errno| Refused { what, errno })
}

/// Changes of one subsystem that are made all or none.
fn batch(what: &'static str, subsystem: u16, requests: &[(Request, u16)]) -> Result<(), Refused> {
    let Some(last) = requests.len().checked_sub(1) else { return Ok(()) };
    let mut bytes = Request::bare(BATCH_BEGIN, subsystem).to_bytes(FLAG_REQUEST, 0);
    for (index, (request, flags)) in requests.iter().enumerate() {
        // One answer is enough; those that fail are answered in any case.
        let ack = if index == last { FLAG_ACK } else { 0 };
        bytes.extend(request.to_bytes(FLAG_REQUEST | flags | ack, index as u32 + 1));
    }
    bytes.extend(Request::bare(BATCH_END, subsystem).to_bytes(FLAG_REQUEST, 0));
    let socket = Socket::open(SockProtocol::NetlinkNetFilter)?;
    let done = socket.send(&bytes).and_then(|()| {
        socket.read(|message| match message.kind {
            ERROR => message.error().map(|()| true),
            _ => Ok(false),
        })
    });
    done.map_err(|errno| Refused { what, errno })
}
