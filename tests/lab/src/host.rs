//! A machine of the lab: programs run in it, in the foreground or left running with a log.
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result};

use crate::process::Process;
use crate::{netns, sh};

/// A machine on the lab's switch: a network namespace and a cgroup; a node has more (see [`crate::Node`]).
#[derive(Debug)]
pub struct Host {
    /// Its name in the lab, e.g. `outside`.
    pub name: String,
    /// Its address on the switch.
    pub v4: Ipv4Addr,
    /// Its address on the switch.
    pub v6: Ipv6Addr,
    /// The lab's id.
    pub lab: String,
    /// Its folder in the lab's scratch folder: logs, and a node's disk.
    pub dir: PathBuf,
    /// Its cgroup, below each hierarchy's mount.
    pub cgroup: String,
}

impl Host {
    /// File that holds the number of a node's first process; a bare host has none.
    pub fn pid1_file(&self) -> PathBuf {
        self.dir.join("pid1")
    }

    /// The node's first process, as this machine numbers it.
    pub fn pid1(&self) -> Option<u32> {
        std::fs::read_to_string(self.pid1_file()).ok()?.trim().parse().ok()
    }

    /// File of its network namespace.
    pub fn netns(&self) -> PathBuf {
        Path::new("/run/netns").join(netns::name(&self.lab, &self.name))
    }

    /// A command that will run here, in this machine's namespaces and cgroup; its exit status is the program's.
    pub fn command<S: AsRef<str>>(&self, argv: &[S]) -> Result<Command> {
        let mut command = Command::new(sh::own("keelway-lab")?);
        command.arg("enter");
        match self.pid1() {
            Some(pid) => command.args(["--cgroup", &format!("{}/system", self.cgroup), "--pid1", &pid.to_string()]),
            None => command.args(["--cgroup", &self.cgroup]).arg("--net").arg(self.netns()),
        };
        command.arg("--").args(argv.iter().map(AsRef::as_ref));
        Ok(command)
    }

    /// Runs a program to its end and gives both outputs and its exit status.
    pub fn exec<S: AsRef<str>>(&self, argv: &[S]) -> Result<Output> {
        let mut command = self.command(argv)?;
        command.stdin(Stdio::null()).output().with_context(|| format!("running in {}", self.name))
    }

    /// Runs a program to its end and gives its standard output; any exit status other than 0 is an error.
    pub fn run<S: AsRef<str>>(&self, argv: &[S]) -> Result<String> {
        let output = self.exec(argv)?;
        let shown = || argv.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" ");
        anyhow::ensure!(
            output.status.success(),
            "{}: {}: {}: {}",
            self.name,
            shown(),
            output.status,
            sh::words(&output)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a program and leaves it running, both outputs in `<dir>/log/<name>.log`.
    pub fn spawn<S: AsRef<str>>(&self, name: &str, argv: &[S]) -> Result<Process> {
        let log = self.log(name);
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let mut command = self.command(argv)?;
        // Its own process group: a Ctrl-C at the terminal is for the lab, which then ends this in its own order.
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        Process::start(&format!("{}/{name}", self.name), command, log)
    }

    /// The log of what [`Host::spawn`] started under this name.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(format!("{name}.log"))
    }

    /// Unplugs this machine from the network.
    pub fn cut(&self) -> Result<()> {
        netns::set_link(&self.lab, &self.name, false)
    }

    /// Plugs it in again.
    pub fn heal(&self) -> Result<()> {
        netns::set_link(&self.lab, &self.name, true)
    }
}
