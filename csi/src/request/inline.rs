//! Volumes that a pod's manifest asks for inline: made with the pod, gone with it.

use std::collections::HashMap;
use std::path::Path;

use super::{TargetPath, Usage, required, string};
use crate::csi;
use crate::error::{Error, Result};
use crate::model::{BackendKind, Content, GRAIN, Mutable, Parameters};
use crate::request::Create;

/// The key by which the kubelet says that a volume is one.
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
/// The size, a quantity, as in `64Mi`.
const SIZE: &str = "size";

/// The backends whose volumes cannot take more than their size.
const HOLDING: [BackendKind; 3] = [BackendKind::Image, BackendKind::Lvm, BackendKind::LvmThin];

/// A volume to make and to bring to a pod.
#[derive(Clone, Debug)]
pub struct Inline {
    /// How it is made.
    pub create: Create,
    /// Where the pod wants it.
    pub target: TargetPath,
    /// How it is used.
    pub usage: Usage,
    /// Whether nothing may be written.
    pub read_only: bool,
}

/// Our name of the volume with a handle of the kubelet's, `csi-<64 hex digits>`; no claim's volume has such a name.
pub fn inline_name(handle: &str) -> Option<String> {
    let digits = handle.strip_prefix("csi-")?;
    let hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    (digits.len() == 64 && digits.bytes().all(hex)).then(|| format!("inline {handle}"))
}

impl Inline {
    /// Whether a publication asks for such a volume.
    pub fn is_one(request: &csi::NodePublishVolumeRequest) -> bool {
        request.volume_context.get(EPHEMERAL).is_some_and(|value| value == "true")
    }

    /// Validates a request; targets must lie below `kubelet_dir`.
    ///
    /// # Errors
    /// As the module says.
    pub fn parse(request: csi::NodePublishVolumeRequest, kubelet_dir: &Path) -> Result<Self> {
        let handle = required("volume_id", request.volume_id)?;
        let expected = || "csi- and 64 hex digits, as the kubelet names inline volumes".to_owned();
        let invalid = |field, value: &str, expected| Error::Invalid { field, value: string(value), expected };
        let name = inline_name(&handle).ok_or_else(|| invalid("volume_id", &handle, expected()))?;
        let target = TargetPath::parse("target_path", &request.target_path, kubelet_dir)?;
        let usage = Usage::parse(request.volume_capability.as_ref())?;
        let mut attributes: HashMap<_, _> =
            request.volume_context.into_iter().filter(|(key, _)| !key.starts_with("csi.storage.k8s.io/")).collect();
        let size = attributes.remove(SIZE).ok_or(Error::Missing { field: "volumeAttributes.size" })?;
        let example = || "a size such as 64Mi or 1G".to_owned();
        let least = quantity(&size).ok_or_else(|| invalid("volumeAttributes.size", &size, example()))?;
        let (parameters, content) = Parameters::parse(&attributes, usage.shape)?;
        usage.options(content)?;
        if content == Content::Raw {
            return Err(invalid("volume_capability", "block", "a mount; inline volumes are no block devices".into()));
        }
        // It is a pod's author who says so, and no administrator: nothing that a pod can grow beyond, and no whole device.
        if !HOLDING.contains(&parameters.backend) {
            let expected = format!("one of {} for inline volumes", HOLDING.map(BackendKind::as_str).join(", "));
            return Err(invalid("volumeAttributes.backend", parameters.backend.as_str(), expected));
        }
        let mutable = Mutable::default();
        let create = Create {
            name,
            least,
            most: None,
            content,
            parameters,
            mutable,
            source: None,
            ephemeral: true,
            claim: None,
            placed: false,
        };
        create.size(0)?;
        let read_only = request.readonly || usage.read_only();
        Ok(Self { create, target, usage, read_only })
    }
}

/// A Kubernetes quantity of bytes without a fraction.
fn quantity(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let factor: u64 = match &text[end..] {
        "" => 1,
        "k" => 1000,
        "M" => 1000_u64.pow(2),
        "G" => 1000_u64.pow(3),
        "T" => 1000_u64.pow(4),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    text[..end].parse::<u64>().ok()?.checked_mul(factor).filter(|&bytes| bytes >= GRAIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        assert_eq!(quantity("64Mi"), Some(64 << 20));
        assert_eq!(quantity("1G"), Some(1_000_000_000));
        assert_eq!(quantity("65536"), Some(65536));
        for bad in ["", "Mi", "-1", "1.5Gi", "1 Gi", "64mi", "0", "99999999999Ti"] {
            assert_eq!(quantity(bad), None, "{bad}");
        }
    }

    #[test]
    fn handles_are_the_kubelets() {
        assert!(inline_name(&format!("csi-{}", "0af9".repeat(16))).is_some());
        for bad in ["csi-", "csi-../../etc", &format!("csi-{}", "0AF9".repeat(16)), &format!("kwl-{}", "0".repeat(64))]
        {
            assert_eq!(inline_name(bad), None, "{bad}");
        }
    }
}
