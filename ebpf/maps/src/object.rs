//! The kernel side, embedded.

use crate::error::Error;

#[repr(align(8))]
struct Aligned<T: ?Sized>(T);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/keelway.bpf.o")));

/// The object file.
pub fn object() -> Result<&'static [u8], Error> {
    if OBJECT.0.is_empty() { Err(Error::NoObject) } else { Ok(&OBJECT.0) }
}
