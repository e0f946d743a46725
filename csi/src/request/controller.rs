//! Requests of the controller service.

use super::{MAX_STRING, Usage, known_id, required, string};
use crate::TOPOLOGY_KEY;
use crate::csi;
use crate::error::{Error, Result};
use crate::model::{Content, GRAIN, Parameters, VolumeId};

/// The size of a volume when nobody asks for one.
const DEFAULT_SIZE: u64 = 1 << 30;

/// A volume to make, or to find again.
#[derive(Clone, Debug)]
pub struct Create {
    /// The caller's name of it.
    pub name: String,
    /// The size to make it, in bytes.
    pub size: u64,
    /// The least that a volume found by this name may have.
    pub least: u64,
    /// The most, where there is a limit.
    pub most: Option<u64>,
    /// What it is handed out as.
    pub content: Content,
    /// The StorageClass's parameters.
    pub parameters: Parameters,
}

impl Create {
    /// Validates a request to the driver of the node called `node`.
    ///
    /// # Errors
    /// As the module says, and [`Error::OutOfRange`] and [`Error::WrongTopology`].
    pub fn parse(request: csi::CreateVolumeRequest, node: &str) -> Result<Self> {
        let name = required("name", request.name)?;
        if name.len() > MAX_STRING || name.chars().any(char::is_control) {
            let expected = format!("at most {MAX_STRING} bytes without control characters");
            return Err(Error::Invalid { field: "name", value: string(&name), expected });
        }
        let content = Usage::parse_all(&request.volume_capabilities)?;
        if request.volume_content_source.is_some() {
            return Err(unserved("volume_content_source", "a source", "neither snapshots nor clones are advertised"));
        }
        if let Some(key) = request.mutable_parameters.keys().min() {
            return Err(unserved("mutable_parameters", key, "MODIFY_VOLUME is not advertised"));
        }
        let parameters = Parameters::parse(&request.parameters, content)?;
        let range = request.capacity_range.unwrap_or_default();
        let least = bytes("capacity_range.required_bytes", range.required_bytes)?;
        let most = Some(bytes("capacity_range.limit_bytes", range.limit_bytes)?).filter(|&most| most != 0);
        let size = size(least, most, content)?;
        if let Some(wanted) = &request.accessibility_requirements {
            reachable(wanted, node)?;
        }
        Ok(Self { name, size, least, most, content, parameters })
    }

    /// Whether a volume of this size answers the request.
    pub fn accepts_size(&self, size: u64) -> bool {
        size >= self.least && self.most.is_none_or(|most| size <= most)
    }
}

fn unserved(field: &'static str, value: &str, why: &str) -> Error {
    Error::Invalid { field, value: string(value), expected: format!("served: {why}") }
}

fn bytes(field: &'static str, value: i64) -> Result<u64> {
    value.try_into().map_err(|_| Error::Invalid { field, value: value.to_string(), expected: "at least 0".into() })
}

/// The size to make: what is asked for, at least the minimum, rounded up to whole blocks, within the limit.
fn size(least: u64, most: Option<u64>, content: Content) -> Result<u64> {
    let out = |why: String| Err(Error::OutOfRange { wanted: least.max(most.unwrap_or(0)), why });
    if most.is_some_and(|most| most < least) {
        return out("limit_bytes is less than required_bytes".into());
    }
    let minimum = content.min_size();
    let wanted = if least == 0 { DEFAULT_SIZE.min(most.unwrap_or(DEFAULT_SIZE)) / GRAIN * GRAIN } else { least };
    // Half of what the kernel's loff_t holds: far more than any pool has, and no sum here can overflow.
    let Some(size) = wanted.max(minimum).checked_next_multiple_of(GRAIN).filter(|&size| size < 1 << 62) else {
        return out("it is larger than a file can be".into());
    };
    match most {
        Some(most) if size > most && minimum > most => out(format!("{content} needs at least {minimum} bytes")),
        Some(most) if size > most => out(format!("no multiple of {GRAIN} lies within the range")),
        _ => Ok(size),
    }
}

fn reachable(wanted: &csi::TopologyRequirement, node: &str) -> Result<()> {
    let ours =
        |topology: &csi::Topology| topology.segments.iter().all(|(key, value)| key == TOPOLOGY_KEY && value == node);
    // Preferred is a subset of requisite where both are given.
    let listed = if wanted.requisite.is_empty() { &wanted.preferred } else { &wanted.requisite };
    if listed.is_empty() || listed.iter().any(ours) {
        return Ok(());
    }
    Err(Error::WrongTopology { key: TOPOLOGY_KEY.into(), node: node.into() })
}

/// How much room there is for a kind of volume.
#[derive(Clone, Debug)]
pub struct Capacity {
    /// What it would be handed out as, when the request says so.
    pub content: Option<Content>,
    /// Whether the question is about this node.
    pub here: bool,
}

impl Capacity {
    /// Validates a request to the driver of the node called `node`.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: &csi::GetCapacityRequest, node: &str) -> Result<Self> {
        // Parameters are not judged here: external-provisioner asks with keys that it takes out of a CreateVolume, and a
        // class with a wrong one would look to the scheduler like a full pool. CreateVolume refuses it, for its owner to
        // see.
        let content = match request.volume_capabilities.as_slice() {
            [] => None,
            capabilities => Some(Usage::parse_all(capabilities)?),
        };
        let here = request
            .accessible_topology
            .as_ref()
            .is_none_or(|topology| topology.segments.iter().all(|(key, value)| key == TOPOLOGY_KEY && value == node));
        Ok(Self { content, here })
    }
}

/// A question whether a volume can be used in some ways.
#[derive(Clone, Debug)]
pub struct Validate {
    /// The volume.
    pub id: VolumeId,
    /// What it would be in those ways, or why no volume of this driver can be.
    pub content: std::result::Result<Content, String>,
    /// The parameters that it should have been made with, or what is wrong with them.
    pub parameters: std::result::Result<Option<Parameters>, String>,
    /// Whether the volume context is the one that we give out, which is empty.
    pub context_matches: bool,
}

impl Validate {
    /// Validates a request.
    ///
    /// # Errors
    /// As the module says; what a volume cannot be is no error, but an answer.
    pub fn parse(request: &csi::ValidateVolumeCapabilitiesRequest) -> Result<Self> {
        let id = required("volume_id", request.volume_id.clone())?;
        let content = match Usage::parse_all(&request.volume_capabilities) {
            Err(error @ Error::Missing { .. }) => return Err(error),
            other => other.map_err(|error| error.to_string()),
        };
        let parameters = match &content {
            Ok(content) if !request.parameters.is_empty() => {
                Parameters::parse(&request.parameters, *content).map(Some).map_err(|error| error.to_string())
            }
            _ => Ok(None),
        };
        let context_matches = request.volume_context.is_empty() && request.mutable_parameters.is_empty();
        Ok(Self { id: known_id(&id)?, content, parameters, context_matches })
    }
}

/// A page of the list of volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct List {
    /// Volumes with a higher sequence number are wanted.
    pub after: u64,
    /// The most entries to answer with.
    pub most: usize,
}

impl List {
    /// Validates a request.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a negative count, [`Error::BadToken`].
    pub fn parse(request: &csi::ListVolumesRequest) -> Result<Self> {
        let most = match bytes("max_entries", request.max_entries.into())? {
            0 => usize::MAX,
            most => most as usize,
        };
        let bad = || Error::BadToken { token: string(&request.starting_token) };
        let after = match request.starting_token.as_str() {
            "" => 0,
            token => token.strip_prefix("after-").and_then(|seq| seq.parse().ok()).ok_or_else(bad)?,
        };
        Ok(Self { after, most })
    }

    /// The token for what follows the volume with this sequence number.
    pub fn token(seq: u64) -> String {
        format!("after-{seq}")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{capability, mount};
    use super::*;
    use crate::model::FsType;
    use csi::volume_capability::access_mode::Mode;
    use proptest::prelude::*;

    const EXT4: Content = Content::Filesystem(FsType::Ext4);

    fn request(required_bytes: i64, limit_bytes: i64) -> csi::CreateVolumeRequest {
        csi::CreateVolumeRequest {
            name: "pvc-1".into(),
            capacity_range: Some(csi::CapacityRange { required_bytes, limit_bytes }),
            volume_capabilities: vec![capability(mount(""), Mode::SingleNodeWriter)],
            ..Default::default()
        }
    }

    fn topology(key: &str, value: &str) -> csi::Topology {
        csi::Topology { segments: [(key.to_owned(), value.to_owned())].into() }
    }

    #[test]
    fn sizes() {
        let make = |least, most| Create::parse(request(least, most), "n").map(|create| create.size);
        assert_eq!(make(0, 0).unwrap(), DEFAULT_SIZE);
        assert_eq!(make(1, 0).unwrap(), EXT4.min_size());
        assert_eq!(make(64 << 20, 64 << 20).unwrap(), 64 << 20);
        assert_eq!(make((64 << 20) + 1, 0).unwrap(), (64 << 20) + GRAIN);
        assert_eq!(make(0, 100 << 20).unwrap(), 100 << 20);
        for (least, most) in [(1, 2), (5 << 20, 4 << 20), ((64 << 20) + 1, (64 << 20) + 2), (i64::MAX, 0)] {
            assert_eq!(make(least, most).unwrap_err().code(), tonic::Code::OutOfRange, "{least} {most}");
        }
        assert_eq!(make(-1, 0).unwrap_err().code(), tonic::Code::InvalidArgument);
    }

    proptest! {
        #[test]
        fn a_size_always_answers_its_own_request(least in 0i64..1 << 45, most in 0i64..1 << 45) {
            if let Ok(create) = Create::parse(request(least, most), "n") {
                prop_assert!(create.accepts_size(create.size));
                prop_assert_eq!(create.size % GRAIN, 0);
                prop_assert!(create.size >= EXT4.min_size());
            }
        }
    }

    #[test]
    fn only_this_node_is_reachable() {
        let make = |requisite, preferred| {
            let wanted = csi::TopologyRequirement { requisite, preferred };
            let request = csi::CreateVolumeRequest { accessibility_requirements: Some(wanted), ..request(0, 0) };
            Create::parse(request, "node1").map(|_| ())
        };
        let here = || topology(TOPOLOGY_KEY, "node1");
        let there = || topology(TOPOLOGY_KEY, "node2");
        assert!(make(vec![], vec![]).is_ok());
        assert!(make(vec![there(), here()], vec![there()]).is_ok());
        assert!(make(vec![], vec![here()]).is_ok());
        assert_eq!(make(vec![there()], vec![]).unwrap_err().code(), tonic::Code::ResourceExhausted);
        assert!(make(vec![topology("zone", "node1")], vec![]).is_err());
    }

    #[test]
    fn what_is_not_served_is_refused() {
        let source = csi::CreateVolumeRequest { volume_content_source: Some(Default::default()), ..request(0, 0) };
        assert!(Create::parse(source, "n").is_err());
        let modify =
            csi::CreateVolumeRequest { mutable_parameters: [("a".into(), "b".into())].into(), ..request(0, 0) };
        assert!(Create::parse(modify, "n").is_err());
        let name = csi::CreateVolumeRequest { name: "a".repeat(129), ..request(0, 0) };
        assert!(Create::parse(name, "n").is_err());
        let name = csi::CreateVolumeRequest { name: "a".repeat(128), ..request(0, 0) };
        assert!(Create::parse(name, "n").is_ok());
    }

    #[test]
    fn tokens() {
        let list = |token: &str| List::parse(&csi::ListVolumesRequest { max_entries: 2, starting_token: token.into() });
        assert_eq!(list(&List::token(7)).unwrap(), List { after: 7, most: 2 });
        assert_eq!(list("").unwrap().after, 0);
        assert_eq!(list("invalid-token").unwrap_err().code(), tonic::Code::Aborted);
        assert!(List::parse(&csi::ListVolumesRequest { max_entries: -1, ..Default::default() }).is_err());
    }
}
