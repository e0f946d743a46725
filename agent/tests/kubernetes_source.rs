//! The Kubernetes source against a real API server, with the permissions of the manifests in `deploy/` and no others:
//! outages, deletions that happen during one, failover, and what leaves the selection.
//!
//! Needs etcd, kube-apiserver and kubectl in `$KUBEBUILDER_ASSETS` or in the lab's cache, and openssl; says so and passes
//! over the test where they are missing. Everything listens on the loopback address, on ports that the kernel chose.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keelway_agent::events::{CONTROLLER, Note, Recorder};
use keelway_agent::source::kube::Kubernetes;
use keelway_agent::source::{CHANNEL_CAPACITY, Event, Kind, Object, Source, Status};
use keelway_proxy::ObjectName;
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(60);
/// The DaemonSet's service account, as the API server sees it.
const ACCOUNT: &str = "system:serviceaccount:kube-system:keelway-agent";

fn programs() -> Result<PathBuf, String> {
    let given = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let cache = std::env::var_os("KEELWAY_CACHE").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/keelway"));
    let cached = cache.or(home).map(|cache| cache.join("bin"));
    let places: Vec<PathBuf> = given.into_iter().chain(cached).collect();
    let has_all =
        |dir: &&PathBuf| ["etcd", "kube-apiserver", "kubectl"].iter().all(|program| dir.join(program).is_file());
    let found = places.iter().find(has_all).cloned();
    found.ok_or_else(|| format!("no etcd, kube-apiserver and kubectl in {places:?}; set KUBEBUILDER_ASSETS"))
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Cluster {
    programs: PathBuf,
    dir: tempfile::TempDir,
    etcd_port: u16,
    servers: Vec<(u16, Option<Process>)>,
    // Last, so that the servers end first.
    _etcd: Process,
}

impl Cluster {
    fn start(programs: PathBuf, servers: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (etcd_port, peer_port) = (free_port(), free_port());
        let key = dir.path().join("sa.key");
        let made =
            Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("2048").stderr(Stdio::null()).status();
        assert!(made.unwrap().success());
        let tokens = format!("admin,admin,1,\"system:masters\"\nagent,{ACCOUNT},2\n");
        std::fs::write(dir.path().join("tokens"), tokens).unwrap();
        let etcd = Command::new(programs.join("etcd"))
            .arg("--data-dir")
            .arg(dir.path().join("etcd"))
            .arg("--unsafe-no-fsync")
            .arg(format!("--listen-client-urls=http://127.0.0.1:{etcd_port}"))
            .arg(format!("--advertise-client-urls=http://127.0.0.1:{etcd_port}"))
            .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer_port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let servers = (0..servers).map(|_| (free_port(), None)).collect();
        let mut this = Self { programs, dir, etcd_port, servers, _etcd: Process(etcd) };
        for index in 0..this.servers.len() {
            this.start_server(index);
        }
        for index in 0..this.servers.len() {
            this.wait_for_server(index);
        }
        this
    }

    fn start_server(&mut self, index: usize) {
        let port = self.servers[index].0;
        let key = self.dir.path().join("sa.key");
        let log = std::fs::File::create(self.dir.path().join(format!("apiserver{index}.log"))).unwrap();
        let child = Command::new(self.programs.join("kube-apiserver"))
            .arg(format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port))
            .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none"])
            .arg(format!("--secure-port={port}"))
            .arg(format!("--cert-dir={}", self.dir.path().join(format!("certs{index}")).display()))
            .arg(format!("--token-auth-file={}", self.dir.path().join("tokens").display()))
            .arg(format!("--service-account-key-file={}", key.display()))
            .arg(format!("--service-account-signing-key-file={}", key.display()))
            .args([
                "--service-account-issuer=https://kubernetes.default.svc",
                "--service-cluster-ip-range=10.96.0.0/16",
            ])
            .args([
                "--authorization-mode=RBAC",
                "--allow-privileged=true",
                "--disable-admission-plugins=ServiceAccount",
            ])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.servers[index].1 = Some(Process(child));
    }

    fn wait_for_server(&mut self, index: usize) {
        let until = Instant::now() + PATIENCE;
        while !self.try_kubectl(index, &["get", "--raw", "/readyz"], "").0 {
            let process = self.servers[index].1.as_mut().unwrap();
            let dead = process.0.try_wait().unwrap();
            let log = || std::fs::read_to_string(self.dir.path().join(format!("apiserver{index}.log"))).unwrap();
            assert!(dead.is_none() && Instant::now() < until, "kube-apiserver {index} does not come up: {}", log());
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn stop_server(&mut self, index: usize) {
        self.servers[index].1 = None;
    }

    fn url(&self, index: usize) -> String {
        format!("https://127.0.0.1:{}", self.servers[index].0)
    }

    fn kubeconfig(&self, index: usize, token: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{token}{index}.conf"));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{name: c, cluster: {{server: '{}', insecure-skip-tls-verify: true}}}}]\n\
             users: [{{name: u, user: {{token: {token}}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
            self.url(index)
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    fn try_kubectl(&self, index: usize, arguments: &[&str], input: &str) -> (bool, String) {
        use std::io::Write;
        let mut child = Command::new(self.programs.join("kubectl"))
            .arg("--kubeconfig")
            .arg(self.kubeconfig(index, "admin"))
            .arg("--cache-dir")
            .arg(self.dir.path().join("kubectl"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    }

    fn kubectl(&self, index: usize, arguments: &[&str], input: &str) -> String {
        let (ok, text) = self.try_kubectl(index, arguments, input);
        assert!(ok, "kubectl {arguments:?}: {text}");
        text
    }

    async fn source(&self, servers: &[usize]) -> Seen {
        let urls: Vec<String> = servers.iter().map(|index| self.url(*index)).collect();
        let source = Kubernetes::kubeconfig(&self.kubeconfig(servers[0], "agent"), &urls).await.unwrap();
        let (sender, events) = mpsc::channel(CHANNEL_CAPACITY);
        let status = Status::default();
        tokio::spawn(source.run(sender, status.clone()));
        Seen { events, status, all: Vec::new() }
    }
}

struct Seen {
    events: mpsc::Receiver<Event>,
    status: Status,
    all: Vec<Event>,
}

impl Seen {
    /// Reads until an event for which `wanted` holds.
    async fn until(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let event = tokio::time::timeout_at(deadline, self.events.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("no {what}; problems: {:?}", self.status.problems())).unwrap();
            let found = wanted(&event);
            self.all.push(event);
            if found {
                return;
            }
        }
    }

    async fn upserted(&mut self, kind: Kind, name: &str) {
        let wanted = |event: &Event| matches!(event, Event::Upsert(object) if is(object, kind, name));
        self.until(&format!("upsert of {kind} {name}"), wanted).await;
    }

    async fn deleted(&mut self, kind: Kind, name: &str) {
        let wanted = |event: &Event| matches!(event, Event::Delete(gone) if gone.kind == kind && gone.name == name);
        self.until(&format!("deletion of {kind} {name}"), wanted).await;
    }

    async fn synced(&mut self) {
        for _ in Kind::ALL {
            self.until("sync", |event| matches!(event, Event::Synced(_))).await;
        }
        let until = Instant::now() + PATIENCE;
        while !self.status.synced() {
            assert!(Instant::now() < until, "the status does not say so");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn problems_become(&self, holds: impl Fn(&[String]) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !holds(&self.status.problems()) {
            assert!(Instant::now() < until, "{:?}", self.status.problems());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn is(object: &Object, kind: Kind, name: &str) -> bool {
    let reference = object.reference();
    reference.kind == kind && reference.name == name
}

fn service(name: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n")
}

const OBJECTS: &str = "
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24]}
---
apiVersion: v1
kind: Pod
metadata: {name: pod, labels: {app: web}}
spec: {nodeName: n1, containers: [{name: c, image: i, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: policy}
spec: {podSelector: {}, egress: [{}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.244.1.5]}]
";

#[tokio::test(flavor = "multi_thread")]
async fn outages_deletions_and_failover() {
    let programs = match programs() {
        Ok(programs) => programs,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return;
        }
    };
    let mut cluster = Cluster::start(programs, 2);
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let deploy = deploy.to_str().unwrap();
    cluster.kubectl(0, &["apply", "--dry-run=server", "-k", deploy], "");
    cluster.kubectl(0, &["apply", "-f", &format!("{deploy}/agent/rbac.yaml")], "");
    cluster.kubectl(0, &["apply", "-f", "-"], &format!("{OBJECTS}---\n{}", service("web")));

    let mut seen = cluster.source(&[0]).await;
    seen.synced().await;
    for (kind, name) in [
        (Kind::Node, "n1"),
        (Kind::ServiceCidr, "kubernetes"),
        (Kind::Namespace, "default"),
        (Kind::Service, "web"),
        (Kind::EndpointSlice, "web-1"),
        (Kind::NetworkPolicy, "policy"),
        (Kind::Pod, "pod"),
    ] {
        let found = seen.all.iter().any(|event| matches!(event, Event::Upsert(object) if is(object, kind, name)));
        assert!(found, "{kind} {name} is missing");
        assert!(seen.status.kind(kind).objects > 0, "{kind}");
    }
    assert!(seen.status.problems().is_empty(), "{:?}", seen.status.problems());

    // What leaves the selection is gone for us.
    let label = ["label", "endpointslice", "web-1", "service.kubernetes.io/headless="];
    cluster.kubectl(0, &label, "");
    seen.deleted(Kind::EndpointSlice, "web-1").await;
    cluster.kubectl(0, &["label", "endpointslice", "web-1", "service.kubernetes.io/headless-"], "");
    seen.upserted(Kind::EndpointSlice, "web-1").await;

    // An outage: what is known stays, and what happens meanwhile is seen afterwards.
    cluster.stop_server(0);
    seen.problems_become(|problems| problems.len() == Kind::ALL.len()).await;
    assert!(seen.status.synced() && seen.status.kind(Kind::Pod).objects == 1);
    cluster.kubectl(1, &["delete", "networkpolicy", "policy"], "");
    cluster.kubectl(1, &["delete", "pod", "pod", "--force", "--grace-period=0"], "");
    cluster.kubectl(1, &["apply", "-f", "-"], &service("during"));
    assert!(seen.events.try_recv().is_err(), "nothing is known during the outage");
    let before = seen.all.len();
    cluster.start_server(0);
    cluster.wait_for_server(0);
    seen.problems_become(<[_]>::is_empty).await;
    // The three come from watches of their own, in any order.
    let mut left = vec!["policy", "pod", "during"];
    while !left.is_empty() {
        seen.until("what happened during the outage", |event| !matches!(event, Event::Synced(_))).await;
        let name = match seen.all.last().unwrap() {
            Event::Delete(gone) => gone.name.clone(),
            Event::Upsert(Object::Service(service)) => service.name.name.clone(),
            _ => continue,
        };
        left.retain(|wanted| *wanted != name);
    }
    let synced_again = seen.all[before..].iter().any(|event| matches!(event, Event::Synced(_)));
    assert!(!synced_again, "a kind is synced once");

    // With two servers, an outage of one is none.
    let mut seen = cluster.source(&[0, 1]).await;
    seen.synced().await;
    cluster.stop_server(0);
    cluster.kubectl(1, &["apply", "-f", "-"], &service("failover"));
    seen.upserted(Kind::Service, "failover").await;
    assert_eq!(seen.status.description(), format!("kubernetes {}", cluster.url(1)));
    seen.problems_become(<[_]>::is_empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_services_are_written_with_the_deployed_permissions() {
    let programs = match programs() {
        Ok(programs) => programs,
        Err(reason) => return eprintln!("skipped: {reason}"),
    };
    let cluster = Cluster::start(programs, 1);
    let rbac = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/agent/rbac.yaml");
    cluster.kubectl(0, &["apply", "-f", rbac.to_str().unwrap()], "");
    cluster.kubectl(0, &["apply", "-f", "-"], &service("web"));
    let source = Kubernetes::kubeconfig(&cluster.kubeconfig(0, "agent"), &[]).await.unwrap();
    let recorder = Recorder::start(source.client(), "n1".into());
    let about = ObjectName::new("default", "web");
    // One Event, however often; a Service that is gone has none.
    for round in 1..=3 {
        recorder.warn(&about, Note::Conflict, &format!("198.51.100.7 port 80 is default/other's, {round}"));
    }
    recorder.warn(&ObjectName::new("default", "gone"), Note::LeftOut, "does not fit");
    recorder.warn(&about, Note::HealthCheckPort, &"long ".repeat(1000));
    let until = Instant::now() + PATIENCE;
    let events = loop {
        let list = cluster.kubectl(0, &["get", "events.events.k8s.io", "-o", "json"], "");
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let ours = list["items"].as_array().unwrap().iter().filter(|event| event["reportingController"] == CONTROLLER);
        let all: Vec<_> = ours.cloned().collect();
        if all.iter().any(|event| event["reason"] == "FailedToStartServiceHealthcheck") {
            break all;
        }
        assert!(Instant::now() < until, "{list:#}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert_eq!(events.len(), 2, "{events:#?}");
    let conflict = events.iter().find(|event| event["reason"] == "ServiceAddressConflict").unwrap();
    assert_eq!(conflict["series"]["count"], 3, "{conflict:#}");
    assert_eq!((&conflict["type"], &conflict["reportingInstance"]), (&"Warning".into(), &"n1".into()));
    assert!(conflict["note"].as_str().unwrap().starts_with("node n1: 198.51.100.7 port 80"), "{conflict:#}");
    let described = cluster.kubectl(0, &["describe", "service", "web"], "");
    assert!(described.contains("ServiceAddressConflict"), "{described}");
}

/// The part of [`the_last_known_servers_are_dialled_in_cluster`] that runs in a mount namespace with a service account.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "is run by the_last_known_servers_are_dialled_in_cluster"]
async fn in_cluster_part() {
    let state_dir = PathBuf::from(std::env::var_os("STATE_DIR").expect("STATE_DIR"));
    let (sender, events) = mpsc::channel(CHANNEL_CAPACITY);
    let source = Kubernetes::in_cluster(&[], &state_dir).unwrap();
    let status = Status::default();
    tokio::spawn(source.run(sender, status.clone()));
    let mut seen = Seen { events, status, all: Vec::new() };
    seen.synced().await;
    println!("described as {}", seen.status.description());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_known_servers_are_dialled_in_cluster() {
    let programs = match programs() {
        Ok(programs) if nix::unistd::geteuid().is_root() => programs,
        Ok(_) => return eprintln!("skipped: a mount namespace of its own needs root"),
        Err(reason) => return eprintln!("skipped: {reason}"),
    };
    let cluster = Cluster::start(programs, 1);
    let rbac = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/agent/rbac.yaml");
    cluster.kubectl(0, &["apply", "-f", rbac.to_str().unwrap()], "");
    let port = cluster.servers[0].0;
    let account = cluster.dir.path().join("account");
    let state = cluster.dir.path().join("state");
    std::fs::create_dir_all(&account).unwrap();
    std::fs::create_dir_all(&state).unwrap();
    std::fs::write(account.join("token"), "agent").unwrap();
    std::fs::write(account.join("namespace"), "kube-system").unwrap();
    std::fs::copy(cluster.dir.path().join("certs0/apiserver.crt"), account.join("ca.crt")).unwrap();
    // The first one is dead; the in-cluster address leads nowhere.
    let known = format!("{{\"servers\": [\"127.0.0.1:{}\", \"127.0.0.1:{port}\"]}}", free_port());
    std::fs::write(state.join("api-servers.json"), known).unwrap();
    let script = "mkdir -p /run/secrets && mount -t tmpfs none /run/secrets \
        && mkdir -p /run/secrets/kubernetes.io && cp -r \"$ACCOUNT\" /run/secrets/kubernetes.io/serviceaccount \
        && exec \"$0\" --exact in_cluster_part --ignored --nocapture";
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .env("ACCOUNT", &account)
        .env("STATE_DIR", &state)
        .env("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        .env("KUBERNETES_SERVICE_PORT", free_port().to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(text.contains(&format!("described as kubernetes https://127.0.0.1:{port}")), "{text}");
}

#[tokio::test]
async fn a_broken_kubeconfig_is_named_and_an_unreachable_server_is_a_problem_not_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kubeconfig");
    let error = Kubernetes::kubeconfig(&path, &[]).await.err().unwrap().to_string();
    assert!(error.starts_with(&format!("kubeconfig: {}: ", path.display())), "{error}");
    std::fs::write(&path, "apiVersion: v1\nkind: Config\n").unwrap();
    assert!(Kubernetes::kubeconfig(&path, &[]).await.is_err());

    let url = format!("http://127.0.0.1:{}", free_port());
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: '{url}'}}}}]\n\
         users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
    );
    std::fs::write(&path, text).unwrap();
    let (sender, events) = mpsc::channel(CHANNEL_CAPACITY);
    let status = Status::default();
    let task = tokio::spawn(Kubernetes::kubeconfig(&path, &[]).await.unwrap().run(sender, status.clone()));
    let seen = Seen { events, status, all: Vec::new() };
    seen.problems_become(|problems| problems.len() == Kind::ALL.len()).await;
    assert!(seen.status.problems()[0].contains("Connection refused"), "{:?}", seen.status.problems());
    assert_eq!(seen.status.description(), format!("kubernetes {url}"));
    assert!(!task.is_finished() && !seen.status.synced());
}
