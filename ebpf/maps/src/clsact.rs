//! The older way of attaching to a device: a filter at one fixed place, which outlives the process by itself.

use aya::programs::tc::{NlOptions, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};

/// Ours: before the usual ones, which count down from 49152.
const PRIORITY: u16 = 75;
const HANDLE: u32 = 75;

pub fn attach(program: &mut SchedClassifier, device: &str, direction: TcAttachType) -> Result<(), ProgramError> {
    match qdisc_add_clsact(device) {
        Ok(()) => {}
        Err(TcError::AlreadyAttached) => {}
        Err(error) => return Err(error.into()),
    }
    if is_attached(device, direction) {
        return Ok(());
    }
    let options = NlOptions { priority: PRIORITY, handle: TcHandle::from(HANDLE), ..NlOptions::default() };
    let link = program.attach_with_options(device, direction, TcAttachOptions::Netlink(options))?;
    // Dropping it would detach the filter, which is to stay.
    std::mem::forget(program.take_link(link)?);
    Ok(())
}

/// Whether our filter is at its place.
pub fn is_attached(device: &str, direction: TcAttachType) -> bool {
    let parent = if direction == TcAttachType::Ingress { "ingress" } else { "egress" };
    // No netlink dump of filters is offered by the library; tc is part of iproute2, which every node has.
    std::process::Command::new("tc")
        .args(["filter", "show", "dev", device, parent])
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(&format!("pref {PRIORITY} ")))
}

/// Removes our filters from a device, of both directions; there may be none.
pub fn detach(device: &str) {
    for parent in ["ingress", "egress"] {
        let priority = PRIORITY.to_string();
        let _ = std::process::Command::new("tc")
            .args(["filter", "del", "dev", device, parent, "pref", &priority])
            .stderr(std::process::Stdio::null())
            .status();
    }
}
