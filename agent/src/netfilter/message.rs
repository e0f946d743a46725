//! Messages and attributes, byte by byte.

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

/// Length, type, flags, sequence, port.
const HEADER: usize = 16;
/// nfnetlink's own: family, version, resource. Generic netlink's is as long: command, version, nothing.
const GENERIC: usize = 4;
/// `IPSET_ERR_BUSY`. Errors from 4096 on are ipset's own.
const SET_BUSY: i32 = 4100;
/// Type bit of attributes that hold attributes.
const NESTED: u16 = 0x8000;
/// Bits of an attribute's type that are none of its number.
const TYPE_BITS: u16 = 0xc000;

/// What is asked of the kernel.
pub struct Request {
    /// Where it is asked.
    pub protocol: SockProtocol,
    kind: u16,
    family: u8,
    version: u8,
    resource: u16,
    attributes: Vec<u8>,
}

impl Request {
    /// A message of `subsystem`.
    pub fn new(subsystem: u16, number: u16, family: u8) -> Self {
        Self { family, ..Self::bare(subsystem << 8 | number, 0) }
    }

    /// A command of a family of generic netlink, by the number that the kernel gave the family.
    pub fn generic(family: u16, command: u8) -> Self {
        Self { protocol: SockProtocol::NetlinkGeneric, family: command, version: 1, ..Self::bare(family, 0) }
    }

    /// The start or end of a batch for `subsystem`.
    pub fn bare(kind: u16, subsystem: u16) -> Self {
        let protocol = SockProtocol::NetlinkNetFilter;
        Self { protocol, kind, family: 0, version: 0, resource: subsystem, attributes: Vec::new() }
    }

    /// With an attribute.
    pub fn with(mut self, kind: u16, payload: &[u8]) -> Self {
        self.attributes.extend(attribute(kind, payload));
        self
    }

    /// With a name, which ends in a zero.
    pub fn with_name(self, kind: u16, name: &str) -> Self {
        self.with(kind, &[name.as_bytes(), &[0]].concat())
    }

    /// With an attribute of attributes.
    pub fn with_nest(self, kind: u16, payload: &[u8]) -> Self {
        self.with(kind | NESTED, payload)
    }

    /// As sent.
    pub fn to_bytes(&self, flags: u16, sequence: u32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + GENERIC + self.attributes.len());
        bytes.extend(((HEADER + GENERIC + self.attributes.len()) as u32).to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.family, self.version]);
        bytes.extend(self.resource.to_be_bytes());
        bytes.extend(&self.attributes);
        bytes
    }
}

/// One attribute, padded.
pub fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(payload.len() + 8);
    bytes.extend((payload.len() as u16 + 4).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// One attribute of attributes.
pub fn nest(kind: u16, payload: &[u8]) -> Vec<u8> {
    attribute(kind | NESTED, payload)
}

/// What the kernel says.
pub struct Message<'a> {
    /// Subsystem and number, or one of netlink's own.
    pub kind: u16,
    /// Netlink's flags.
    pub flags: u16,
    /// Of nfnetlink's header; the command of generic netlink's.
    pub family: u8,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// What follows nfnetlink's header.
    pub fn attributes(&self) -> Attributes<'a> {
        Attributes(self.body.get(GENERIC..).unwrap_or_default())
    }

    /// The verdict of an error message, which also says that all is well.
    pub fn error(&self) -> nix::Result<()> {
        let code = self.body.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
        match -code {
            0 => Ok(()),
            SET_BUSY => Err(Errno::EBUSY),
            code => Err(Errno::from_raw(code)),
        }
    }
}

/// The first message, and what follows it.
pub fn first(bytes: &[u8]) -> Option<(Message<'_>, &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let flags = u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?);
    let body = bytes.get(HEADER..length)?;
    let message = Message { kind, flags, family: body.first().copied().unwrap_or_default(), body };
    Some((message, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// Attributes in their order.
#[derive(Clone, Copy)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?);
        let payload = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !TYPE_BITS, payload))
    }
}

impl<'a> Attributes<'a> {
    /// Those in a payload.
    pub const fn of(payload: &'a [u8]) -> Self {
        Self(payload)
    }

    /// The payload of the attribute of this number.
    pub fn get(self, wanted: u16) -> Option<&'a [u8]> {
        { self }.find(|(kind, _)| *kind == wanted).map(|(_, payload)| payload)
    }

    /// The attributes in the attribute of this number.
    pub fn nested(self, wanted: u16) -> Option<Attributes<'a>> {
        self.get(wanted).map(Attributes)
    }

    /// A name, without its zero.
    pub fn name(self, wanted: u16) -> Option<String> {
        Some(String::from_utf8_lossy(self.get(wanted)?).trim_end_matches('\0').to_owned())
    }

    /// A number in network byte order.
    pub fn be16(self, wanted: u16) -> Option<u16> {
        Some(u16::from_be_bytes(self.get(wanted)?.try_into().ok()?))
    }

    /// The same of 32 bits.
    pub fn be32(self, wanted: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(wanted)?.try_into().ok()?))
    }

    /// A number in the host's byte order.
    pub fn ne16(self, wanted: u16) -> Option<u16> {
        Some(u16::from_ne_bytes(self.get(wanted)?.try_into().ok()?))
    }

    /// The same of 32 bits.
    pub fn ne32(self, wanted: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(self.get(wanted)?.try_into().ok()?))
    }

    /// 64 bits in network byte order.
    pub fn be64(self, wanted: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.get(wanted)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_cut_does_no_harm() {
        let inner = attribute(7, &5_u32.to_be_bytes());
        let bytes = Request::new(10, 3, 2).with_name(1, "nat").with_nest(4, &inner).to_bytes(1, 1);
        let (message, rest) = first(&bytes).unwrap();
        assert_eq!((message.kind, message.family, rest.len()), (10 << 8 | 3, 2, 0));
        assert_eq!(message.attributes().name(1).as_deref(), Some("nat"));
        assert_eq!(message.attributes().nested(4).and_then(|inner| inner.be32(7)), Some(5));
        for length in 0..bytes.len() {
            if let Some((message, _)) = first(&bytes[..length]) {
                assert!(message.attributes().count() <= 2);
            }
            assert!(Attributes(&bytes[HEADER + GENERIC..][..length.saturating_sub(HEADER + GENERIC)]).count() <= 2);
        }
        assert!(first(&[4, 0, 0, 0, 1, 0, 0, 0]).is_none());
        assert!(first(&[0; 20]).is_none(), "a length of nothing would be read for ever");
        assert_eq!(Attributes(&[0; 8]).count(), 0, "the same of an attribute");
    }
}
