//! A plan becomes kernel state. Used by the agent; the plugin's binary is built without it.
//!
//! [`apply`] and [`detach`] may be repeated at any time, also after a crash half-way: names follow from the lease, so
//! that what an earlier try left is found and replaced or removed. [`verify`] reads back what the kernel really has.

mod verify;

pub use verify::{Difference, verify};

use std::future::Future;

use keelway_netlink::{AddressOptions, Error as KernelError, Handle, Netns, Route, RouteScope, Veth, netns, sysctl};

use crate::plan::{Plan, Side, Step, Undo};

/// The pair as it exists when the hook runs: the host's end up, the pod's end down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Index of the host's end, in the host's namespace.
    pub host_index: u32,
    /// Index of the pod's end, in the pod's namespace.
    pub pod_index: u32,
    /// Cookie of the pod's network namespace, as BPF programs see it.
    pub netns_cookie: u64,
}

/// Why there is no attachment. Whatever had been made was removed again.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The kernel refused a step.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The caller's hook failed.
    #[error("attach programs and policy: {0}")]
    Hook(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Removing what had been made failed as well.
    #[error("{first}; and then undoing it: {undo}")]
    NotUndone {
        /// Why it was to be undone.
        first: Box<ApplyError>,
        /// What stood in the way.
        undo: KernelError,
    },
}

/// What a hook answers.
pub type HookResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Makes the attachment of `plan` with the pod's end in `netns`. `host` is a handle of the host's namespace, which
/// must be the caller's own. Runs `hook` at its place in the plan; the hook undoes its own part when it fails, and
/// when a later step fails the caller does (programs on the host's end go with the link).
///
/// A pair of the same name, which an earlier try left, is deleted first: call [`verify`] before, to keep a good one.
///
/// # Errors
/// [`ApplyError`]; `EEXIST` when the pod already has a link of that name.
pub async fn apply<F, Fut>(plan: &Plan, host: &Handle, netns: &Netns, hook: F) -> Result<Ends, ApplyError>
where
    F: FnOnce(Ends) -> Fut,
    Fut: Future<Output = HookResult>,
{
    host.delete_link(&plan.host_ifname).await?;
    match run(plan, host, netns, hook).await {
        Ok(ends) => Ok(ends),
        Err(first) => match detach(plan, host).await {
            Ok(_) => Err(first),
            Err(undo) => Err(ApplyError::NotUndone { first: Box::new(first), undo }),
        },
    }
}

/// Removes the attachment; answers whether its pair was there. Works without the pod's namespace. As [`apply`], for a caller in
/// the host's namespace.
///
/// # Errors
/// The kernel's, for anything but absence.
pub async fn detach(plan: &Plan, host: &Handle) -> Result<bool, KernelError> {
    let Some(link) = host.link(&plan.host_ifname).await? else { return Ok(false) };
    for undo in plan.undo() {
        match undo {
            Undo::DeleteRoute { to } => {
                let src = plan.source_for(to.addr());
                host.delete_route(&Route { src, ..Route::dev(to, link.index) }).await?;
            }
            Undo::DeleteNeighbour { address } => {
                host.delete_neighbour(link.index, address).await?;
            }
            Undo::DeleteVeth => {
                Handle::delete_link_apart(&plan.host_ifname).await?;
            }
        }
    }
    Ok(true)
}

async fn run<F, Fut>(plan: &Plan, host: &Handle, netns: &Netns, hook: F) -> Result<Ends, ApplyError>
where
    F: FnOnce(Ends) -> Fut,
    Fut: Future<Output = HookResult>,
{
    let pod = Handle::open_in(netns).await?;
    let mut steps = plan.steps();
    create(plan, host, netns).await?;
    let ends = Ends {
        host_index: host.require_link(&plan.host_ifname).await?.index,
        pod_index: pod.require_link(&plan.pod_ifname).await?.index,
        netns_cookie: netns.run(netns::own_cookie).await?,
    };
    let mut hook = Some(hook);
    // Entering a namespace costs a thread: the pod's keys are written together, where the first of them stands.
    let mut pod_keys = take_pod_sysctls(&mut steps);
    for step in &steps {
        match step {
            Step::CreateVeth => {}
            Step::Sysctl { key, value, .. } => sysctl::write(key, value)?,
            Step::Hook => {
                if let Some(hook) = hook.take() {
                    hook(ends).await.map_err(ApplyError::Hook)?;
                }
            }
            step => {
                if matches!(step, Step::Address { .. }) && !pod_keys.is_empty() {
                    sysctl::write_in(netns, std::mem::take(&mut pod_keys)).await?;
                }
                on_link(step, host, &pod, ends).await?;
            }
        }
    }
    Ok(ends)
}

fn take_pod_sysctls(steps: &mut Vec<Step>) -> Vec<(String, String)> {
    let mut taken = Vec::new();
    steps.retain(|step| match step {
        Step::Sysctl { side: Side::Pod, key, value } => {
            taken.push((key.clone(), value.clone()));
            false
        }
        _ => true,
    });
    taken
}

async fn create(plan: &Plan, host: &Handle, netns: &Netns) -> Result<(), KernelError> {
    host.create_veth(&Veth {
        name: &plan.host_ifname,
        mac: Some(plan.host_mac.0),
        peer_name: &plan.pod_ifname,
        peer_mac: Some(plan.pod_mac.0),
        peer_netns: Some(netns),
        mtu: plan.mtu,
    })
    .await
}

async fn on_link(step: &Step, host: &Handle, pod: &Handle, ends: Ends) -> Result<(), KernelError> {
    let end = |side: &Side| match side {
        Side::Host => (host, ends.host_index),
        Side::Pod => (pod, ends.pod_index),
    };
    match step {
        Step::Up { side } => {
            let (handle, index) = end(side);
            handle.set_up(index, true).await
        }
        Step::Address { side, address } => {
            let (handle, index) = end(side);
            handle.replace_address(index, *address, AddressOptions { nodad: true, noprefixroute: true }).await
        }
        Step::Neighbour { side, address, mac } => {
            let (handle, index) = end(side);
            handle.replace_neighbour(index, *address, mac.0).await
        }
        Step::Route { side, to, via, src } => {
            let (handle, index) = end(side);
            handle.replace_route(&route(*to, *via, *src, index)).await
        }
        Step::CreateVeth | Step::Sysctl { .. } | Step::Hook => Ok(()),
    }
}

/// The route of a step, as the kernel is asked for it.
fn route(to: ipnet::IpNet, via: Option<std::net::IpAddr>, src: Option<std::net::IpAddr>, index: u32) -> Route {
    match via {
        Some(gateway) => Route { src, ..Route::via(to, gateway, index) },
        None => Route { src, scope: RouteScope::Link, ..Route::dev(to, index) },
    }
}
