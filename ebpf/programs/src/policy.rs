//! Whether a pod may have a flow, by the rules of its subject.

use keelway_layout::{Addr, CidrKey, Direction, Endpoint, PrefixKey, Reason, RuleKey, endpoint_flags, identity, scope};

use crate::count::Account;
use crate::ct::{self, Admission, Flow, Way};
use crate::kernel::lpm_get;
use crate::maps::{CIDRS, IDENTITIES, RULES};
use crate::parse::Packet;

/// Who an address is.
#[inline(always)]
pub fn identity_of(addr: &Addr) -> u32 {
    lpm_get(&IDENTITIES, &PrefixKey::host(*addr)).map_or(identity::WORLD, |found| found.id)
}

#[inline(always)]
fn rule(key: RuleKey, out: &mut Admission) -> bool {
    match lpm_get(&RULES, &key) {
        Some(found) => {
            out.rule = *found;
            true
        }
        None => false,
    }
}

/// Whether the rules of `endpoint` allow the flow of `packet`, opened to it (scope IN) or by it (OUT); `way` tells whether the
/// packet goes as the flow was opened.
#[inline(never)]
fn evaluate(endpoint: &Endpoint, packet: &Packet, scope: u8, way: Way, out: &mut Admission) -> bool {
    let tuple = &packet.tuple;
    let (src, dst, dport) = match way {
        Way::Forward => (&tuple.src, &tuple.dst, tuple.dport),
        Way::Reverse => (&tuple.dst, &tuple.src, tuple.sport),
    };
    let (direction, remote, enforced) = if scope == scope::IN {
        (Direction::Ingress, src, endpoint_flags::ENFORCE_INGRESS)
    } else {
        (Direction::Egress, dst, endpoint_flags::ENFORCE_EGRESS)
    };
    out.peer = identity_of(remote);
    out.rule = 0;
    // A pod's own node reaches it whatever the rules say: the kubelet's probes do.
    if endpoint.flags & enforced == 0 || (direction == Direction::Ingress && out.peer == identity::HOST) {
        return true;
    }
    let subject = endpoint.subject;
    if rule(RuleKey::exact(subject, out.peer, direction, tuple.proto, dport), out)
        || rule(RuleKey::exact(subject, identity::ANY, direction, tuple.proto, dport), out)
    {
        return true;
    }
    match lpm_get(&CIDRS, &CidrKey::new(subject, direction, *remote, 128)) {
        Some(block) if *block != 0 => rule(RuleKey::exact(subject, *block, direction, tuple.proto, dport), out),
        _ => false,
    }
}

#[inline(always)]
fn refusal(scope: u8) -> Reason {
    if scope == scope::IN { Reason::PolicyIngress } else { Reason::PolicyEgress }
}

/// Admits a packet of a flow that is known, if the rules still allow it.
#[inline(always)]
pub fn admit_known(
    flow: Flow,
    scope: u8,
    way: Way,
    endpoint: &Endpoint,
    packet: &Packet,
    now: u64,
    account: &mut Account,
) -> Result<(), Reason> {
    let entry = flow.entry();
    account.endpoint = endpoint.id;
    if entry.policy_generation != endpoint.policy_generation || entry.epoch != ct::epoch() {
        let mut admission = Admission::default();
        let allowed = evaluate(endpoint, packet, scope, way, &mut admission);
        account.peer = admission.peer;
        if !allowed {
            ct::forget(&packet.tuple, scope, way);
            return Err(refusal(scope));
        }
        flow.admitted(endpoint, admission.peer, admission.rule);
    }
    flow.touch(packet, way, now);
    Ok(())
}

/// Admits the first packet of a flow and remembers it. `dialled` is the frontend before translation, unspecified without.
#[inline(always)]
pub fn admit_new(
    scope: u8,
    endpoint: &Endpoint,
    packet: &Packet,
    dialled: (Addr, keelway_layout::Port),
    now: u64,
    account: &mut Account,
) -> Result<(), Reason> {
    let mut admission = Admission { dialled, ..Admission::default() };
    let allowed = evaluate(endpoint, packet, scope, Way::Forward, &mut admission);
    account.endpoint = endpoint.id;
    account.peer = admission.peer;
    if !allowed {
        return Err(refusal(scope));
    }
    ct::open(packet, scope, endpoint, &admission, now)
}
