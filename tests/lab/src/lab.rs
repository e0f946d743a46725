//! The lab: a switch, nodes, and a machine outside. Dropping it removes all of it.
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};

use crate::host::Host;
use crate::node::Node;
use crate::{cgroup, clean, netns, probe, sh};

/// Any number of nodes on one switch, with a machine outside that is no node and is everyone's gateway.
#[derive(Debug)]
pub struct Lab {
    /// Names everything that the lab makes.
    pub id: String,
    /// Scratch folder, at the same path inside every node.
    pub dir: PathBuf,
    /// The machine outside: routes between nobody, reaches the nodes, answers at [`netns::FAR_V4`] too.
    pub outside: Host,
    nodes: Vec<Node>,
    guard: Option<Child>,
}

impl Lab {
    /// A lab with `nodes` nodes, booted, and nothing running on them.
    pub fn new(nodes: u8) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!(
            "{:x}{}",
            std::process::id(),
            char::from(b'a' + (COUNT.fetch_add(1, Ordering::Relaxed) % 26) as u8)
        );
        Self::named(&id, nodes)
    }

    /// A lab with an id of the caller's choice: letters and digits, at most 7.
    pub fn named(id: &str, nodes: u8) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "the lab makes namespaces, mounts and cgroups: run it as root");
        ensure!(
            !id.is_empty() && id.len() <= 7 && id.bytes().all(|b| b.is_ascii_alphanumeric()),
            "lab id `{id}`: 1 to 7 letters or digits"
        );
        let dir = clean::base().join(id);
        if dir.exists() {
            bail!("a lab `{id}` exists already: `keelway-lab clean --all` removes it");
        }
        // Another lab's end may remove the folder of all just before.
        sh::wait_for("the lab's folder", sh::SOON, || Ok(fs::create_dir_all(&dir)?))?;
        let guard = start_guard(id)?;
        fs::write(dir.join("guard"), guard.id().to_string())?;
        let outside = host(id, "outside", netns::OUTSIDE)?;
        // From here on the guard cleans up whatever fails.
        let mut lab = Self { id: id.to_owned(), dir, outside, nodes: Vec::new(), guard: Some(guard) };
        netns::make_switch(id)?;
        lab.plug(&lab.outside)?;
        for _ in 0..nodes {
            lab.add_node()?;
        }
        Ok(lab)
    }

    /// The lab of this id that another process made and kept. Dropping this value leaves the lab as it is.
    pub fn open(id: &str) -> Result<Self> {
        let dir = clean::base().join(id);
        ensure!(dir.exists(), "there is no lab `{id}`");
        let mut nodes = Vec::new();
        for number in (1..).take_while(|number| dir.join(format!("node{number}")).exists()) {
            nodes.push(Node::new(host(id, &format!("node{number}"), 10 + number)?, number));
        }
        Ok(Self { id: id.to_owned(), outside: host(id, "outside", netns::OUTSIDE)?, dir, nodes, guard: None })
    }

    /// Lets the lab live on after this process; `keelway-lab clean --all` or [`Lab::open`] finds it again.
    pub fn keep(mut self) -> Result<()> {
        if let Some(mut guard) = self.guard.take() {
            guard.stdin.take().context("the guard's pipe")?.write_all(b"keep")?;
            guard.wait()?;
            fs::write(self.dir.join("guard"), "kept")?;
        }
        Ok(())
    }

    /// Adds a node and boots it.
    pub fn add_node(&mut self) -> Result<&Node> {
        let number = u8::try_from(self.nodes.len() + 1)?;
        let node = Node::new(host(&self.id, &format!("node{number}"), 10 + number)?, number);
        node.boot_node()?;
        self.nodes.push(node);
        Ok(&self.nodes[self.nodes.len() - 1])
    }

    /// The node with this number, from 1.
    ///
    /// # Panics
    /// When there is none.
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number - 1]
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A machine that is no node, such as the control plane.
    pub fn add_host(&self, name: &str, number: u8) -> Result<Host> {
        let host = self.host(name, number)?;
        self.plug(&host)?;
        Ok(host)
    }

    /// The handle of a machine that [`Lab::add_host`] made.
    pub fn host(&self, name: &str, number: u8) -> Result<Host> {
        host(&self.id, name, number)
    }

    /// Waits until so many of the probe's flows have been answered for the first time, wherever in the lab they run.
    pub fn wait_for_flows(&self, count: usize) -> Result<()> {
        let top = cgroup::v2_mount()?.join(cgroup::TOP).join(&self.id);
        let wanted = probe::flow::UNDER_WAY.to_str()?;
        sh::wait_for(&format!("{count} flows to be under way"), sh::SOON, || {
            let named =
                |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|n| n.trim_end() == wanted);
            let found = cgroup::processes(&top).iter().filter(|pid| named(pid)).count();
            ensure!(found == count, "{found} are");
            Ok(())
        })
    }

    fn plug(&self, host: &Host) -> Result<()> {
        cgroup::make(&host.cgroup)?;
        netns::plug(&self.id, &host.name, host.v4.octets()[3])
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let Some(mut guard) = self.guard.take() else { return };
        drop(guard.stdin.take());
        match guard.wait() {
            Ok(status) if status.success() => {}
            other => eprintln!(
                "lab {}: not all of it could be removed ({other:?}); `keelway-lab clean` tries again",
                self.id
            ),
        }
    }
}

fn host(id: &str, name: &str, number: u8) -> Result<Host> {
    let dir = clean::base().join(id).join(name);
    fs::create_dir_all(dir.join("log"))?;
    Ok(Host {
        name: name.to_owned(),
        v4: netns::v4(number),
        v6: netns::v6(number),
        lab: id.to_owned(),
        dir,
        cgroup: format!("{}/{id}/{name}", cgroup::TOP),
    })
}

fn start_guard(id: &str) -> Result<Child> {
    let mut command = Command::new(sh::own("keelway-lab")?);
    // A session's Ctrl-C must not reach it.
    command.args(["guard", id]).stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
    command.spawn().context("starting the lab's guard")
}
