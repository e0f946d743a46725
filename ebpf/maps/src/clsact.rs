//! The older way of attaching to a device: a filter at one fixed place, which outlives the process by itself.

use aya::programs::tc::{NlOptions, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};

/// Ours: before the usual ones, which count down from 49152.
const PRIORITY: u16 = 75;
const HANDLE: u32 = 75;

pub fn attach(program: &mut SchedClassifier, device: &str, direction: TcAttachType) -> Result<(), ProgramError> {
    // The qdisc is there for the other direction, or is another's: it is shared.
    exists_is_fine(qdisc_add_clsact(device).map_err(ProgramError::from))?;
    let options = NlOptions { priority: PRIORITY, handle: TcHandle::from(HANDLE), ..NlOptions::default() };
    match program.attach_with_options(device, direction, TcAttachOptions::Netlink(options)) {
        // Dropping it would detach the filter, which is to stay.
        Ok(link) => {
            std::mem::forget(program.take_link(link)?);
            Ok(())
        }
        // The filter of an earlier start: it stays.
        Err(error) => exists_is_fine(Err(error)),
    }
}

fn exists_is_fine(result: Result<(), ProgramError>) -> Result<(), ProgramError> {
    match result {
        Err(ProgramError::TcError(TcError::NetlinkError(error))) if error.raw_os_error() == Some(libc::EEXIST) => {
            Ok(())
        }
        other => other,
    }
}

/// Whether our filter is at its place, as `tc` sees it; where there is no `tc`, what attached is taken to have stayed.
pub fn is_attached(device: &str, direction: TcAttachType) -> bool {
    let parent = if direction == TcAttachType::Ingress { "ingress" } else { "egress" };
    std::process::Command::new("tc")
        .args(["filter", "show", "dev", device, parent])
        .output()
        .map_or(true, |output| String::from_utf8_lossy(&output.stdout).contains(&format!("pref {PRIORITY} ")))
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
