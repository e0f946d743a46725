//! What carries a packet. Reading, choosing and rewriting are the same for all that can do this.

use keelway_layout::Reason;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A packet at a hook, Ethernet header first.
pub trait Frame: Copy {
    /// Bytes from the Ethernet header on.
    fn len(self) -> u32;

    /// The device that the hook is on.
    fn ifindex(self) -> u32;

    /// EtherType in network byte order.
    fn protocol(self) -> Result<u16, Reason>;

    /// Copies from `offset`.
    fn load<T: FromBytes>(self, offset: u32) -> Result<T, Reason>;

    /// Writes at `offset`, without minding checksums.
    fn store<T: IntoBytes + Immutable>(self, offset: u32, value: &T) -> Result<(), Reason>;

    /// Mends an IPv4 header checksum after a change of `size` bytes.
    fn fix_ip_csum(self, offset: u32, from: u32, to: u32, size: u64) -> Result<(), Reason>;

    /// Mends a transport checksum after a change of `size` bytes, or by a difference when `size` is 0. `pseudo`: the change is
    /// in the pseudo header; `optional`: zero means no checksum (UDP).
    fn fix_l4_csum(
        self,
        offset: u32,
        from: u32,
        to: u32,
        size: u64,
        pseudo: bool,
        optional: bool,
    ) -> Result<(), Reason>;
}
