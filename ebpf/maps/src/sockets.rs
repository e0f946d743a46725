//! What the programs know of sockets, for those who look after them beside the engine.

use std::net::{IpAddr, SocketAddr};

use aya::maps::{Map, MapData};
use keelway_layout::{
    Addr, Backend, Frontend, FrontendKey, Identity, MEMBER_BIT, Port, PrefixKey, SlotKey, SockFrontend, SockKey,
    frontend_flags, identity, maps as m,
};

use crate::error::{Error, TableError};
use crate::pins::Pins;
use crate::table::{KernelTable, Table as _};

/// Reads the tables of sockets, of Services and of identities.
pub struct SocketTables {
    reverse: KernelTable<SockKey, SockFrontend>,
    frontends: KernelTable<FrontendKey, Frontend>,
    slots: KernelTable<SlotKey, u32>,
    backends: KernelTable<u32, Backend>,
    identities: KernelTable<PrefixKey, Identity>,
}

impl SocketTables {
    pub(crate) fn open(pins: &Pins) -> Result<Self, Error> {
        let refused = |name: &str, error: &dyn std::fmt::Display| Error::Refused {
            what: format!("map {name}"),
            reason: error.to_string(),
        };
        let pinned = |name: &str| MapData::from_pin(pins.maps().join(name)).map_err(|error| refused(name, &error));
        macro_rules! open {
            ($kind:ident, $map:ident, $name:ident, $capacity:ident) => {
                KernelTable::$kind(m::$name, m::$capacity, Map::$map(pinned(m::$name)?))
                    .map_err(|error| refused(m::$name, &error))?
            };
        }
        Ok(Self {
            reverse: open!(hash, LruHashMap, SOCK_REVERSE, MAX_SOCK_REVERSE),
            frontends: open!(hash, HashMap, FRONTENDS, MAX_FRONTENDS),
            slots: open!(hash, HashMap, SLOTS, MAX_SLOTS),
            backends: open!(hash, HashMap, BACKENDS, MAX_BACKENDS),
            identities: open!(prefix, LpmTrie, IDENTITIES, MAX_IDENTITIES),
        })
    }

    /// The Service's address that the socket dialled when it was given this backend; `None` if it dialled that itself.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn dialled(&self, cookie: u64, backend: SocketAddr, proto: u8) -> Result<Option<SocketAddr>, TableError> {
        let (addr, port) = (Addr::from(backend.ip()), Port::new(backend.port()));
        let key = SockKey { cookie, addr, port, proto, reserved: [0; 5] };
        Ok(self.reverse.get(&key)?.map(|found| SocketAddr::new(found.addr.into(), found.port.get())))
    }

    /// Whether a process of the host that dials this address keeps the backend that it was given, which had this id then.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn keeps(&self, dialled: SocketAddr, backend: SocketAddr, id: u32, proto: u8) -> Result<bool, TableError> {
        let Some(frontend) = self.frontend(dialled, proto)? else { return Ok(false) };
        if self.slots.get(&SlotKey { frontend: frontend.id | MEMBER_BIT, slot: id })?.is_some() {
            return Ok(true);
        }
        // One that came back has another id, and a slot.
        for slot in 0..frontend.count {
            let Some(id) = self.slots.get(&SlotKey { frontend: frontend.id, slot })? else { continue };
            if let Some(found) = self.backends.get(&id)?
                && (IpAddr::from(found.addr), found.port.get(), found.proto) == (backend.ip(), backend.port(), proto)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// As the programs look it up (`lb::dial`).
    fn frontend(&self, dialled: SocketAddr, proto: u8) -> Result<Option<Frontend>, TableError> {
        let v6 = dialled.is_ipv6();
        let any = if v6 { Addr::UNSPECIFIED } else { Addr::from_v4_word(0) };
        let addr = match (dialled.ip().is_unspecified(), v6) {
            (false, _) => dialled.ip().into(),
            (true, false) => Addr::LOOPBACK_V4,
            (true, true) => Addr::LOOPBACK_V6,
        };
        let port = Port::new(dialled.port());
        if let Some(found) = self.frontends.get(&FrontendKey::new(addr, port, proto))? {
            return Ok(Some(found));
        }
        match self.frontends.get(&FrontendKey::new(addr, Port::NONE, 0))? {
            Some(other) if other.flags & frontend_flags::NODE_ADDRESS != 0 => {
                self.frontends.get(&FrontendKey::new(any, port, proto))
            }
            _ => Ok(None),
        }
    }

    /// Whether the address is inside of a pod CIDR and no pod has it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_no_pod(&self, addr: IpAddr) -> Result<bool, TableError> {
        let found = self.identities.get(&PrefixKey::host(addr.into()))?;
        Ok(found.is_some_and(|found| found.id == identity::UNKNOWN_POD))
    }
}
