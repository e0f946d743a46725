//! The kernel's helpers, as safe functions. All unsafe code that is not a plain map read is here.

use core::ffi::c_void;
use core::mem::{MaybeUninit, size_of};

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX,
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup, bpf_tunnel_key,
};
use aya_ebpf::helpers::generated as h;
use aya_ebpf::maps::LpmTrie;
use keelway_layout::{Addr, Reason};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::frame::Frame;
use crate::parse::Packet;

/// The outside of a tunnelled packet.
pub struct Underlay {
    /// Where it came from.
    pub remote: Addr,
    /// The network id.
    pub id: u32,
}

/// A packet at a tc hook.
#[derive(Clone, Copy)]
pub struct Skb(*mut __sk_buff);

/// Nanoseconds of the monotonic clock, as of its last tick: no flow's time is as short as that, and the counter behind the
/// precise clock is slow to read.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes no arguments.
    unsafe { h::bpf_ktime_get_coarse_ns() }
}

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub fn precise_now() -> u64 {
    // SAFETY: takes no arguments.
    unsafe { h::bpf_ktime_get_ns() }
}

/// A random number, not for secrets.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: takes no arguments.
    unsafe { h::bpf_get_prandom_u32() }
}

/// Longest-prefix match. `key` is the whole key, prefix length first.
#[inline(always)]
pub fn lpm_get<K: IntoBytes + Immutable, D, V>(map: &'static LpmTrie<D, V>, key: &K) -> Option<&'static V> {
    const { assert!(size_of::<K>() == 4 + size_of::<D>()) };
    // SAFETY: a map static is the map to the helper; the key has the size that the map was declared with, and what is found
    // stays readable for this run of the program.
    unsafe {
        let found = h::bpf_map_lookup_elem(
            core::ptr::from_ref(map).cast_mut().cast(),
            core::ptr::from_ref(key).cast::<c_void>(),
        );
        found.cast::<V>().as_ref()
    }
}

/// The ones' complement sum that turns a checksum over `from` into one over `to`, added to `seed`.
#[inline(always)]
pub fn csum_diff(from: &[u32], to: &[u32], seed: u32) -> Result<u32, Reason> {
    // SAFETY: both slices are readable for their whole length, a multiple of four bytes; the helper only reads them.
    let sum = unsafe {
        h::bpf_csum_diff(
            if from.is_empty() { core::ptr::null_mut() } else { from.as_ptr().cast_mut() },
            (from.len() * 4) as u32,
            if to.is_empty() { core::ptr::null_mut() } else { to.as_ptr().cast_mut() },
            (to.len() * 4) as u32,
            seed,
        )
    };
    if sum < 0 { Err(Reason::Helper) } else { Ok(sum as u32) }
}

/// Fills in what the routes are asked: from `src` to `dst`, as if the packet came by `ifindex`. `params` is zeroed.
#[inline(always)]
pub fn fib_question(params: &mut MaybeUninit<bpf_fib_lookup>, proto: u8, src: &Addr, dst: &Addr, ifindex: u32) {
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    // SAFETY: the caller zeroed it, and any bytes make such a structure.
    let p = unsafe { &mut *params.as_mut_ptr() };
    p.ifindex = ifindex;
    p.l4_protocol = proto;
    if !dst.is_v4() {
        p.family = AF_INET6;
        p.__bindgen_anon_3.ipv6_src = src.words();
        p.__bindgen_anon_4.ipv6_dst = dst.words();
    } else {
        p.family = AF_INET;
        p.__bindgen_anon_3.ipv4_src = src.v4_word();
        p.__bindgen_anon_4.ipv4_dst = dst.v4_word();
    }
}

impl Skb {
    /// The packet of a program's context.
    pub const fn new(skb: *mut __sk_buff) -> Self {
        Self(skb)
    }

    /// Cuts or grows the packet to `len` bytes.
    #[inline(always)]
    pub fn set_len(self, len: u32) -> Result<(), Reason> {
        // SAFETY: takes no pointers but the context.
        check(unsafe { h::bpf_skb_change_tail(self.0, len, 0) })
    }

    /// Makes room for `len` bytes between the Ethernet and the IP header.
    #[inline(always)]
    pub fn insert_l3(self, len: i32) -> Result<(), Reason> {
        const BPF_ADJ_ROOM_MAC: u32 = 1;
        // SAFETY: takes no pointers but the context.
        check(unsafe { h::bpf_skb_adjust_room(self.0, len, BPF_ADJ_ROOM_MAC, 0) })
    }

    /// Says that the packet is for this host, whatever its MAC said on arrival.
    #[inline(always)]
    pub fn set_for_this_host(self) -> Result<(), Reason> {
        const PACKET_HOST: u32 = 0;
        // SAFETY: takes no pointers but the context.
        check(unsafe { h::bpf_skb_change_type(self.0, PACKET_HOST) })
    }

    /// The tunnel that a packet came out of, or is on its way into; for an underlay of the other family an error.
    #[inline(always)]
    pub fn tunnel(self, v6: bool) -> Result<Underlay, Reason> {
        let mut key = MaybeUninit::<bpf_tunnel_key>::uninit();
        let flags = if v6 { u64::from(BPF_F_TUNINFO_IPV6) } else { 0 };
        // SAFETY: `key` is writable for the size given, all of which the helper writes; any bytes make a `bpf_tunnel_key`.
        unsafe {
            check(h::bpf_skb_get_tunnel_key(self.0, key.as_mut_ptr(), size_of::<bpf_tunnel_key>() as u32, flags))?;
            let key = key.assume_init();
            let remote = if v6 {
                Addr::from_words(key.__bindgen_anon_1.remote_ipv6)
            } else {
                // The one field that the kernel keeps in host byte order.
                Addr::from_v4_word(key.__bindgen_anon_1.remote_ipv4.to_be())
            };
            Ok(Underlay { remote, id: key.tunnel_id })
        }
    }

    /// Sends the packet to `remote`, under a network id of 24 bits, once it reaches the tunnel's device.
    #[inline(always)]
    pub fn set_tunnel(self, remote: &Addr, id: u32) -> Result<(), Reason> {
        const WORDS: usize = size_of::<bpf_tunnel_key>() / 4;
        const { assert!(WORDS * 4 == size_of::<bpf_tunnel_key>() && align_of::<bpf_tunnel_key>() >= 4) };
        let mut key = MaybeUninit::<bpf_tunnel_key>::uninit();
        // SAFETY: all bytes are initialised, word by word (what the compiler would call does it byte by byte), and the size
        // given is the structure's.
        unsafe {
            for word in 0..WORDS {
                key.as_mut_ptr().cast::<u32>().add(word).write_volatile(0);
            }
            let k = &mut *key.as_mut_ptr();
            k.tunnel_id = id;
            k.tunnel_ttl = 64;
            let flags = if remote.is_v4() {
                k.__bindgen_anon_1.remote_ipv4 = u32::from_be(remote.v4_word());
                u64::from(BPF_F_ZERO_CSUM_TX)
            } else {
                k.__bindgen_anon_1.remote_ipv6 = remote.words();
                u64::from(BPF_F_TUNINFO_IPV6) | u64::from(BPF_F_ZERO_CSUM_TX)
            };
            check(h::bpf_skb_set_tunnel_key(self.0, key.as_mut_ptr(), size_of::<bpf_tunnel_key>() as u32, flags))
        }
    }

    /// Verdict: into the network namespace behind the veth device `ifindex`.
    #[inline(always)]
    pub fn redirect_peer(self, ifindex: u32) -> i32 {
        // SAFETY: takes no pointers.
        unsafe { h::bpf_redirect_peer(ifindex, 0) as i32 }
    }

    /// Verdict: out of the device and to the neighbour that the node's routes name for the packet's destination.
    #[inline(always)]
    pub fn redirect_by_route(self, packet: &Packet) -> Result<i32, Reason> {
        let mut params = MaybeUninit::<bpf_fib_lookup>::zeroed();
        fib_question(&mut params, packet.tuple.proto, &packet.tuple.src, &packet.tuple.dst, self.ifindex());
        // SAFETY: all bytes are initialised (zeroed), and the size given is the structure's.
        unsafe {
            let found = h::bpf_fib_lookup(self.0.cast(), params.as_mut_ptr(), size_of::<bpf_fib_lookup>() as i32, 0);
            // A neighbour that is not known yet is asked for on the way out.
            if !matches!(
                found as u32,
                BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED
            ) {
                return Err(Reason::NoRoute);
            }
            Ok(h::bpf_redirect_neigh((*params.as_ptr()).ifindex, core::ptr::null_mut(), 0, 0) as i32)
        }
    }

    /// Verdict: into this host, as if it came by the device `ifindex`.
    #[inline(always)]
    pub fn redirect_in(self, ifindex: u32) -> i32 {
        const BPF_F_INGRESS: u64 = 1;
        // SAFETY: takes no pointers.
        unsafe { h::bpf_redirect(ifindex, BPF_F_INGRESS) as i32 }
    }

    /// Verdict: out of the device `ifindex`.
    #[inline(always)]
    pub fn redirect(self, ifindex: u32) -> i32 {
        // SAFETY: takes no pointers.
        unsafe { h::bpf_redirect(ifindex, 0) as i32 }
    }
}

impl Frame for Skb {
    #[inline(always)]
    fn len(self) -> u32 {
        // SAFETY: the context of a tc program is readable.
        unsafe { (*self.0).len }
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ifindex }
    }

    #[inline(always)]
    fn protocol(self) -> Result<u16, Reason> {
        // SAFETY: as above.
        Ok(unsafe { (*self.0).protocol as u16 })
    }

    #[inline(always)]
    fn load<T: FromBytes>(self, offset: u32) -> Result<T, Reason> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper writes all of `value` or fails; any bytes make a `T`.
        unsafe {
            if h::bpf_skb_load_bytes(self.0.cast(), offset, value.as_mut_ptr().cast(), size_of::<T>() as u32) != 0 {
                return Err(Reason::Malformed);
            }
            Ok(value.assume_init())
        }
    }

    #[inline(always)]
    fn store<T: IntoBytes + Immutable>(self, offset: u32, value: &T) -> Result<(), Reason> {
        let from = core::ptr::from_ref(value).cast();
        // SAFETY: `value` is readable for its size.
        check(unsafe { h::bpf_skb_store_bytes(self.0, offset, from, size_of::<T>() as u32, 0) })
    }

    #[inline(always)]
    fn fix_ip_csum(self, offset: u32, from: u32, to: u32, size: u64) -> Result<(), Reason> {
        // SAFETY: takes no pointers but the context.
        check(unsafe { h::bpf_l3_csum_replace(self.0, offset, from.into(), to.into(), size) })
    }

    #[inline(always)]
    fn fix_l4_csum(
        self,
        offset: u32,
        from: u32,
        to: u32,
        size: u64,
        pseudo: bool,
        optional: bool,
    ) -> Result<(), Reason> {
        let mut flags = size;
        if pseudo {
            flags |= u64::from(BPF_F_PSEUDO_HDR);
        }
        if optional {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        // SAFETY: takes no pointers but the context.
        check(unsafe { h::bpf_l4_csum_replace(self.0, offset, from.into(), to.into(), flags) })
    }
}

#[inline(always)]
pub fn check(code: i64) -> Result<(), Reason> {
    if code == 0 { Ok(()) } else { Err(Reason::Helper) }
}
