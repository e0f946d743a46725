//! A call to the agent, and how its failure is told from its absence.

use std::error::Error as _;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use keelway_api::CNI_CODE;
use keelway_api::v1::attachments_client::AttachmentsClient;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::spec::{CniError, code};

/// How long the socket may take to accept.
const DIAL_WAIT: Duration = Duration::from_secs(2);

/// Why a call did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    /// There is no agent, or it went away in the middle, or it does not answer.
    Away(String),
    /// The agent said no.
    Refused(CniError),
}

pub(super) struct Agent(AttachmentsClient<Channel>);

impl Agent {
    pub(super) async fn dial(socket: &Path) -> Result<Self, Failure> {
        let dialled = tokio::time::timeout(DIAL_WAIT, keelway_api::connect(socket, DIAL_WAIT)).await;
        match dialled {
            Ok(Ok(channel)) => Ok(Self(AttachmentsClient::new(channel))),
            Ok(Err(e)) => Err(Failure::Away(format!("{}: {}", socket.display(), innermost(&e)))),
            Err(_) => Err(Failure::Away(format!("{}: not accepted within {DIAL_WAIT:?}", socket.display()))),
        }
    }

    pub(super) async fn call<T, F, Fut>(&self, wait: Duration, call: F) -> Result<T, Failure>
    where
        F: FnOnce(AttachmentsClient<Channel>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        match tokio::time::timeout(wait, call(self.0.clone())).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(failure(&status)),
            Err(_) => Err(Failure::Away(format!("no answer within {wait:?}"))),
        }
    }
}

/// A status that the agent sent carries a CNI code, or at least has no local cause.
fn failure(status: &Status) -> Failure {
    let sent = status.metadata().get(CNI_CODE).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
    let away = status.code() == Code::Unavailable || status.source().is_some();
    match sent {
        Some(code) => Failure::Refused(CniError::new(code, status.message())),
        None if away => Failure::Away(format!("{}: {}", status.code(), innermost(status))),
        None => {
            let code = match status.code() {
                Code::DeadlineExceeded | Code::Aborted | Code::ResourceExhausted => code::TRY_AGAIN,
                Code::InvalidArgument => code::INVALID_CONFIG,
                _ => code::AGENT,
            };
            Failure::Refused(CniError::new(code, status.message()).details(format!("gRPC status {:?}", status.code())))
        }
    }
}

/// The first cause says what happened; the layers above only say that something did.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
