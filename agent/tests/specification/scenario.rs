//! Objects in, packets in, verdicts out: the format of the files in `scenarios/`, and what runs it.

mod affinity;
mod tunnel;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use keelway_agent::source::convert;
use keelway_layout::{Addr, Hook, Reason, ct_flags};
use keelway_proxy::model::{EndpointSlice, LoadBalancing, Service};
use keelway_proxy::{Backend, Forward, NodeInfo, ObjectName, Packet, Place, Verdict, maglev, reference};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::affinity::Affine;
use crate::kernel::{Did, Dsr, Kernel, NODE, REDIRECT, Source, ip, is_local_pod, is_remote_pod};
use crate::packet::{self, ACK, SCTP, SYN, Seen, TCP, UDP};

/// A client's SYN, or INIT, from a port that had a connection. Nobody but this test looks at its ECE bit.
const AGAIN: u8 = SYN | 0x40;
const OK: i32 = 0;
const SHOT: i32 = 2;
/// As often a flow is opened until each of a few backends has had one: with eight, 1 in 10^22 misses one.
const TRIES: usize = 400;

/// A file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Scenario {
    /// What it shows.
    pub about: String,
    /// The node's.
    #[serde(default)]
    pub zone: Option<String>,
    /// Pods of other nodes are reached by routes instead of the tunnel.
    #[serde(default)]
    pub routed: bool,
    #[serde(default)]
    pub dsr: Dsr,
    pub steps: Vec<Step>,
}

/// Flows of one step are looked at again in the next.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Step {
    /// Services and EndpointSlices.
    #[serde(default)]
    pub put: Vec<Value>,
    /// `Service/namespace/name` or `EndpointSlice/namespace/name`.
    #[serde(default)]
    pub delete: Vec<String>,
    /// A new agent finds the tables of the one before, and these objects.
    #[serde(default)]
    pub restart: bool,
    #[serde(default)]
    pub packets: Vec<Case>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum From {
    /// By the network.
    Outside,
    /// A pod of this node.
    Pod,
    /// A pod of another node, where those are reached by routes. (A run cannot have come by a tunnel.)
    RemotePod,
    /// A process of this node, by a protocol that no socket hook sees (SCTP).
    Host,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Case {
    pub from: From,
    pub client: IpAddr,
    pub to: SocketAddr,
    pub protocol: String,
    /// In words; without, the reference's alone counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
}

impl Case {
    fn proto(&self) -> u8 {
        match self.protocol.as_str() {
            "TCP" => TCP,
            "UDP" => UDP,
            "SCTP" => SCTP,
            other => panic!("no protocol: {other}"),
        }
    }
    fn hook(&self) -> Hook {
        match self.from {
            From::Pod => Hook::PodIngress,
            From::Host => Hook::NodeEgress,
            From::Outside | From::RemotePod => Hook::NodeIngress,
        }
    }
    fn packet(&self) -> Packet {
        // To a node's policy a pod of another one comes from outside.
        let place = match self.from {
            From::Pod => Place::Pod,
            From::Host => Place::Host,
            From::Outside | From::RemotePod => Place::Outside,
        };
        Packet { place, client: self.client, addr: self.to.ip(), port: self.to.port(), proto: self.proto() }
    }
}

/// A verdict as the files say it.
pub fn words(verdict: &Verdict) -> String {
    match verdict {
        Verdict::NotAService => "not a service".into(),
        Verdict::Refuse => "refused".into(),
        Verdict::Drop => "dropped: no-backend".into(),
        Verdict::Forbidden => "dropped: source-range".into(),
        Verdict::Forward(forward) => {
            let backends = forward.backends.iter().map(|b| SocketAddr::from((b.addr, b.port)).to_string());
            backends.collect::<Vec<_>>().join(" ")
        }
    }
}

/// A host's own packets do not come back to it: what it has no socket hook for, it cannot send itself by a Service.
fn is_to_itself(case: &Case, verdict: &Verdict) -> bool {
    let own = ip(NODE[usize::from(case.client.is_ipv6())]);
    let has = |to: &Forward| to.backends.iter().any(|backend| backend.addr == own);
    case.from == From::Host && matches!(verdict, Verdict::Forward(to) if has(to))
}

/// A flow that has a backend.
struct Open {
    case: Case,
    client: SocketAddr,
    backend: SocketAddr,
}

/// Affinity of less than so many seconds may end between two steps.
const LASTS: u32 = 600;

/// Runs a scenario on a kernel.
pub struct Runner<'a> {
    kernel: &'a mut Kernel,
    node: NodeInfo,
    routed: bool,
    dsr: Dsr,
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
    flows: Vec<Open>,
    /// The backends that clients with affinity have.
    kept: BTreeMap<Affine, SocketAddr>,
    next_port: u16,
    /// Packets that were compared, for the record.
    pub compared: usize,
}

/// Runs all steps; an error names the first disagreement. Answers how many packets were compared.
pub fn run(kernel: &mut Kernel, scenario: &Scenario) -> Result<usize, String> {
    let addresses = [(NODE[0], false), (NODE[1], false), ("127.0.0.1", true), ("::1", true)];
    let addresses: Vec<(IpAddr, bool)> = addresses.iter().map(|(addr, host_only)| (ip(addr), *host_only)).collect();
    let ips = vec![ip(NODE[0]), ip(NODE[1])];
    let node =
        NodeInfo { name: "n1".into(), zone: scenario.zone.clone(), ips: ips.clone(), addresses: addresses.clone() };
    kernel.set_mode(scenario.routed, scenario.dsr);
    kernel.forget_flows();
    kernel.services.set_place(scenario.zone.clone(), ips);
    kernel.services.set_addresses(addresses);
    let mut runner = Runner {
        kernel,
        node,
        routed: scenario.routed,
        dsr: scenario.dsr,
        services: BTreeMap::new(),
        slices: BTreeMap::new(),
        flows: Vec::new(),
        kept: BTreeMap::new(),
        next_port: 10_000,
        compared: 0,
    };
    let result = scenario
        .steps
        .iter()
        .enumerate()
        .try_for_each(|(at, step)| runner.step(step).map_err(|error| format!("step {at}: {error}")));
    runner.clear();
    result.map(|()| runner.compared)
}

impl Runner<'_> {
    /// The next scenario starts from nothing, and so must the tables.
    fn clear(&mut self) {
        for name in self.services.keys() {
            self.kernel.services.service_gone(&name.namespace, &name.name);
        }
        for name in self.slices.keys() {
            self.kernel.services.slice_gone(&name.namespace, &name.name);
        }
        self.kernel.services.set_addresses(Vec::new());
        self.kernel.apply();
        use keelway_maps::Table as _;
        let tables = &self.kernel.datapath.tables;
        let left = [tables.frontends.len(), tables.slots.len(), tables.backends.len(), tables.source_ranges.len()];
        assert!(left.iter().all(|left| matches!(left, Ok(0))), "entries of nobody are left: {left:?}");
    }

    fn put(&mut self, object: &Value) -> Result<(), String> {
        let object = object.clone();
        if object["kind"] == "EndpointSlice" {
            let object = serde_json::from_value(object).map_err(|error| error.to_string())?;
            if let Some((slice, _)) = convert::endpoint_slice(&object).map_err(|error| error.to_string())? {
                self.slices.insert(slice.name.clone(), slice.clone());
                self.kernel.services.slice_changed(slice, None);
            }
        } else {
            let object = serde_json::from_value(object).map_err(|error| error.to_string())?;
            let service = convert::service(&object).map_err(|error| error.to_string())?;
            self.services.insert(service.name.clone(), service.clone());
            self.kernel.services.model.upsert_service(service);
        }
        Ok(())
    }

    fn delete(&mut self, what: &str) -> Result<(), String> {
        let [kind, namespace, name] = what.split('/').collect::<Vec<_>>()[..] else {
            return Err(format!("no KIND/NAMESPACE/NAME: {what}"));
        };
        let object = ObjectName::new(namespace, name);
        if kind == "Service" {
            self.services.remove(&object);
            self.kept.retain(|(_, _, service, _), _| *service != object);
            self.kernel.services.service_gone(namespace, name);
        } else {
            self.slices.remove(&object);
            self.kernel.services.slice_gone(namespace, name);
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        step.put.iter().try_for_each(|object| self.put(object))?;
        step.delete.iter().try_for_each(|what| self.delete(what))?;
        if step.restart {
            self.kernel.restart();
        }
        self.kernel.apply();
        for open in std::mem::take(&mut self.flows) {
            self.goes_on(&open)
                .map_err(|error| format!("{:?} from {} that had {}: {error}", open.case, open.client, open.backend))?;
        }
        for case in &step.packets {
            let verdict = self.reference(case);
            let named = |error: String| format!("{case:?}, of which the reference says {}: {error}", words(&verdict));
            if let Some(wanted) = &case.verdict
                && *wanted != words(&verdict)
            {
                return Err(named("the reference is of another opinion than the file".into()));
            }
            if !is_to_itself(case, &verdict) {
                self.opens(case, &verdict).map_err(named)?;
            }
        }
        Ok(())
    }

    fn reference(&self, case: &Case) -> Verdict {
        let services: Vec<Service> = self.services.values().cloned().collect();
        let slices: Vec<EndpointSlice> = self.slices.values().cloned().collect();
        reference::verdict(&self.node, &services, &slices, &case.packet())
    }

    /// Whether datagrams stay with their backend.
    fn keeps(&self, case: &Case, backend: &Backend) -> bool {
        let services: Vec<Service> = self.services.values().cloned().collect();
        let slices: Vec<EndpointSlice> = self.slices.values().cloned().collect();
        reference::keeps(&self.node, &services, &slices, &case.packet(), backend)
    }

    fn client(&mut self, case: &Case) -> SocketAddr {
        self.next_port += 1;
        assert!(self.next_port < 60_000, "a scenario has too many packets");
        (case.client, self.next_port).into()
    }

    /// New flows of a client: all that the reference says, and nothing else.
    fn opens(&mut self, case: &Case, verdict: &Verdict) -> Result<(), String> {
        let client = self.client(case);
        let Some(first) = self.meets(case, client, SYN, verdict)? else { return Ok(()) };
        self.flows.push(Open { case: case.clone(), client, backend: first });
        let Verdict::Forward(forward) = verdict else { return Err("it was forwarded".into()) };
        let wanted: BTreeSet<SocketAddr> = forward.backends.iter().map(|b| (b.addr, b.port).into()).collect();
        let mut seen = BTreeSet::from([first]);
        let timeout = forward.affinity_seconds;
        if timeout > 0 {
            let had = self.affine(case).and_then(|affine| self.kept.get(&affine).copied());
            if let Some(had) = had.filter(|had| timeout >= LASTS && wanted.contains(had) && *had != first) {
                return Err(format!("a client with affinity to {had}, by another address or from before, got {first}"));
            }
            // The same one while the time lasts; each connection begins it anew.
            for seconds in [0, timeout.saturating_sub(2), timeout.saturating_sub(2)] {
                self.kernel.age(case.client, seconds);
                let client = self.client(case);
                let next = self.meets(case, client, SYN, verdict)?;
                if next != Some(first) {
                    return Err(format!("a client with affinity to {first} got {next:?} within its time"));
                }
            }
            self.forget(case.client);
            self.keep(case, first);
            self.has_by_all_addresses(case, first)?;
        }
        for _ in 0..TRIES {
            if seen == wanted {
                return Ok(());
            }
            if timeout > 0 {
                self.kernel.age(case.client, timeout + 1);
                self.forget(case.client);
            }
            let client = self.client(case);
            if let Some(backend) = self.meets(case, client, SYN, verdict)? {
                seen.insert(backend);
                self.keep(case, backend);
            }
        }
        Err(format!("of {wanted:?} only {seen:?} got any of {TRIES} flows"))
    }

    /// A flow of an earlier step.
    fn goes_on(&mut self, open: &Open) -> Result<(), String> {
        let verdict = self.reference(&open.case);
        let proto = open.case.proto();
        let here = Backend { addr: open.backend.ip(), port: open.backend.port(), proto };
        let drains = self.kernel.drains(&here);
        let is_served = verdict != Verdict::NotAService;
        let stays = Forward { backends: BTreeSet::from([here]), affinity_seconds: 0, keep_source: false };
        let stays = Verdict::Forward(stays);
        if proto != UDP {
            // A connection is for its two ends to end, whatever became of its backend in the slices, or of its Service.
            self.meets(&open.case, open.client, ACK, &stays).map_err(|error| format!("its data: {error}"))?;
        }
        // A connection that has not ended leaves a backend that drains for every frontend of this node, not one that only its own
        // frontend left; datagrams, of which none says that it begins a flow, one that serves their Service port no longer.
        let keeps = if proto == UDP { self.keeps(&open.case, &here) } else { drains == Some(false) };
        let wanted = if keeps && is_served { &stays } else { &verdict };
        if !is_to_itself(&open.case, wanted) {
            let got = self.meets(&open.case, open.client, AGAIN, wanted);
            let got = got.map_err(|error| format!("as a new flow: {error}"))?;
            got.filter(|_| *wanted == verdict).into_iter().for_each(|got| self.keep(&open.case, got));
        }
        Ok(())
    }

    /// One packet meets what it should; the backend, if that is one.
    fn meets(
        &mut self,
        case: &Case,
        client: SocketAddr,
        flags: u8,
        verdict: &Verdict,
    ) -> Result<Option<SocketAddr>, String> {
        self.compared += 1;
        let sent = packet::flow(client, case.to, case.proto(), flags);
        let did = self.kernel.run(case.hook(), &sent);
        let (out, counted) = (&did.run.packet, &did.counted);
        let wrong = |what: &str| {
            let seen = packet::read(out);
            Err(format!("{what}: verdict {}, counted {counted:?}, packet {seen:?}", did.run.verdict))
        };
        match verdict {
            Verdict::NotAService => {
                let passed = [OK, REDIRECT].contains(&did.run.verdict);
                // A MAC may have changed; nothing behind it has.
                if !passed || out[14..] != sent[14..] || counted.contains(&Reason::Translated) {
                    return wrong("it should have passed as it was");
                }
                Ok(None)
            }
            Verdict::Refuse if case.proto() == TCP && flags & (SYN | ACK) == SYN => {
                let told = packet::reset(out, &sent)?;
                let back = told.src == case.to && told.dst == client;
                match did.run.verdict == REDIRECT && back && counted.contains(&Reason::NoBackend) {
                    true => Ok(None),
                    false => wrong("it should have been refused"),
                }
            }
            Verdict::Refuse => {
                let told = packet::carried(out)?;
                let outer = packet::read(out)?;
                let back = outer.src.ip() == case.to.ip() && outer.dst.ip() == client.ip();
                let about = told.src == client && told.dst == case.to && told.proto == case.proto();
                match did.run.verdict == REDIRECT && back && about && counted.contains(&Reason::NoBackend) {
                    true => Ok(None),
                    false => wrong("it should have been refused"),
                }
            }
            Verdict::Drop | Verdict::Forbidden => {
                let reason = if *verdict == Verdict::Drop { Reason::NoBackend } else { Reason::SourceRange };
                match did.run.verdict == SHOT && *counted == [reason] {
                    true => Ok(None),
                    false => wrong("it should have been dropped"),
                }
            }
            Verdict::Forward(forward) => {
                if did.run.verdict == SHOT {
                    return wrong("it should have reached a backend");
                }
                let is_backend = |seen| forward.backends.iter().any(|b| SocketAddr::from((b.addr, b.port)) == seen);
                if let Some(backend) = self.handed_on(case, client) {
                    // The other words of its address are where the MACs were.
                    let told: Vec<u8> =
                        Addr::from(backend.ip()).words()[1..].iter().flat_map(|w| w.to_ne_bytes()).collect();
                    let as_it_came = out[14..] == sent[14..] && out[..12] == told && did.run.verdict == REDIRECT;
                    if did.tunnelled.is_some_and(|id| id != 1 << 16 | u32::from(backend.port())) {
                        return wrong("its network id should say the backend's port");
                    }
                    if !is_backend(backend) || !as_it_came || !counted.contains(&Reason::ToBackendsNode) {
                        return wrong(&format!("it should have been handed on as it is, to {backend}"));
                    }
                    self.is_hashed(case, client, flags, forward, backend)?;
                    self.kernel.handed_on += 1;
                    return Ok(Some(backend));
                }
                let seen = packet::read(out)?;
                if !is_backend(seen.dst) || seen.proto != case.proto() || !counted.contains(&Reason::Translated) {
                    return wrong("it reached none of the backends");
                }
                let by_tunnel = is_remote_pod(seen.dst.ip()) && !self.routed;
                if did.tunnelled.is_some_and(|id| !by_tunnel || id != 1) {
                    return wrong("it should not have gone through the tunnel, or under another id");
                }
                if self.is_to_be_handed_on(case, seen.dst.ip()) {
                    return wrong("it should have been handed on to its backend's node");
                }
                let source = self.source(case, client, seen.dst);
                if forward.keep_source && source != Source::Of(client) {
                    return wrong("its client should be kept");
                }
                if !source.is(seen.src) {
                    return wrong(&format!("it should come from {source:?}"));
                }
                self.is_hashed(case, client, flags, forward, seen.dst)?;
                self.answers(case, client, &did, seen)?;
                self.kernel.from_host += usize::from(case.from == From::Host);
                Ok(Some(seen.dst))
            }
        }
    }

    /// The backend of a flow that its backend's node answers.
    fn handed_on(&self, case: &Case, client: SocketAddr) -> Option<SocketAddr> {
        let flow = self.kernel.service_flow(client, case.to, case.proto())?;
        let backend = SocketAddr::new(flow.nat_addr.into(), flow.nat_port.get());
        (flow.flags & ct_flags::DSR != 0 && self.is_to_be_handed_on(case, backend.ip())).then_some(backend)
    }

    fn is_to_be_handed_on(&self, case: &Case, backend: IpAddr) -> bool {
        let is_on = match self.dsr {
            Dsr::None => false,
            Dsr::Tcp => case.proto() == TCP,
            Dsr::All => true,
        };
        is_on && case.from == From::Outside && is_remote_pod(backend)
    }

    /// Whom the backend sees.
    fn source(&self, case: &Case, client: SocketAddr, backend: SocketAddr) -> Source {
        let own = ip(NODE[usize::from(backend.is_ipv6())]);
        let itself = ip(if backend.is_ipv6() { "100::1" } else { "169.254.1.1" });
        match case.from {
            From::Pod if backend.ip() == client.ip() => Source::Of((itself, client.port()).into()),
            From::Pod | From::Host => Source::Of(client),
            _ if is_local_pod(backend.ip()) || backend.ip() == own => Source::Of(client),
            _ => Source::Node(own),
        }
    }

    /// Where every Service is hashed, the flow alone decides, for clients from outside and addresses that are theirs to dial.
    fn is_hashed(
        &self,
        case: &Case,
        client: SocketAddr,
        flags: u8,
        forward: &Forward,
        got: SocketAddr,
    ) -> Result<(), String> {
        let all =
            self.services.values().all(|s| s.load_balancing == LoadBalancing::Maglev && s.affinity_seconds.is_none());
        let external =
            case.hook() == Hook::NodeIngress && !self.services.values().any(|s| s.cluster_ips.contains(&case.to.ip()));
        if !all || !external || flags != SYN {
            return Ok(());
        }
        let backends: Vec<Backend> = forward.backends.iter().copied().collect();
        let table = maglev::table(&backends, maglev::size(maglev::SIZES, backends.len()), None);
        let slot = maglev::flow_hash(client, case.to, case.proto()) as usize % table.len();
        let wanted = backends[table[slot] as usize];
        match SocketAddr::from((wanted.addr, wanted.port)) == got {
            true => Ok(()),
            false => Err(format!("its hash names slot {slot}, and so {wanted}; it got {got}")),
        }
    }

    /// The hook that a backend's packets meet; `None` where a run cannot show it.
    fn answering_hook(&self, case: &Case, backend: IpAddr) -> Option<Hook> {
        let own = ip(NODE[usize::from(backend.is_ipv6())]);
        if is_local_pod(backend) {
            Some(Hook::PodIngress)
        } else if backend == own {
            Some(if case.from == From::Pod { Hook::PodEgress } else { Hook::NodeEgress })
        } else if is_remote_pod(backend) && !self.routed {
            None
        } else {
            Some(Hook::NodeIngress)
        }
    }

    /// What the backend answers, and its ICMP errors, come from whom the client dialled; the client's errors reach the backend.
    fn answers(&mut self, case: &Case, client: SocketAddr, did: &Did, seen: Seen) -> Result<(), String> {
        if case.from == From::Outside && is_remote_pod(seen.dst.ip()) && !self.routed {
            return self.answers_by_tunnel(case, client, seen);
        }
        let Some(hook) = self.answering_hook(case, seen.dst.ip()) else { return Ok(()) };
        let (mut request, mut seen) = (did.run.packet.clone(), seen);
        if case.from == From::Pod && hook == Hook::NodeIngress {
            // On its way out it may be masqueraded.
            request = self.kernel.run(Hook::NodeEgress, &request).run.packet;
            seen = packet::read(&request)?;
        }
        if case.from == From::Host && hook == Hook::PodIngress {
            let taken = self.kernel.run(Hook::PodEgress, &request);
            if taken.run.verdict != OK || taken.run.packet != request {
                return Err(format!("the pod's hook does not take it as it is: {:?}", taken.counted));
            }
        }
        let answer = packet::flow(seen.dst, seen.src, case.proto(), SYN | ACK);
        let answered = self.kernel.run(hook, &answer);
        let got = packet::read(&answered.run.packet).map_err(|error| format!("the answer: {error}"))?;
        if answered.run.verdict == SHOT || (got.src, got.dst) != (case.to, client) {
            return Err(format!("the answer at {}: {got:?}, counted {:?}", hook.name(), answered.counted));
        }
        let itself = case.from == From::Pod && seen.dst.ip() == case.client;
        if !itself {
            let error = packet::unreachable(seen.dst.ip(), seen.src.ip(), &request);
            let told = self.kernel.run(hook, &error);
            let about = packet::carried(&told.run.packet).map_err(|error| format!("the backend's error: {error}"))?;
            let outer = packet::read(&told.run.packet)?;
            let right = (about.src, about.dst) == (client, case.to)
                && (outer.src.ip(), outer.dst.ip()) == (case.to.ip(), client.ip());
            if told.run.verdict == SHOT || !right {
                return Err(format!(
                    "the backend's error at {}: {outer:?} about {about:?}, counted {:?}",
                    hook.name(),
                    told.counted
                ));
            }
        }
        if case.hook() == Hook::NodeIngress && is_local_pod(seen.dst.ip()) {
            let error = packet::unreachable(client.ip(), case.to.ip(), &answered.run.packet);
            let told = self.kernel.run(case.hook(), &error);
            let about = packet::carried(&told.run.packet).map_err(|error| format!("the client's error: {error}"))?;
            let outer = packet::read(&told.run.packet)?;
            let right = (about.src, about.dst) == (seen.dst, client)
                && (outer.src.ip(), outer.dst.ip()) == (client.ip(), seen.dst.ip());
            if told.run.verdict == SHOT || !right {
                return Err(format!("the client's error: {outer:?} about {about:?}, counted {:?}", told.counted));
            }
        }
        Ok(())
    }
}
