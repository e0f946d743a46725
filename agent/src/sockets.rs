//! The host's own sockets that were connected to a backend which is gone. Pods' sockets need none of this: what they dial is
//! translated with every packet where it matters (`ebpf/programs/src/sock.rs`).
//!
//! A connected datagram socket would go on sending to the old backend, and notice nothing: it is ended, and its program dials again.
//! A connection to a pod that no longer exists has nobody to say so: it is ended too, which an NFS mount (a socket of the kernel)
//! answers by dialling the Service anew. Unconnected sockets are left alone.
//!
//! Both wait a little, from when it last left: an answer that is on its way when the backend leaves is still to be read, and a backend
//! that comes back at once loses nobody, whether it stays then or not.

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

/// A backend that a Service does without from now on, or that is gone from all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gone {
    /// Where it was.
    pub backend: SocketAddr,
    /// IANA protocol number.
    pub proto: u8,
    /// The number that it has in the tables.
    pub id: u32,
}

/// Ends such sockets until the agent ends.
pub async fn run(mut gone: mpsc::UnboundedReceiver<Gone>, tables: SocketTables) {
    let tables = std::sync::Arc::new(tables);
    let (mut batch, mut leaving) = (Vec::new(), BTreeMap::new());
    loop {
        let due = leaving.values().min().copied();
        tokio::select! {
            count = gone.recv_many(&mut batch, 4096) => {
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
fn sort(gone: impl Iterator<Item = Gone>, leaving: &mut BTreeMap<Gone, Instant>, due: Instant) -> BTreeSet<Gone> {
    let mut connections = BTreeSet::new();
    for one in gone {
        match one.proto {
            UDP => {
                // It was back meanwhile, perhaps under another number: who dialled it then has as long, too.
                let same = Gone { id: 0, ..one }..=Gone { id: u32::MAX, ..one };
                leaving.range_mut(same).for_each(|(_, until)| *until = due);
                leaving.insert(one, due);
            }
            TCP => _ = connections.insert(one),
            _ => {}
        }
    }
    connections
}

/// Connections end once their pod is known to be no more. A pod that only left the Service keeps them.
async fn end_connections(mut backends: BTreeSet<Gone>, tables: std::sync::Arc<SocketTables>) {
    for wait in LOOKS {
        tokio::time::sleep(wait).await;
        let (dead, left): (BTreeSet<_>, BTreeSet<_>) =
            backends.into_iter().partition(|one| tables.is_no_pod(one.backend.ip()).unwrap_or(false));
        if !dead.is_empty() {
            end(TCP, dead, &tables).await;
        }
        backends = left;
        if backends.is_empty() {
            return;
        }
    }
}

async fn end(proto: u8, gone: BTreeSet<Gone>, tables: &std::sync::Arc<SocketTables>) {
    let tables = tables.clone();
    let done = tokio::task::spawn_blocking(move || {
        for found in sockets::connected_to(proto, &gone.iter().map(|one| one.backend).collect())? {
            // Whoever dialled the backend itself is not ours to judge.
            let Ok(Some(dialled)) = tables.dialled(found.cookie, found.peer, proto) else { continue };
            // Another Service may have lost it, or it came back in time.
            let keeps = |one: &Gone| {
                one.backend == found.peer && tables.keeps(dialled, found.peer, one.id, proto).unwrap_or(true)
            };
            let is_kept = proto == UDP && gone.iter().any(keeps);
            if !is_kept && sockets::destroy(&found)? {
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
    fn a_backend_that_leaves_again_has_its_time_again() {
        let at = |last: u8| SocketAddr::from(([10, 244, 0, last], 53));
        let gone = |last, proto, id| Gone { backend: at(last), proto, id };
        let (mut leaving, now) = (BTreeMap::new(), Instant::now());
        let first = [gone(1, UDP, 7), gone(2, UDP, 8), gone(3, TCP, 9)];
        assert_eq!(sort(first.into_iter(), &mut leaving, now), BTreeSet::from([gone(3, TCP, 9)]));
        // One that was back has another number.
        let later = now + Duration::from_secs(1);
        assert!(sort([gone(1, UDP, 10), gone(4, UDP, 11)].into_iter(), &mut leaving, later).is_empty());
        let expected = [(gone(1, UDP, 7), later), (gone(1, UDP, 10), later), (gone(2, UDP, 8), now)];
        assert_eq!(leaving, BTreeMap::from_iter(expected.into_iter().chain([(gone(4, UDP, 11), later)])));
    }
}
