//! Who says which address is theirs, and what the address therefore is.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::model::ObjectName;
use crate::op::identity;

/// One who claims a prefix; earlier kinds win over later ones.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Claimant {
    LocalNode(String),
    RemoteNode(String),
    /// A local endpoint, by uid: it holds the lease.
    Endpoint(String),
    Pod(ObjectName),
    PodCidr(String),
    ServiceCidr(String),
}

impl Claimant {
    fn kind(&self) -> u8 {
        match self {
            Self::LocalNode(_) => 0,
            Self::RemoteNode(_) => 1,
            Self::Endpoint(_) => 2,
            Self::Pod(_) => 3,
            Self::PodCidr(_) => 4,
            Self::ServiceCidr(_) => 5,
        }
    }
}

/// All claims, and which prefixes changed since they were last looked at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claims {
    claims: BTreeMap<IpNet, BTreeMap<Claimant, u32>>,
    pub changed: BTreeSet<IpNet>,
}

impl Claims {
    pub fn set(&mut self, prefix: IpNet, claimant: Claimant, identity: u32) {
        let old = self.claims.entry(prefix).or_default().insert(claimant, identity);
        if old != Some(identity) {
            self.changed.insert(prefix);
        }
    }

    pub fn remove(&mut self, prefix: IpNet, claimant: &Claimant) {
        let Some(claims) = self.claims.get_mut(&prefix) else { return };
        if claims.remove(claimant).is_some() {
            self.changed.insert(prefix);
        }
        if claims.is_empty() {
            self.claims.remove(&prefix);
        }
    }

    /// What the prefix is. Two claims of the same kind that disagree (an address that was reused before the old pod's
    /// object went) make it nobody known, until one of them goes: when unsure, deny.
    pub fn identity(&self, prefix: &IpNet) -> Option<u32> {
        let claims = self.claims.get(prefix)?;
        let (first, found) = claims.first_key_value()?;
        let same = claims.iter().take_while(|(claimant, _)| claimant.kind() == first.kind());
        Some(if same.into_iter().all(|(_, other)| other == found) { *found } else { identity::UNKNOWN_POD })
    }
}
