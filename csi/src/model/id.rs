//! Names that we issue: they can be recognised, and none is ever joined to a path before it was.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const RANDOM: usize = 16;
const CHECK: usize = 4;

/// Not an id of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not of the form {1}<32 hex digits>-<8 digits of checksum>")]
pub struct NotAnId(String, &'static str);

/// An id type: a prefix of its own, and a checksum that holds for this kind of id only.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $domain:literal) => {
        $(#[$doc])*
        /// A value of this type is always of that form, hence safe as a file name.
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The id made from 16 random bytes.
            pub fn new(random: [u8; RANDOM]) -> Self {
                Self(format!(concat!($prefix, "{}-{}"), hex(&random), hex(&checksum($domain, &random))))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NotAnId;

            fn from_str(text: &str) -> Result<Self, NotAnId> {
                let random = text
                    .strip_prefix($prefix)
                    .and_then(|rest| rest.split_once('-'))
                    .and_then(|(random, _)| <[u8; RANDOM]>::try_from(unhex(random)?).ok());
                // Only one spelling is right, so making it again and comparing is the whole check.
                match random.map(Self::new) {
                    Some(id) if id.0 == text => Ok(id),
                    _ => Err(NotAnId(printable(text), $prefix)),
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = NotAnId;
            fn try_from(text: String) -> Result<Self, NotAnId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A volume id: `kwl-<32 hex digits>-<8 hex digits>`, the latter a checksum of the former.
    VolumeId, "kwl-", b"keelway volume id"
);
id!(
    /// A snapshot id: `kws-<32 hex digits>-<8 hex digits>`.
    SnapshotId, "kws-", b"keelway snapshot id"
);
id!(
    /// The id of a group of snapshots: `kwg-<32 hex digits>-<8 hex digits>`.
    GroupId, "kwg-", b"keelway group id"
);

/// What tells one incarnation of an image from another that got the same inode number: 16 random bytes as hex digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Nonce(String);

impl Nonce {
    /// The nonce of 16 random bytes.
    pub fn new(random: [u8; RANDOM]) -> Self {
        Self(hex(&random))
    }

    /// The nonce as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Nonce {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match unhex(&text) {
            Some(bytes) if bytes.len() == RANDOM => Ok(Self(text)),
            _ => Err(format!("{:?} is not a nonce of {RANDOM} bytes", printable(&text))),
        }
    }
}

impl From<Nonce> for String {
    fn from(nonce: Nonce) -> Self {
        nonce.0
    }
}

/// What came from outside, cut so that it can stand in an error or a log line.
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(80).collect()
}

fn checksum(domain: &[u8], random: &[u8]) -> [u8; CHECK] {
    let digest = Sha256::new().chain_update(domain).chain_update(random).finalize();
    digest[..CHECK].try_into().expect("a digest is longer than the checksum")
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let lower = |c: &u8| c.is_ascii_digit() || (b'a'..=b'f').contains(c);
    if !text.len().is_multiple_of(2) || !text.as_bytes().iter().all(lower) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_id_made_is_read_back(random: [u8; RANDOM]) {
            let id = VolumeId::new(random);
            prop_assert_eq!(id.as_str().parse::<VolumeId>().unwrap(), id.clone());
            prop_assert!(id.as_str().bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-'));
        }

        #[test]
        fn one_changed_character_is_noticed(random: [u8; RANDOM], at in 4usize..45, with in "[0-9a-f]") {
            let id = VolumeId::new(random);
            let mut text = id.as_str().to_owned();
            text.replace_range(at..at + 1, &with);
            prop_assert_eq!(text.parse::<VolumeId>().is_ok(), text == id.as_str());
        }

        #[test]
        fn nothing_else_is_an_id(text in ".*") {
            prop_assert!(text.parse::<VolumeId>().is_err());
        }
    }

    #[test]
    fn what_could_be_a_path_is_none() {
        let good = VolumeId::new([7; RANDOM]).to_string();
        for bad in ["", "..", "../../etc", "kwl-", "kwl-/../x-00000000", "fake-vol-id", &good.to_uppercase()] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad}");
        }
        assert!(format!("{good}/..").parse::<VolumeId>().is_err());
        assert!(format!("../{good}").parse::<VolumeId>().is_err());
        assert!(format!("{good}\0").parse::<VolumeId>().is_err());
    }

    #[test]
    fn one_kind_is_never_taken_for_another() {
        let (volume, snapshot) = (VolumeId::new([7; RANDOM]), SnapshotId::new([7; RANDOM]));
        assert!(volume.as_str().parse::<SnapshotId>().is_err());
        assert!(volume.as_str().replace("kwl-", "kws-").parse::<SnapshotId>().is_err());
        assert!(snapshot.as_str().replace("kws-", "kwg-").parse::<GroupId>().is_err());
    }

    #[test]
    fn an_error_never_repeats_a_long_input_whole() {
        let error = "x".repeat(10_000).parse::<VolumeId>().unwrap_err();
        assert!(error.to_string().len() < 200);
    }
}
