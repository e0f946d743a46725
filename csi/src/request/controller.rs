//! Requests of the controller service.

use std::collections::HashMap;

use super::{MAX_STRING, Usage, known_id, known_snapshot, required, string};
use crate::TOPOLOGY_KEY;
use crate::csi;
use crate::error::{Error, Result};
use crate::model::{BackendKind, Content, GRAIN, Mutable, Parameters, Shape, Source, VolumeId};

/// The size of a volume when nobody asks for one.
const DEFAULT_SIZE: u64 = 1 << 30;

/// A volume to make, or to find again.
#[derive(Clone, Debug)]
pub struct Create {
    /// The caller's name of it.
    pub name: String,
    /// The least that it may have, in bytes.
    pub least: u64,
    /// The most, where there is a limit.
    pub most: Option<u64>,
    /// What it is handed out as.
    pub content: Content,
    /// The StorageClass's parameters.
    pub parameters: Parameters,
    /// The VolumeAttributesClass's.
    pub mutable: Mutable,
    /// What it is made from.
    pub source: Option<Source>,
    /// Whether it is one pod's only.
    pub ephemeral: bool,
    /// The claim that it is for, where the caller says so.
    pub claim: Option<String>,
    /// Whether the caller says where it is to be, and so can try elsewhere.
    pub placed: bool,
}

impl Create {
    /// Validates a request to the driver of the node called `node`.
    ///
    /// # Errors
    /// As the module says, and [`Error::OutOfRange`] and [`Error::WrongTopology`].
    pub fn parse(request: csi::CreateVolumeRequest, node: &str) -> Result<Self> {
        let name = name(request.name)?;
        let (shape, usages) = Usage::parse_all(&request.volume_capabilities)?;
        let (parameters, content) = Parameters::parse(&request.parameters, shape)?;
        usages.iter().try_for_each(|usage| usage.options(content).map(drop))?;
        let source = request.volume_content_source.map(source).transpose()?;
        let mutable = Mutable::default().with(&request.mutable_parameters)?;
        let (least, most) = range(request.capacity_range)?;
        if let Some(wanted) = &request.accessibility_requirements {
            reachable(wanted, node)?;
        }
        let placed = request.accessibility_requirements.is_some();
        let claim = crate::model::claim(&request.parameters);
        let create = Self { name, least, most, content, parameters, mutable, source, ephemeral: false, claim, placed };
        create.size(0)?;
        Ok(create)
    }

    /// The size to make: what is asked for, at least the minimum and what the source has, rounded up to whole blocks,
    /// within the limit.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn size(&self, source: u64) -> Result<u64> {
        size(self.least, self.most, self.content, source)
    }

    /// Whether a volume of this size answers the request.
    pub fn accepts_size(&self, size: u64) -> bool {
        size >= self.least && self.most.is_none_or(|most| size <= most)
    }
}

/// A name that a caller gives.
pub(super) fn name(name: String) -> Result<String> {
    let name = required("name", name)?;
    // What the specification bans: control characters, but for those that are common whitespace.
    let banned = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r');
    if name.len() > MAX_STRING || name.chars().any(banned) {
        let expected = format!("at most {MAX_STRING} bytes without control characters but tab, LF and CR");
        return Err(Error::Invalid { field: "name", value: string(&name), expected });
    }
    Ok(name)
}

fn source(source: csi::VolumeContentSource) -> Result<Source> {
    use csi::volume_content_source::Type;
    match source.r#type {
        Some(Type::Snapshot(snapshot)) => {
            let id = required("volume_content_source.snapshot.snapshot_id", snapshot.snapshot_id)?;
            known_snapshot(&id).map(Source::Snapshot)
        }
        Some(Type::Volume(volume)) => {
            let id = required("volume_content_source.volume.volume_id", volume.volume_id)?;
            known_id(&id).map(Source::Volume)
        }
        None => Err(Error::Missing { field: "volume_content_source.type" }),
    }
}

pub(super) fn range(range: Option<csi::CapacityRange>) -> Result<(u64, Option<u64>)> {
    let range = range.unwrap_or_default();
    let least = bytes("capacity_range.required_bytes", range.required_bytes)?;
    let most = Some(bytes("capacity_range.limit_bytes", range.limit_bytes)?).filter(|&most| most != 0);
    Ok((least, most))
}

/// A volume to make larger.
#[derive(Clone, Debug)]
pub struct Expand {
    /// The volume.
    pub id: VolumeId,
    /// The least that it is to have, in bytes.
    pub least: u64,
    /// The most, where there is a limit.
    pub most: Option<u64>,
    /// What the caller takes it for, when it says so.
    pub usage: Option<Usage>,
}

impl Expand {
    /// Validates a request.
    ///
    /// # Errors
    /// As the module says, and [`Error::OutOfRange`].
    pub fn parse(request: csi::ControllerExpandVolumeRequest) -> Result<Self> {
        let id = required("volume_id", request.volume_id)?;
        let given = request.capacity_range.ok_or(Error::Missing { field: "capacity_range" })?;
        let (least, most) = range(Some(given))?;
        if least == 0 && most.is_none() {
            return Err(Error::Missing { field: "capacity_range.required_bytes" });
        }
        let usage = request.volume_capability.as_ref().map(|capability| Usage::parse(Some(capability))).transpose()?;
        Ok(Self { id: known_id(&id)?, least, most, usage })
    }

    /// The size to bring a volume of `has` bytes to: never less than it has.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn size(&self, has: u64, content: Content) -> Result<u64> {
        size(self.least.max(has), self.most, content, 0)
    }
}

/// A volume to change.
#[derive(Clone, Debug)]
pub struct Modify {
    /// The volume.
    pub id: VolumeId,
    /// What changes; the rest stays.
    pub parameters: HashMap<String, String>,
}

impl Modify {
    /// Validates a request.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: csi::ControllerModifyVolumeRequest) -> Result<Self> {
        let id = required("volume_id", request.volume_id)?;
        if request.mutable_parameters.is_empty() {
            return Err(Error::Missing { field: "mutable_parameters" });
        }
        Mutable::default().with(&request.mutable_parameters)?;
        Ok(Self { id: known_id(&id)?, parameters: request.mutable_parameters })
    }
}

fn bytes(field: &'static str, value: i64) -> Result<u64> {
    value.try_into().map_err(|_| Error::Invalid { field, value: value.to_string(), expected: "at least 0".into() })
}

fn size(least: u64, most: Option<u64>, content: Content, source: u64) -> Result<u64> {
    let out = |why: String| Err(Error::OutOfRange { wanted: least.max(most.unwrap_or(0)), why });
    if most.is_some_and(|most| most < least) {
        return out("limit_bytes is less than required_bytes".into());
    }
    let minimum = content.min_size().max(source);
    let wanted =
        if least == 0 && source == 0 { DEFAULT_SIZE.min(most.unwrap_or(DEFAULT_SIZE)) / GRAIN * GRAIN } else { least };
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
    pub shape: Option<Shape>,
    /// Where it would live, when the class says so.
    pub backend: Option<BackendKind>,
    /// Whether the question is about this node.
    pub here: bool,
}

impl Capacity {
    /// Validates a request to the driver of the node called `node`.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: &csi::GetCapacityRequest, node: &str) -> Result<Self> {
        // Parameters but for the backend are not judged here: external-provisioner asks with keys that it takes out of a CreateVolume, and a
        // class with a wrong one would look to the scheduler like a full pool. CreateVolume refuses it, for its owner to
        // see.
        let shape = match request.volume_capabilities.as_slice() {
            [] => None,
            capabilities => Some(Usage::parse_all(capabilities)?.0),
        };
        let backend = request.parameters.get("backend").and_then(|name| name.parse().ok());
        let here = request
            .accessible_topology
            .as_ref()
            .is_none_or(|topology| topology.segments.iter().all(|(key, value)| key == TOPOLOGY_KEY && value == node));
        Ok(Self { shape, backend, here })
    }
}

/// A question whether a volume can be used in some ways.
#[derive(Clone, Debug)]
pub struct Validate {
    /// The volume.
    pub id: VolumeId,
    /// Those ways, or why no volume of this driver can be used so.
    pub usages: std::result::Result<(Shape, Vec<Usage>), String>,
    /// The parameters that it should have been made with, or what is wrong with them.
    pub parameters: std::result::Result<Option<Parameters>, String>,
    /// Mutable parameters that it should have.
    pub mutable: HashMap<String, String>,
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
        let usages = match Usage::parse_all(&request.volume_capabilities) {
            Err(error @ Error::Missing { .. }) => return Err(error),
            other => other.map_err(|error| error.to_string()),
        };
        let parameters = match &usages {
            Ok((shape, _)) if !request.parameters.is_empty() => Parameters::parse(&request.parameters, *shape)
                .map(|(parameters, _)| Some(parameters))
                .map_err(|error| error.to_string()),
            _ => Ok(None),
        };
        let (mutable, context_matches) = (request.mutable_parameters.clone(), request.volume_context.is_empty());
        Ok(Self { id: known_id(&id)?, usages, parameters, mutable, context_matches })
    }
}

/// A page of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct List {
    /// Entries with a higher sequence number are wanted.
    pub after: u64,
    /// The most entries to answer with.
    pub most: usize,
}

impl List {
    /// Validates the two fields that each list has.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a negative count, [`Error::BadToken`].
    pub fn parse(max_entries: i32, starting_token: &str) -> Result<Self> {
        let most = match bytes("max_entries", max_entries.into())? {
            0 => usize::MAX,
            most => most as usize,
        };
        let bad = || Error::BadToken { token: string(starting_token) };
        let after = match starting_token {
            "" => 0,
            token => token.strip_prefix("after-").and_then(|seq| seq.parse().ok()).ok_or_else(bad)?,
        };
        Ok(Self { after, most })
    }

    /// The token for what follows the entry with this sequence number.
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
        let make = |least, most| Create::parse(request(least, most), "n").map(|create| create.size(0).unwrap());
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
                let size = create.size(0).unwrap();
                prop_assert!(create.accepts_size(size));
                prop_assert_eq!(size % GRAIN, 0);
                prop_assert!(size >= EXT4.min_size());
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
    fn a_source_is_the_least() {
        let size = |least, most, source| Create::parse(request(least, most), "n").unwrap().size(source);
        assert_eq!(size(0, 0, 64 << 20).unwrap(), 64 << 20);
        assert_eq!(size(32 << 20, 0, 64 << 20).unwrap(), 64 << 20);
        assert_eq!(size(100 << 20, 0, 64 << 20).unwrap(), 100 << 20);
        assert_eq!(size(32 << 20, 48 << 20, 64 << 20).unwrap_err().code(), tonic::Code::OutOfRange);
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
        let list = |token: &str| List::parse(2, token);
        assert_eq!(list(&List::token(7)).unwrap(), List { after: 7, most: 2 });
        assert_eq!(list("").unwrap().after, 0);
        assert_eq!(list("invalid-token").unwrap_err().code(), tonic::Code::Aborted);
        assert!(List::parse(-1, "").is_err());
    }
}
