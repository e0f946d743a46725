//! The agent's local gRPC API (`<run-dir>/agent.sock`): messages, client and server, and the way to dial it.
//!
//! `keelway-cni` and `keelway` are its clients, `keelway-agent` its server. It is a crate of its own, beside the house of
//! the design, because two clients and a server share it and none of them may depend on another.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::{Channel, Endpoint, Uri};

/// Generated messages, clients and servers of `keelway.v1`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("keelway.v1");
}

/// gRPC metadata key under which the agent hands keelway-cni the CNI error code (decimal).
pub const CNI_CODE: &str = "keelway-cni-code";

/// Where the agent listens unless `--run-dir` says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/keelway/agent.sock";

/// Dials the agent at `socket`; fails at once when nothing listens there.
///
/// # Errors
/// The transport's, when the socket does not exist or refuses.
pub async fn connect(socket: &Path, timeout: Duration) -> Result<Channel, tonic::transport::Error> {
    let path: PathBuf = socket.to_owned();
    // The URI is not used to dial; it becomes the :authority, which h2 wants to be a valid name.
    Endpoint::from_static("http://localhost")
        .connect_timeout(timeout)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        }))
        .await
}
