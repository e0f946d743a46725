//! `make demo`: the whole of Keelway on two nodes without Kubernetes, each step shown by what was seen on the wire.
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::csi::Csi;
use crate::probe::{Asked, Flowed};
use crate::sh::{self, SOON, wait_for};
use crate::standalone::{self, Pod, Standalone};
use crate::story::Story;

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const EMPTY: [&str; 2] = ["10.96.0.12", "fd00:10:96::12"];
const DRIVER_SOCKET: &str = "/var/lib/kubelet/plugins/local.csi.keelway.dev/csi.sock";

const INGRESS: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web, namespace: default}\n\
    spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}]}]}\n";
const EGRESS: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: out, namespace: default}\n\
    spec: {podSelector: {matchLabels: {role: friend}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: web}}}]}]}\n";

/// Runs the demo; whether every row is as it should be.
pub fn run() -> Result<bool> {
    if let Some(reason) = standalone::missing().or_else(|| sh::missing(&["mkfs.ext4"], &["keelway-csi"])) {
        anyhow::bail!(reason);
    }
    let mut story = Story::new("demo");
    story.say("two nodes: namespaces, containerd, agents reading a manifests directory");
    let lab = Standalone::new(2, &[])?;
    story.say("pods through containerd and keelway-cni");
    let friend = lab.pod(1, "friend", &[("role", "friend")])?;
    let far = lab.pod(2, "far", &[("role", "stranger")])?;
    let mut web = Vec::new();
    for (name, node) in [("web1", 1), ("web2", 2), ("web3", 2)] {
        web.push(lab.pod(node, name, &[("app", "web")])?);
    }
    let demo = Demo { lab: &lab, friend: &friend, far: &far, web: &web };
    demo.pods(&mut story);
    demo.service(&mut story)?;
    demo.policy(&mut story);
    demo.agent_killed(&mut story);
    demo.volume(&mut story);
    demo.status(&mut story);
    story.say("removing the lab");
    drop(lab);
    story.end()
}

struct Demo<'a> {
    lab: &'a Standalone,
    friend: &'a Pod,
    far: &'a Pod,
    web: &'a [Pod],
}

impl Demo<'_> {
    fn pods(&self, story: &mut Story) {
        story.step("a pod reaches pods on its node and on the other, IPv4 and IPv6", || {
            let mut seen = Vec::new();
            let mut good = true;
            for v6 in [false, true] {
                for to in &self.web[..2] {
                    let report = self.ask(self.friend, to.address(v6).to_string(), 8080, &["--count", "20"])?;
                    good &= report.answers.get(&to.name) == Some(&20);
                    seen.push(format!("{} {}/20", to.address(v6), report.answered()));
                }
            }
            Ok((good, seen.join(", ")))
        });
        story.step("a pod reaches the outside under its node's address", || {
            let (node, outside) = (self.lab.node(1), &self.lab.lab.outside);
            let probe = sh::own("keelway-probe")?.display().to_string();
            let _server = outside.spawn("server", &[&probe, "serve", "--name", "outside"])?;
            let mut seen = Vec::new();
            let mut good = true;
            for (target, expected) in [("203.0.113.10", node.v4.to_string()), ("2001:db8:113::10", node.v6.to_string())]
            {
                let report =
                    self.eventually(self.friend, target, 8080, &["--count", "5"], |report| report.answered() == 5)?;
                good &= report.seen_as.keys().eq([&expected]);
                let names: Vec<&str> = report.seen_as.keys().map(String::as_str).collect();
                seen.push(format!("{target} saw {}", names.join(", ")));
            }
            Ok((good, seen.join(", ")))
        });
    }

    fn service(&self, story: &mut Story) -> Result<()> {
        let all: Vec<&Pod> = self.web.iter().collect();
        self.lab.service("web", VIPS, "TCP", 80, &all)?;
        self.lab.service("empty", EMPTY, "TCP", 80, &[])?;
        self.eventually(self.friend, VIPS[0], 80, &["--count", "50"], |report| report.answers.len() == 3)?;
        self.eventually(self.far, VIPS[0], 80, &["--count", "50"], |report| report.answers.len() == 3)?;
        for (who, from) in [("a pod on node 1", self.friend), ("a pod on node 2", self.far)] {
            story.step(&format!("a ClusterIP Service from {who}, IPv4 and IPv6"), || {
                let reports = VIPS.map(|vip| self.ask(from, vip.to_owned(), 80, &["--count", "300"]));
                let reports = reports.into_iter().collect::<Result<Vec<_>>>()?;
                Ok((
                    reports.iter().all(|report| spread(report, 3)),
                    reports.iter().map(counted).collect::<Vec<_>>().join("; "),
                ))
            });
        }
        story.step("the same Service from a process on the node itself", || {
            let target = socket(VIPS[0], 80)?;
            let report: Asked = self.lab.probe_on_node(1, &["ask", &target, "--count", "300"])?;
            Ok((spread(&report, 3), counted(&report)))
        });
        story.step("a Service without endpoints refuses at once", || {
            let report = self.ask(self.friend, EMPTY[0].to_owned(), 80, &["--count", "10", "--timeout", "2000"])?;
            Ok((report.failures.get("refused") == Some(&10), format!("of 10: {}", counted(&report))))
        });
        story.step("a killed backend is out of the rotation", || {
            let dead = &self.web[2];
            self.lab.kill_container(dead)?;
            self.lab.service("web", VIPS, "TCP", 80, &all[..2])?;
            self.eventually(self.friend, VIPS[0], 80, &["--count", "50"], |report| {
                report.answered() == 50 && !report.answers.contains_key(&dead.name)
            })?;
            let report = self.ask(self.friend, VIPS[0].to_owned(), 80, &["--count", "300"])?;
            Ok((spread(&report, 2) && !report.answers.contains_key(&dead.name), counted(&report)))
        });
        Ok(())
    }

    fn policy(&self, story: &mut Story) {
        let web = &self.web[0];
        story.step("ingress policy: a friend gets in, a stranger does not", || {
            let before = self.ask_web(self.far, &["--count", "5"])?;
            self.lab.write("ingress", INGRESS)?;
            let short = ["--count", "5", "--timeout", "300"];
            let address = web.address(false).to_string();
            self.eventually(self.far, &address, 8080, &short, |report| report.answered() == 0)?;
            let (stranger, friend) = (self.ask_web(self.far, &short)?, self.ask_web(self.friend, &["--count", "5"])?);
            let good = before.answered() == 5 && stranger.answered() == 0 && friend.answered() == 5;
            let (before, stranger, friend) = (before.answered(), stranger.answered(), friend.answered());
            Ok((good, format!("stranger {before}/5 before, {stranger}/5 after; friend {friend}/5")))
        });
        story.step("egress policy: a pod reaches what it may, and nothing else", || {
            self.lab.write("egress", EGRESS)?;
            let short = ["--count", "5", "--timeout", "300"];
            let elsewhere = self.far.address(false).to_string();
            self.eventually(self.friend, &elsewhere, 8080, &short, |report| report.answered() == 0)?;
            let (web, other) =
                (self.ask_web(self.friend, &["--count", "5"])?, self.ask(self.friend, elsewhere, 8080, &short)?);
            let back = self.ask(self.far, self.friend.address(false).to_string(), 8080, &["--count", "5"])?;
            let good = web.answered() == 5 && other.answered() == 0 && back.answered() == 5;
            let (web, other, back) = (web.answered(), other.answered(), back.answered());
            Ok((good, format!("to web {web}/5, elsewhere {other}/5, asked by others {back}/5")))
        });
    }

    fn agent_killed(&self, story: &mut Story) {
        story.step("both agents killed with SIGKILL and started again, under load: nobody notices", || {
            let (service, web) = (socket(VIPS[0], 80)?, SocketAddr::from((self.web[1].address(true), 8080)).to_string());
            let forbidden = SocketAddr::from((self.web[1].address(false), 8080)).to_string();
            std::thread::scope(|scope| {
                let flow = scope.spawn(|| -> Result<Flowed> {
                    self.lab.probe(self.friend, &["flow", &web, "--seconds", "6", "--rate", "200"])
                });
                let ask = scope.spawn(|| -> Result<Asked> {
                    self.lab.probe(self.friend, &["ask", &service, "--count", "1200", "--rate", "200"])
                });
                let denied = scope.spawn(|| -> Result<Asked> {
                    self.lab.probe(self.far, &["ask", &forbidden, "--count", "20", "--timeout", "300"])
                });
                std::thread::sleep(Duration::from_secs(1));
                for node in [1, 2] {
                    self.lab.stop_agent(node, Signal::SIGKILL)?;
                    std::thread::sleep(Duration::from_millis(500));
                    self.lab.start_agent(node)?;
                    self.lab.wait_synced(node)?;
                }
                let panicked = "a probe does not panic";
                let (flow, ask) = (flow.join().expect(panicked)?, ask.join().expect(panicked)?);
                let denied = denied.join().expect(panicked)?;
                let good = flow.lost() == 0 && flow.failures.is_empty() && flow.sent > 1000;
                let good = good && ask.answered() == 1200 && ask.resent == 0 && denied.answered() == 0 && denied.tried == 20;
                let (sent, lost, gap) = (flow.sent, flow.lost(), flow.longest_gap / 1000);
                let failed = ask.tried - ask.answered();
                let seen = format!("a flow of {sent} messages lost {lost}, longest silence {gap} ms; of {} new connections {failed} failed;", ask.tried);
                Ok((good, format!("{seen}\na forbidden client got through {} of {} times", denied.answered(), denied.tried)))
            })
        });
    }

    fn volume(&self, story: &mut Story) {
        story.step("a volume over its CSI socket keeps its data beyond its pod", || {
            let node = self.lab.node(1);
            let driver = sh::own("keelway-csi")?.display().to_string();
            let endpoint = format!("--endpoint=unix://{DRIVER_SOCKET}");
            node.run(&["mkdir", "-p", "/var/lib/kubelet/plugins/local.csi.keelway.dev"])?;
            let mut driver =
                node.spawn("csi", &[&driver, "--no-registration", "--node-name", &node.name, &endpoint])?;
            let csi = wait_for("the driver", SOON, || {
                driver.check()?;
                Csi::connect(node, DRIVER_SOCKET)
            })?;
            let volume = csi.create("demo", 64 << 20)?;
            let words = "written by the first pod";
            let first = self.pod_with_volume(&csi, &volume, "first")?;
            self.in_pod(&first, &format!("echo '{words}' >/data/file && sync"))?;
            self.remove_pod_with_volume(&csi, &volume, &first)?;
            let second = self.pod_with_volume(&csi, &volume, "second")?;
            let read = self.in_pod(&second, "cat /data/file && busybox df -T /data | busybox tail -1")?;
            self.remove_pod_with_volume(&csi, &volume, &second)?;
            csi.delete(&volume)?;
            let left = node.run(&["find", "/var/lib/keelway/pool", "-type", "f", "-size", "+1024k"])?;
            let mut lines = read.lines();
            let (text, mount) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
            let good = text == words && mount.contains("ext4") && left.is_empty();
            let mount = mount.split_whitespace().collect::<Vec<_>>().join(" ");
            Ok((
                good,
                format!(
                    "the second pod read \"{text}\"\nfrom {mount}; images left after deletion: {}",
                    left.lines().count()
                ),
            ))
        });
    }

    fn status(&self, story: &mut Story) {
        story.step("keelway status counts what it dropped, by reason", || {
            let status = self.lab.status(1)?;
            let drops = status["drops"].as_array().cloned().unwrap_or_default();
            let count = |drop: &serde_json::Value| drop["packets"].as_u64().unwrap_or(0);
            let policy: u64 = drops
                .iter()
                .filter(|drop| drop["reason"].as_str().is_some_and(|reason| reason.starts_with("policy")))
                .map(count)
                .sum();
            let mut by_reason: BTreeMap<&str, u64> = BTreeMap::new();
            for drop in &drops {
                *by_reason.entry(drop["reason"].as_str().unwrap_or("?")).or_default() += count(drop);
            }
            let shown: Vec<String> = by_reason.iter().map(|(reason, packets)| format!("{reason} {packets}")).collect();
            Ok((policy > 0, shown.join(", ")))
        });
    }

    fn pod_with_volume(&self, csi: &Csi, volume: &crate::csi::Volume, name: &str) -> Result<Pod> {
        let path = csi.publish(volume, name)?;
        self.lab.pod_with("default", 1, name, &[("app", "data")], vec![(path, "/data".to_owned())])
    }

    fn remove_pod_with_volume(&self, csi: &Csi, volume: &crate::csi::Volume, pod: &Pod) -> Result<()> {
        self.lab.remove_pod(pod)?;
        csi.unpublish(volume, &pod.name)
    }

    fn in_pod(&self, pod: &Pod, script: &str) -> Result<String> {
        let done = self.lab.exec(pod, &["busybox", "sh", "-c", script])?;
        ensure!(done.exit_code == 0, "in pod {}: {script}: {done:?}", pod.name);
        Ok(done.stdout)
    }

    fn ask_web(&self, from: &Pod, options: &[&str]) -> Result<Asked> {
        self.ask(from, self.web[0].address(false).to_string(), 8080, options)
    }

    fn ask(&self, from: &Pod, address: String, port: u16, options: &[&str]) -> Result<Asked> {
        let target = socket(&address, port)?;
        self.lab.probe(from, &[&["ask", &target], options].concat())
    }

    /// Asks until the answers are as wanted: the directory is read within a moment, not at once.
    fn eventually(
        &self,
        from: &Pod,
        address: &str,
        port: u16,
        options: &[&str],
        wanted: impl Fn(&Asked) -> bool,
    ) -> Result<Asked> {
        wait_for(&format!("{address} from {}", from.name), SOON, || {
            let report = self.ask(from, address.to_owned(), port, options)?;
            ensure!(wanted(&report), "it saw {report:?}");
            Ok(report)
        })
    }
}

fn socket(address: &str, port: u16) -> Result<String> {
    let address: std::net::IpAddr = address.parse().with_context(|| format!("address `{address}`"))?;
    Ok(SocketAddr::from((address, port)).to_string())
}

/// Whether this many backends answered, each at least half of its fair share, and nothing failed.
fn spread(report: &Asked, backends: u64) -> bool {
    let share = report.tried / backends / 2;
    report.failures.is_empty()
        && report.answers.len() as u64 == backends
        && report.answers.values().all(|count| *count >= share)
}

fn counted(report: &Asked) -> String {
    let mut words: Vec<String> = report.answers.iter().map(|(name, count)| format!("{name} {count}")).collect();
    words.extend(report.failures.iter().map(|(kind, count)| format!("{kind}: {count}")));
    words.join(", ")
}
