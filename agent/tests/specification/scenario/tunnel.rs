//! Answers that come out of the tunnel, at the hook before tc's. (At tc's a run's packet has no tunnel that it came by.)

use std::net::{IpAddr, SocketAddr};

use keelway_layout::Hook;

use super::{Case, Runner};
use crate::kernel::{OTHER_NODE, ip, is_behind_v6};
use crate::packet::{self, ACK, SYN, Seen};

const XDP_PASS: i32 = 2;
const XDP_TX: i32 = 3;
/// Of what goes through the tunnel under its own addresses.
const ID: u32 = 1;
/// "Congestion experienced" (RFC 3168).
const CONGESTED: u8 = 3;

impl Runner<'_> {
    /// A backend's answer to a packet that came as `seen` says; before it one like it that is tc's to judge, and stays as it is.
    pub(super) fn answers_by_tunnel(&mut self, case: &Case, client: SocketAddr, seen: Seen) -> Result<(), String> {
        let sender = ip(OTHER_NODE[usize::from(is_behind_v6(seen.dst.ip()))]);
        let stranger: IpAddr = ip(if sender.is_ipv6() { "2001:db8::3" } else { "192.0.2.3" });
        let answer = packet::flow(seen.dst, seen.src, case.proto(), SYN | ACK);
        // From a port that is no backend's: of this node's any may be another flow's.
        let unasked = packet::flow((seen.dst.ip(), 9).into(), seen.src, case.proto(), SYN | ACK);
        let for_tc = match self.compared % 6 {
            0 => packet::through(&answer, stranger, ID, 0, 0),
            1 => packet::through(&answer, sender, ID + 1, 0, 0),
            2 => packet::through(&answer, sender, ID, CONGESTED, 0),
            3 => packet::through(&answer, sender, ID, 0, 0x1234),
            4 => [packet::through(&answer, sender, ID, 0, 0), vec![0; 2]].concat(),
            _ => packet::through(&unasked, sender, ID, 0, 0),
        };
        let did = self.kernel.run_alone(Hook::NodeXdp, &for_tc);
        if did.run.verdict != XDP_PASS || did.run.packet != for_tc || !did.counted.is_empty() {
            return Err(format!("it should have gone on to tc, {}: {:?}", self.compared % 6, did.counted));
        }
        let did = self.kernel.run_alone(Hook::NodeXdp, &packet::through(&answer, sender, ID, 0, 0));
        let got = packet::read(&did.run.packet).map_err(|error| format!("the answer out of the tunnel: {error}"))?;
        if did.run.verdict != XDP_TX || (got.src, got.dst) != (case.to, client) {
            return Err(format!("the answer out of the tunnel: {got:?}, counted {:?}", did.counted));
        }
        if did.run.packet[..12] != [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1] {
            return Err("the answer out of the tunnel goes to no neighbour".into());
        }
        self.kernel.answered += 1;
        Ok(())
    }
}
