//! Random histories of Services and slices: the tables agree with the reference after every change, every packet in
//! between sees the state before or after, and a restart at any write continues from there.

mod support;

use keelway_proxy::{Backend, Model, Simulated, SlotKey, Tables};
use proptest::prelude::*;

use support::{
    Event, Flows, LIMITS, World, addr, check_datagram_flows, datagram_flows, event, flush, packets, verdicts,
};

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn tables_follow_the_reference(events in prop::collection::vec(event(), 1..30)) {
        let packets = packets();
        let mut world = World::new();
        let mut model = Model::new(world.node.clone());
        let mut tables = Tables::new(LIMITS);
        let mut kernel = Simulated::default();
        let mut flows = Flows::new();
        for event in events.iter().chain([&Event::Flush]) {
            world.feed(&mut model, event);
            if !matches!(event, Event::Flush) {
                continue;
            }
            flush(&mut model, &mut tables, &mut kernel, &packets)?;
            check_datagram_flows(&world, &kernel, &flows)?;
            flows = datagram_flows(&world, &kernel, &packets)?;
            for ((now, wanted), packet) in verdicts(&kernel, &packets)?.iter().zip(&world.verdicts()).zip(&packets) {
                prop_assert_eq!(now, wanted, "{:?}", packet);
            }

            let (_, ops, errors) = Tables::restore(LIMITS, &kernel.dump(), &model.all());
            prop_assert_eq!((ops, errors), (vec![], vec![]), "a restart has nothing to write");
        }
        let used: Vec<usize> = tables.usage().iter().map(|(_, used, _)| *used).collect();
        let slots = kernel.slots.len() + kernel.members.len();
        prop_assert_eq!(used, vec![kernel.frontends.len(), slots, kernel.backends.len(), kernel.source_ranges.len()]);
        world.clear(&mut model);
        flush(&mut model, &mut tables, &mut kernel, &packets)?;
        prop_assert_eq!(&kernel, &Simulated::default(), "nothing is left behind");
    }

    #[test]
    fn a_crash_at_any_write_is_made_good(
        events in prop::collection::vec(event(), 5..25), more in prop::collection::vec(event(), 0..6), at in any::<prop::sample::Index>(),
    ) {
        let packets = packets();
        let mut world = World::new();
        let mut model = Model::new(world.node.clone());
        let mut tables = Tables::new(LIMITS);
        let mut kernel = Simulated::default();
        let mut states = vec![kernel.clone()];
        for event in events.iter().chain([&Event::Flush]) {
            world.feed(&mut model, event);
            for change in if matches!(event, Event::Flush) { model.take_changes() } else { vec![] } {
                for op in tables.apply(&change).unwrap() {
                    kernel.execute(&op);
                    states.push(kernel.clone());
                }
            }
        }
        // The agent dies after some write; while it is away the objects go on changing.
        let mut kernel = at.get(&states).clone();
        for event in &more {
            world.feed(&mut model, event);
        }
        let (mut tables, ops, errors) = Tables::restore(LIMITS, &kernel.dump(), &model.all());
        prop_assert_eq!(errors, vec![]);
        for op in &ops {
            kernel.execute(op);
            verdicts(&kernel, &packets)?;
        }
        prop_assert_eq!(kernel.check(), Ok(()));
        prop_assert_eq!(verdicts(&kernel, &packets)?, world.verdicts());
        let (_, ops, _) = Tables::restore(LIMITS, &kernel.dump(), &model.all());
        prop_assert_eq!(ops, vec![]);
        world.clear(&mut model);
        flush(&mut model, &mut tables, &mut kernel, &packets)?;
        prop_assert_eq!(&kernel, &Simulated::default(), "nothing is left behind");
    }

    #[test]
    fn damaged_maps_are_made_good(
        events in prop::collection::vec(event(), 5..25), damage in prop::collection::vec((0..12u8, 0..9u32, 0..9u32), 1..6),
    ) {
        let packets = packets();
        let mut world = World::new();
        let mut model = Model::new(world.node.clone());
        let mut tables = Tables::new(LIMITS);
        let mut kernel = Simulated::default();
        events.iter().for_each(|event| world.feed(&mut model, event));
        flush(&mut model, &mut tables, &mut kernel, &packets)?;
        for (what, a, b) in damage {
            let slot = SlotKey { frontend: a, slot: b };
            let frontend = kernel.frontends.values_mut().nth(a as usize);
            match what {
                0 => { kernel.slots.insert(slot, b); }
                1 => { kernel.slots.remove(&slot); }
                2 => { kernel.backends.remove(&a); }
                3 => { kernel.backends.insert(a, (Backend { addr: addr("192.0.2.1"), port: 1, proto: 6 }, b == 0)); }
                4 => { kernel.members.insert((a, b), a); }
                5 => { kernel.source_ranges.insert((a, "192.0.2.0/24".parse().unwrap())); }
                6 => if let Some(backend) = kernel.backends.get_mut(&a) { backend.1 ^= true; },
                7 => if let Some(frontend) = frontend { frontend.flags ^= 1 << b; },
                8 => if let Some(key) = kernel.frontends.keys().nth(a as usize).copied() { kernel.frontends.remove(&key); },
                9 => if let Some(frontend) = frontend { frontend.id = if b == 0 { u32::MAX } else { b }; },
                _ => if let Some(frontend) = frontend { frontend.count = b; },
            }
        }
        let (_, ops, errors) = Tables::restore(LIMITS, &kernel.dump(), &model.all());
        prop_assert_eq!(errors, vec![]);
        ops.iter().for_each(|op| kernel.execute(op));
        prop_assert_eq!(kernel.check(), Ok(()));
        prop_assert_eq!(verdicts(&kernel, &packets)?, world.verdicts());
        let (_, ops, _) = Tables::restore(LIMITS, &kernel.dump(), &model.all());
        prop_assert_eq!(ops, vec![]);
    }
}
