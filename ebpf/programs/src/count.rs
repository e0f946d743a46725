//! Everything that is counted, and the one place through which packets are dropped.

use keelway_layout::{Addr, Counter, CounterKey, DropEvent, EndpointDropKey, Hook, Port, Reason};

use crate::frame::Frame;
use crate::kernel::precise_now;
use crate::lb::Client;
use crate::maps::{COUNTERS, ENDPOINT_DROPS, EVENTS};
use crate::parse::Packet;

/// What is known of a packet while it is worked on, for the account of its end.
// Aligned so that it is made by two stores.
#[repr(align(8))]
pub struct Account {
    pub hook: Hook,
    /// The local endpoint whose rules or address decided; 0 when none.
    pub endpoint: u32,
    /// The peer's identity; 0 when not looked up.
    pub peer: u32,
    /// Who sent it, where Services care.
    pub client: Client,
    /// The frontend that a client from outside dialled; unspecified without.
    pub dialled: (Addr, Port),
    /// Whether the packet is for the backend's node to translate.
    pub dsr: bool,
}

impl Account {
    pub const fn new(hook: Hook) -> Self {
        Self {
            hook,
            endpoint: 0,
            peer: 0,
            client: Client::Outside,
            dialled: (Addr::UNSPECIFIED, Port::NONE),
            dsr: false,
        }
    }
}

#[inline(always)]
fn add(counter: Option<*mut Counter>, bytes: u64) {
    if let Some(counter) = counter {
        // SAFETY: a per-CPU value; the program that counts here is not interrupted by another that does on this CPU at this hook.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += bytes;
        }
    }
}

/// Counts one packet (or call).
#[inline(always)]
pub fn count(hook: Hook, reason: Reason, bytes: u32) {
    add(COUNTERS.get_ptr_mut(CounterKey::index(hook, reason)), bytes.into());
}

/// Counts a drop for everyone who asks: by hook, by endpoint, and as an event while there is room for one.
#[inline(never)]
pub fn dropped(frame: impl Frame, packet: &Packet, account: &mut Account, reason: Reason) {
    let len = frame.len();
    count(account.hook, reason, len);
    if account.endpoint != 0 {
        let key =
            EndpointDropKey { endpoint: account.endpoint, reason: reason as u8, hook: account.hook as u8, reserved: 0 };
        match ENDPOINT_DROPS.get_ptr_mut(&key) {
            Some(counter) => add(Some(counter), len.into()),
            None => {
                let _ = ENDPOINT_DROPS.insert(&key, Counter { packets: 1, bytes: len.into() }, 0);
            }
        }
    }
    if let Some(mut entry) = EVENTS.reserve::<DropEvent>(0) {
        entry.write(DropEvent {
            time: precise_now(),
            src: packet.tuple.src,
            dst: packet.tuple.dst,
            sport: packet.tuple.sport,
            dport: packet.tuple.dport,
            proto: packet.tuple.proto,
            reason: reason as u8,
            hook: account.hook as u8,
            reserved: 0,
            endpoint: account.endpoint,
            peer: account.peer,
            ifindex: frame.ifindex(),
            len,
        });
        entry.submit(0);
    }
}
