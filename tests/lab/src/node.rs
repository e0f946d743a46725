//! A node: a machine with its own processes, file systems, bpffs and cgroup; it can lose power and boot again.
use std::fs::{self, File};
use std::ops::Deref;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::boot::NodeSpec;
use crate::host::Host;
use crate::process::child_of;
use crate::sh::{self, SOON, wait_for};
use crate::{cgroup, clean, netns};

/// A node of a lab; what a [`Host`] can do, it can do inside its namespaces.
#[derive(Debug)]
pub struct Node {
    host: Host,
    /// Its number, from 1: `node1` has host number 11.
    pub number: u8,
    parent: Mutex<Option<Child>>,
}

impl Deref for Node {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Node {
    pub(crate) fn new(host: Host, number: u8) -> Self {
        Self { host, number, parent: Mutex::new(None) }
    }

    /// What survives a reboot: `etc`, `opt`, `var` (overlays), `kubelet`, `containerd`, `keelway` (below /var/lib).
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    /// A path as seen in the node, from outside: sockets and files of a running node.
    pub fn path(&self, inside: &str) -> Result<PathBuf> {
        let pid = self.pid1().with_context(|| format!("{} has no power", self.name))?;
        Ok(PathBuf::from(format!("/proc/{pid}/root")).join(inside.trim_start_matches('/')))
    }

    /// Where the node's socket hooks belong, as this machine sees it. (The node itself sees this as its v2 mount.)
    pub fn cgroup_v2(&self) -> Result<PathBuf> {
        Ok(cgroup::v2_mount()?.join(&self.cgroup))
    }

    /// Switches the node on: network, cgroup, namespaces, file systems. Its disk is as it was.
    pub fn boot_node(&self) -> Result<()> {
        if self.pid1().is_some() {
            bail!("{} is running", self.name);
        }
        netns::plug(&self.lab, &self.name, 10 + self.number)?;
        cgroup::make(&self.cgroup)?;
        fs::create_dir_all(self.disk())?;
        let ready = self.dir.join("ready");
        let _ = fs::remove_file(&ready);
        let spec = NodeSpec {
            name: self.name.clone(),
            netns: self.netns(),
            cgroup: self.cgroup.clone(),
            disk: self.disk(),
            ready: ready.clone(),
        };
        let (spec_file, log) = (self.dir.join("node.json"), self.log("boot"));
        fs::write(&spec_file, serde_json::to_vec(&spec)?)?;
        let output = File::create(&log)?;
        let mut command = Command::new(sh::own("keelway-lab")?);
        command.arg("node-init").arg(&spec_file).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut parent = command.process_group(0).spawn()?;
        let pid = wait_for(&format!("{} to boot", self.name), SOON, || match parent.try_wait()? {
            Some(_) => Ok(None),
            None if ready.exists() => Ok(child_of(parent.id())),
            None => bail!("it is still booting"),
        })?;
        let Some(pid) = pid else { bail!("{} did not boot: {}", self.name, fs::read_to_string(&log)?.trim()) };
        fs::write(self.pid1_file(), pid.to_string())?;
        *self.parent.lock().expect("nobody panics with this lock") = Some(parent);
        Ok(())
    }

    /// Pulls the plug: the node's first process is killed, and with it every process, memory file system, device and
    /// pinned BPF object of the node. Loop devices over files of its disk end too.
    pub fn kill_node(&self) -> Result<()> {
        let pid = self.pid1().with_context(|| format!("{} has no power", self.name))?;
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        if let Some(mut parent) = self.parent.lock().expect("nobody panics with this lock").take() {
            parent.wait()?;
        }
        cgroup::kill(&self.cgroup)?;
        fs::remove_file(self.pid1_file())?;
        netns::unplug(&self.lab, &self.name)?;
        clean::detach_loops(&self.disk())?;
        cgroup::remove(&self.cgroup)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The lab's guard ends the processes; here only the zombie is collected, if there is one already.
        if let Ok(mut parent) = self.parent.lock()
            && let Some(child) = parent.as_mut()
        {
            let _ = child.try_wait();
        }
    }
}
