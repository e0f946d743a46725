//! Loading: check the pins, load beside what runs, switch by one word.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::os::fd::AsFd as _;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread::{ScopedJoinHandle, available_parallelism};

use aya::maps::{MapData, ProgramArray};
use aya::programs::{CgroupSockAddr, Program, ProgramError, ProgramFd, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use keelway_layout::{Hook, NodeState, maps};

use crate::attach::Attachments;
use crate::connections::Connections;
use crate::error::Error;
use crate::features;
use crate::object::object;
use crate::pins::{Pins, specs};
use crate::sockets::SocketTables;
use crate::sweep::Sweep;
use crate::sys;
use crate::tables::Tables;

/// What the kernel takes a program for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ProgramKind {
    Socket,
    Tc,
    Xdp,
}

/// A hook's two programs and the array between them.
pub struct HookPrograms {
    pub hook: Hook,
    pub entry: &'static str,
    pub work: &'static str,
    pub array: &'static str,
    pub kind: ProgramKind,
}

macro_rules! hooks {
    ($($hook:ident, $entry:literal, $work:literal, $array:literal, $kind:ident;)*) => {
        &[$(HookPrograms {
            hook: Hook::$hook, entry: $entry, work: $work, array: $array, kind: ProgramKind::$kind,
        },)*]
    };
}

pub const HOOKS: &[HookPrograms] = hooks! {
    PodIngress, "pod_ingress", "pod_ingress_work", "kwp_pod_in", Tc;
    PodEgress, "pod_egress", "pod_egress_work", "kwp_pod_out", Tc;
    NodeIngress, "node_ingress", "node_ingress_work", "kwp_node_in", Tc;
    NodeEgress, "node_egress", "node_egress_work", "kwp_node_out", Tc;
    NodeXdp, "node_xdp", "node_xdp_work", "kwp_node_xdp", Xdp;
    VxlanIngress, "vxlan_ingress", "vxlan_ingress_work", "kwp_vxlan_in", Tc;
    VxlanEgress, "vxlan_egress", "vxlan_egress_work", "kwp_vxlan_out", Tc;
    Connect4, "connect4", "connect4_work", "kwp_connect4", Socket;
    Connect6, "connect6", "connect6_work", "kwp_connect6", Socket;
    Sendmsg4, "sendmsg4", "sendmsg4_work", "kwp_sendmsg4", Socket;
    Sendmsg6, "sendmsg6", "sendmsg6_work", "kwp_sendmsg6", Socket;
    Recvmsg4, "recvmsg4", "recvmsg4_work", "kwp_recvmsg4", Socket;
    Recvmsg6, "recvmsg6", "recvmsg6_work", "kwp_recvmsg6", Socket;
    Getpeername4, "getpeername4", "getpeername4_work", "kwp_peername4", Socket;
    Getpeername6, "getpeername6", "getpeername6_work", "kwp_peername6", Socket;
    Bind4, "bind4", "bind4_work", "kwp_bind4", Socket;
    Bind6, "bind6", "bind6_work", "kwp_bind6", Socket;
};

/// Attached nowhere; see [`crate::Sweep`].
const SWEEP: &str = "sweep";

/// What a hook did with a packet of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The program's verdict, `TC_ACT_...` of `linux/pkt_cls.h` or `XDP_...` of `linux/bpf.h`.
    pub verdict: i32,
    /// The packet as it left it.
    pub packet: Vec<u8>,
    /// Nanoseconds that each run took.
    pub nanoseconds: u32,
}

/// The loaded programs, the open tables and what is attached.
pub struct Datapath {
    pub(crate) ebpf: Ebpf,
    /// The maps.
    pub tables: Tables,
    pub(crate) attachments: Attachments,
    /// Whether the programs of [`Hook::NodeXdp`] are loaded.
    xdp: bool,
}

fn program_error(name: &str) -> impl Fn(ProgramError) -> Error {
    move |error| {
        let reason = match &error {
            ProgramError::LoadError { io_error, verifier_log } => {
                // The verdict stands at the end of the log.
                let log = verifier_log.to_string();
                let from = log.char_indices().rev().nth(1500).map_or(0, |(index, _)| index);
                format!("{io_error}: {}", &log[from..])
            }
            other => other.to_string(),
        };
        Error::Refused { what: format!("program {name}"), reason }
    }
}

impl Datapath {
    /// Loads this build's programs beside those that run, on the maps that are pinned below `bpffs` or on new ones.
    ///
    /// # Errors
    /// See [`Error`]; nothing that ran before is changed.
    pub fn open(bpffs: &Path) -> Result<Self, Error> {
        Self::open_for(bpffs, true)
    }

    /// The same; without the hook before the kernel's stack, which takes as long to check as any, where it is not wanted.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for(bpffs: &Path, xdp: bool) -> Result<Self, Error> {
        let object = object()?;
        check_kernel(&release())?;
        features::check()?;
        let pins = Pins::below(bpffs);
        pins.prepare(bpffs)?;
        pins.check_maps()?;
        let mut loader = EbpfLoader::new();
        let folder = pins.maps();
        for spec in specs() {
            loader.map_pin_path(spec.name, folder.join(spec.name));
        }
        let mut ebpf = loader
            .load(object)
            .map_err(|error| Error::Refused { what: "the object".into(), reason: error.to_string() })?;
        load_all(&mut ebpf, xdp)?;
        let tables = Tables::open(&mut ebpf)?;
        Ok(Self { ebpf, tables, attachments: Attachments::new(pins), xdp })
    }

    /// Puts this build's programs in the other slot of every hook and makes it the current one: one write, after which all
    /// hooks of the node run them. Returns the generation.
    ///
    /// # Errors
    /// What the kernel says; the programs that ran before then still run.
    pub fn switch(&mut self) -> Result<u32, Error> {
        let state = self.tables.state()?;
        let generation = state.generation.wrapping_add(1);
        for hook in hooks(self.xdp) {
            let program = self
                .program(hook.work)?
                .try_clone()
                .map_err(|error| Error::Refused { what: hook.work.into(), reason: error.to_string() })?;
            let map = self.ebpf.map_mut(hook.array).ok_or_else(|| missing(hook.array))?;
            let refused =
                |error: aya::maps::MapError| Error::Refused { what: hook.array.into(), reason: error.to_string() };
            let mut array = ProgramArray::try_from(map).map_err(refused)?;
            array.set(generation & 1, &program, 0).map_err(refused)?;
        }
        self.tables.set_state(NodeState { generation, ..state })?;
        Ok(generation)
    }

    /// What removes flows that are past their time. It shares the maps and works on its own.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn sweep(&self) -> Result<Sweep, Error> {
        let refused = |error: &dyn std::fmt::Display| Error::Refused { what: SWEEP.into(), reason: error.to_string() };
        let pinned =
            |name: &str| MapData::from_pin(self.attachments.pins().maps().join(name)).map_err(|error| refused(&error));
        let (conntrack, nat) = (pinned(maps::CONNTRACK)?, pinned(maps::NAT)?);
        let program = self.program(SWEEP)?.as_fd().try_clone_to_owned().map_err(|error| refused(&error))?;
        Sweep::new(program, &conntrack, &nat).map_err(|error| refused(&error))
    }

    /// What counts connections by backend. It shares the map of flows and works on its own.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn connections(&self) -> Result<Connections, Error> {
        let refused = |error: &dyn std::fmt::Display| Error::Refused {
            what: format!("map {}", maps::CONNTRACK),
            reason: error.to_string(),
        };
        let pin = self.attachments.pins().maps().join(maps::CONNTRACK);
        Connections::new(&MapData::from_pin(pin).map_err(|error| refused(&error))?).map_err(|error| refused(&error))
    }

    /// The tables of sockets, for readers beside this one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn socket_tables(&self) -> Result<SocketTables, Error> {
        SocketTables::open(self.attachments.pins())
    }

    /// Runs what this build does at a device's hook on a packet, Ethernet header first, as if it came by this network namespace's
    /// loopback device: `repeat` times, on what the run before left. Nothing is sent anywhere.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn run(&self, hook: Hook, packet: &[u8], repeat: u32) -> Result<Run, Error> {
        self.run_as_from(hook, packet, repeat, None)
    }

    /// The same of [`Hook::NodeXdp`], as if the packet came by the device `index`, which holds an XDP program.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_xdp(&self, packet: &[u8], index: u32) -> Result<Run, Error> {
        self.run_as_from(Hook::NodeXdp, packet, 1, Some(index))
    }

    fn run_as_from(&self, hook: Hook, packet: &[u8], repeat: u32, from: Option<u32>) -> Result<Run, Error> {
        let hook = HOOKS.iter().find(|programs| programs.hook == hook).ok_or_else(|| missing(hook.name()))?;
        let mut out = vec![0; packet.len() + 256];
        let run = sys::test_run(self.program(hook.work)?.as_fd(), packet, &mut out, repeat, from)
            .map_err(|error| Error::Refused { what: format!("a run of {}", hook.work), reason: error.to_string() })?;
        out.truncate(run.len);
        Ok(Run { verdict: run.verdict.cast_signed(), packet: out, nanoseconds: run.duration })
    }

    fn program(&self, name: &str) -> Result<&ProgramFd, Error> {
        self.ebpf.program(name).and_then(|program| program.fd().ok()).ok_or_else(|| missing(name))
    }

    pub(crate) fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier, Error> {
        self.ebpf
            .program_mut(name)
            .ok_or_else(|| missing(name))?
            .try_into()
            .map_err(|error: ProgramError| program_error(name)(error))
    }

    pub(crate) fn socket_program(&mut self, name: &str) -> Result<&mut CgroupSockAddr, Error> {
        self.ebpf
            .program_mut(name)
            .ok_or_else(|| missing(name))?
            .try_into()
            .map_err(|error: ProgramError| program_error(name)(error))
    }
}

pub(crate) fn release() -> String {
    nix::sys::utsname::uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default()
}

/// Linux 6.1 is the oldest for which every program is tried (`make kernels`). A release that does not read as one is let pass.
fn check_kernel(release: &str) -> Result<(), Error> {
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < (6, 1) => {
            Err(Error::OldKernel { found: release.to_owned(), floor: "6.1" })
        }
        _ => Ok(()),
    }
}

fn missing(name: &str) -> Error {
    Error::Refused { what: name.into(), reason: "not in the object".into() }
}

fn hooks(xdp: bool) -> impl Iterator<Item = &'static HookPrograms> {
    HOOKS.iter().filter(move |hook| xdp || hook.kind != ProgramKind::Xdp)
}

/// Loads every program, some at a time: the kernel checks a few of them for half a second each.
fn load_all(ebpf: &mut Ebpf, xdp: bool) -> Result<(), Error> {
    const THREADS: usize = 4;
    let of_hooks = hooks(xdp).flat_map(|hook| [(hook.entry, hook.kind), (hook.work, hook.kind)]);
    let mut wanted: BTreeMap<&str, ProgramKind> = of_hooks.chain([(SWEEP, ProgramKind::Tc)]).collect();
    let take = |(name, program)| wanted.remove(name).map(|kind| (kind, name, program));
    let mut programs: Vec<(ProgramKind, &str, &mut Program)> = ebpf.programs_mut().filter_map(take).collect();
    if let Some((name, _)) = wanted.first_key_value() {
        return Err(missing(name));
    }
    // The long ones first, which are those on devices that work.
    programs.sort_unstable_by_key(|(kind, name, _)| (*kind != ProgramKind::Socket && name.ends_with("_work"), *name));
    let threads = available_parallelism().map_or(1, NonZero::get).min(THREADS);
    let programs = Mutex::new(programs);
    let next = || programs.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let work = || std::iter::from_fn(next).try_for_each(|(kind, name, program)| load(program, name, kind));
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        let join = |thread: ScopedJoinHandle<'_, _>| thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        others.into_iter().map(join).fold(own, Result::and)
    })
}

fn load(program: &mut Program, name: &str, kind: ProgramKind) -> Result<(), Error> {
    let loaded = match kind {
        ProgramKind::Socket => <&mut CgroupSockAddr>::try_from(program).and_then(CgroupSockAddr::load),
        ProgramKind::Tc => <&mut SchedClassifier>::try_from(program).and_then(SchedClassifier::load),
        ProgramKind::Xdp => <&mut Xdp>::try_from(program).and_then(Xdp::load),
    };
    loaded.map_err(program_error(name))
}

/// Detaches and unpins everything of ours below `bpffs`, of every version. Returns what was removed.
///
/// # Errors
/// Of the file system; what was removed until then stays removed.
pub fn cleanup(bpffs: &Path) -> Result<Vec<String>, Error> {
    let root = Pins::below(bpffs).root().to_owned();
    let mut removed = Vec::new();
    remove_tree(&root, &mut removed).map_err(|source| Error::Io { path: root, source })?;
    Ok(removed)
}

fn remove_tree(path: &Path, removed: &mut Vec<String>) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path(), removed)?;
        } else {
            std::fs::remove_file(entry.path())?;
            removed.push(entry.path().display().to_string());
        }
    }
    std::fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::check_kernel;

    #[test]
    fn kernels_before_6_1_are_refused_by_name() {
        for release in ["5.15.0-91-generic", "6.0.12", "4.19.0"] {
            let error = check_kernel(release).expect_err(release).to_string();
            assert!(error.contains(release) && error.contains("6.1"), "{error}");
        }
        for release in ["6.1.0-18-amd64", "6.12.3", "7.0", "unreadable"] {
            check_kernel(release).expect(release);
        }
    }
}
