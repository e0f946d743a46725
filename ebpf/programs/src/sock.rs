//! The hooks on sockets: a Service's address becomes a backend's once per connection, and is what the program sees ever after.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_set_retval};
use keelway_layout::{Addr, Frontend, FrontendKey, Hook, Port, Reason, SockBackend, SockFrontend, SockKey};

use crate::count::count;
use crate::lb::{self, Choice, Dial};
use crate::maps::{SOCK_FORWARD, SOCK_REVERSE};
use crate::parse::{TCP, UDP};

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

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

#[inline(always)]
fn refuse(hook: Hook) -> i32 {
    count(hook, Reason::NoBackend, 0);
    // SAFETY: takes no pointers.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
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
    match lb::dial(dialled.addr(), dialled.port(), dialled.proto()) {
        // What is to be dropped is left to the packet's own hook.
        Dial::Other | Dial::Dropped => ALLOW,
        Dial::Refused => refuse(hook),
        Dial::Service(frontend) => match lb::choose(frontend) {
            Some(choice) => translate(sock, hook, dialled, &choice),
            None => refuse(hook),
        },
    }
}

/// sendmsg(2) with an address: an unconnected socket stays with its backend for as long as the Service has it.
#[inline(always)]
pub fn sendmsg(sock: SockAddr, hook: Hook) -> i32 {
    let dialled = FrontendKey::new(sock.addr(), sock.port(), UDP);
    match lb::dial(dialled.addr(), dialled.port(), UDP) {
        Dial::Other | Dial::Dropped => ALLOW,
        Dial::Refused => refuse(hook),
        Dial::Service(frontend) => match kept_or_chosen(sock, dialled, frontend) {
            Some(choice) => translate(sock, hook, dialled, &choice),
            None => refuse(hook),
        },
    }
}

#[inline(always)]
fn kept_or_chosen(sock: SockAddr, dialled: FrontendKey, frontend: &Frontend) -> Option<Choice> {
    let key = sock.key(dialled.addr(), dialled.port());
    // SAFETY: the value is copied out at once.
    if let Some(kept) = unsafe { SOCK_FORWARD.get(key) }.copied()
        && kept.slot < frontend.count
        && let Some(choice) = lb::in_slot(frontend, kept.slot)
        && choice.id == kept.backend
    {
        return Some(choice);
    }
    let choice = lb::choose(frontend)?;
    let _ = SOCK_FORWARD.insert(key, SockBackend { backend: choice.id, slot: choice.slot }, 0);
    Some(choice)
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
