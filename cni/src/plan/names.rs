//! Names and hardware addresses that follow from the key of a lease alone, so that nothing has to remember them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::lease::LeaseKey;

/// Prefix of the host ends' names.
pub const HOST_PREFIX: &str = "kw";

/// A hardware address, bytes in the order of the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("hardware address {text:?}: expected six hex bytes joined by colons");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// The host end's name: the prefix and 52 bits of a hash, 15 bytes in all.
#[must_use]
pub fn host_ifname(key: &LeaseKey) -> String {
    let hash: String = digest(key, "name").iter().map(|b| format!("{b:02x}")).collect();
    format!("{HOST_PREFIX}{}", &hash[..15 - HOST_PREFIX.len()])
}

/// The host end's hardware address.
#[must_use]
pub fn host_mac(key: &LeaseKey) -> Mac {
    mac(key, "host")
}

/// The pod end's hardware address.
#[must_use]
pub fn pod_mac(key: &LeaseKey) -> Mac {
    mac(key, "pod")
}

fn mac(key: &LeaseKey, side: &str) -> Mac {
    let hash = digest(key, side);
    // Bit 1 of the first byte: locally administered; bit 0 clear: unicast.
    Mac([hash[0] & 0xfc | 0x02, hash[1], hash[2], hash[3], hash[4], hash[5]])
}

fn digest(key: &LeaseKey, purpose: &str) -> [u8; 32] {
    // Neither part can hold a NUL, so no two keys run together into the same input.
    sha2::Sha256::digest(format!("{}\0{}\0{purpose}", key.container_id, key.ifname)).into()
}
