//! A packet before the kernel has made anything of it. With `kernel`, where unsafe code is.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup, xdp_md};
use aya_ebpf::helpers::generated as h;
use keelway_layout::{Addr, Reason};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::frame::Frame;
use crate::kernel::{check, fib_question};
use crate::parse::{ETH_LEN, Packet, UDP};

/// The hardware addresses of a frame, the receiver's first.
pub type Macs = [[u8; 6]; 2];

/// A packet at an XDP hook.
#[derive(Clone, Copy)]
pub struct Xdp(*mut xdp_md);

impl Xdp {
    /// The packet of a program's context.
    pub const fn new(packet: *mut xdp_md) -> Self {
        Self(packet)
    }

    /// Makes room for `bytes` before the packet.
    #[inline(always)]
    pub fn grow(self, bytes: u32) -> Result<(), Reason> {
        // SAFETY: takes no pointers but the context.
        check(unsafe { h::bpf_xdp_adjust_head(self.0, -(bytes as i32)) })
    }

    /// Cuts off the first `bytes`, which [`Self::grow`] puts back unless they were written over.
    #[inline(always)]
    pub fn cut(self, bytes: u32) -> Result<(), Reason> {
        // SAFETY: as above.
        check(unsafe { h::bpf_xdp_adjust_head(self.0, bytes as i32) })
    }

    /// Whether there is that much room. It is as it was then: what was before the packet is nobody's.
    #[inline(always)]
    pub fn can_grow(self, bytes: u32) -> bool {
        self.grow(bytes).is_ok() && self.cut(bytes).is_ok()
    }
}

impl Frame for Xdp {
    #[inline(always)]
    fn len(self) -> u32 {
        // SAFETY: takes the context alone.
        unsafe { h::bpf_xdp_get_buff_len(self.0) as u32 }
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: the context of an XDP program is readable.
        unsafe { (*self.0).ingress_ifindex }
    }

    #[inline(always)]
    fn protocol(self) -> Result<u16, Reason> {
        self.load(ETH_LEN - 2)
    }

    #[inline(always)]
    fn load<T: FromBytes>(self, offset: u32) -> Result<T, Reason> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper writes all of `value` or fails; any bytes make a `T`.
        unsafe {
            if h::bpf_xdp_load_bytes(self.0, offset, value.as_mut_ptr().cast(), size_of::<T>() as u32) != 0 {
                return Err(Reason::Malformed);
            }
            Ok(value.assume_init())
        }
    }

    #[inline(always)]
    fn store<T: IntoBytes + Immutable>(self, offset: u32, value: &T) -> Result<(), Reason> {
        let from = core::ptr::from_ref(value).cast_mut().cast();
        // SAFETY: `value` is readable for its size; the helper only reads it.
        check(unsafe { h::bpf_xdp_store_bytes(self.0, offset, from, size_of::<T>() as u32) })
    }

    #[inline(always)]
    fn fix_ip_csum(self, offset: u32, from: u32, to: u32, _size: u64) -> Result<(), Reason> {
        mend(self, offset, from, to, false)
    }

    #[inline(always)]
    fn fix_l4_csum(
        self,
        offset: u32,
        from: u32,
        to: u32,
        _size: u64,
        _pseudo: bool,
        optional: bool,
    ) -> Result<(), Reason> {
        mend(self, offset, from, to, optional)
    }
}

/// RFC 1624, equation 3, for changes of two and of four bytes, and for differences (`from` 0): what a shorter one has in front
/// adds 0xffff, which is ones' complement's other zero.
#[inline(never)]
fn mend(frame: Xdp, offset: u32, from: u32, to: u32, optional: bool) -> Result<(), Reason> {
    let old: u16 = frame.load(offset)?;
    if optional && old == 0 {
        return Ok(());
    }
    let mut sum = u64::from(!old) + u64::from(!from) + u64::from(to);
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    let new = !(sum as u16);
    frame.store(offset, &if optional && new == 0 { 0xffff } else { new })
}

/// The hardware addresses under which a packet from `src` to `dst` goes on out of the device that it came by, if that is where the
/// node's routes lead, the neighbour is known, the packet fits and it was meant for this device: `into` says whom it came to.
#[inline(never)]
pub fn way_back(frame: Xdp, packet: &Packet, src: &Addr, dst: &Addr, into: &mut Macs) -> bool {
    leads_back(frame, (packet.tuple.proto, frame.len().wrapping_sub(ETH_LEN)), src, dst, into)
}

/// As [`way_back`], of the datagram around it, `length` bytes of IP.
#[inline(never)]
pub fn way_through(frame: Xdp, length: u32, src: &Addr, dst: &Addr, into: &mut Macs) -> bool {
    leads_back(frame, (UDP, length), src, dst, into)
}

#[inline(always)]
fn leads_back(frame: Xdp, (proto, length): (u8, u32), src: &Addr, dst: &Addr, into: &mut Macs) -> bool {
    // What the look-up takes as a length. Without one it minds no device's limit.
    if length == 0 || length > u32::from(u16::MAX) {
        return false;
    }
    let mut params = MaybeUninit::<bpf_fib_lookup>::zeroed();
    fib_question(&mut params, proto, src, dst, frame.ifindex());
    // SAFETY: all bytes are initialised (zeroed), and the size given is the structure's.
    let found = unsafe {
        (*params.as_mut_ptr()).__bindgen_anon_1.tot_len = length as u16;
        h::bpf_fib_lookup(frame.0.cast(), params.as_mut_ptr(), size_of::<bpf_fib_lookup>() as i32, 0)
    };
    // SAFETY: as above; what the helper writes makes such a structure.
    let params = unsafe { &*params.as_ptr() };
    if found as u32 != BPF_FIB_LKUP_RET_SUCCESS || params.ifindex != frame.ifindex() {
        return false;
    }
    let meant_for = into[0];
    *into = [params.dmac, params.smac];
    meant_for == params.smac
}
