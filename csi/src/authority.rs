//! A filter in front of the HTTP/2 server, for callers that name the socket's path as the `:authority` of a request.
//!
//! The kubelet's plugin watcher does (and `grpcurl`); the `h2` crate answers PROTOCOL_ERROR, since a path is no authority. Nothing
//! here uses the authority, so the filter puts a short valid one in its place. To find it in a HEADERS frame, lengths have to
//! be read, but nothing decompressed. A replacement enters the receiver's compression table in the original's place and is never longer,
//! so the receiver keeps every entry that the sender still counts on.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

/// What a client sends before the first frame.
const PREFACE: usize = 24;
/// Length (3 bytes), type, flags, stream.
const FRAME_HEADER: usize = 9;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
/// The largest frame that the server takes; what is larger passes as it is, for the server to refuse.
const MAX_FRAME: usize = 16_384;
/// `:authority` in the static table.
const AUTHORITY: usize = 1;
const REPLACEMENT: &[u8] = b"x";

/// Rewrites a client's bytes as they come.
#[derive(Debug)]
struct Rewriter {
    state: State,
    /// The frame header, or the whole HEADERS frame, that is not complete yet.
    partial: Vec<u8>,
    out: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// This many bytes pass as they are.
    Pass(usize),
    Header,
    /// A HEADERS frame of this length in all.
    Headers(usize),
}

impl Rewriter {
    fn new() -> Self {
        Self { state: State::Pass(PREFACE), partial: Vec::new(), out: Vec::new() }
    }

    fn push(&mut self, mut input: &[u8]) {
        while !input.is_empty() {
            match self.state {
                State::Pass(left) => {
                    let (now, rest) = input.split_at(left.min(input.len()));
                    self.out.extend_from_slice(now);
                    input = rest;
                    self.state = if now.len() == left { State::Header } else { State::Pass(left - now.len()) };
                }
                State::Header | State::Headers(_) => {
                    let want = if let State::Headers(all) = self.state { all } else { FRAME_HEADER };
                    let (now, rest) = input.split_at((want - self.partial.len()).min(input.len()));
                    self.partial.extend_from_slice(now);
                    input = rest;
                    if self.partial.len() == want {
                        self.complete();
                    }
                }
            }
        }
    }

    /// A frame's header, or a whole HEADERS frame, is there.
    fn complete(&mut self) {
        let length = u32::from_be_bytes([0, self.partial[0], self.partial[1], self.partial[2]]) as usize;
        if matches!(self.state, State::Header) {
            if self.partial[3] == HEADERS && (1..=MAX_FRAME).contains(&length) {
                self.state = State::Headers(FRAME_HEADER + length);
                return;
            }
            self.state = if length == 0 { State::Header } else { State::Pass(length) };
        } else {
            if let Some(range) = authority(&self.partial) {
                self.partial.splice(range, std::iter::once(REPLACEMENT.len() as u8).chain(REPLACEMENT.iter().copied()));
                let length = (self.partial.len() - FRAME_HEADER) as u32;
                self.partial[..3].copy_from_slice(&length.to_be_bytes()[1..]);
            }
            self.state = State::Header;
        }
        self.out.append(&mut self.partial);
    }
}

/// Where in a HEADERS frame the authority's value stands, its length included. `None` when there is none to replace.
fn authority(frame: &[u8]) -> Option<std::ops::Range<usize>> {
    let (flags, mut at, mut end) = (frame[4], FRAME_HEADER, frame.len());
    if flags & PADDED != 0 {
        end = end.checked_sub(usize::from(*frame.get(at)?))?;
        at += 1;
    }
    if flags & PRIORITY != 0 {
        at += 5;
    }
    let block = frame.get(..end)?;
    while at < end {
        let first = *block.get(at)?;
        // RFC 7541, section 6: what a field begins with says how it goes on.
        let prefix = match first {
            0x80.. => {
                (_, at) = integer(block, at, 7)?;
                continue;
            }
            0x40..0x80 => 6,
            0x20..0x40 => {
                (_, at) = integer(block, at, 5)?;
                continue;
            }
            _ => 4,
        };
        let (name, value) = integer(block, at, prefix)?;
        let value = if name == 0 { string(block, value)? } else { value };
        at = string(block, value)?;
        // One that is empty is left alone: a replacement would be longer.
        if name == AUTHORITY && block[value] & 0x7f != 0 {
            return Some(value..at);
        }
    }
    None
}

/// Reads an integer whose first `bits` bits are the low ones of the byte at `at`; returns it and what follows.
fn integer(block: &[u8], mut at: usize, bits: u32) -> Option<(usize, usize)> {
    let mask = (1usize << bits) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    at += 1;
    if value < mask {
        return Some((value, at));
    }
    for shift in [0, 7, 14, 21] {
        let byte = usize::from(*block.get(at)?);
        at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

/// The end of the string that begins at `at`.
fn string(block: &[u8], at: usize) -> Option<usize> {
    let (length, start) = integer(block, at, 7)?;
    start.checked_add(length).filter(|&end| end <= block.len())
}

/// A connection with the filter in front.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    rewriter: Rewriter,
    given: usize,
}

impl Connection {
    /// Puts the filter in front of an accepted connection.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, rewriter: Rewriter::new(), given: 0 }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let this = &mut *self;
        while this.given == this.rewriter.out.len() {
            this.rewriter.out.clear();
            this.given = 0;
            let mut bytes = [0; 4096];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.rewriter.push(read.filled());
        }
        let left = &this.rewriter.out[this.given..];
        let now = left.len().min(buf.remaining());
        buf.put_slice(&left[..now]);
        this.given += now;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = payload.len() as u32;
        [&length.to_be_bytes()[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
    }

    fn literal(first: u8, value: &str) -> Vec<u8> {
        [&[first, value.len() as u8], value.as_bytes()].concat()
    }

    /// POST, http, path and authority as grpc-go writes them, trailers and content type.
    fn request(path: &str, authority: &str) -> Vec<u8> {
        [
            vec![0x83, 0x86],
            literal(0x44, path),
            literal(0x41, authority),
            literal(0x5f, "application/grpc"),
            [&[0x40, 2][..], b"te", &[8], b"trailers"].concat(),
        ]
        .concat()
    }

    fn stream(requests: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, 0, &[]));
        for (number, block) in requests.iter().enumerate() {
            bytes.extend(frame(HEADERS, 4, number as u8 * 2 + 1, block));
            bytes.extend(frame(0, 1, number as u8 * 2 + 1, &[0; 5]));
        }
        bytes
    }

    #[test]
    fn the_authority_is_replaced_and_nothing_else() {
        let mut rewriter = Rewriter::new();
        rewriter.push(&stream(&[request("/a/b", "/var/lib/kubelet/x.sock"), request("/a/c", "y")]));
        assert_eq!(rewriter.out, stream(&[request("/a/b", "x"), request("/a/c", "x")]));
    }

    #[test]
    fn padding_and_priority_are_minded() {
        let block = request("/a/b", "/socket");
        let payload = [&[3, 0, 0, 0, 0, 16][..], &block, &[0; 3]].concat();
        let whole = frame(HEADERS, 4 | PADDED | PRIORITY, 1, &payload);
        let range = authority(&whole).unwrap();
        assert_eq!(&whole[range], b"\x07/socket");
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_come_out_the_same(size in 1usize..64) {
            let input = stream(&[request("/a/b", "/var/lib/kubelet/x.sock"), request("/a/c", "localhost")]);
            let mut rewriter = Rewriter::new();
            input.chunks(size).for_each(|piece| rewriter.push(piece));
            prop_assert_eq!(rewriter.out, stream(&[request("/a/b", "x"), request("/a/c", "x")]));
        }

        #[test]
        fn no_input_makes_it_fail(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut rewriter = Rewriter::new();
            rewriter.push(&[0; PREFACE]);
            rewriter.push(&frame(HEADERS, *bytes.first().unwrap_or(&4), 1, &bytes));
            rewriter.push(&bytes);
        }
    }

    /// The bytes of a caller that names the socket's path, against the real server.
    #[tokio::test]
    async fn the_kubelet_is_answered() {
        use crate::registration::registration_server::RegistrationServer;
        use crate::service::RegistrationService;
        use tokio::io::{AsyncReadExt, AsyncWriteExt};

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reg.sock");
        let mut socket = crate::server::Socket::listen(&path).unwrap();
        let service = RegistrationServer::new(RegistrationService { endpoint: "/csi.sock".into() });
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(socket.incoming()));
        let mut client = UnixStream::connect(&path).await.unwrap();
        let block = request("/pluginregistration.Registration/GetInfo", "%2Fvar%2Flib/kubelet/plugins_registry/x.sock");
        client.write_all(&stream(&[block])).await.unwrap();
        let mut answer = Vec::new();
        let named = |answer: &[u8]| answer.windows(21).any(|window| window == b"local.csi.keelway.dev");
        while !named(&answer) {
            let mut bytes = [0; 4096];
            let read = tokio::time::timeout(std::time::Duration::from_secs(60), client.read(&mut bytes));
            let length = read.await.expect("an answer in 60 s").unwrap();
            assert_ne!(length, 0, "the server hung up: {answer:?}");
            answer.extend_from_slice(&bytes[..length]);
        }
    }
}
