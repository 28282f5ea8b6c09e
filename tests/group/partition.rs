//! The way between a worker and rank 0 breaks: one way and both, and heals or not.

use crate::harness::{Group, Worker, err};
use crate::relay::{Path, relay};
use crate::{tiny, tokens, undisturbed};
use exflow::engine::{Cluster, Rank};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Three processes, the last of which reaches rank 0 by a way that can be broken.
fn run(group: &Group) -> (Cluster, Vec<Worker>, Arc<Path>) {
    let (way, path) = relay(group.leader.parse().expect("an address"));
    let leader = group.start(group.options());
    let workers = vec![group.worker(1, &[]), group.worker(2, &["--leader", &way.to_string()])];
    (leader.join().expect("thread"), workers, path)
}

#[test]
#[ignore = "make test-cluster: it takes its time"]
fn a_partition_changes_no_token_and_who_was_cut_off_comes_back() {
    type Cut = fn(&Path);
    let cuts: [Cut; 3] = [
        |path| path.cut(true),
        |path| path.cut_there.store(true, Ordering::Relaxed),
        |path| path.cut_back.store(true, Ordering::Relaxed),
    ];
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 24);
    for cut in cuts {
        let group = Group::new(3, folder.path());
        let (mut cluster, mut workers, path) = run(&group);
        let mut events = 0;
        let generated = cluster.generate(&requests, &mut |_| {
            events += 1;
            if events == 20 {
                cut(&path);
            }
        });
        assert_eq!(tokens(&generated.unwrap_or_else(|e| panic!("{e}\n{}", group.said()))), expected);
        assert_eq!(cluster.absent(), [Rank(2)], "{}", group.said());
        // The side without rank 0 asks for it, and ends if it cannot reach it.
        let output = workers.pop().expect("rank 2").end();
        assert_eq!(output.status.code(), Some(1), "{}", err(&output));
        assert!(err(&output).contains("error: rank 0 is gone"), "{}", err(&output));
        // Healed, its next process is let in.
        path.cut(false);
        workers.push(group.worker(2, &["--leader", &group.leader]));
        group.until_all_are_back(&mut cluster, &requests, &expected);
    }
}

#[test]
#[ignore = "make test-cluster: it takes its time"]
fn a_partition_that_heals_in_time_changes_nothing_at_all() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 24);
    let group = Group::new(3, folder.path());
    let (mut cluster, _workers, path) = run(&group);
    let mut events = 0;
    let generated = cluster.generate(&requests, &mut |_| {
        events += 1;
        if events == 20 {
            path.cut(true);
            let path = Arc::clone(&path);
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                path.cut(false);
            });
        }
    });
    assert_eq!(tokens(&generated.expect("all three")), expected);
    assert_eq!((cluster.epoch(), cluster.absent().len()), (0, 0), "{}", group.said());
}
