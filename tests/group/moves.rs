//! Experts that move between processes, and a process that is killed meanwhile.

use crate::harness::Group;
use crate::{tiny, undisturbed};
use exflow::engine::{ClusterOptions, Engine, EngineOptions, LiveStats, Schedule};
use exflow::placement::PlacementTable;
use std::time::{Duration, Instant};

fn until(engine: &Engine, group: &Group, so: impl Fn(&LiveStats) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !so(&engine.live()) {
        assert!(Instant::now() < deadline, "{:?}\n{}", engine.live().moves, group.said());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn who_is_killed_while_experts_move_changes_no_token() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 50);
    for schedule in [Schedule::Rounds, Schedule::Flow] {
        let group = Group::new(3, folder.path());
        let (_one, mut two) = (group.worker(1, &[]), Some(group.worker(2, &[])));
        let options = ClusterOptions { schedule, ..group.options() };
        let cluster = group.start(options).join().expect("thread");
        let engine = Engine::over(cluster, EngineOptions::default()).expect("an engine");
        let run = || requests.iter().map(|request| engine.submit(request.clone()).expect("taken"));

        let running: Vec<_> = run().collect();
        engine.move_to(PlacementTable::linear(3, 8, 3)).expect("it fits");
        until(&engine, &group, |live| live.moves.done == 1);
        assert_eq!(engine.placement().assignment, PlacementTable::linear(3, 8, 3).assignment);
        for (running, expected) in running.into_iter().zip(&expected) {
            assert_eq!(&running.complete().expect("tokens").output_ids, expected, "{schedule}");
        }
        assert!(group.said().contains("experts were read and moved"), "{}", group.said());

        let mut running: Vec<_> = run().collect();
        let first: Vec<_> = running[0].by_ref().take(4).collect();
        engine.move_to(PlacementTable::round_robin(3, 8, 3)).expect("it fits");
        drop(two.take());
        let rest = running.remove(0);
        let told: Vec<u32> =
            first.into_iter().chain(rest).map(|event| event.expect("a token").token).collect();
        assert_eq!(told, expected[0], "{schedule}");
        for (running, expected) in running.into_iter().zip(&expected[1..]) {
            assert_eq!(&running.complete().expect("tokens").output_ids, expected, "{schedule}");
        }
        // It may have come to its end just before; in any case it is over, and the others hold everything.
        until(&engine, &group, |live| live.moves.done + live.moves.refused == 2);
        until(&engine, &group, |_| engine.placement().experts_per_rank()[2] == 0);
        // What moves next waits for the rank that is lost.
        engine.move_to(PlacementTable::linear(3, 8, 3)).expect("it fits the model");
        until(&engine, &group, |live| live.moves.done + live.moves.refused == 3);
        assert!(
            engine.live().moves.why.is_some_and(|why| why.contains("rank 2")),
            "{:?}",
            engine.live().moves
        );
    }
}
