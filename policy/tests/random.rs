//! Random clusters and histories: the tables agree with the reference for every flow, after every change; in between, a
//! flow meets the verdict before or after; a restart at any write goes on from there with the same numbers.

mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;

use common::{Event, World, addr, events};
use keelway_policy::model::Pod;
use keelway_policy::reference::{self, Flow, Reason, Verdict};
use keelway_policy::{Config, Decision, Direction, Limits, Model, Op, Scope, Simulated, identity};
use proptest::prelude::*;

const CONFIG: Config =
    Config { limits: Limits { identities: 1000, rules: 5000, cidrs: 5000 }, implied_namespaces: false };

/// Every address and destination port that matters, and some that nothing names.
fn probes() -> Vec<(IpAddr, u8, u16)> {
    let extra =
        ["192.0.2.1", "198.51.100.1", "10.9.0.9", "10.244.1.200", "fd00:244:1::200", "2001:db8::1", "2001:db8:1::1"];
    let addrs = common::POD_ADDRS.iter().chain(common::NODE_ADDRS).chain(&extra);
    let ports = [(1, 0), (6, 80), (6, 81), (6, 443), (6, 8080), (17, 53), (17, 80), (132, 80)];
    addrs.flat_map(|a| ports.map(|(proto, port)| (addr(a), proto, port))).collect()
}

type Decisions = BTreeMap<(String, Direction, IpAddr, u8, u16), Option<Decision>>;

fn flow(pod: IpAddr, direction: Direction, peer: IpAddr, proto: u8, port: u16) -> Flow {
    match direction {
        Direction::Ingress => Flow { src: peer, dst: pod, proto, port },
        Direction::Egress => Flow { src: pod, dst: peer, proto, port },
    }
}

fn decisions(world: &World, kernel: &Simulated) -> Decisions {
    let mut decisions = Decisions::new();
    for uid in world.endpoints.keys() {
        for direction in Direction::BOTH {
            for (peer, proto, port) in probes() {
                let decision = kernel.decide(uid, direction, peer, proto, port);
                decisions.insert((uid.clone(), direction, peer, proto, port), decision);
            }
        }
    }
    decisions
}

/// Whether the tables say what the reference says, and name a rule that it names too.
fn check(world: &World, model: &Model, kernel: &Simulated) -> Result<(), TestCaseError> {
    let objects = world.objects();
    for ((uid, direction, peer, proto, port), decision) in decisions(world, kernel) {
        let decision = decision.ok_or_else(|| TestCaseError::fail(format!("endpoint {uid} is missing")))?;
        let endpoint = &world.endpoints[&uid];
        let pod = objects.pods.iter().find(|pod| pod.name == endpoint.pod && pod.uid == uid && !pod.host_network);
        let Some(pod) = pod else {
            let from_host = decision == Decision::FromHost;
            prop_assert!(decision == Decision::Denied || from_host, "an endpoint without its pod lets nothing pass");
            continue;
        };
        let pod = &Pod { node_name: "n1".into(), ..pod.clone() };
        let flow = flow(addr("10.244.1.1"), direction, peer, proto, port);
        let verdict = reference::decide(&objects, pod, direction, &flow);
        let what = format!("{} {direction} {peer} {proto}/{port}", pod.name);
        if verdict == Verdict::Deny(Reason::UnknownNamespace) && decision == Decision::FromHost {
            continue;
        }
        prop_assert_eq!(decision.passes(), verdict.passes(), "{}: {:?}, {:?}", what, decision, verdict);
        let explained = model.explain(&uid, direction, peer, proto, port).map(|e| (e.decision, e.rule));
        let named = match decision {
            Decision::Allowed(rule) => model.rule(rule).cloned(),
            _ => None,
        };
        prop_assert_eq!(explained, Some((decision, named.clone())), "{}", what);
        match (decision, verdict) {
            (Decision::Allowed(_), Verdict::Allow(Reason::Rules(rules))) => {
                prop_assert!(named.as_ref().is_some_and(|rule| rules.contains(rule)), "{what}: {named:?}, {rules:?}");
            }
            (Decision::NotIsolated, Verdict::Allow(Reason::NotIsolated))
            | (Decision::FromHost, Verdict::Allow(Reason::FromOwnNode))
            | (Decision::Denied, Verdict::Deny(_)) => {}
            (decision, verdict) => return Err(TestCaseError::fail(format!("{what}: {decision:?}, {verdict:?}"))),
        }
    }
    Ok(())
}

/// Executes changes write by write. In between, when they come of one event, each flow meets the verdict before or the one
/// after (several events have states between them that are right too). Where the writes leave a flow that was allowed
/// denied, its generation is bumped at the end.
fn execute(
    world: &World,
    kernel: &mut Simulated,
    ops: &[Op],
    one_event: bool,
) -> Result<Vec<Simulated>, TestCaseError> {
    let before = decisions(world, kernel);
    let mut after = kernel.clone();
    ops.iter().for_each(|op| after.execute(op));
    let after_decisions = decisions(world, &after);
    let passes = |decision: &Option<Decision>| decision.is_none_or(Decision::passes);
    let mut states = Vec::new();
    for op in ops {
        kernel.execute(op);
        states.push(kernel.clone());
    }
    // Each state is as dear as the whole check, so a few in the middle stand for all.
    for state in states.iter().step_by(states.len() / 6 + 1).filter(|_| one_event) {
        for (key, now) in decisions(world, state) {
            let pod = &world.endpoints[&key.0].pod;
            let own = world.pods.get(pod).into_iter().flat_map(|pod| &pod.addresses);
            if own.chain(world.former.get(pod).into_iter().flatten()).any(|own| *own == key.2) {
                continue; // a pod to itself: never asked
            }
            let (old, new) = (&before[&key], &after_decisions[&key]);
            let between = passes(&now) == passes(old) || passes(&now) == passes(new);
            prop_assert!(between, "{key:?}: {old:?}, {now:?}, {new:?}");
        }
    }
    let bumped = |uid: &str| {
        ops.iter().any(|op| match op {
            Op::Bump(Scope::All) => true,
            Op::Bump(Scope::Subject(subject)) => after.endpoints.get(uid).is_some_and(|e| e.subject == *subject),
            Op::PutEndpoint(policy) => policy.uid == uid,
            _ => false,
        })
    };
    for (key, old) in before.iter().filter(|(_, old)| old.is_some()) {
        let new = &after_decisions[key];
        prop_assert!(!passes(old) || passes(new) || bumped(&key.0), "{key:?} is denied now: {old:?}, {new:?}");
    }
    Ok(states)
}

/// The tables with names for numbers, so that two models can be compared.
fn named(model: &Model, kernel: &Simulated) -> BTreeMap<String, String> {
    let name = |id: u32| model.describe_identity(id);
    let rule = |id: &u32| model.rule(*id).map(ToString::to_string).unwrap_or_default();
    let cidr_rules = |subject, direction, peer: u32| -> String {
        let rules = kernel.rules.iter().filter(|(k, _)| (k.subject, k.direction, k.peer) == (subject, direction, peer));
        rules.map(|(k, v)| format!("{:?} {}, ", k.port, rule(v))).collect()
    };
    let mut all = BTreeMap::new();
    for (key, id) in kernel.rules.iter().filter(|(key, _)| key.peer & identity::CIDR_BIT == 0) {
        all.insert(format!("rule {} {} {} {:?}", name(key.subject), key.direction, name(key.peer), key.port), rule(id));
    }
    for (key, peer) in &kernel.cidrs {
        let rules = cidr_rules(key.subject, key.direction, *peer);
        all.insert(format!("cidr {} {} {}", name(key.subject), key.direction, key.prefix), rules);
    }
    all.extend(kernel.identities.iter().map(|(prefix, id)| (format!("address {prefix}"), name(*id))));
    for e in kernel.endpoints.values() {
        let policy = format!("{} {} {} {}", e.pod, name(e.subject), e.enforce_ingress, e.enforce_egress);
        all.insert(format!("endpoint {}", e.uid), policy);
    }
    all
}

fn flush(
    world: &World,
    model: &mut Model,
    kernel: &mut Simulated,
    lines: &mut Vec<String>,
    one_event: bool,
) -> Result<Vec<Simulated>, TestCaseError> {
    let changes = model.take_changes();
    prop_assert_eq!(changes.errors, vec![]);
    lines.extend(changes.numbers);
    execute(world, kernel, &changes.ops, one_event)
}

fn run(
    events: &[Event],
    world: &mut World,
    model: &mut Model,
) -> Result<(Simulated, Vec<String>, Vec<Simulated>), TestCaseError> {
    let (mut kernel, mut lines) = (Simulated::default(), Vec::new());
    let mut states = vec![kernel.clone()];
    let mut pending = 0;
    for event in events.iter().chain([&Event::Flush]) {
        world.feed(model, event);
        pending += 1;
        if matches!(event, Event::Flush) {
            states.extend(flush(world, model, &mut kernel, &mut lines, pending <= 2)?);
            check(world, model, &kernel)?;
            pending = 0;
            world.former.clear();
        }
    }
    Ok((kernel, lines, states))
}

fn restore(lines: &[String], kernel: &Simulated) -> Result<Model, TestCaseError> {
    let lines = lines.iter().map(String::as_str);
    Model::restore(CONFIG, lines, &kernel.dump()).map_err(|error| TestCaseError::fail(error.to_string()))
}

/// Each case asks thousands of questions; `PROPTEST_CASES` asks for more of them.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn tables_follow_the_reference(events in events(1..50)) {
        let (mut world, mut model) = (World::default(), Model::new(CONFIG));
        let (mut kernel, mut lines, _) = run(&events, &mut world, &mut model)?;

        let mut fresh = Model::new(CONFIG);
        world.feed_all(&mut fresh);
        let mut built = Simulated::default();
        fresh.take_changes().ops.iter().for_each(|op| built.execute(op));
        prop_assert_eq!(named(&model, &kernel), named(&fresh, &built), "a history ends where a fresh start does");

        // A restart has nothing to write and keeps the numbers, from all lines as from the shortened ones.
        for lines in [&lines, &model.numbers()] {
            let mut again = restore(lines, &kernel)?;
            world.feed_all(&mut again);
            let changes = again.take_changes();
            prop_assert_eq!((changes.ops, changes.errors), (vec![], vec![]));
        }
        world.clear(&mut model);
        flush(&world, &mut model, &mut kernel, &mut lines, false)?;
        prop_assert_eq!(&kernel, &Simulated::default(), "nothing is left behind");
        prop_assert_eq!(model.numbers(), Vec::<String>::new());
    }

    #[test]
    fn a_crash_at_any_write_is_made_good(
        before in events(5..40), while_away in events(0..6), at in any::<prop::sample::Index>(), keep_lines in any::<bool>(),
    ) {
        let (mut world, mut model) = (World::default(), Model::new(CONFIG));
        let (_, mut lines, states) = run(&before, &mut world, &mut model)?;
        let mut kernel = at.get(&states).clone();
        while_away.iter().for_each(|event| world.feed(&mut model, event));
        if !keep_lines {
            lines.clear();
        }
        let mut again = restore(&lines, &kernel)?;
        world.feed_all(&mut again);
        let changes = again.take_changes();
        prop_assert_eq!(changes.errors, vec![]);
        if keep_lines {
            execute(&world, &mut kernel, &changes.ops, false)?;
        } else {
            changes.ops.iter().for_each(|op| kernel.execute(op));
        }
        check(&world, &again, &kernel)?;
        world.clear(&mut again);
        again.take_changes().ops.iter().for_each(|op| kernel.execute(op));
        prop_assert_eq!(&kernel, &Simulated::default(), "nothing is left behind");
    }

    #[test]
    fn a_failed_write_is_made_good(before in events(5..30), after in events(1..6), at in any::<prop::sample::Index>()) {
        let (mut world, mut model) = (World::default(), Model::new(CONFIG));
        let (mut kernel, _, _) = run(&before, &mut world, &mut model)?;
        after.iter().for_each(|event| world.feed(&mut model, event));
        let mut ops = model.take_changes().ops;
        ops.truncate(at.index(ops.len() + 1));
        ops.iter().for_each(|op| kernel.execute(op));
        model.resync(&kernel.dump());
        model.take_changes().ops.iter().for_each(|op| kernel.execute(op));
        check(&world, &model, &kernel)?;
        world.clear(&mut model);
        model.take_changes().ops.iter().for_each(|op| kernel.execute(op));
        prop_assert_eq!(&kernel, &Simulated::default(), "nothing is left behind");
    }

    #[test]
    fn full_maps_allow_less_never_more(events in events(10..50), identities in 5..30usize, rules in 0..40usize, cidrs in 0..12usize) {
        let limits = Limits { identities, rules, cidrs };
        let (mut world, mut model) = (World::default(), Model::new(Config { limits, ..CONFIG }));
        let mut kernel = Simulated::default();
        for event in events.iter().chain([&Event::Flush]) {
            world.feed(&mut model, event);
            if !matches!(event, Event::Flush) {
                continue;
            }
            let changes = model.take_changes();
            for op in &changes.ops {
                kernel.execute(op);
                prop_assert!(kernel.identities.len() <= identities && kernel.rules.len() <= rules && kernel.cidrs.len() <= cidrs);
            }
            if changes.errors.is_empty() {
                check(&world, &model, &kernel)?;
                continue;
            }
            let mut whole = Model::new(CONFIG);
            world.feed_all(&mut whole);
            let mut wanted = Simulated::default();
            whole.take_changes().ops.iter().for_each(|op| wanted.execute(op));
            let wanted = decisions(&world, &wanted);
            for (key, now) in decisions(&world, &kernel) {
                let allowed = |decision: &Option<Decision>| decision.is_some_and(Decision::passes);
                prop_assert!(!allowed(&now) || allowed(&wanted[&key]), "{key:?}: {now:?} for {:?}", wanted[&key]);
            }
        }
    }
}
