//! IP sets (`<linux/netfilter/ipset/ip_set.h>`): their names, and their end.

use super::message::Request;
use super::{Refused, change, dump};

const SUBSYSTEM: u16 = 6;
const DESTROY: u16 = 3;
const LIST: u16 = 7;
const ATTRIBUTE_PROTOCOL: u16 = 1;
const ATTRIBUTE_NAME: u16 = 2;
const ATTRIBUTE_FLAGS: u16 = 6 | 0x4000;
/// Names only.
const LIST_NAMES: u32 = 2;
/// The oldest that all kernels of interest speak.
const PROTOCOL: u8 = 6;

/// The names of all sets.
///
/// # Errors
/// What the kernel says; also that it has no sets.
pub fn names() -> Result<Vec<String>, Refused> {
    let request = Request::new(SUBSYSTEM, LIST, 0)
        .with(ATTRIBUTE_PROTOCOL, &[PROTOCOL])
        .with(ATTRIBUTE_FLAGS, &LIST_NAMES.to_be_bytes());
    dump("ipset", request, SUBSYSTEM << 8 | LIST, |_, attributes| attributes.name(ATTRIBUTE_NAME))
}

/// Ends a set that no rule uses.
///
/// # Errors
/// What the kernel says.
pub fn destroy(name: &str) -> Result<(), Refused> {
    let request =
        Request::new(SUBSYSTEM, DESTROY, 0).with(ATTRIBUTE_PROTOCOL, &[PROTOCOL]).with_name(ATTRIBUTE_NAME, name);
    change("ipset", request, 0)
}
