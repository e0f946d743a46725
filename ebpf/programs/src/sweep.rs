//! Removing entries that are past their time. User space names them, by running this on a packet that is a list of keys; this
//! looks again, under the key's claim, where the flow's own programs cannot revive it.

use keelway_layout::{CtKey, SWEEP_GRACE, SWEEP_HEADER, SWEEP_KEYS};

use crate::claim;
use crate::frame::Frame as _;
use crate::kernel::{Skb, now};
use crate::maps::{CONNTRACK, NAT};

/// Removes what is past its time; how many.
#[inline(always)]
pub fn sweep(skb: Skb) -> i32 {
    let now = now();
    let mut removed = 0;
    for number in 0..SWEEP_KEYS {
        let Ok(key) = skb.load::<CtKey>(SWEEP_HEADER + number * size_of::<CtKey>() as u32) else { break };
        removed += one(&key, now);
    }
    removed
}

#[inline(never)]
fn one(key: &CtKey, now: u64) -> i32 {
    // A flow is about to be opened there: the entry will live again.
    if !claim::try_take(key) {
        return 0;
    }
    let removed = if key.is_nat() {
        // SAFETY: found by this lookup; a single word.
        let over = NAT.get_ptr(key).is_some_and(|entry| unsafe { (*entry).expires } + SWEEP_GRACE <= now);
        over && NAT.remove(key).is_ok()
    } else {
        // SAFETY: as above.
        let over = CONNTRACK.get_ptr(key).is_some_and(|entry| unsafe { (*entry).expires } + SWEEP_GRACE <= now);
        over && CONNTRACK.remove(key).is_ok()
    };
    claim::release(key);
    removed.into()
}
