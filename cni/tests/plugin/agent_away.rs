//! What holds while no agent runs.

use std::fs::File;
use std::time::{Duration, SystemTime};

use keelway_cni::LeaseKey;
use keelway_cni::pending;
use serde_json::json;

use crate::fake_agent::FakeAgent;
use crate::{about, conf, run};

#[test]
fn add_check_and_gc_are_told_to_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let prev = json!({ "prevResult": {
        "interfaces": [{ "name": "eth0", "sandbox": "/x" }],
        "ips": [{ "address": "10.0.0.1/32", "interface": 0 }],
    }});
    let calls = [("ADD", json!({})), ("CHECK", prev), ("GC", json!({ "cni.dev/valid-attachments": [] }))];
    for (command, more) in calls {
        let (code, message) = run(&about(command, "/x"), &conf(dir.path(), "1.1.0", more)).error();
        assert_eq!(code, 11, "{command}: {message}");
        assert!(message.contains("agent.sock") && message.contains("No such file or directory"), "{message}");
    }
}

#[test]
fn del_is_queued_for_the_agent_and_an_add_of_the_same_name_comes_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let queue = dir.path().join("cni-del");
    let conf = conf(dir.path(), "1.1.0", json!({}));
    run(&about("DEL", ""), &conf).silent();
    run(&about("DEL", ""), &conf).silent();
    let (waiting, bad) = pending::list(&queue).unwrap();
    assert_eq!(bad.len(), 0);
    assert_eq!(waiting.len(), 1, "one attachment, one entry");
    assert_eq!((waiting[0].network.as_str(), &waiting[0].key), ("keelway", &LeaseKey::new("c1", "eth0")));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert!(now.abs_diff(waiting[0].asked) < 60);

    let agent = FakeAgent::default().serve(dir.path());
    assert!(run(&about("ADD", "/x"), &conf).success);
    assert_eq!(agent.asked(), ["DEL c1 eth0 keelway", "ADD c1 eth0 /x keelway ns/web-0/u-1 mtu 0"]);
    assert_eq!(pending::list(&queue).unwrap().0, []);
    assert!(!pending::remove(&queue, "keelway", &LeaseKey::new("c1", "eth0")).unwrap());
}

#[test]
fn an_agent_that_goes_away_in_the_middle_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let _agent = FakeAgent { hang_up: true, ..FakeAgent::default() }.serve(dir.path());
    let conf = conf(dir.path(), "1.1.0", json!({}));
    let (code, message) = run(&about("ADD", "/x"), &conf).error();
    assert_eq!(code, 11, "{message}");
    run(&about("DEL", ""), &conf).silent();
    assert_eq!(pending::list(&dir.path().join("cni-del")).unwrap().0.len(), 1);
}

#[test]
fn a_connection_that_is_cut_is_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("agent.sock")).unwrap();
    std::thread::spawn(move || listener.incoming().flatten().for_each(drop));
    let conf = conf(dir.path(), "1.1.0", json!({}));
    let (code, message) = run(&about("ADD", "/x"), &conf).error();
    assert_eq!(code, 11, "{message}");
    run(&about("DEL", ""), &conf).silent();
    assert_eq!(pending::list(&dir.path().join("cni-del")).unwrap().0.len(), 1);
    // Its socket was there a moment ago: to STATUS that is a restart.
    run(&[("CNI_COMMAND", "STATUS")], &conf).silent();
}

#[test]
fn a_socket_that_nobody_listens_on_is_no_agent() {
    let dir = tempfile::tempdir().unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("agent.sock")).unwrap());
    let (code, message) = run(&about("ADD", "/x"), &conf(dir.path(), "1.1.0", json!({}))).error();
    assert_eq!(code, 11);
    assert!(message.contains("Connection refused"), "{message}");
}

#[test]
fn a_damaged_entry_is_named_and_the_others_are_done() {
    let dir = tempfile::tempdir().unwrap();
    let queue = dir.path().join("cni-del");
    run(&about("DEL", ""), &conf(dir.path(), "1.1.0", json!({}))).silent();
    std::fs::write(queue.join("00.json"), "{").unwrap();
    std::fs::write(queue.join(".x.1.tmp"), "half").unwrap();
    let (good, bad) = pending::list(&queue).unwrap();
    assert_eq!((good.len(), bad.len()), (1, 1));
    assert!(bad[0].to_string().contains("00.json"), "{}", bad[0]);
}

#[test]
fn a_del_that_cannot_be_written_down_fails() {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("cni-del")).unwrap();
    let (code, message) = run(&about("DEL", ""), &conf(dir.path(), "1.1.0", json!({}))).error();
    assert!(code == 5 && message.contains("cni-del"), "{code} {message}");
}

#[test]
fn status_holds_for_the_grace_time() {
    let status = [("CNI_COMMAND", "STATUS")];
    let dir = tempfile::tempdir().unwrap();
    let stdin = conf(dir.path(), "1.1.0", json!({}));
    let (code, message) = run(&status, &stdin).error();
    assert!(code == 50 && message.contains("never seen"), "{code} {message}");

    let seen = File::create(dir.path().join("agent.seen")).unwrap();
    run(&status, &stdin).silent();
    seen.set_modified(SystemTime::now() - Duration::from_secs(299)).unwrap();
    run(&status, &stdin).silent();
    seen.set_modified(SystemTime::now() - Duration::from_secs(400)).unwrap();
    let (code, message) = run(&status, &stdin).error();
    assert!(code == 50 && message.contains("more than 300 s"), "{code} {message}");
    run(&status, &conf(dir.path(), "1.1.0", json!({ "statusGraceSeconds": 500 }))).silent();

    // Without the file, the socket's own age counts.
    std::fs::remove_file(dir.path().join("agent.seen")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("agent.sock")).unwrap());
    run(&status, &stdin).silent();
    let (code, _) = {
        std::thread::sleep(Duration::from_millis(1100));
        run(&status, &conf(dir.path(), "1.1.0", json!({ "statusGraceSeconds": 0 }))).error()
    };
    assert_eq!(code, 50);
}
