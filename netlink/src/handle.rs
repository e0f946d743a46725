//! A netlink socket in one namespace, and the two shapes of request: one that is acknowledged, one that lists.

use std::sync::Arc;

use futures::StreamExt as _;
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::AsyncSocket as _;
use tokio::task::JoinHandle;

use crate::{Error, Netns, Result};

/// How often a listing is repeated when the kernel says that it changed underway.
const DUMP_TRIES: u32 = 10;
/// `NLM_F_DUMP_INTR`: the listing is not one consistent view.
const DUMP_INTERRUPTED: u16 = 0x10;
/// Length of the request's header that the kernel echoes before its attributes.
const NLMSGHDR_LEN: usize = 16;
/// `NLMSGERR_ATTR_MSG`: the extended acknowledgement's text.
const ATTR_MSG: u16 = 1;

/// An open rtnetlink socket. Cheap to clone; the socket closes with the last clone.
#[derive(Clone, Debug)]
pub struct Handle {
    requests: rtnetlink::Handle,
    _task: Arc<Task>,
}

#[derive(Debug)]
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Handle {
    /// Opens a socket in the network namespace of the calling thread. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Io`] when no socket can be had.
    pub fn open() -> Result<Self> {
        let io = |source| Error::io("open a netlink socket", source);
        let (mut connection, requests, _) = rtnetlink::new_connection_with_strict_check().map_err(io)?;
        // Without these an acknowledgement and a dead socket would look alike.
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        let socket = connection.socket_mut().socket_mut();
        socket.set_ext_ack(true).map_err(io)?;
        socket.set_cap_ack(true).map_err(io)?;
        Ok(Self { requests, _task: Arc::new(Task(tokio::spawn(connection))) })
    }

    /// Opens a socket in `netns`.
    ///
    /// # Errors
    /// [`Error::Privilege`] without CAP_SYS_ADMIN, [`Error::Io`] when no socket can be had.
    pub async fn open_in(netns: &Netns) -> Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        netns
            .run(move || {
                let _entered = runtime.enter();
                Self::open()
            })
            .await
    }

    /// Sends a request and waits for its acknowledgement.
    pub(crate) async fn execute(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        what: impl Fn() -> String,
    ) -> Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.requests.clone().request(request).map_err(|_| broken(&what))?;
        match answers.next().await.ok_or_else(|| broken(&what))?.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => {
                Err(refused(error.raw_code(), &error.header, what()))
            }
            _ => Ok(()),
        }
    }

    /// Sends a request that the kernel answers with one object; `None` when it does not exist.
    pub(crate) async fn get_one(
        &self,
        message: RouteNetlinkMessage,
        what: impl Fn() -> String,
    ) -> Result<Option<RouteNetlinkMessage>> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST;
        let mut answers = self.requests.clone().request(request).map_err(|_| broken(&what))?;
        match answers.next().await.ok_or_else(|| broken(&what))?.payload {
            NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
            NetlinkPayload::Error(error) => match refused(error.raw_code(), &error.header, what()) {
                refusal if refusal.is_absent() => Ok(None),
                refusal => Err(refusal),
            },
            other => Err(Error::Broken { what: what(), reason: format!("unexpected answer {other:?}") }),
        }
    }

    /// Lists; `pick` keeps and converts what is wanted. Repeats a listing that changed underway.
    pub(crate) async fn list<T>(
        &self,
        message: RouteNetlinkMessage,
        what: impl Fn() -> String,
        mut pick: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let mut request = NetlinkMessage::from(message.clone());
            request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
            let mut answers = self.requests.clone().request(request).map_err(|_| broken(&what))?;
            let (mut found, mut interrupted, mut complete) = (Vec::new(), false, false);
            while let Some(answer) = answers.next().await {
                interrupted |= answer.header.flags & DUMP_INTERRUPTED != 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.extend(pick(message)),
                    NetlinkPayload::Done(done) if done.code == 0 => complete = true,
                    NetlinkPayload::Done(done) => return absent_is_empty(refused(done.code, &[], what())),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return absent_is_empty(refused(error.raw_code(), &error.header, what()));
                    }
                    _ => {}
                }
            }
            match (complete, interrupted) {
                (true, false) => return Ok(found),
                (true, true) => {}
                (false, _) => return Err(broken(&what)),
            }
        }
        Err(Error::Broken { what: what(), reason: format!("changed under each of {DUMP_TRIES} listings") })
    }
}

fn broken(what: &impl Fn() -> String) -> Error {
    Error::Broken { what: what(), reason: "the netlink socket closed".into() }
}

/// `code` is a negative errno, `payload` what follows it in the message.
fn refused(code: i32, payload: &[u8], what: String) -> Error {
    match Errno::from_raw(code.abs()) {
        Errno::EPERM => Error::Privilege { what },
        errno => Error::Kernel { what, errno, note: note(payload) },
    }
}

/// Listing what is on a device that is gone: nothing is the right answer.
fn absent_is_empty<T>(refusal: Error) -> Result<Vec<T>> {
    if refusal.is_absent() { Ok(Vec::new()) } else { Err(refusal) }
}

/// The text of the extended acknowledgement that follows the echoed header (native byte order, padded to 4).
fn note(payload: &[u8]) -> Option<String> {
    let mut rest = payload.get(NLMSGHDR_LEN..)?;
    while let [l0, l1, t0, t1, ..] = *rest {
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = rest.get(4..len)?;
        if u16::from_ne_bytes([t0, t1]) & 0x3fff == ATTR_MSG {
            return Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::note;

    #[test]
    fn reads_the_extended_acknowledgement_and_survives_garbage() {
        let mut payload = vec![0; 16];
        payload.extend([8, 0, 2, 0, 9, 9, 9, 9]);
        payload.extend([9, 0, 1, 0, b'n', b'o', b'p', b'e', 0, 0, 0, 0]);
        assert_eq!(note(&payload).as_deref(), Some("nope"));
        assert_eq!(note(&payload[..20]), None);
        assert_eq!(note(&[0; 16]), None);
        assert_eq!(note(&[0; 24]), None);
    }
}
