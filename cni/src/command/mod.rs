//! What each command does: ask the agent, or, where the specification and our promises allow it, answer without it.
//!
//! | command | agent there | agent away |
//! |---|---|---|
//! | ADD, CHECK, GC | its answer | error 11, try again later |
//! | DEL | its answer | written down for the agent, success |
//! | STATUS | its answer | success until the grace time since it was last seen is over, then error 50 |
//! | VERSION | not asked | not asked |

mod agent;
mod answer;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keelway_api::v1;

use crate::lease::LeaseKey;
use crate::pending::{self, PendingDel, PendingError};
use crate::spec::{CniError, NetConf, Request, code, render, version_answer};
use agent::{Agent, Failure};

/// Name of the file beside the socket whose modification time the agent keeps fresh.
pub const SEEN_FILE: &str = "agent.seen";

/// How long the agent may take. ADD waits there for the Pod and its policies to be known.
const ADD_WAIT: Duration = Duration::from_secs(90);
const WAIT: Duration = Duration::from_secs(30);
const STATUS_WAIT: Duration = Duration::from_secs(5);

/// Does what the request asks. `Ok` is what goes to stdout, which for most commands is nothing.
///
/// # Errors
/// The error for stdout.
pub async fn run(request: Request) -> Result<String, CniError> {
    match request {
        Request::Version { asked } => Ok(version_answer(&asked)),
        Request::Add { conf, key, netns, pod } => add(&conf, key, netns, pod).await,
        Request::Del { conf, key } => del(&conf, key).await.map(|()| String::new()),
        Request::Check { conf, key, netns } => check(&conf, key, netns).await.map(|()| String::new()),
        Request::Gc { conf, valid } => gc(&conf, valid).await.map(|()| String::new()),
        Request::Status { conf } => status(&conf, SystemTime::now()).await.map(|()| String::new()),
    }
}

async fn add(conf: &NetConf, key: LeaseKey, netns: String, pod: crate::PodRef) -> Result<String, CniError> {
    let agent = Agent::dial(&conf.socket).await.map_err(|f| try_again(conf, f))?;
    if pending::waits(&conf.state_dir, &conf.name, &key) {
        let old = v1::DelRequest {
            container_id: key.container_id.clone(),
            ifname: key.ifname.clone(),
            network: conf.name.clone(),
        };
        agent.call(WAIT, |mut client| async move { client.del(old).await }).await.map_err(|f| try_again(conf, f))?;
        pending::remove(&conf.state_dir, &conf.name, &key).map_err(|e| queue_error(&e))?;
    }
    let request = v1::AddRequest {
        container_id: key.container_id,
        ifname: key.ifname,
        netns: netns.clone(),
        network: conf.name.clone(),
        pod_namespace: pod.namespace,
        pod_name: pod.name,
        pod_uid: pod.uid,
        mtu: conf.mtu.unwrap_or(0),
    };
    let call = agent.call(ADD_WAIT, |mut client| async move { client.add(request).await });
    let attachment = call.await.map_err(|f| try_again(conf, f))?;
    let outcome = answer::outcome(&attachment, &netns)?;
    Ok(render(&outcome, conf.version, conf.prev.as_ref()))
}

async fn del(conf: &NetConf, key: LeaseKey) -> Result<(), CniError> {
    let request = v1::DelRequest {
        container_id: key.container_id.clone(),
        ifname: key.ifname.clone(),
        network: conf.name.clone(),
    };
    let result = match Agent::dial(&conf.socket).await {
        Ok(agent) => agent.call(WAIT, |mut client| async move { client.del(request).await }).await.map(drop),
        Err(away) => Err(away),
    };
    match result {
        Ok(()) => Ok(()),
        Err(Failure::Refused(e)) => Err(e),
        Err(Failure::Away(_)) => {
            let asked = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let entry = PendingDel { network: conf.name.clone(), key, asked };
            pending::record(&conf.state_dir, &entry).map_err(|e| queue_error(&e))
        }
    }
}

async fn check(conf: &NetConf, key: LeaseKey, netns: String) -> Result<(), CniError> {
    let addresses = conf.prev.as_ref().map(|p| p.addresses_of(&key.ifname)).unwrap_or_default();
    if addresses.is_empty() {
        let msg = format!("prevResult has no address of interface {}", key.ifname);
        return Err(CniError::new(code::INVALID_CONFIG, msg));
    }
    let request = v1::CheckRequest {
        container_id: key.container_id,
        ifname: key.ifname,
        netns,
        network: conf.name.clone(),
        addresses: addresses.iter().map(ToString::to_string).collect(),
    };
    let agent = Agent::dial(&conf.socket).await.map_err(|f| try_again(conf, f))?;
    let call = agent.call(WAIT, |mut client| async move { client.check(request).await });
    call.await.map(drop).map_err(|f| try_again(conf, f))
}

async fn gc(conf: &NetConf, valid: Vec<LeaseKey>) -> Result<(), CniError> {
    let valid = valid.into_iter().map(|k| v1::AttachmentId { container_id: k.container_id, ifname: k.ifname });
    let request = v1::GcRequest { network: conf.name.clone(), valid: valid.collect() };
    let agent = Agent::dial(&conf.socket).await.map_err(|f| try_again(conf, f))?;
    let call = agent.call(WAIT, |mut client| async move { client.gc(request).await });
    call.await.map(drop).map_err(|f| try_again(conf, f))
}

async fn status(conf: &NetConf, now: SystemTime) -> Result<(), CniError> {
    let request = v1::StatusRequest { network: conf.name.clone() };
    let result = match Agent::dial(&conf.socket).await {
        Ok(agent) => agent.call(STATUS_WAIT, |mut client| async move { client.status(request).await }).await.map(drop),
        Err(away) => Err(away),
    };
    match result {
        Ok(()) => Ok(()),
        Err(Failure::Refused(e)) => Err(e),
        Err(Failure::Away(reason)) => within_grace(last_seen(&conf.socket), now, conf.status_grace)
            .map_err(|since| CniError::new(code::NOT_AVAILABLE, format!("the agent is away: {since}")).details(reason)),
    }
}

/// When the agent last showed itself, by the file that it touches, else by its socket's age.
fn last_seen(socket: &Path) -> Option<SystemTime> {
    let seen: [PathBuf; 2] = [socket.with_file_name(SEEN_FILE), socket.to_owned()];
    seen.iter().filter_map(|p| p.metadata().and_then(|m| m.modified()).ok()).max()
}

/// Whether an absence is still a restart; if not, since when.
fn within_grace(seen: Option<SystemTime>, now: SystemTime, grace: Duration) -> Result<(), String> {
    let Some(seen) = seen else { return Err("it was never seen on this node".into()) };
    // A time in the future is a clock that was set back: the agent was here.
    let away = now.duration_since(seen).unwrap_or_default();
    if away <= grace {
        Ok(())
    } else {
        Err(format!("last seen {} s ago, more than {} s", away.as_secs(), grace.as_secs()))
    }
}

fn try_again(conf: &NetConf, failure: Failure) -> CniError {
    match failure {
        Failure::Refused(e) => e,
        Failure::Away(reason) => {
            let msg = format!("the agent does not answer on {}", conf.socket.display());
            CniError::new(code::TRY_AGAIN, msg).details(reason)
        }
    }
}

fn queue_error(error: &PendingError) -> CniError {
    let code = if matches!(error, PendingError::Full { .. }) { code::TRY_AGAIN } else { code::IO_FAILURE };
    CniError::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absence_is_a_restart_until_the_grace_is_over() {
        let now = UNIX_EPOCH + Duration::from_secs(10_000);
        let ago = |s| Some(now - Duration::from_secs(s));
        let grace = Duration::from_secs(300);
        assert_eq!(within_grace(ago(0), now, grace), Ok(()));
        assert_eq!(within_grace(ago(300), now, grace), Ok(()));
        assert_eq!(within_grace(ago(301), now, grace), Err("last seen 301 s ago, more than 300 s".into()));
        assert_eq!(within_grace(Some(now + grace), now, grace), Ok(()), "the clock was set back");
        assert_eq!(within_grace(None, now, grace), Err("it was never seen on this node".into()));
    }
}
