use std::time::Instant;

use super::super::{Object, ObjectRef};
use super::*;

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )
}

fn reference(name: &str) -> ObjectRef {
    ObjectRef { kind: Kind::Service, namespace: "default".to_owned(), name: name.to_owned() }
}

fn reason(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn errors_name_document_object_and_field() {
    let good = service("a", "10.96.0.1");
    let bad_value = format!("{good}---\n{}", service("b", "10.96.0"));
    assert_eq!(
        reason(&bad_value),
        r#"document 2: Service default/b: spec.clusterIPs[]: "10.96.0" is not an IP address"#
    );
    let bad_type = good.replace("port: 80", "port: http");
    let text = reason(&bad_type);
    assert!(text.starts_with("document 1: Service default/a: spec.ports[0].port: ") && text.contains("http"), "{text}");
    let typo = good.replace("clusterIP", "clusterIp");
    assert_eq!(reason(&typo), "document 1: Service default/a: spec.clusterIp: unknown field");
    let kind = reason("apiVersion: apps/v1\nkind: Deployment\n");
    assert!(kind.starts_with(r#"document 1: kind: "Deployment" of apiVersion "apps/v1" is not one of"#), "{kind}");
    assert!(reason("a: [").starts_with("document 1: "), "{}", reason("a: ["));
    assert_eq!(reason(&format!("{good}---\n{good}")), "document 2: Service default/a: is in this file twice");
    let nameless = good.replace("name: a", "");
    assert_eq!(reason(&nameless), r#"document 1: Service default/: metadata.name: "" is not a name"#);
}

#[test]
fn lists_and_empty_documents() {
    let list = "
# nothing
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: a}}
- {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: a}, spec: {podSelector: {}}}
- {apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: []}}
- {apiVersion: v1, kind: Node, metadata: {name: n}}
---
";
    assert_eq!(parse(list).unwrap().len(), 4);
    assert!(parse("").unwrap().is_empty());
    let broken = list.replace("podSelector", "podSelectors");
    assert_eq!(reason(&broken), "document 1: items[1].NetworkPolicy a/p: spec.podSelectors: unknown field");
}

struct Running {
    dir: tempfile::TempDir,
    events: mpsc::Receiver<Event>,
    status: Status,
}

async fn start(files: &[(&str, String)]) -> Running {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let (sender, events) = mpsc::channel(64);
    let status = Status::default();
    tokio::spawn(Manifests::open(dir.path()).unwrap().run(sender, status.clone()));
    let mut this = Running { dir, events, status };
    let mut synced = 0;
    while synced < Kind::ALL.len() {
        synced += usize::from(matches!(this.next().await, Event::Synced(_)));
    }
    this
}

impl Running {
    /// Fails rather than wait for the slow look: what is tested is the watch.
    async fn next(&mut self) -> Event {
        tokio::time::timeout(RESCAN * 9 / 10, self.events.recv()).await.expect("an event in time").unwrap()
    }

    async fn upserted(&mut self) -> (String, String) {
        match self.next().await {
            Event::Upsert(Object::Service(service)) => (service.name.name, service.cluster_ips[0].to_string()),
            other => panic!("{other:?}"),
        }
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    async fn problems_become(&self, holds: impl Fn(&[String]) -> bool) -> Vec<String> {
        let until = Instant::now() + RESCAN * 3;
        loop {
            let problems = self.status.problems();
            if holds(&problems) {
                return problems;
            }
            assert!(Instant::now() < until, "{problems:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn pair(name: &str, ip: &str) -> (String, String) {
    (name.to_owned(), ip.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_and_deletions_are_seen_and_temporary_files_are_not() {
    let mut run = start(&[("a.yaml", service("a", "10.96.0.1"))]).await;
    assert_eq!(run.status.kind(Kind::Service).objects, 1);

    run.write("a.yaml", &service("a", "10.96.0.2"));
    assert_eq!(run.upserted().await, pair("a", "10.96.0.2"));
    assert!(run.status.synced());

    // An editor's ways: a hidden copy, a backup, a rename over the file.
    run.write(".b.yaml.swp", &service("x", "10.96.0.9"));
    run.write(".b.yaml", &service("x", "10.96.0.9"));
    run.write("a.yaml~", &service("x", "10.96.0.9"));
    run.write("b.tmp", &service("b", "10.96.0.3"));
    std::fs::rename(run.dir.path().join("b.tmp"), run.dir.path().join("b.yaml")).unwrap();
    assert_eq!(run.upserted().await, pair("b", "10.96.0.3"));

    std::fs::remove_file(run.dir.path().join("a.yaml")).unwrap();
    assert_eq!(run.next().await, Event::Delete(reference("a")));
    assert_eq!(run.status.kind(Kind::Service).objects, 1);
    assert!(run.status.problems().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_being_written_is_read_when_it_is_closed() {
    use std::io::Write;
    let both = format!("{}---\n{}", service("a", "10.96.0.1"), service("b", "10.96.0.2"));
    let mut run = start(&[("a.yaml", both.clone())]).await;
    let mut file = std::fs::File::create(run.dir.path().join("a.yaml")).unwrap();
    file.write_all(service("a", "10.96.0.1").as_bytes()).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    file.write_all(b"---\n").unwrap();
    file.write_all(service("b", "10.96.0.7").as_bytes()).unwrap();
    drop(file);
    assert_eq!(run.upserted().await, pair("b", "10.96.0.7"), "b was never deleted in between");
}

fn policy_and_pod() -> (String, String) {
    let policy =
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: {podSelector: {}}\n";
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, uid: u}\n";
    (policy.to_owned(), pod.to_owned())
}

impl Running {
    async fn next_kind(&mut self) -> Kind {
        match self.next().await {
            Event::Upsert(object) => object.reference().kind,
            other => panic!("{other:?}"),
        }
    }

    fn rename(&self, name: &str, text: &str) {
        let fresh = self.dir.path().join(format!(".{name}"));
        std::fs::write(&fresh, text).unwrap();
        // Old enough to be read at once.
        std::thread::sleep(Duration::from_millis(50));
        std::fs::rename(fresh, self.dir.path().join(name)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_never_later_than_a_pod_that_was_written_after_it() {
    use std::io::Write;
    let (policy, pod) = policy_and_pod();
    let mut run = start(&[]).await;
    // Seen together, in files whose names are in the other order.
    run.write(".z", &policy);
    run.write(".a", &pod);
    for (fresh, name) in [(".z", "z.yaml"), (".a", "a.yaml")] {
        std::fs::rename(run.dir.path().join(fresh), run.dir.path().join(name)).unwrap();
    }
    assert_eq!(run.next_kind().await, Kind::NetworkPolicy);
    assert_eq!(run.next_kind().await, Kind::Pod);

    // The policy's writer is slow; the pod is there at once.
    let mut file = std::fs::File::create(run.dir.path().join("slow.yaml")).unwrap();
    file.write_all(policy.replace("name: p", "name: q").as_bytes()).unwrap();
    run.rename("fast.yaml", &pod.replace("name: p", "name: q"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(run.events.try_recv().is_err(), "the pod comes before the policy");
    drop(file);
    assert_eq!(run.next_kind().await, Kind::NetworkPolicy);
    assert_eq!(run.next_kind().await, Kind::Pod);

    // A writer that never ends holds up nothing for long.
    let mut file = std::fs::File::create(run.dir.path().join("endless.yaml")).unwrap();
    run.rename("next.yaml", &pod.replace("name: p", "name: r"));
    let writing = async {
        loop {
            file.write_all(b"# more\n").unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        kind = run.next_kind() => assert_eq!(kind, Kind::Pod),
        () = writing => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_breaks_keeps_its_last_good_state_and_is_named() {
    let mut run = start(&[("a.yaml", service("a", "10.96.0.1"))]).await;
    run.write("a.yaml", &service("a", "10.96.0.999"));
    let problems = run.problems_become(|problems| problems.len() == 1).await;
    let start = format!("{}: document 1: Service default/a: ", run.dir.path().join("a.yaml").display());
    assert!(problems[0].starts_with(&start) && problems[0].contains("stays in force"), "{problems:?}");
    assert_eq!(run.status.kind(Kind::Service).objects, 1);
    run.write("a.yaml", &service("a", "10.96.0.5"));
    assert_eq!(run.upserted().await, pair("a", "10.96.0.5"));
    run.problems_become(<[_]>::is_empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_file_by_name_wins_and_the_other_is_named() {
    let mut run = start(&[("b.yaml", service("s", "10.96.0.2"))]).await;
    run.write("c.yaml", &service("s", "10.96.0.3"));
    let problems = run.problems_become(|problems| !problems.is_empty()).await;
    assert_eq!(problems, ["Service default/s: is in b.yaml and c.yaml; the first is in force"]);
    std::fs::remove_file(run.dir.path().join("b.yaml")).unwrap();
    assert_eq!(run.upserted().await, pair("s", "10.96.0.3"));
    run.problems_become(<[_]>::is_empty).await;
    run.write("a.yaml", &service("s", "10.96.0.1"));
    assert_eq!(run.upserted().await, pair("s", "10.96.0.1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_goes_takes_nothing_with_it() {
    let mut run = start(&[("a.yaml", service("a", "10.96.0.1"))]).await;
    let (dir, away) = (run.dir.path().to_owned(), run.dir.path().with_extension("away"));
    std::fs::rename(&dir, &away).unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(run.events.try_recv().is_err());
    std::fs::create_dir(&dir).unwrap();
    std::fs::remove_dir_all(&away).unwrap();
}

#[test]
fn at_the_start_every_broken_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.yaml"), "kind: [").unwrap();
    std::fs::write(dir.path().join("b.yaml"), service("b", "x")).unwrap();
    std::fs::write(dir.path().join("c.yaml"), service("c", "10.96.0.1")).unwrap();
    let text = Manifests::open(dir.path()).unwrap_err().to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.len() == 2 && lines[0].contains("a.yaml: document 1: ") && lines[1].contains("b.yaml: "), "{text}");
    let missing = Manifests::open(&dir.path().join("none")).unwrap_err().to_string();
    assert!(missing.ends_with("none: No such file or directory (os error 2)"), "{missing}");
}
