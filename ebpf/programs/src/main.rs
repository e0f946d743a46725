//! The kernel side. Each hook has two programs: an entry, which is attached once and stays, and the work, which the entry
//! tail-calls from the slot of the current generation. A new build fills the other slots and then changes one word, so that
//! all hooks of the node change over together and none is ever detached.
//!
//! `parse` -> `lb`, `ct`, `policy`, `nat` decide -> `rewrite`, `deliver`, `refuse` act; `count` keeps the account; `frame` is what
//! carries a packet, `kernel` and `xdp` hold the helpers, `encap` does the tunnel device's work for `node_xdp`.
//! `pod`, `node`, `node_xdp`, `vxlan` and `sock` are the hooks. `sweep` is run by the agent, and `claim` keeps it and the hooks apart.
#![no_std]
#![no_main]

mod claim;
mod count;
mod ct;
mod deliver;
mod dsr;
mod encap;
mod frame;
mod kernel;
mod lb;
mod maps;
mod nat;
mod node;
mod node_xdp;
mod parse;
mod pod;
mod policy;
mod refuse;
mod rewrite;
mod service;
mod sock;
mod sweep;
mod vxlan;
mod xdp;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::macros::{cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{SockAddrContext, TcContext, XdpContext};
use keelway_layout::{Hook, Reason};

use count::{Account, count, dropped};
use frame::Frame as _;
use kernel::Skb;
use maps::STATE;
use parse::Packet;
use sock::SockAddr;
use xdp::Xdp;

#[inline(always)]
fn slot() -> u32 {
    STATE.get(0).map_or(0, |state| state.generation & 1)
}

/// Runs a tc hook's work on a parsed packet and settles the account.
#[inline(always)]
fn run(
    ctx: &TcContext,
    hook: Hook,
    not_ip: i32,
    work: fn(Skb, &mut Packet, &mut Account) -> Result<i32, Reason>,
) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    let mut account = Account::new(hook);
    let Some(scratch) = maps::SCRATCH.get_ptr_mut(0) else { return not_ip };
    // SAFETY: a per-CPU value, and no two tc programs run on one CPU at a time (softirqs are off around each).
    let packet = unsafe { &mut *scratch };
    match parse::packet(skb, packet) {
        Ok(()) => {}
        Err(Reason::NotIp) if not_ip == TC_ACT_OK as i32 => return not_ip,
        // The host's own stack judges what it gets; a pod is protected by this hook alone.
        Err(reason) => {
            if not_ip == TC_ACT_OK as i32 {
                return not_ip;
            }
            *packet = Packet::EMPTY;
            dropped(skb, packet, &mut account, reason);
            return TC_ACT_SHOT as i32;
        }
    };
    match work(skb, packet, &mut account) {
        Ok(verdict) => {
            count(hook, Reason::Forwarded, skb.len());
            verdict
        }
        Err(reason) => {
            dropped(skb, packet, &mut account, reason);
            TC_ACT_SHOT as i32
        }
    }
}

macro_rules! tc_hooks {
    ($($entry:ident, $work:ident, $map:ident, $hook:ident, $otherwise:ident, $function:path;)*) => { $(
        #[classifier]
        pub fn $entry(ctx: TcContext) -> i32 {
            // SAFETY: a tail call; it returns only when the slot is empty.
            unsafe { maps::$map.tail_call(&ctx, slot()) };
            count(Hook::$hook, Reason::NoProgram, ctx.len());
            $otherwise as i32
        }

        #[classifier]
        pub fn $work(ctx: TcContext) -> i32 {
            run(&ctx, Hook::$hook, $otherwise as i32, $function)
        }
    )* };
}

// Without programs a pod is cut off, since its policy is; the node is not.
tc_hooks! {
    pod_ingress, pod_ingress_work, POD_INGRESS, PodIngress, TC_ACT_SHOT, pod::ingress;
    pod_egress, pod_egress_work, POD_EGRESS, PodEgress, TC_ACT_SHOT, pod::egress;
    node_ingress, node_ingress_work, NODE_INGRESS, NodeIngress, TC_ACT_OK, node::ingress;
    node_egress, node_egress_work, NODE_EGRESS, NodeEgress, TC_ACT_OK, node::egress;
    vxlan_ingress, vxlan_ingress_work, VXLAN_INGRESS, VxlanIngress, TC_ACT_SHOT, vxlan::ingress;
    vxlan_egress, vxlan_egress_work, VXLAN_EGRESS, VxlanEgress, TC_ACT_SHOT, vxlan::egress;
}

/// Without programs packets go to tc's hook, as most do.
#[xdp]
pub fn node_xdp(ctx: XdpContext) -> u32 {
    // SAFETY: a tail call; it returns only when the slot is empty.
    unsafe { maps::NODE_XDP.tail_call(&ctx, slot()) };
    XDP_PASS
}

#[xdp]
pub fn node_xdp_work(ctx: XdpContext) -> u32 {
    let frame = Xdp::new(ctx.ctx);
    let mut account = Account::new(Hook::NodeXdp);
    let Some(scratch) = maps::SCRATCH.get_ptr_mut(0) else { return XDP_PASS };
    // SAFETY: a per-CPU value, and no two programs run on one CPU at a time (softirqs are off around each).
    let packet = unsafe { &mut *scratch };
    if parse::packet(frame, packet).is_err() {
        return XDP_PASS;
    }
    match node_xdp::ingress(frame, packet, &mut account) {
        Ok(XDP_PASS) => XDP_PASS,
        Ok(verdict) => {
            count(Hook::NodeXdp, Reason::Forwarded, frame.len());
            verdict
        }
        Err(reason) => {
            dropped(frame, packet, &mut account, reason);
            XDP_DROP
        }
    }
}

macro_rules! sock_hooks {
    ($($attach:ident, $entry:ident, $work:ident, $map:ident, $hook:ident, $family:ident, $function:path;)*) => { $(
        #[cgroup_sock_addr($attach)]
        pub fn $entry(ctx: SockAddrContext) -> i32 {
            // SAFETY: a tail call; it returns only when the slot is empty.
            unsafe { maps::$map.tail_call(&ctx, slot()) };
            1
        }

        #[cgroup_sock_addr($attach)]
        pub fn $work(ctx: SockAddrContext) -> i32 {
            $function(SockAddr::$family(ctx.as_ptr().cast()), Hook::$hook)
        }
    )* };
}

sock_hooks! {
    connect4, connect4, connect4_work, CONNECT4, Connect4, v4, sock::connect;
    connect6, connect6, connect6_work, CONNECT6, Connect6, v6, sock::connect;
    sendmsg4, sendmsg4, sendmsg4_work, SENDMSG4, Sendmsg4, v4, sock::sendmsg;
    sendmsg6, sendmsg6, sendmsg6_work, SENDMSG6, Sendmsg6, v6, sock::sendmsg;
    recvmsg4, recvmsg4, recvmsg4_work, RECVMSG4, Recvmsg4, v4, sock::show;
    recvmsg6, recvmsg6, recvmsg6_work, RECVMSG6, Recvmsg6, v6, sock::show;
    getpeername4, getpeername4, getpeername4_work, GETPEERNAME4, Getpeername4, v4, sock::show;
    getpeername6, getpeername6, getpeername6_work, GETPEERNAME6, Getpeername6, v6, sock::show;
    bind4, bind4, bind4_work, BIND4, Bind4, v4, sock::bind;
    bind6, bind6, bind6_work, BIND6, Bind6, v6, sock::bind;
}

/// Attached nowhere: the agent runs it.
#[classifier]
pub fn sweep(ctx: TcContext) -> i32 {
    sweep::sweep(Skb::new(ctx.skb.skb))
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // The verifier refuses a program in which this can be reached.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
