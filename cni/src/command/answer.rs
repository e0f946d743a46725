//! The agent's attachment as a CNI result.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use keelway_api::v1::Attachment;

use crate::spec::{CniError, Interface, IpConfig, Outcome, RouteConfig, code};

/// Position of the pod's interface in the result.
const POD: usize = 1;

/// The host's interface, the pod's, its addresses and a default route for each family.
pub(super) fn outcome(attachment: &Attachment, netns: &str) -> Result<Outcome, CniError> {
    let wrong = |what: String| CniError::new(code::AGENT, format!("the agent's answer: {what}"));
    if attachment.addresses.is_empty() || attachment.addresses.len() != attachment.gateways.len() {
        let (addresses, gateways) = (attachment.addresses.len(), attachment.gateways.len());
        return Err(wrong(format!(
            "{addresses} addresses and {gateways} gateways: expected as many, and one at least"
        )));
    }
    let mtu = Some(attachment.mtu).filter(|&mtu| mtu > 0);
    let mut outcome = Outcome {
        interfaces: vec![
            Interface { name: attachment.host_ifname.clone(), mac: attachment.host_mac.clone(), mtu, sandbox: None },
            Interface {
                name: attachment.ifname.clone(),
                mac: attachment.pod_mac.clone(),
                mtu,
                sandbox: Some(netns.to_owned()),
            },
        ],
        ..Outcome::default()
    };
    for (address, gateway) in attachment.addresses.iter().zip(&attachment.gateways) {
        let address: IpNet =
            address.parse().map_err(|_| wrong(format!("address {address:?}: expected address/length")))?;
        let gateway: IpAddr =
            gateway.parse().map_err(|_| wrong(format!("gateway {gateway:?}: expected an address")))?;
        let any: IpAddr = if gateway.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let to = IpNet::new(any, 0).expect("0 is a prefix length of both families");
        outcome.ips.push(IpConfig { address, gateway: Some(gateway), interface: Some(POD) });
        outcome.routes.push(RouteConfig { to, via: Some(gateway) });
    }
    Ok(outcome)
}
