//! A stand-in for a cloud's load balancer, or for what does its work on bare metal: it gives Services of type LoadBalancer an address and
//! leads packets for it to nodes.
//!
//! It is part of the lab and nothing that Keelway brings: Keelway serves such an address on every node, whoever gives it. Here a process
//! beside the control plane gives addresses of one pool, and the machines that clients run on (`outside` and `cp`) have routes to them over
//! the nodes, each connection over one of them. Of a Service whose traffic policy is Local a node gets packets while its health check port
//! answers 200, which is asked every second. A Service with affinity has each machine led to one node: no node knows of another's clients.
mod plan;
mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Service};
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::Cluster;
use plan::{FINALIZER, Numbers};
use routes::{Lead, Routes};

/// From one look at Services, nodes and their health to the next, and how long a node has to say that it is well.
const TURN: Duration = Duration::from_secs(1);

/// Which lab to balance in, and where its API server is.
#[derive(Args, Debug)]
pub struct Balance {
    /// The lab's id.
    id: String,
    /// The administrator's kubeconfig.
    kubeconfig: PathBuf,
}

/// Starts the balancer on the control plane's machine, where it stays until the cluster goes.
pub fn start(cluster: &Cluster) -> Result<()> {
    let kubeconfig = cluster.kubeconfig().to_string_lossy().into_owned();
    let argv = ["keelway-lab".to_owned(), "balance".to_owned(), cluster.lab.id.clone(), kubeconfig];
    cluster.control_plane.spawn("balancer", &argv)?.keep();
    Ok(())
}

/// Balances until it is ended.
pub fn run(balance: &Balance) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let file = Kubeconfig::read_from(&balance.kubeconfig)?;
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        let mut balancer = Balancer {
            services: watch(Api::all(client.clone())),
            nodes: watch(Api::all(client.clone())),
            client,
            numbers: Numbers::default(),
            routes: Routes::prepare(&balance.id)?,
        };
        balancer.services.wait_until_ready().await?;
        balancer.nodes.wait_until_ready().await?;
        let mut turns = interval(TURN);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            turns.tick().await;
            if let Err(error) = balancer.turn().await {
                println!("{error:#}");
            }
        }
    })
}

/// All objects of a kind, kept up to date for as long as the process lives.
fn watch<K>(api: Api<K>) -> Store<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Send + Sync,
{
    let (store, writer) = reflector::store();
    let seen = watcher(api, watcher::Config::default()).default_backoff().reflect(writer);
    tokio::spawn(seen.for_each(|_| std::future::ready(())));
    store
}

struct Balancer {
    client: Client,
    services: Store<Service>,
    nodes: Store<Node>,
    numbers: Numbers,
    routes: Routes,
}

impl Balancer {
    /// Routes first, so that an address that a Service shows is led somewhere, and one that it gives back is not.
    async fn turn(&mut self) -> Result<()> {
        let services = self.services.state();
        let nodes: Vec<IpAddr> = self.nodes.state().iter().flat_map(|node| plan::addresses(node)).collect();
        let balanced: Vec<&Arc<Service>> = services.iter().filter(|service| plan::wants(service)).collect();
        self.numbers.keep(&balanced.iter().filter_map(|service| service.uid()).collect());
        let healthy = healthy(&balanced, &nodes).await;
        let mut wanted = BTreeMap::new();
        for service in &balanced {
            let number = self.numbers.of(&service.uid().unwrap_or_default())?;
            for entry in plan::ingress(service, number) {
                let to: IpAddr = entry.ip.unwrap_or_default().parse()?;
                let fit = |node: &&IpAddr| {
                    let well = |port| healthy.contains(&(**node, port).into());
                    node.is_ipv6() == to.is_ipv6() && plan::health_port(service).is_none_or(well)
                };
                let nodes = nodes.iter().filter(fit).copied().collect();
                wanted.insert(to, Lead { nodes, sticky: plan::sticky(service) });
            }
        }
        self.routes.lead(wanted)?;
        for service in services {
            if let Err(error) = self.write(&service).await {
                // The next turn has the object as it is by then.
                println!("{}/{}: {error:#}", service.namespace().unwrap_or_default(), service.name_any());
            }
        }
        Ok(())
    }

    /// Makes the object say what holds: the finalizer is the first to come and the last to go.
    async fn write(&mut self, service: &Service) -> Result<()> {
        let (name, held) = (service.name_any(), plan::held(service));
        let api: Api<Service> = Api::namespaced(self.client.clone(), &service.namespace().unwrap_or_default());
        let (params, said) = (PatchParams::default(), plan::said(service));
        let finalizers = |names: Vec<String>, version: Option<String>| {
            // With the version, so that nobody else's finalizer is lost.
            Patch::Merge(json!({"metadata": {"finalizers": names, "resourceVersion": version}}))
        };
        let others = service.finalizers().iter().filter(|name| *name != FINALIZER).cloned();
        if plan::wants(service) {
            let ingress = plan::ingress(service, self.numbers.of(&service.uid().unwrap_or_default())?);
            if !held {
                let names = others.chain([FINALIZER.to_owned()]).collect();
                api.patch(&name, &params, &finalizers(names, service.resource_version())).await?;
            }
            if ingress != said {
                let status = Patch::Merge(json!({"status": {"loadBalancer": {"ingress": ingress}}}));
                api.patch_status(&name, &params, &status).await?;
            }
        } else if held && !plan::foreign(service) {
            let mut version = service.resource_version();
            if !said.is_empty() {
                let status = Patch::Merge(json!({"status": {"loadBalancer": null}}));
                version = api.patch_status(&name, &params, &status).await?.resource_version();
            }
            api.patch(&name, &params, &finalizers(others.collect(), version)).await?;
        }
        Ok(())
    }
}

/// Those of the Services' health check ports that answer 200 now. Each family of a Service has its own.
async fn healthy(services: &[&Arc<Service>], nodes: &[IpAddr]) -> BTreeSet<SocketAddr> {
    let ports: BTreeSet<u16> = services.iter().filter_map(|service| plan::health_port(service)).collect();
    let mut asking = JoinSet::new();
    for address in nodes {
        for port in &ports {
            let to = SocketAddr::new(*address, *port);
            asking.spawn(async move { matches!(timeout(TURN, ask(to)).await, Ok(Ok(()))).then_some(to) });
        }
    }
    asking.join_all().await.into_iter().flatten().collect()
}

async fn ask(to: SocketAddr) -> Result<()> {
    let mut stream = tokio::net::TcpStream::connect(to).await?;
    stream.write_all(format!("GET /healthz HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    ensure!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
    Ok(())
}
