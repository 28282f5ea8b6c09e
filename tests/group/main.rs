//! Ranks in processes of their own: one world, what it refuses, and how it goes on when ranks are lost.
#![cfg(unix)]

#[path = "../common/mod.rs"]
mod common;
mod harness;
mod moves;
mod partition;
#[allow(dead_code, unreachable_pub, reason = "made for other tests too")]
#[path = "../../transport/tests/support/relay.rs"]
mod relay;

use common::tiny::{Folder, Tiny};
use common::{request, root, tokens};
use exflow::engine::{
    Cluster, ClusterOptions, Feed, NoProgress, PlacementSource, Rank, Schedule, Strategy, TransportKind,
};
use exflow::placement::{Affinity, PlacementTable};
use harness::{Group, Worker, err};
use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn tiny() -> Folder {
    Tiny { layers: 3, experts: 8, seed: 5, ..Tiny::default() }.write()
}

/// Requests of different lengths, and what one undisturbed rank makes of them.
fn undisturbed(model: &Path, n: usize) -> (Vec<exflow::engine::Request>, Vec<Vec<u32>>) {
    let requests = vec![request(&[1, 2, 3], n), request(&[7, 5], n), request(&[4, 4, 4, 4, 9], n)];
    let mut alone = common::Setup::one_rank(model).start();
    let said = tokens(&alone.generate(&requests, &mut |_| {}).expect("one rank"));
    (requests, said)
}

#[test]
fn processes_make_one_world_and_a_killed_one_changes_no_token() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 24);
    let group = Group::new(3, folder.path());
    let (mut cluster, mut workers) = group.run();
    assert_eq!(tokens(&cluster.generate(&requests, &mut |_| {}).expect("three processes")), expected);
    let alone =
        common::Setup::one_rank(folder.path()).start().logits(&[1, 2, 3, 4], Feed::Decode).expect("one");
    assert_eq!(cluster.logits(&[1, 2, 3, 4], Feed::Decode).expect("three processes"), alone, "bit by bit");

    // Rank 2 is killed amid a run: the others take its experts over and go on.
    let mut victim = workers.pop();
    let mut events = 0;
    let run = cluster.generate(&requests, &mut |_| {
        events += 1;
        if events == 20 {
            drop(victim.take());
        }
    });
    assert_eq!(tokens(&run.unwrap_or_else(|e| panic!("{e}\n{}", group.said()))), expected);
    assert_eq!(events, expected.iter().map(Vec::len).sum::<usize>(), "no token is told twice");
    assert_eq!((cluster.epoch(), cluster.absent()), (1, &[Rank(2)][..]));
    assert_eq!(cluster.placement().experts_per_rank()[2], 0);

    // It comes back, and is let in.
    workers.push(group.worker(2, &[]));
    group.until_all_are_back(&mut cluster, &requests, &expected);
    assert!(cluster.epoch() >= 2);
    assert_eq!(tokens(&cluster.generate(&requests, &mut |_| {}).expect("all again")), expected);
    drop(cluster);
    for worker in workers {
        let output = worker.end();
        assert!(output.status.success(), "a worker ends with rank 0: {}", err(&output));
    }
}

/// Expert e always follows expert e: each of the lost rank's chains goes to one rank, which reads that and no more.
#[test]
fn a_lost_ranks_experts_stay_with_those_that_they_follow() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 16);
    let group = Group::new(3, folder.path());
    let mut affinity = Affinity::zeros(3, 8);
    affinity.transitions.chunks_exact_mut(64).for_each(|pair| (0..8).for_each(|e| pair[9 * e] = 1.0));
    let options = ClusterOptions { affinity: Some(Arc::new(affinity)), ..group.options() };
    let (_one, mut two) = (group.worker(1, &[]), Some(group.worker(2, &[])));
    let mut cluster = group.start(options).join().expect("thread");
    let mut events = 0;
    let run = cluster.generate(&requests, &mut |_| {
        events += 1;
        if events == 20 {
            drop(two.take());
        }
    });
    assert_eq!(tokens(&run.unwrap_or_else(|e| panic!("{e}\n{}", group.said()))), expected);
    for row in &cluster.placement().assignment {
        assert_eq!(row, &cluster.placement().assignment[0], "chains are whole");
        assert!((0..2).all(|r| row.iter().filter(|holder| **holder == Rank(r)).count() == 4), "{row:?}");
    }
    assert!(group.said().contains("process 0: 3 experts read, 9 kept"), "{}", group.said());
    // Everything goes back to where it was: of what rank 0 holds then it has all.
    let _two = group.worker(2, &[]);
    group.until_all_are_back(&mut cluster, &requests, &expected);
    assert!(group.said().contains("process 0: 0 experts read, 9 kept"), "{}", group.said());
}

/// Two processes of two ranks each, in both schedules; then one of them is killed and the other holds all experts.
#[test]
fn processes_of_several_ranks_make_one_world_in_rounds_and_in_flow() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 16);
    for schedule in [Schedule::Rounds, Schedule::Flow] {
        let group = Group::new(2, folder.path());
        let worker = group.worker(1, &["--ranks-per-device", "2"]);
        let options = ClusterOptions { ranks: 2, schedule, ..group.options() };
        let mut cluster = group.start(options).join().expect("thread");
        assert_eq!((cluster.options().ranks, cluster.adapters().len()), (4, 4));
        assert!(cluster.adapters().iter().all(|name| !name.is_empty()));
        let mut worker = Some(worker);
        assert_eq!(tokens(&cluster.generate(&requests, &mut |_| {}).expect("four ranks")), expected);
        let mut events = 0;
        let run = cluster.generate(&requests, &mut |_| {
            events += 1;
            if events == 10 {
                drop(worker.take());
            }
        });
        assert_eq!(tokens(&run.unwrap_or_else(|e| panic!("{e}\n{}", group.said()))), expected, "{schedule}");
        assert_eq!(cluster.absent(), [Rank(2), Rank(3)]);
    }
}

#[test]
fn a_world_of_processes_measures_itself_and_changes_how_it_runs() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 8);
    let group = Group::new(3, folder.path());
    let (mut cluster, workers) = group.run();
    let measured = cluster.measure().unwrap_or_else(|e| panic!("{e}\n{}", group.said()));
    assert_eq!((measured.ranks.len(), measured.links.len()), (3, 3));
    for (from, links) in measured.links.iter().enumerate() {
        let others = links.iter().enumerate().filter(|(to, _)| *to != from);
        others
            .for_each(|(to, link)| assert!(link.latency_s > 0.0 && link.bytes_per_s > 0.0, "{from} to {to}"));
    }
    let table = PlacementTable::linear(3, 8, 3);
    for (strategy, schedule, table) in [
        (Strategy::Vanilla, Schedule::Flow, None),
        (Strategy::Coherent, Schedule::Flow, Some(table.clone())),
        (Strategy::Coherent, Schedule::Rounds, None),
    ] {
        let what = format!("{strategy}, {schedule}");
        cluster.change(strategy, schedule, table).unwrap_or_else(|e| panic!("{what}: {e}\n{}", group.said()));
        let run = cluster.generate(&requests, &mut |_| {}).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(tokens(&run), expected, "{what}");
        assert_eq!((run.stats.strategy, run.stats.schedule), (strategy.to_string(), schedule.to_string()));
        assert!(cluster.absent().is_empty(), "{what}: {}", group.said());
    }
    assert_eq!(cluster.placement().assignment, table.assignment);
    drop(cluster);
    for worker in workers {
        let output = worker.end();
        assert!(output.status.success(), "a worker ends with rank 0: {}", err(&output));
    }
}

/// Two ranks that begin a latency apart must not take turns at finding and at waiting for each other's part: each would
/// time an exchange as none or as two latencies.
#[test]
fn an_exchange_of_two_ranks_takes_one_latency() {
    let folder = tiny();
    let options = ClusterOptions {
        ranks: 2,
        transport: TransportKind::Quic,
        link: Some("latency=40ms".parse().expect("a link")),
        ..ClusterOptions::new(folder.path())
    };
    common::prepare();
    let measured = Cluster::start(options, &NoProgress).expect("a cluster").measure().expect("measured");
    let latency = measured.links[0][1].latency_s;
    assert!(latency >= 0.04, "{latency}");
    let of_latency = measured.exchange_s / latency;
    assert!((0.6..1.5).contains(&of_latency), "{of_latency}");
}

#[test]
fn a_world_that_was_measured_and_changed_says_the_same() {
    let shape = Tiny { top_k: 2, layers: 3, experts: 6, seed: 51, ..Tiny::default() };
    let folder = shape.write();
    let requests: Vec<_> = (0..3).map(|s| request(&shape.prompt(4 + s, s as u64), 7)).collect();
    let expected = {
        let mut alone = common::Setup::one_rank(folder.path()).start();
        tokens(&alone.generate(&requests, &mut |_| {}).expect("one rank"))
    };
    let mut cluster = common::Setup::new(folder.path(), 3, Strategy::Vanilla).start();
    for (strategy, schedule) in [
        (Strategy::Coherent, Schedule::Flow),
        (Strategy::Vanilla, Schedule::Rounds),
        (Strategy::Vanilla, Schedule::Flow),
        (Strategy::Coherent, Schedule::Rounds),
    ] {
        let measured = cluster.measure();
        match cluster.options().schedule {
            Schedule::Rounds => {
                for times in measured.expect("measured").ranks {
                    let curves =
                        [&times.hop.vanilla, &times.hop.coherent, &times.serve, &times.begin, &times.end];
                    let more = [&times.attend.vanilla, &times.attend.coherent, &times.sample];
                    assert!(curves.iter().chain(&more).all(|curve| curve.at(1) > 0.0), "{times:?}");
                    assert!(times.crowded >= 1.0);
                }
            }
            Schedule::Flow => assert!(measured.expect_err("ranks in flow do not stop together").is_input()),
        }
        assert_eq!(tokens(&cluster.generate(&requests, &mut |_| {}).expect("three ranks")), expected);
        let table = PlacementTable::linear(3, 6, 3);
        let table = (schedule == Schedule::Flow).then_some(table);
        cluster.change(strategy, schedule, table).expect("changed");
        let run = cluster.generate(&requests, &mut |_| {}).expect("three ranks");
        assert_eq!(tokens(&run), expected, "{strategy}, {schedule}");
        assert_eq!((run.stats.strategy, run.stats.schedule), (strategy.to_string(), schedule.to_string()));
    }
}

/// `exflow bench` over processes: rank 0 has the others change with it and prints the table.
#[test]
fn a_group_compares_strategies_over_its_own_links() {
    let folder = tiny();
    let group = Group::new(2, folder.path());
    let worker =
        Worker(Some(group.command("bench", 1, &["--listen", "127.0.0.1:0"]).spawn().expect("rank 1")));
    let more = "-n 4 -r 2 --own-text 8 --time-limit 1s --format json -p one two";
    let leader = group.command("bench", 0, &more.split(' ').collect::<Vec<_>>()).spawn().expect("rank 0");
    let (leader, worker) = (Worker(Some(leader)).end(), worker.end());
    assert!(leader.status.success() && worker.status.success(), "{}\n{}", err(&leader), err(&worker));
    let table: serde_json::Value = serde_json::from_slice(&leader.stdout).expect("JSON");
    assert_eq!((&table["same_tokens"], &table["repeats"]), (&true.into(), &2.into()));
    let rows = table["settings"].as_array().expect("settings");
    let exchanges: Vec<_> = rows.iter().map(|row| row["exchanges_per_layer"].as_f64()).collect();
    assert_eq!(exchanges, [Some(2.0), Some(1.0), Some(1.0)], "{table}");
    assert!(rows.iter().all(|row| row["bytes"]["dispatch"].as_f64() > Some(0.0)), "{table}");
    assert_eq!(table["adapters"].as_array().map(Vec::len), Some(2));
}

#[test]
fn those_who_do_not_fit_hear_why_and_the_others_join() {
    let folder = tiny();
    let other = Tiny { layers: 3, experts: 8, seed: 6, ..Tiny::default() }.write();
    let (requests, expected) = undisturbed(folder.path(), 4);
    let group = Group::new(3, folder.path());
    let mut options = group.options();
    let tables = tempfile::tempdir().expect("a folder");
    let path = |name: &str| tables.path().join(name).display().to_string();
    PlacementTable::linear(3, 8, 3).save(path("linear").as_ref()).expect("table");
    PlacementTable::round_robin(3, 8, 3).save(path("round_robin").as_ref()).expect("table");
    options.placement = PlacementSource::File(path("linear").into());
    let leader = group.start(options);
    let identity = |rank: usize| group.certificates.path().join(format!("rank-{rank}")).display().to_string();
    let refused = |rank: usize, more: &[&str], words: &str| {
        let output = group.worker(rank, more).end();
        let told = err(&output);
        assert!(!output.status.success() && told.contains(words), "{words}:\n{told}");
        assert!(told.lines().filter(|line| line.starts_with("error")).count() == 1, "{told}");
    };
    refused(1, &["-m", &other.path().display().to_string()], "another model");
    refused(1, &["--world-size", "4"], "world size 4 where it is 3");
    refused(1, &["--identity", &identity(2)], "not rank 1's");
    refused(1, &["--placement", &path("round_robin")], "another placement table");
    let first = group.worker(1, &["--placement", &path("linear")]);
    while !group.said().contains("rank 1 joined") {
        std::thread::sleep(Duration::from_millis(5));
    }
    refused(1, &[], "rank 1 has already joined");
    let _second = group.worker(2, &[]);
    let mut cluster = leader.join().expect("thread");
    assert_eq!(tokens(&cluster.generate(&requests, &mut |_| {}).expect("all are there")), expected);
    let said = group.said();
    for words in
        ["another model", "world size 4", "not rank 1's", "another placement table", "already joined"]
    {
        assert!(said.contains(words), "rank 0 is told too: {words}\n{said}");
    }
    drop((cluster, first));
}

#[test]
fn the_loss_of_rank_0_ends_every_worker_with_its_name() {
    let group = Group::new(3, &root().join("examples/models/gpt-moe-16e"));
    let more = ["--prompt-ids", "1,2,3", "-n", "200", "--ignore-eos"];
    let mut leader = Worker(Some(group.command("generate", 0, &more).spawn().expect("rank 0")));
    let workers = [group.worker(1, &[]), group.worker(2, &["--ranks-per-device", "2"])];
    // Its first byte of text: they are amid a run.
    let out = leader.0.as_mut().and_then(|child| child.stdout.as_mut()).expect("stdout");
    std::io::Read::read_exact(out, &mut [0; 1]).expect("text");
    leader.signal("-KILL");
    let began = Instant::now();
    // How long it may take follows from the settings, which a test of the engine keeps under 2 s.
    for worker in workers {
        let output = worker.end();
        eprintln!("a worker ended after {:?}", began.elapsed());
        assert_eq!(output.status.code(), Some(1), "{}", err(&output));
        assert!(err(&output).contains("error: rank 0 is gone"), "{}", err(&output));
        assert!(!err(&output).contains("rank 1: rank 1:"), "{}", err(&output));
    }
}

/// All ranks in one process: there is nobody to be lost, however long it was stopped.
#[test]
fn a_process_that_hosts_all_ranks_may_be_stopped() {
    common::prepare();
    let model = root().join("examples/models/gpt-moe-16e");
    let generate = |transport: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_exflow"));
        command.args(["generate", "--ep-size", "2", "--transport", transport, "--prompt-ids", "1,2,3"]);
        command.args(["-n", "150", "--ignore-eos", "-m"]).arg(&model);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        Worker(Some(command.spawn().expect("it starts")))
    };
    let mut stopped = generate("quic");
    let out = stopped.0.as_mut().and_then(|child| child.stdout.as_mut()).expect("stdout");
    let mut first = [0; 1];
    std::io::Read::read_exact(out, &mut first).expect("text");
    stopped.signal("-STOP");
    std::thread::sleep(Duration::from_secs(3));
    stopped.signal("-CONT");
    let (stopped, other) = (stopped.end(), generate("local").end());
    assert!(stopped.status.success() && other.status.success(), "{}\n{}", err(&stopped), err(&other));
    assert_eq!([&first[..], &stopped.stdout].concat(), other.stdout, "the same text");
}

#[test]
fn what_no_longer_fits_is_named_with_the_memory_that_is_missing() {
    let folder = tiny();
    let group = Group::new(2, folder.path());
    let mut options = group.options();
    options.memory = Some(1 << 30);
    options.cache_positions = Some(64);
    let probe =
        Cluster::start(ClusterOptions { group: None, ..options.clone() }, &NoProgress).expect("it fits");
    drop(probe);
    // Room for the half that it holds with two ranks, and not for all.
    options.memory = Some(memory_for(&options, 12));
    options.group.as_mut().expect("group").join_timeout = Duration::from_secs(3);
    let worker = group.worker(1, &["--memory", "1GiB"]);
    let mut cluster = Cluster::start(options, &NoProgress).expect("two ranks fit");
    let mut worker = Some(worker);
    let run = cluster.generate(&[request(&[1, 2, 3], 20)], &mut |_| drop(worker.take()));
    let told = run.expect_err("one rank is too few").to_string();
    for words in ["without rank 1", "no room for 12 of the experts", "layer 0", "KiB are missing"] {
        assert!(told.contains(words), "{words}: {told}");
    }
}

/// The least memory with which the error says that one rank alone has room for exactly `experts`.
fn memory_for(options: &ClusterOptions, experts: usize) -> u64 {
    let says = |memory: u64| {
        let alone = ClusterOptions { group: None, memory: Some(memory), ..options.clone() };
        match Cluster::start(alone, &NoProgress) {
            Err(error) => error.to_string().contains(&format!("has room for {experts}:")),
            Ok(_) => false,
        }
    };
    (1..).map(|step| step * 4096).take(1 << 12).find(|&memory| says(memory)).expect("some memory")
}

#[test]
#[ignore = "make test-cluster: it takes its time"]
fn kills_at_any_moment_change_no_token() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 24);
    for (moment, strategy) in
        [0, 1, 7, 23, 40, 71].into_iter().zip([Strategy::Coherent, Strategy::Vanilla].into_iter().cycle())
    {
        let group = Group::new(4, folder.path());
        let mut workers: Vec<_> = (1..4).map(|rank| Some(group.worker(rank, &[]))).collect();
        let mut cluster = group.start(ClusterOptions { strategy, ..group.options() }).join().expect("thread");
        if moment == 0 {
            drop(workers[1].take());
        }
        let mut events = 0;
        let run = cluster.generate(&requests, &mut |_| {
            events += 1;
            // A second one later: two of four are left.
            match events {
                at if at == moment => drop(workers[1].take()),
                at if at == moment + 13 => drop(workers[2].take()),
                _ => {}
            }
        });
        assert_eq!(
            tokens(&run.unwrap_or_else(|e| panic!("{moment}: {e}\n{}", group.said()))),
            expected,
            "{moment}"
        );
    }
}

#[test]
#[ignore = "make test-cluster: it takes its time"]
fn a_process_that_is_stopped_for_5_s_is_done_without_and_comes_back() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 24);
    let group = Group::new(3, folder.path());
    let (mut cluster, workers) = group.run();
    let mut events = 0;
    let run = cluster.generate(&requests, &mut |_| {
        events += 1;
        if events == 20 {
            workers[1].signal("-STOP");
        }
    });
    assert_eq!(tokens(&run.expect("two of three")), expected);
    assert_eq!(cluster.absent(), [Rank(2)], "{}", group.said());
    std::thread::sleep(Duration::from_secs(4));
    workers[1].signal("-CONT");
    group.until_all_are_back(&mut cluster, &requests, &expected);
}

#[test]
#[ignore = "make test-cluster: it takes its time"]
fn a_restart_on_the_same_port_is_let_in_at_the_next_epoch() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 24);
    let group = Group::new(3, folder.path());
    let port = UdpSocket::bind("127.0.0.1:0").expect("a port").local_addr().expect("address").to_string();
    let worker = || Worker(Some(group.command("worker", 2, &["--listen", &port]).spawn().expect("worker")));
    let (_one, mut two) = (group.worker(1, &[]), Some(worker()));
    let mut cluster = group.start(group.options()).join().expect("thread");
    let mut events = 0;
    let run = cluster.generate(&requests, &mut |_| {
        events += 1;
        if events == 20 {
            drop(two.take());
            two = Some(worker());
        }
    });
    assert_eq!(tokens(&run.unwrap_or_else(|e| panic!("{e}\n{}", group.said()))), expected);
    group.until_all_are_back(&mut cluster, &requests, &expected);
}

#[test]
#[ignore = "make test-cluster: it takes its time"]
fn ranks_may_start_seconds_apart_and_one_that_never_comes_is_named() {
    let folder = tiny();
    let (requests, expected) = undisturbed(folder.path(), 6);
    let group = Group::new(3, folder.path());
    let _one = group.worker(1, &[]);
    std::thread::sleep(Duration::from_secs(2));
    let leader = group.start(group.options());
    std::thread::sleep(Duration::from_secs(2));
    let _two = group.worker(2, &[]);
    let mut cluster = leader.join().expect("thread");
    assert_eq!(tokens(&cluster.generate(&requests, &mut |_| {}).expect("all came")), expected);

    let group = Group::new(3, folder.path());
    let one = group.worker(1, &[]);
    let mut options = group.options();
    options.group.as_mut().expect("group").join_timeout = Duration::from_secs(5);
    let error = Cluster::start(options, &NoProgress).err().expect("rank 2 never comes").to_string();
    assert!(error.contains("rank 2 had not joined"), "{error}");
    let output = one.end();
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("rank 2 missing"), "{}", err(&output));
}
