//! The binary against an agent's API of its own making.

use std::process::{Command, Output};

use keelway_api::v1::inspect_server::{Inspect, InspectServer};
use keelway_api::v1::{ListServicesRequest, NodeStatusRequest, NodeStatusResponse, ServiceState};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

struct Agent(NodeStatusResponse);

#[tonic::async_trait]
impl Inspect for Agent {
    type ListServicesStream = tokio_stream::Empty<Result<ServiceState, Status>>;

    async fn list_services(
        &self,
        _: Request<ListServicesRequest>,
    ) -> Result<Response<Self::ListServicesStream>, Status> {
        Ok(Response::new(tokio_stream::empty()))
    }

    async fn node_status(&self, _: Request<NodeStatusRequest>) -> Result<Response<NodeStatusResponse>, Status> {
        Ok(Response::new(self.0.clone()))
    }
}

fn keelway(socket: &std::path::Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keelway"));
    command.args(arguments).arg("--socket").arg(socket).output().unwrap()
}

#[test]
fn without_an_agent_the_error_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let output = keelway(&dir.path().join("agent.sock"), &["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("agent.sock: No such file") && error.contains("no keelway-agent is running"), "{error}");
    assert_eq!(keelway(dir.path(), &["nonsense"]).status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_comes_as_a_table_or_as_json_and_the_exit_status_tells() {
    let dir = tempfile::tempdir().unwrap();
    for (synced, code) in [(true, 0), (false, 3)] {
        let socket = dir.path().join(format!("{code}.sock"));
        let status = NodeStatusResponse { node: "n1".into(), synced, ..NodeStatusResponse::default() };
        let listener = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let server = tonic::transport::Server::builder().add_service(InspectServer::new(Agent(status)));
        tokio::spawn(server.serve_with_incoming(listener));
        let json = tokio::task::spawn_blocking({
            let socket = socket.clone();
            move || keelway(&socket, &["status", "-o", "json"])
        });
        let json = json.await.unwrap();
        assert_eq!(json.status.code(), Some(code));
        let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!((&value["node"], &value["synced"]), (&"n1".into(), &synced.into()));
        let table = tokio::task::spawn_blocking(move || keelway(&socket, &["status"])).await.unwrap();
        let text = String::from_utf8(table.stdout).unwrap();
        assert!(text.contains("Node            n1\n"), "{text}");
    }
}
