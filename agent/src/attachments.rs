//! Pod attachments over the local API: leases, veth pairs, and the engine's part between them.
//!
//! ADD: admit (the engine knows the pod; beside it, the gate looks for newer policies) -> lease (on disk) -> prepare (its policy in the kernel) -> veth pair, programs and
//! endpoint while the pod's end is down -> up. What fails is undone in reverse. Everything may be repeated, also after a crash.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use keelway_api::CNI_CODE;
use keelway_api::v1::attachments_server::Attachments;
use keelway_api::v1::{
    AddRequest, Attachment, CheckRequest, CheckResponse, DelRequest, DelResponse, GcRequest, GcResponse, StatusRequest,
    StatusResponse,
};
use keelway_cni::apply::{ApplyError, Ends, apply, detach, verify};
use keelway_cni::ipam::journal::Journal;
use keelway_cni::ipam::{Book, IpamError};
use keelway_cni::lease::LeaseRequest;
use keelway_cni::plan::{Plan, gateway};
use keelway_cni::spec::code;
use keelway_cni::{Lease, LeaseKey, PodRef, pending};
use keelway_netlink::{Handle as Netlink, Netns};
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status};

use crate::engine::{Attached, Command, EngineError, Handle as EngineHandle};
use crate::gate::Gate;
use crate::host::HostNetwork;

/// How long an ADD waits for its Pod to be known; the runtime tries again after error 11.
const ADMIT_TIMEOUT: Duration = Duration::from_secs(15);

type SharedBook = Arc<Mutex<Option<Book<Journal>>>>;

/// The service.
#[derive(Clone)]
pub struct AttachmentService {
    gate: Gate,
    engine: EngineHandle,
    host: Netlink,
    network: watch::Receiver<Option<HostNetwork>>,
    book: SharedBook,
    locks: Arc<Mutex<BTreeMap<LeaseKey, Arc<tokio::sync::Mutex<()>>>>>,
    leases: PathBuf,
    pending: PathBuf,
    /// The tables were in sync before this start, and how long that is worth something without the source.
    warm_until: Option<Instant>,
}

/// The journal of leases below the state directory.
pub fn leases_path(state_dir: &Path) -> PathBuf {
    state_dir.join("leases")
}

/// An error with the CNI code that the plugin is to print.
fn status(cni: u32, message: impl Into<String>) -> Status {
    let grpc = match cni {
        code::TRY_AGAIN | code::NOT_AVAILABLE => Code::Unavailable,
        code::EXHAUSTED => Code::ResourceExhausted,
        code::CHECK_FAILED => Code::FailedPrecondition,
        code::UNKNOWN_CONTAINER => Code::NotFound,
        code::INVALID_ENVIRONMENT | code::INVALID_CONFIG => Code::InvalidArgument,
        _ => Code::Internal,
    };
    let mut status = Status::new(grpc, message);
    status.metadata_mut().insert(CNI_CODE, cni.into());
    status
}

fn engine_gone() -> Status {
    status(code::TRY_AGAIN, "the agent is stopping")
}

fn engine_error(error: &EngineError) -> Status {
    status(code::TRY_AGAIN, error.to_string())
}

fn ipam_error(error: &IpamError) -> Status {
    match error {
        IpamError::Exhausted { .. } => status(code::EXHAUSTED, error.to_string()),
        _ => status(code::AGENT, error.to_string()),
    }
}

fn apply_error(error: &ApplyError) -> Status {
    status(code::AGENT, error.to_string())
}

impl AttachmentService {
    /// With the leases of `book`; until `network` says the CIDRs nothing is leased.
    pub fn new(
        gate: Gate,
        engine: EngineHandle,
        host: Netlink,
        network: watch::Receiver<Option<HostNetwork>>,
        book: Option<Book<Journal>>,
        state_dir: &Path,
        warm_until: Option<Instant>,
    ) -> Self {
        Self {
            gate,
            engine,
            host,
            network,
            book: Arc::new(Mutex::new(book)),
            leases: leases_path(state_dir),
            locks: Arc::default(),
            pending: state_dir.join(pending::DIRECTORY),
            warm_until,
        }
    }

    /// Opens the leases anew, for the node's pod CIDRs.
    ///
    /// # Errors
    /// See [`IpamError`].
    pub fn reopen_book(&self, cidrs: &[IpNet]) -> Result<(), IpamError> {
        // The journal is locked: let go of the old one first.
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        *book = None;
        *book = Some(Book::open(Journal::open(&self.leases)?, cidrs)?);
        Ok(())
    }

    /// Does the DELs that came while no agent ran.
    pub async fn drain_pending(&self) {
        let (entries, bad) = match pending::list(&self.pending) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "DELs that wait cannot be read");
                return;
            }
        };
        for error in bad {
            tracing::error!(%error, "a DEL that waits cannot be read");
        }
        for entry in entries {
            let _guard = self.lock(&entry.key).await;
            // The plugin strikes an entry off before it asks for a new ADD of the same name.
            if !pending::waits(&self.pending, &entry.network, &entry.key) {
                continue;
            }
            match self.delete_locked(&entry.key).await {
                Ok(()) => {
                    if let Err(error) = pending::remove(&self.pending, &entry.network, &entry.key) {
                        tracing::error!(%error, "a DEL that is done cannot be struck off");
                    }
                }
                Err(error) => tracing::warn!(attachment = %entry.key, %error, "a DEL that waits failed"),
            }
        }
    }

    async fn with_book<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Book<Journal>) -> Result<T, IpamError> + Send + 'static,
    ) -> Result<T, Status> {
        let book = Arc::clone(&self.book);
        // Writing leases waits for the disk.
        tokio::task::spawn_blocking(move || {
            let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
            match book.as_mut() {
                Some(book) => work(book).map_err(|error| ipam_error(&error)),
                None => Err(status(code::TRY_AGAIN, "the node's pod CIDRs are not known yet")),
            }
        })
        .await
        .map_err(|_| engine_gone())?
    }

    async fn lock(&self, key: &LeaseKey) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(key.clone()).or_default())
        };
        lock.lock_owned().await
    }

    fn network(&self) -> Result<HostNetwork, Status> {
        let network = self.network.borrow().clone();
        network.ok_or_else(|| status(code::TRY_AGAIN, "the node's network is not set up yet"))
    }

    async fn add_pod(&self, request: AddRequest) -> Result<Attachment, Status> {
        if !self.engine.is_synced() {
            return Err(engine_error(&EngineError::NotSynced));
        }
        let network = self.network()?;
        let key = LeaseKey::new(request.container_id, request.ifname);
        let _guard = self.lock(&key).await;
        let mut pod = PodRef { namespace: request.pod_namespace, name: request.pod_name, uid: request.pod_uid };
        if pod.name.is_empty() {
            return Err(status(
                code::INVALID_ENVIRONMENT,
                "CNI_ARGS: K8S_POD_NAME is empty, expected the pod's name: without it no policy can be found",
            ));
        }
        let (gate, namespace) = (self.gate.clone(), pod.namespace.clone());
        let policies = tokio::spawn(async move { gate.pass(&namespace).await });
        let admitted = self.engine.ask(|reply| Command::Admit { pod: pod.clone(), reply });
        pod.uid = match tokio::time::timeout(ADMIT_TIMEOUT, admitted).await {
            Ok(uid) => uid.ok_or_else(engine_gone)?,
            Err(_) => {
                let PodRef { namespace, name, uid } = &pod;
                let text = format!("the pod {namespace}/{name} with uid {uid:?} is not known to the agent yet");
                return Err(status(code::TRY_AGAIN, text));
            }
        };
        let netns = Netns::open(&request.netns)
            .map_err(|error| status(code::UNKNOWN_CONTAINER, format!("CNI_NETNS: {error}")))?;
        let wanted = LeaseRequest {
            key: key.clone(),
            network: request.network,
            netns: request.netns,
            pod,
            mtu: if request.mtu == 0 { network.mtu } else { request.mtu.min(network.mtu) },
        };
        let lease = self.with_book(move |book| book.allocate(&wanted)).await?;
        match self.attach(&lease, &network, &netns, policies).await {
            Ok(plan) => Ok(answer(&lease, &plan)),
            Err(error) => {
                if let Err(undo) = self.delete_locked(&key).await {
                    tracing::error!(attachment = %key, %undo, "undoing a failed ADD");
                }
                Err(error)
            }
        }
    }

    async fn attach(
        &self,
        lease: &Lease,
        network: &HostNetwork,
        netns: &Netns,
        policies: tokio::task::JoinHandle<Result<(), String>>,
    ) -> Result<Plan, Status> {
        let plan = Plan::new(lease, &network.devices.host_addresses);
        if self.is_whole(&plan, lease, netns).await {
            return Ok(plan);
        }
        let prepared = self.engine.ask(|reply| Command::Prepare { lease: lease.clone(), reply }).await;
        prepared.ok_or_else(engine_gone)?.map_err(|error| engine_error(&error))?;
        let engine = self.engine.clone();
        let too_old = OnceLock::new();
        let too_old = &too_old;
        let attached = |ends: Ends| Attached {
            lease: lease.clone(),
            host_ifname: plan.host_ifname.clone(),
            ifindex: ends.host_index,
            mac: plan.pod_mac.0,
            host_mac: plan.host_mac.0,
            netns_cookie: ends.netns_cookie,
        };
        apply(&plan, &self.host, netns, |ends| async move {
            // The pod's end is still down: so far nothing was sent or received.
            if let Err(reason) = policies.await? {
                return Err(too_old.get_or_init(|| reason).as_str().into());
            }
            match engine.ask(|reply| Command::Attach { attached: attached(ends), reply }).await {
                Some(Ok(())) => Ok(()),
                Some(Err(error)) => Err(error.into()),
                None => Err("the agent is stopping".into()),
            }
        })
        .await
        .map_err(|error| too_old.get().map_or_else(|| apply_error(&error), |reason| status(code::TRY_AGAIN, reason)))?;
        Ok(plan)
    }

    /// Whether the attachment is there already, as it should be: a repeated ADD then changes nothing.
    async fn is_whole(&self, plan: &Plan, lease: &Lease, netns: &Netns) -> bool {
        let missing = self.engine.ask(|reply| Command::Verify { key: lease.key.clone(), reply }).await;
        missing.is_some_and(|missing| missing.is_empty())
            && verify(plan, &self.host, netns).await.is_ok_and(|differences| differences.is_empty())
    }

    async fn delete(&self, key: &LeaseKey) -> Result<(), Status> {
        let _guard = self.lock(key).await;
        self.delete_locked(key).await
    }

    /// In reverse of ADD. The endpoint goes first: from then on the address is nobody's.
    async fn delete_locked(&self, key: &LeaseKey) -> Result<(), Status> {
        let of_lease = key.clone();
        let addresses = self
            .with_book(move |book| Ok(book.pool().get(&of_lease).map(|lease| lease.addresses.clone())))
            .await?
            .unwrap_or_default();
        let host_addresses = self.network().map(|network| network.devices.host_addresses).unwrap_or_default();
        let plan = Plan::of(key, &addresses, 0, &host_addresses);
        let host_ifname = plan.host_ifname.clone();
        let detached = self.engine.ask(|reply| Command::Detach { key: key.clone(), host_ifname, reply }).await;
        detached.ok_or_else(engine_gone)?.map_err(|error| engine_error(&error))?;
        detach(&plan, &self.host).await.map_err(|error| status(code::AGENT, error.to_string()))?;
        let key = key.clone();
        self.with_book(move |book| book.release(&key)).await?;
        Ok(())
    }

    async fn check_pod(&self, request: CheckRequest) -> Result<(), Status> {
        let key = LeaseKey::new(request.container_id, request.ifname);
        let _guard = self.lock(&key).await;
        let of_lease = key.clone();
        let lease = self.with_book(move |book| Ok(book.pool().get(&of_lease).cloned())).await?;
        let lease = lease.ok_or_else(|| status(code::UNKNOWN_CONTAINER, format!("there is no attachment {key}")))?;
        let plan = Plan::new(&lease, &self.network()?.devices.host_addresses);
        let netns = Netns::open(&request.netns)
            .map_err(|error| status(code::UNKNOWN_CONTAINER, format!("CNI_NETNS: {error}")))?;
        let mut wrong: Vec<String> = verify(&plan, &self.host, &netns)
            .await
            .map_err(|error| status(code::AGENT, error.to_string()))?
            .iter()
            .map(ToString::to_string)
            .collect();
        let held: BTreeSet<String> = lease.addresses.iter().map(|ip| IpNet::from(*ip).to_string()).collect();
        let said: BTreeSet<String> = request.addresses.into_iter().collect();
        if !said.is_empty() && said != held {
            wrong.push(format!("prevResult: addresses are {said:?}, expected {held:?}"));
        }
        wrong.extend(self.engine.ask(|reply| Command::Verify { key, reply }).await.ok_or_else(engine_gone)?);
        if wrong.is_empty() { Ok(()) } else { Err(status(code::CHECK_FAILED, wrong.join("; "))) }
    }

    async fn collect(&self, request: GcRequest) -> Result<u32, Status> {
        let valid: BTreeSet<LeaseKey> =
            request.valid.into_iter().map(|id| LeaseKey::new(id.container_id, id.ifname)).collect();
        let stale = self.with_book(move |book| Ok(book.pool().stale(&request.network, &valid))).await?;
        let mut removed = 0;
        let mut failed = Vec::new();
        for lease in stale {
            match self.delete(&lease.key).await {
                Ok(()) => removed += 1,
                // The rest is worth removing all the same.
                Err(error) => failed.push(format!("{}: {}", lease.key, error.message())),
            }
        }
        if failed.is_empty() { Ok(removed) } else { Err(status(code::AGENT, failed.join("; "))) }
    }

    async fn availability(&self) -> Result<(), Status> {
        let warm = self.warm_until.is_some_and(|until| Instant::now() < until);
        if !self.engine.is_synced() {
            // A restart is not an event: what runs goes on, and new pods are told to try again.
            return if warm { Ok(()) } else { Err(status(code::NOT_AVAILABLE, EngineError::NotSynced.to_string())) };
        }
        let full = self
            .with_book(|book| Ok(book.pool().usage().into_iter().find(|usage| usage.used >= usage.capacity)))
            .await?;
        match full {
            None => Ok(()),
            Some(usage) => {
                Err(status(code::NOT_AVAILABLE, format!("all {} addresses of {} are leased", usage.used, usage.cidr)))
            }
        }
    }
}

fn answer(lease: &Lease, plan: &Plan) -> Attachment {
    Attachment {
        container_id: lease.key.container_id.clone(),
        ifname: lease.key.ifname.clone(),
        network: lease.network.clone(),
        netns: lease.netns.clone(),
        host_ifname: plan.host_ifname.clone(),
        host_mac: plan.host_mac.to_string(),
        pod_mac: plan.pod_mac.to_string(),
        mtu: plan.mtu,
        addresses: lease.addresses.iter().map(|ip| IpNet::from(*ip).to_string()).collect(),
        gateways: lease.addresses.iter().map(|ip| gateway(*ip).to_string()).collect(),
        pod_namespace: lease.pod.namespace.clone(),
        pod_name: lease.pod.name.clone(),
        pod_uid: lease.pod.uid.clone(),
    }
}

#[tonic::async_trait]
impl Attachments for AttachmentService {
    async fn add(&self, request: Request<AddRequest>) -> Result<Response<Attachment>, Status> {
        self.detached(|service| async move { service.add_pod(request.into_inner()).await }).await.map(Response::new)
    }

    async fn del(&self, request: Request<DelRequest>) -> Result<Response<DelResponse>, Status> {
        let request = request.into_inner();
        let key = LeaseKey::new(request.container_id, request.ifname);
        self.detached(|service| async move { service.delete(&key).await }).await?;
        Ok(Response::new(DelResponse {}))
    }

    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        self.check_pod(request.into_inner()).await?;
        Ok(Response::new(CheckResponse {}))
    }

    async fn gc(&self, request: Request<GcRequest>) -> Result<Response<GcResponse>, Status> {
        let removed = self.detached(|service| async move { service.collect(request.into_inner()).await }).await?;
        Ok(Response::new(GcResponse { removed }))
    }

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.availability().await?;
        Ok(Response::new(StatusResponse {}))
    }
}

impl AttachmentService {
    /// Runs `work` to its end even when the caller hangs up: half an attachment helps nobody.
    async fn detached<T, F, Fut>(&self, work: F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: FnOnce(Self) -> Fut,
        Fut: Future<Output = Result<T, Status>> + Send + 'static,
    {
        tokio::spawn(work(self.clone())).await.map_err(|_| engine_gone())?
    }
}
