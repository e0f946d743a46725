//! The hooks on sockets: a Service's address becomes a backend's once per connection, and is what the program sees ever after.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use keelway_layout::{
    Addr, Frontend, FrontendKey, Hook, NO_SLOT, Port, Reason, SockBackend, SockFrontend, SockKey, frontend_flags,
};

use crate::count::count;
use crate::kernel::{now, random};
use crate::lb::{self, Choice, Client};
use crate::maps::{FRONTENDS, NETNS, NODE, SOCK_FORWARD, SOCK_REVERSE};
use crate::parse::{TCP, UDP};
use crate::service::node_addr;

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const EADDRINUSE: i32 = 98;
const ECONNREFUSED: i32 = 111;
const EPERM: i32 = 1;

/// The context of a sock_addr program.
#[derive(Clone, Copy)]
pub struct SockAddr {
    ctx: *mut bpf_sock_addr,
    v6: bool,
}

impl SockAddr {
    /// The context of a hook for IPv4 sockets.
    pub const fn v4(ctx: *mut bpf_sock_addr) -> Self {
        Self { ctx, v6: false }
    }

    /// The context of a hook for IPv6 sockets.
    pub const fn v6(ctx: *mut bpf_sock_addr) -> Self {
        Self { ctx, v6: true }
    }

    #[inline(always)]
    fn proto(self) -> u8 {
        // SAFETY: the context is readable at these fields.
        unsafe { (*self.ctx).protocol as u8 }
    }

    #[inline(always)]
    fn cookie(self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { bpf_get_socket_cookie(self.ctx.cast()) }
    }

    /// Of the network namespace that the socket is in.
    #[inline(always)]
    fn netns(self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { bpf_get_netns_cookie(self.ctx.cast()) }
    }

    #[inline(always)]
    fn addr(self) -> Addr {
        // SAFETY: the context is readable at these fields, one word at a time.
        unsafe {
            if self.v6 {
                let words = &raw const (*self.ctx).user_ip6;
                let words = words.cast::<u32>();
                Addr::from_words([
                    words.read_volatile(),
                    words.add(1).read_volatile(),
                    words.add(2).read_volatile(),
                    words.add(3).read_volatile(),
                ])
            } else {
                Addr::from_v4_word((&raw const (*self.ctx).user_ip4).read_volatile())
            }
        }
    }

    #[inline(always)]
    fn port(self) -> Port {
        // SAFETY: as above.
        Port::from_be(unsafe { (&raw const (*self.ctx).user_port).read_volatile() } as u16)
    }

    #[inline(always)]
    fn set(self, addr: Addr, port: Port) {
        // SAFETY: the context is writable at these fields, one word at a time.
        unsafe {
            if self.v6 {
                let words = &raw mut (*self.ctx).user_ip6;
                let words = words.cast::<u32>();
                let new = addr.words();
                words.write_volatile(new[0]);
                words.add(1).write_volatile(new[1]);
                words.add(2).write_volatile(new[2]);
                words.add(3).write_volatile(new[3]);
            } else {
                (&raw mut (*self.ctx).user_ip4).write_volatile(addr.v4_word());
            }
            (&raw mut (*self.ctx).user_port).write_volatile(port.be().into());
        }
    }

    #[inline(always)]
    fn key(self, addr: Addr, port: Port) -> SockKey {
        SockKey { cookie: self.cookie(), addr, port, proto: self.proto(), reserved: [0; 5] }
    }
}

/// Who a socket belongs to.
#[derive(Clone, Copy)]
struct Owner {
    client: Client,
    /// The address that it dials from; unspecified when not known.
    addr: Addr,
    /// The hook at a pod's device sees what this socket sends.
    has_device: bool,
}

impl Owner {
    /// Nobody that this node knows.
    const UNKNOWN: Self = Self { client: Client::Pod, addr: Addr::UNSPECIFIED, has_device: false };
}

/// `v6`: of what it dials.
#[inline(never)]
fn owner(netns: u64, v6: bool, into: &mut Owner) {
    *into = Owner::UNKNOWN;
    let Some(node) = NODE.get(0) else { return };
    if netns == node.host_netns {
        into.client = Client::Host;
        into.addr = node_addr(node, v6);
    // SAFETY: copied out at once.
    } else if let Some(pod) = unsafe { NETNS.get(netns) } {
        into.addr = if v6 { pod.v6 } else { pod.v4 };
        into.has_device = true;
    }
}

#[inline(always)]
fn refuse(hook: Hook) -> i32 {
    count(hook, Reason::NoBackend, 0);
    fail(ECONNREFUSED)
}

/// What a packet filter on the way out of the host would answer.
#[inline(always)]
fn drop(hook: Hook, reason: Reason) -> i32 {
    count(hook, reason, 0);
    fail(EPERM)
}

#[inline(always)]
fn fail(errno: i32) -> i32 {
    // SAFETY: takes no pointers.
    unsafe { bpf_set_retval(-errno) };
    REFUSE
}

/// Puts the backend in and remembers what to show instead.
#[inline(always)]
fn translate(sock: SockAddr, hook: Hook, dialled: FrontendKey, choice: &Choice) -> i32 {
    let shown = SockFrontend { addr: dialled.addr(), port: dialled.port(), reserved: [0; 6] };
    // Should the table refuse, the connection works all the same; only getpeername shows the backend.
    let _ = SOCK_REVERSE.insert(sock.key(choice.backend.addr, choice.backend.port), shown, 0);
    sock.set(choice.backend.addr, choice.backend.port);
    count(hook, Reason::Translated, 0);
    ALLOW
}

/// connect(2)
#[inline(always)]
pub fn connect(sock: SockAddr, hook: Hook) -> i32 {
    if !matches!(sock.proto(), TCP | UDP) {
        return ALLOW;
    }
    let dialled = FrontendKey::new(sock.addr(), sock.port(), sock.proto());
    let mut who = Owner::UNKNOWN;
    owner(sock.netns(), !dialled.addr().is_v4(), &mut who);
    match lb::dial(&dialled.addr(), dialled.port(), dialled.proto(), who.client) {
        None => ALLOW,
        Some(frontend) if lb::refuses(frontend) => refuse(hook),
        // A connected datagram socket would keep its backend for ever; its packets are translated one by one instead.
        Some(frontend) if dialled.proto() == UDP && who.has_device && frontend.count != 0 => ALLOW,
        Some(frontend) => match chosen(frontend, &who) {
            Chosen::Choice(choice) => translate(sock, hook, dialled, &choice),
            Chosen::Nobody => refuse(hook),
            Chosen::AtDevice => ALLOW,
            Chosen::Dropped(reason) => drop(hook, reason),
        },
    }
}

enum Chosen {
    Choice(Choice),
    Nobody,
    /// The packets' own hook knows better who the client is, or is to drop them.
    AtDevice,
    /// The host's own, which meet no such hook: they would leave the node as they are.
    Dropped(Reason),
}

/// The backend for a new connection.
#[inline(always)]
fn chosen(frontend: &Frontend, owner: &Owner) -> Chosen {
    let minds_client = lb::minds_client(frontend);
    let is_host = owner.client == Client::Host;
    if minds_client && owner.addr.is_unspecified() {
        return Chosen::AtDevice;
    }
    if minds_client && !lb::serves(frontend, &owner.addr) {
        return if is_host { Chosen::Dropped(Reason::SourceRange) } else { Chosen::AtDevice };
    }
    if frontend.count == 0 {
        return match lb::drops_when_empty(frontend) {
            true if is_host => Chosen::Dropped(Reason::NoBackend),
            true => Chosen::AtDevice,
            false => Chosen::Nobody,
        };
    }
    let now = now();
    let kept = if minds_client { lb::kept_for(frontend, &owner.addr, now) } else { NO_SLOT };
    let seed = if kept == NO_SLOT { random() } else { kept };
    let Some(choice) = lb::choose(frontend, seed) else { return Chosen::Nobody };
    if minds_client {
        lb::keep_for(frontend, &owner.addr, choice.id, now);
    }
    Chosen::Choice(choice)
}

/// sendmsg(2) with an address: an unconnected socket stays with its backend for as long as the Service has it serving, as its flow
/// does where packets are translated.
#[inline(always)]
pub fn sendmsg(sock: SockAddr, hook: Hook) -> i32 {
    let dialled = FrontendKey::new(sock.addr(), sock.port(), UDP);
    let mut who = Owner::UNKNOWN;
    owner(sock.netns(), !dialled.addr().is_v4(), &mut who);
    match lb::dial(&dialled.addr(), dialled.port(), UDP, who.client) {
        None => ALLOW,
        Some(frontend) if lb::refuses(frontend) => refuse(hook),
        Some(frontend) => match kept_or_chosen(sock, dialled, frontend, &who) {
            Chosen::Choice(choice) => translate(sock, hook, dialled, &choice),
            Chosen::Nobody => refuse(hook),
            Chosen::AtDevice => ALLOW,
            Chosen::Dropped(reason) => drop(hook, reason),
        },
    }
}

#[inline(always)]
fn kept_or_chosen(sock: SockAddr, dialled: FrontendKey, frontend: &Frontend, owner: &Owner) -> Chosen {
    let key = sock.key(dialled.addr(), dialled.port());
    // SAFETY: the value is copied out at once.
    if let Some(kept) = unsafe { SOCK_FORWARD.get(key) }.copied()
        && let Some(choice) = lb::kept_by_socket(frontend, kept.backend)
    {
        return Chosen::Choice(choice);
    }
    let chosen = chosen(frontend, owner);
    if let Chosen::Choice(choice) = &chosen {
        let _ = SOCK_FORWARD.insert(key, SockBackend { backend: choice.id, slot: choice.slot }, 0);
    }
    chosen
}

/// recvmsg(2) and getpeername(2): shows the address that the program dialled.
#[inline(always)]
pub fn show(sock: SockAddr, hook: Hook) -> i32 {
    // SAFETY: the value is copied out at once.
    if let Some(dialled) = unsafe { SOCK_REVERSE.get(sock.key(sock.addr(), sock.port())) }.copied() {
        sock.set(dialled.addr, dialled.port);
        count(hook, Reason::Translated, 0);
    }
    ALLOW
}

/// bind(2): a node port is the Service's; a process that took it would hear nothing there.
#[inline(always)]
pub fn bind(sock: SockAddr, hook: Hook) -> i32 {
    let Some(node) = NODE.get(0) else { return ALLOW };
    let port = sock.port();
    if port == Port::NONE || sock.netns() != node.host_netns {
        return ALLOW;
    }
    let addr = sock.addr();
    if is_node_port(Addr::from_v4_word(0), &addr, port, sock.proto())
        || is_node_port(Addr::UNSPECIFIED, &addr, port, sock.proto())
    {
        count(hook, Reason::NodePortTaken, 0);
        return fail(EADDRINUSE);
    }
    ALLOW
}

/// Whether `family` has a node port there that `bound` would hide: the wildcard does, and so does each address that serves it.
#[inline(always)]
fn is_node_port(family: Addr, bound: &Addr, port: Port, proto: u8) -> bool {
    let wildcard = bound.is_unspecified() || *bound == Addr::from_v4_word(0);
    if !wildcard && lb::any_of_family(bound) != family {
        return false;
    }
    // SAFETY: read at once.
    let is_node_port = unsafe { FRONTENDS.get(FrontendKey::new(family, port, proto)) }
        .is_some_and(|found| found.flags & frontend_flags::NODE_PORT != 0);
    // SAFETY: read at once.
    let serves = |other_port: FrontendKey| {
        unsafe { FRONTENDS.get(other_port) }.is_some_and(|found| found.flags & frontend_flags::NODE_ADDRESS != 0)
    };
    is_node_port && (wildcard || serves(FrontendKey::new(*bound, Port::NONE, 0)))
}
