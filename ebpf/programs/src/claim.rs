//! One at a time: an entry past its time is replaced by a program that opens a flow, or removed by the sweep, never both.
//!
//! Map operations by key are blind to what happened since a look-up. A claim is an entry of a small map, which only one can
//! make: who has it may replace or remove the entry that is past its time. A new key needs none, since the kernel refuses the
//! second of two.

use keelway_layout::CtKey;

use crate::maps::CLAIMS;

/// What is held meanwhile is held for two map operations, about 200 ns.
const TRIES: u32 = 64;
const BPF_NOEXIST: u64 = 1;

/// Takes the claim of a key, if nobody has it.
#[inline(always)]
pub fn try_take(key: &CtKey) -> bool {
    CLAIMS.insert(key, 0, BPF_NOEXIST).is_ok()
}

/// Takes the claim of a key once it is free. False if it never was, within the tries.
#[inline(always)]
pub fn take(key: &CtKey) -> bool {
    for _ in 0..TRIES {
        if try_take(key) {
            return true;
        }
    }
    false
}

/// Gives it back.
#[inline(always)]
pub fn release(key: &CtKey) {
    let _ = CLAIMS.remove(key);
}
