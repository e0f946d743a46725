//! Attaching the entry programs, once, by pinned links; an attachment that is there and alive is left alone.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::programs::links::{CgroupAttachMode, FdLink};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder as Order, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use keelway_layout::Hook;

use crate::clsact;
use crate::error::Error;
use crate::loader::{Datapath, HOOKS, ProgramKind};
use crate::pins::Pins;
use crate::sys::{LinkTarget, cgroup_programs, pinned_link};
use crate::xdp::{self, XdpMode};

/// How a hook is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// A pinned link to a cgroup.
    Cgroup,
    /// A pinned tcx link to a device (Linux 6.6 and later).
    Tcx,
    /// A filter at our fixed priority and handle of the device's clsact qdisc.
    Clsact,
    /// A pinned XDP link, run by the device's driver.
    XdpNative,
    /// A pinned XDP link, run by the kernel.
    XdpGeneric,
}

impl Mechanism {
    /// As shown.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::XdpNative => "xdp native",
            Self::XdpGeneric => "xdp generic",
        }
    }
}

/// One attached hook.
#[derive(Clone, Debug)]
pub struct HookState {
    /// Which.
    pub hook: Hook,
    /// Device or cgroup.
    pub to: String,
    /// By what.
    pub mechanism: Mechanism,
    /// Kernel-wide number of the link; 0 for filters.
    pub link_id: u32,
    /// Kernel-wide number of the entry program; 0 for filters.
    pub program_id: u32,
    /// Whether the kernel still has it.
    pub alive: bool,
}

pub(crate) struct Attachments {
    pins: Pins,
    states: BTreeMap<(String, Hook), HookState>,
    /// Why devices have no XDP hook that should have one.
    pub problems: Vec<String>,
}

impl Attachments {
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    pub fn new(pins: Pins) -> Self {
        Self { pins, states: BTreeMap::new(), problems: Vec::new() }
    }

    fn pin(&self, name: &str) -> PathBuf {
        self.pins.links().join(name)
    }
}

/// A link that is pinned at `path` and still holds `target`.
pub(crate) fn living(path: &Path, target: LinkTarget) -> Option<(u32, u32)> {
    let link = pinned_link(path).ok()?;
    (link.target == target).then_some((link.id, link.program_id))
}

pub(crate) fn failed(hook: Hook, to: &str, reason: impl std::fmt::Display) -> Error {
    Error::Attach { hook: hook.name(), to: to.into(), reason: reason.to_string() }
}

impl Datapath {
    /// Attaches the socket hooks to a cgroup.
    ///
    /// # Errors
    /// When the kernel refuses; the error names the hook.
    pub fn attach_cgroup(&mut self, cgroup: &Path) -> Result<(), Error> {
        let shown = cgroup.display().to_string();
        let folder = std::fs::File::open(cgroup).map_err(|source| Error::Io { path: cgroup.into(), source })?;
        // A cgroup's id is the inode number of its folder.
        let id = folder.metadata().map_err(|source| Error::Io { path: cgroup.into(), source })?.ino();
        for hook in HOOKS.iter().filter(|hook| hook.kind == ProgramKind::Socket) {
            let path = self.attachments.pin(&format!("cgroup-{}", hook.entry));
            if living(&path, LinkTarget::Cgroup(id)).is_none() {
                let program = self.socket_program(hook.entry)?;
                let refused = |error: &dyn std::fmt::Display| failed(hook.hook, &shown, error);
                let link = program
                    .attach(&folder, CgroupAttachMode::Single)
                    .map_err(|error| refused(&format!("{}{}", with_cause(&error), alone_there(&folder, hook.hook))))?;
                let link = program.take_link(link).map_err(|error| refused(&error))?;
                let link = FdLink::try_from(link).map_err(|error| refused(&error))?;
                pin(link, &path, hook.hook, &shown)?;
            }
            let (link_id, program_id) = living(&path, LinkTarget::Cgroup(id))
                .ok_or_else(|| failed(hook.hook, &shown, "the link is gone at once"))?;
            self.remember(hook.hook, &shown, Mechanism::Cgroup, link_id, program_id);
        }
        Ok(())
    }

    /// Attaches a pod's two hooks to the host's side of its veth pair: by filters, on every kernel. For each tcx link that
    /// comes or goes the kernel waits for a grace period of RCU, twice a pod and several times as long as all the rest of
    /// an ADD; for filters it does not. What an earlier build attached by living links stays as it is.
    ///
    /// # Errors
    /// As [`Self::attach_cgroup`].
    pub fn attach_pod(&mut self, device: &str) -> Result<(), Error> {
        self.attach_device(device, Hook::PodIngress, Hook::PodEgress)
    }

    /// Attaches the hooks of a device of the node.
    ///
    /// # Errors
    /// As [`Self::attach_cgroup`].
    pub fn attach_node(&mut self, device: &str) -> Result<(), Error> {
        self.attach_device(device, Hook::NodeIngress, Hook::NodeEgress)
    }

    /// Attaches the hooks of the tunnel's device.
    ///
    /// # Errors
    /// As [`Self::attach_cgroup`].
    pub fn attach_vxlan(&mut self, device: &str) -> Result<(), Error> {
        self.attach_device(device, Hook::VxlanIngress, Hook::VxlanEgress)
    }

    /// Forgets a device that is gone or going: its links' pins are removed.
    ///
    /// # Errors
    /// Of the file system.
    pub fn forget_device(&mut self, device: &str) -> Result<(), Error> {
        for direction in ["in", "out"] {
            let path = self.attachments.pin(&format!("tc-{device}-{direction}"));
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(Error::Io { path, source }),
                _ => {}
            }
        }
        self.attachments.states.retain(|(to, _), _| to != device);
        Ok(())
    }

    /// Devices whose links are pinned, alive or not.
    pub fn pinned_devices(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.attachments.pins.links()) else { return Vec::new() };
        let mut devices: Vec<String> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().to_str()?.to_owned();
                Some(name.strip_prefix("tc-")?.strip_suffix("-in")?.to_owned())
            })
            .collect();
        devices.sort();
        devices
    }

    /// What is attached, as the kernel has it now.
    pub fn hooks(&self) -> Vec<HookState> {
        self.attachments
            .states
            .values()
            .cloned()
            .map(|state| HookState { alive: self.is_alive(&state), ..state })
            .collect()
    }

    /// Programs of others on our devices and our cgroup as the kernel has them now, in words: they run before or after ours, and
    /// may drop or send elsewhere what ours let through; or, where there can be only one, in place of ours.
    pub fn others(&self) -> Vec<String> {
        let mut found = self.attachments.problems.clone();
        for state in self.attachments.states.values() {
            match state.mechanism {
                // Filters run after every tcx program; where there is no tcx the kernel does not tell.
                Mechanism::Tcx | Mechanism::Clsact => found.extend(others_on_device(state)),
                Mechanism::Cgroup => found.extend(others_on_cgroup(state)),
                Mechanism::XdpNative | Mechanism::XdpGeneric => {}
            }
        }
        found
    }

    fn is_alive(&self, state: &HookState) -> bool {
        let path = match state.mechanism {
            Mechanism::Cgroup => self.attachments.pin(&format!("cgroup-{}", entry_of(state.hook))),
            Mechanism::Tcx => self.attachments.pin(&device_pin(&state.to, direction_of(state.hook))),
            Mechanism::XdpNative => xdp::pin(&self.attachments.pins.links(), &state.to, XdpMode::Native),
            Mechanism::XdpGeneric => xdp::pin(&self.attachments.pins.links(), &state.to, XdpMode::Generic),
            Mechanism::Clsact => return clsact::is_attached(&state.to, direction_of(state.hook)),
        };
        pinned_link(&path).is_ok_and(|link| {
            !matches!(link.target, LinkTarget::Cgroup(0) | LinkTarget::Device(0) | LinkTarget::Other(_))
        })
    }

    pub(crate) fn forget(&mut self, hook: Hook) {
        self.attachments.states.retain(|(_, of), _| *of != hook);
    }

    pub(crate) fn remember(&mut self, hook: Hook, to: &str, mechanism: Mechanism, link_id: u32, program_id: u32) {
        let state = HookState { hook, to: to.into(), mechanism, link_id, program_id, alive: true };
        self.attachments.states.insert((to.into(), hook), state);
    }

    fn attach_device(&mut self, device: &str, ingress: Hook, egress: Hook) -> Result<(), Error> {
        let index = nix::net::if_::if_nametoindex(device).map_err(|errno| failed(ingress, device, errno))?;
        for (hook, direction) in [(ingress, TcAttachType::Ingress), (egress, TcAttachType::Egress)] {
            let by_link = match hook {
                Hook::PodIngress | Hook::PodEgress => {
                    let pin = self.attachments.pin(&device_pin(device, direction));
                    living(&pin, LinkTarget::Device(index)).is_some()
                }
                _ => has_tcx(),
            };
            if by_link {
                self.attach_tcx(device, index, hook, direction)?;
            } else {
                let program = self.classifier(entry_of(hook))?;
                clsact::attach(program, device, direction).map_err(|error| failed(hook, device, error))?;
                self.remember(hook, device, Mechanism::Clsact, 0, 0);
            }
        }
        Ok(())
    }

    fn attach_tcx(&mut self, device: &str, index: u32, hook: Hook, direction: TcAttachType) -> Result<(), Error> {
        let path = self.attachments.pin(&device_pin(device, direction));
        if living(&path, LinkTarget::Device(index)).is_none() {
            let program = self.classifier(entry_of(hook))?;
            let refused = |error: &dyn std::fmt::Display| failed(hook, device, error);
            // First in the chain: whoever else is there sees what we let through.
            let options = TcAttachOptions::TcxOrder(Order::first());
            let link = program
                .attach_with_options(device, direction, options)
                .map_err(|error| refused(&with_cause(&error)))?;
            let link = program.take_link(link).map_err(|error| refused(&error))?;
            let link = FdLink::try_from(link).map_err(|error| refused(&error))?;
            pin(link, &path, hook, device)?;
        }
        let (link_id, program_id) =
            living(&path, LinkTarget::Device(index)).ok_or_else(|| failed(hook, device, "the link is gone at once"))?;
        self.remember(hook, device, Mechanism::Tcx, link_id, program_id);
        Ok(())
    }
}

/// Whoever is attached to this cgroup's hook, since one that allows no others is why the kernel refuses ours.
fn alone_there(folder: &std::fs::File, hook: Hook) -> String {
    let ids = cgroup_programs(folder.as_fd(), cgroup_attach_type(hook)).unwrap_or_default();
    let named: Vec<String> = ids
        .into_iter()
        .map(|id| format!("program {:?} (id {id})", loaded_program(id).unwrap_or_else(|| "?".to_owned())))
        .collect();
    if named.is_empty() {
        String::new()
    } else {
        format!("; another's is there and may allow none beside it: {}", named.join(", "))
    }
}

/// An error of the kernel only means that it does not tell.
fn others_on_device(state: &HookState) -> Vec<String> {
    let direction = direction_of(state.hook);
    let Ok((_, programs)) = SchedClassifier::query_tcx(&state.to, direction) else { return Vec::new() };
    let named: Vec<(u32, String)> =
        programs.iter().map(|program| (program.id(), program.name_as_str().unwrap_or("?").to_owned())).collect();
    let place = format!("{}: tcx {}", state.to, if direction == TcAttachType::Ingress { "ingress" } else { "egress" });
    match state.mechanism {
        Mechanism::Clsact => {
            let shown = |(id, name)| format!("{place} program {name:?} (id {id}) is another's and runs before ours");
            named.into_iter().map(shown).collect()
        }
        _ => others_among(&named, state.program_id, &place),
    }
}

fn others_on_cgroup(state: &HookState) -> Vec<String> {
    let Ok(folder) = std::fs::File::open(&state.to) else { return Vec::new() };
    let Ok(ids) = cgroup_programs(folder.as_fd(), cgroup_attach_type(state.hook)) else { return Vec::new() };
    let name = |id| loaded_program(id).unwrap_or_else(|| "?".to_owned());
    let named: Vec<(u32, String)> = ids.into_iter().map(|id| (id, name(id))).collect();
    others_among(&named, state.program_id, &format!("{}: {}", state.to, state.hook.name()))
}

/// Programs in the order in which they run; `ours` is one of them, or is gone.
fn others_among(programs: &[(u32, String)], ours: u32, place: &str) -> Vec<String> {
    let own = programs.iter().position(|(id, _)| *id == ours);
    let when = |index| match own {
        Some(own) if index < own => "runs before ours",
        Some(_) => "runs after ours",
        None => "is there and ours is not",
    };
    let others = programs.iter().enumerate().filter(|(_, (id, _))| *id != ours);
    others
        .map(|(index, (id, name))| format!("{place} program {name:?} (id {id}) is another's and {}", when(index)))
        .collect()
}

/// The name of a loaded program.
pub(crate) fn loaded_program(id: u32) -> Option<String> {
    let found = aya::programs::loaded_programs().flatten().find(|program| program.id() == id)?;
    Some(found.name_as_str()?.to_owned())
}

/// `enum bpf_attach_type` of include/uapi/linux/bpf.h; 0 for hooks that are no socket's.
const fn cgroup_attach_type(hook: Hook) -> u32 {
    match hook {
        Hook::Connect4 => 10,
        Hook::Connect6 => 11,
        Hook::Sendmsg4 => 14,
        Hook::Sendmsg6 => 15,
        Hook::Recvmsg4 => 19,
        Hook::Recvmsg6 => 20,
        Hook::Getpeername4 => 29,
        Hook::Getpeername6 => 30,
        _ => 0,
    }
}

/// Linux 6.6 brought tcx.
fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

pub(crate) fn with_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Pins a new link in place of whatever dead one is pinned there.
fn pin(link: FdLink, path: &Path, hook: Hook, to: &str) -> Result<(), Error> {
    let _ = std::fs::remove_file(path);
    link.pin(path).map(drop).map_err(|error| failed(hook, to, error))
}

fn device_pin(device: &str, direction: TcAttachType) -> String {
    format!("tc-{device}-{}", if direction == TcAttachType::Ingress { "in" } else { "out" })
}

fn entry_of(hook: Hook) -> &'static str {
    HOOKS.iter().find(|programs| programs.hook == hook).map_or("", |programs| programs.entry)
}

const fn direction_of(hook: Hook) -> TcAttachType {
    match hook {
        Hook::PodIngress | Hook::NodeIngress | Hook::VxlanIngress => TcAttachType::Ingress,
        _ => TcAttachType::Egress,
    }
}
