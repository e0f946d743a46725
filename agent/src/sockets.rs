//! The host's own sockets that were connected to a backend which is gone. Pods' sockets need none of this: what they dial is
//! translated with every packet where it matters (`ebpf/programs/src/sock.rs`).
//!
//! A connected datagram socket would go on sending to the old backend, and notice nothing: it is ended, and its program dials again.
//! A connection to a pod that no longer exists has nobody to say so: it is ended too, which an NFS mount (a socket of the kernel)
//! answers by dialling the Service anew. Unconnected sockets are left alone.
//!
//! Both wait a little: an answer that is on its way when the backend leaves is still to be read, and a backend that comes back at once
//! loses nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use keelway_maps::SocketTables;
use keelway_netlink::sockets;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// IANA numbers.
const TCP: u8 = 6;
const UDP: u8 = 17;
/// When a connection's backend is looked at again: the Pod's end may be known a little after its endpoint's.
const LOOKS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(30)];

/// How long a connected datagram socket may still hear from a backend that left.
pub const LINGER: Duration = Duration::from_millis(500);

/// What happened to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It takes nothing new.
    Gone(Gone),
    /// One that went within [`LINGER`] takes new ones again, as this protocol's number has it.
    Back(SocketAddr, u8),
}

/// A backend that takes nothing new.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gone {
    /// Where it was.
    pub backend: SocketAddr,
    /// IANA protocol number.
    pub proto: u8,
    /// It still ends what it has: datagrams are to go elsewhere, connections stay.
    pub draining: bool,
}

/// Ends such sockets until the agent ends.
pub async fn run(mut news: mpsc::UnboundedReceiver<News>, tables: SocketTables) {
    let tables = std::sync::Arc::new(tables);
    let (mut batch, mut leaving) = (Vec::new(), BTreeMap::new());
    loop {
        let due = leaving.values().min().copied();
        tokio::select! {
            count = news.recv_many(&mut batch, 4096) => {
                if count == 0 {
                    return;
                }
                let connections = sort(batch.drain(..), &mut leaving, Instant::now() + LINGER);
                if !connections.is_empty() {
                    tokio::spawn(end_connections(connections, tables.clone()));
                }
            }
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                let now = Instant::now();
                let (gone, left): (BTreeMap<_, _>, _) = leaving.into_iter().partition(|(_, due)| *due <= now);
                leaving = left;
                end(UDP, gone.into_keys().collect(), &tables).await;
            }
        }
    }
}

/// Notes the datagram backends that are leaving, and when their sockets end; the other ones that are gone.
fn sort(
    news: impl Iterator<Item = News>,
    leaving: &mut BTreeMap<SocketAddr, Instant>,
    due: Instant,
) -> BTreeSet<SocketAddr> {
    let mut connections = BTreeSet::new();
    for one in news {
        match one {
            News::Gone(gone) if gone.proto == UDP => _ = leaving.entry(gone.backend).or_insert(due),
            News::Gone(gone) if gone.proto == TCP && !gone.draining => _ = connections.insert(gone.backend),
            News::Back(backend, UDP) => _ = leaving.remove(&backend),
            _ => {}
        }
    }
    connections
}

/// Connections end once their pod is known to be no more. A pod that only left the Service keeps them.
async fn end_connections(mut backends: BTreeSet<SocketAddr>, tables: std::sync::Arc<SocketTables>) {
    for wait in LOOKS {
        tokio::time::sleep(wait).await;
        let (dead, left): (BTreeSet<_>, BTreeSet<_>) =
            backends.into_iter().partition(|backend| tables.is_no_pod(backend.ip()).unwrap_or(false));
        if !dead.is_empty() {
            end(TCP, dead, &tables).await;
        }
        backends = left;
        if backends.is_empty() {
            return;
        }
    }
}

async fn end(proto: u8, backends: BTreeSet<SocketAddr>, tables: &std::sync::Arc<SocketTables>) {
    let tables = tables.clone();
    let done = tokio::task::spawn_blocking(move || {
        for found in sockets::connected_to(proto, &backends)? {
            // Whoever dialled the backend itself is not ours to judge.
            if tables.was_given(found.cookie, found.peer, proto).unwrap_or(false) && sockets::destroy(&found)? {
                tracing::info!(backend = %found.peer, proto, "ended a socket of this host: its Service's backend is gone");
            }
        }
        Ok::<_, keelway_netlink::Error>(())
    });
    if let Ok(Err(error)) = done.await {
        tracing::warn!(%error, "sockets of this host may stay with a backend that is gone");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_back_in_time_loses_no_socket() {
        let at = |last: u8| SocketAddr::from(([10, 244, 0, last], 53));
        let gone = |last, proto, draining| News::Gone(Gone { backend: at(last), proto, draining });
        let (mut leaving, now) = (BTreeMap::new(), Instant::now());
        let news =
            [gone(1, UDP, true), gone(2, UDP, false), gone(3, TCP, false), gone(4, TCP, true), gone(5, UDP, true)];
        assert_eq!(sort(news.into_iter(), &mut leaving, now), BTreeSet::from([at(3)]));
        // Two that were leaving: one is back, the other goes altogether and gets no more time for it.
        let news = [News::Back(at(1), UDP), gone(5, UDP, false), News::Back(at(2), TCP)];
        let later = now + Duration::from_secs(1);
        assert!(sort(news.into_iter(), &mut leaving, later).is_empty());
        assert_eq!(leaving, BTreeMap::from([(at(2), now), (at(5), now)]));
    }
}
