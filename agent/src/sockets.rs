//! The host's own sockets that were connected to a backend which is gone. Pods' sockets need none of this: what they dial is
//! translated with every packet where it matters (`ebpf/programs/src/sock.rs`).
//!
//! A connected datagram socket would go on sending to the old backend, and notice nothing: it is ended, and its program dials again.
//! A connection to a pod that no longer exists has nobody to say so: it is ended too, which an NFS mount (a socket of the kernel)
//! answers by dialling the Service anew. Unconnected sockets are left alone.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use keelway_maps::SocketTables;
use keelway_netlink::sockets;
use tokio::sync::mpsc;

/// IANA numbers.
const TCP: u8 = 6;
const UDP: u8 = 17;
/// When a connection's backend is looked at again: the Pod's end may be known a little after its endpoint's.
const LOOKS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(30)];

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
pub async fn run(mut gone: mpsc::UnboundedReceiver<Gone>, tables: SocketTables) {
    let tables = std::sync::Arc::new(tables);
    let mut batch = Vec::new();
    while gone.recv_many(&mut batch, 4096).await > 0 {
        let datagrams: BTreeSet<_> = batch.iter().filter(|one| one.proto == UDP).map(|one| one.backend).collect();
        let connections: BTreeSet<_> =
            batch.drain(..).filter(|one| one.proto == TCP && !one.draining).map(|one| one.backend).collect();
        if !datagrams.is_empty() {
            end(UDP, datagrams, &tables).await;
        }
        if !connections.is_empty() {
            tokio::spawn(end_connections(connections, tables.clone()));
        }
    }
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
