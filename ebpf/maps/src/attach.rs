//! Attaching the entry programs, once, by pinned links; an attachment that is there and alive is left alone.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::programs::links::{CgroupAttachMode, FdLink};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder as Order, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use keelway_layout::Hook;

use crate::clsact;
use crate::error::Error;
use crate::loader::{Datapath, HOOKS};
use crate::pins::Pins;
use crate::sys::{LinkTarget, pinned_link};

/// How a hook is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// A pinned link to a cgroup.
    Cgroup,
    /// A pinned tcx link to a device (Linux 6.6 and later).
    Tcx,
    /// A filter at our fixed priority and handle of the device's clsact qdisc.
    Clsact,
}

impl Mechanism {
    /// As shown.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
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
    /// Programs of others on our devices, in words, by device.
    others: BTreeMap<String, Vec<String>>,
}

impl Attachments {
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    pub fn new(pins: Pins) -> Self {
        Self { pins, states: BTreeMap::new(), others: BTreeMap::new() }
    }

    fn pin(&self, name: &str) -> PathBuf {
        self.pins.links().join(name)
    }
}

/// A link that is pinned at `path` and still holds `target`.
fn living(path: &Path, target: LinkTarget) -> Option<(u32, u32)> {
    let link = pinned_link(path).ok()?;
    (link.target == target).then_some((link.id, link.program_id))
}

fn failed(hook: Hook, to: &str, reason: impl std::fmt::Display) -> Error {
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
        for hook in HOOKS.iter().filter(|hook| hook.socket) {
            let path = self.attachments.pin(&format!("cgroup-{}", hook.entry));
            if living(&path, LinkTarget::Cgroup(id)).is_none() {
                let program = self.socket_program(hook.entry)?;
                let refused = |error: &dyn std::fmt::Display| failed(hook.hook, &shown, error);
                let link =
                    program.attach(&folder, CgroupAttachMode::Single).map_err(|error| refused(&with_cause(&error)))?;
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

    /// Attaches a pod's two hooks to the host's side of its veth pair.
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
        self.attach_device(device, Hook::NodeIngress, Hook::NodeEgress)?;
        self.note_others(device);
        Ok(())
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

    /// Programs of others on the node's devices, in words: they run before or after ours, and may drop what ours let through.
    pub fn others(&self) -> Vec<String> {
        self.attachments.others.values().flatten().cloned().collect()
    }

    /// Notes who else is attached to a device. An error only means that the kernel does not tell.
    fn note_others(&mut self, device: &str) {
        let mut found = Vec::new();
        for (direction, name) in [(TcAttachType::Ingress, "ingress"), (TcAttachType::Egress, "egress")] {
            let Ok((_, programs)) = SchedClassifier::query_tcx(device, direction) else { continue };
            let names = programs.iter().map(|program| program.name_as_str().unwrap_or("?").to_owned());
            let foreign = names.filter(|name| HOOKS.iter().all(|hook| hook.entry != name));
            found.extend(foreign.map(|program| format!("{device}: the tcx {name} program {program:?} is another's")));
        }
        for other in &found {
            tracing::warn!("{other}");
        }
        self.attachments.others.insert(device.to_owned(), found);
    }

    fn is_alive(&self, state: &HookState) -> bool {
        let path = match state.mechanism {
            Mechanism::Cgroup => self.attachments.pin(&format!("cgroup-{}", entry_of(state.hook))),
            Mechanism::Tcx => self.attachments.pin(&device_pin(&state.to, direction_of(state.hook))),
            Mechanism::Clsact => return clsact::is_attached(&state.to, direction_of(state.hook)),
        };
        pinned_link(&path).is_ok_and(|link| {
            !matches!(link.target, LinkTarget::Cgroup(0) | LinkTarget::Device(0) | LinkTarget::Other(_))
        })
    }

    fn remember(&mut self, hook: Hook, to: &str, mechanism: Mechanism, link_id: u32, program_id: u32) {
        let state = HookState { hook, to: to.into(), mechanism, link_id, program_id, alive: true };
        self.attachments.states.insert((to.into(), hook), state);
    }

    fn attach_device(&mut self, device: &str, ingress: Hook, egress: Hook) -> Result<(), Error> {
        let index = nix::net::if_::if_nametoindex(device).map_err(|errno| failed(ingress, device, errno))?;
        for (hook, direction) in [(ingress, TcAttachType::Ingress), (egress, TcAttachType::Egress)] {
            if has_tcx() {
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

/// Linux 6.6 brought tcx.
fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

fn with_cause(error: &dyn std::error::Error) -> String {
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
