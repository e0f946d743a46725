//! An agent that answers by the book and remembers what it was asked. It touches no kernel state.

use std::path::Path;
use std::sync::{Arc, Mutex};

use keelway_api::CNI_CODE;
use keelway_api::v1::attachments_server::{Attachments, AttachmentsServer};
use keelway_api::v1::{
    AddRequest, Attachment, CheckRequest, CheckResponse, DelRequest, DelResponse, GcRequest, GcResponse, StatusRequest,
    StatusResponse,
};
use tonic::{Code, Request, Response, Status};

/// What it was asked, in order, in words.
pub type Log = Arc<Mutex<Vec<String>>>;

#[derive(Clone, Default)]
pub struct FakeAgent {
    pub log: Log,
    /// Refuses everything with this CNI code and message; without a code, as a bare gRPC status.
    pub refusal: Option<(Option<u32>, &'static str)>,
    /// Exits the process' part of the connection instead of answering.
    pub hang_up: bool,
}

impl FakeAgent {
    fn answer<T>(&self, asked: String, answer: T) -> Result<Response<T>, Status> {
        self.log.lock().unwrap().push(asked);
        if self.hang_up {
            return Err(Status::unavailable("going away"));
        }
        match self.refusal {
            None => Ok(Response::new(answer)),
            Some((code, message)) => {
                let mut status = Status::new(Code::Internal, message);
                if let Some(code) = code {
                    status.metadata_mut().insert(CNI_CODE, code.to_string().parse().unwrap());
                }
                Err(status)
            }
        }
    }

    /// Serves `<dir>/agent.sock` until the returned handle is dropped.
    pub fn serve(self, dir: &Path) -> Running {
        let path = dir.join("agent.sock");
        let _ = std::fs::remove_file(&path);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(async { tokio::net::UnixListener::bind(path) }).unwrap();
        let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
        let log = self.log.clone();
        runtime.spawn(
            tonic::transport::Server::builder().add_service(AttachmentsServer::new(self)).serve_with_incoming(incoming),
        );
        Running { log, runtime: Some(runtime) }
    }
}

/// A served [`FakeAgent`].
pub struct Running {
    log: Log,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Running {
    /// What it was asked since the last time.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[tonic::async_trait]
impl Attachments for FakeAgent {
    async fn add(&self, request: Request<AddRequest>) -> Result<Response<Attachment>, Status> {
        let r = request.into_inner();
        let pod = format!("{}/{}/{}", r.pod_namespace, r.pod_name, r.pod_uid);
        let asked = format!("ADD {} {} {} {} {pod} mtu {}", r.container_id, r.ifname, r.netns, r.network, r.mtu);
        let attachment = Attachment {
            container_id: r.container_id,
            ifname: r.ifname,
            network: r.network,
            netns: r.netns,
            host_ifname: "kw0123456789abc".into(),
            host_mac: "02:00:00:00:00:01".into(),
            pod_mac: "02:00:00:00:00:02".into(),
            mtu: 1450,
            addresses: vec!["10.244.1.7/32".into(), "fd00:244:1::7/128".into()],
            gateways: vec!["169.254.1.1".into(), "fe80::1".into()],
            pod_namespace: r.pod_namespace,
            pod_name: r.pod_name,
            pod_uid: r.pod_uid,
        };
        self.answer(asked, attachment)
    }

    async fn del(&self, request: Request<DelRequest>) -> Result<Response<DelResponse>, Status> {
        let r = request.into_inner();
        self.answer(format!("DEL {} {} {}", r.container_id, r.ifname, r.network), DelResponse {})
    }

    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let r = request.into_inner();
        let asked = format!("CHECK {} {} {} {}", r.container_id, r.ifname, r.netns, r.addresses.join(","));
        self.answer(asked, CheckResponse {})
    }

    async fn gc(&self, request: Request<GcRequest>) -> Result<Response<GcResponse>, Status> {
        let r = request.into_inner();
        let valid: Vec<_> = r.valid.iter().map(|v| format!("{}/{}", v.container_id, v.ifname)).collect();
        self.answer(format!("GC {} keep {}", r.network, valid.join(",")), GcResponse { removed: 0 })
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.answer(format!("STATUS {}", request.into_inner().network), StatusResponse {})
    }
}
