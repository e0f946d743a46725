//! What the programs know of sockets, for those who look after them beside the engine.

use aya::maps::{Map, MapData};
use keelway_layout::{Addr, Identity, Port, PrefixKey, SockFrontend, SockKey, identity, maps as m};

use crate::error::{Error, TableError};
use crate::pins::Pins;
use crate::table::{KernelTable, Table as _};

/// Reads the tables of sockets and of identities.
pub struct SocketTables {
    reverse: KernelTable<SockKey, SockFrontend>,
    identities: KernelTable<PrefixKey, Identity>,
}

impl SocketTables {
    pub(crate) fn open(pins: &Pins) -> Result<Self, Error> {
        let refused = |name: &str, error: &dyn std::fmt::Display| Error::Refused {
            what: format!("map {name}"),
            reason: error.to_string(),
        };
        let pinned = |name: &str| MapData::from_pin(pins.maps().join(name)).map_err(|error| refused(name, &error));
        let reverse =
            KernelTable::hash(m::SOCK_REVERSE, m::MAX_SOCK_REVERSE, Map::LruHashMap(pinned(m::SOCK_REVERSE)?))
                .map_err(|error| refused(m::SOCK_REVERSE, &error))?;
        let identities = KernelTable::prefix(m::IDENTITIES, m::MAX_IDENTITIES, Map::LpmTrie(pinned(m::IDENTITIES)?))
            .map_err(|error| refused(m::IDENTITIES, &error))?;
        Ok(Self { reverse, identities })
    }

    /// Whether the socket dialled a Service and was given this backend.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn was_given(&self, cookie: u64, backend: std::net::SocketAddr, proto: u8) -> Result<bool, TableError> {
        let (addr, port) = (Addr::from(backend.ip()), Port::new(backend.port()));
        let key = SockKey { cookie, addr, port, proto, reserved: [0; 5] };
        Ok(self.reverse.get(&key)?.is_some())
    }

    /// Whether the address is inside of a pod CIDR and no pod has it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_no_pod(&self, addr: std::net::IpAddr) -> Result<bool, TableError> {
        let found = self.identities.get(&PrefixKey::host(addr.into()))?;
        Ok(found.is_some_and(|found| found.id == identity::UNKNOWN_POD))
    }
}
