//! Where prompts are prefilled, and how far tokens may go from home, decides what is sent and never what is said.

use crate::common::tiny::Tiny;
use crate::common::{Setup, generate, prepare, request, tokens};
use exflow::engine::{
    Cluster, ClusterOptions, Combine, Domain, Feed, KvWire, Linger, NoProgress, Overlap, PlacementSource,
    PlacementTable, Prefill, Quant, Rank, Request, RunStats, Sampling, Schedule, Strategy, TransportKind,
};
use exflow_placement::Affinity;
use std::path::Path;
use std::time::Duration;

fn start(model: &Path, change: impl FnOnce(&mut ClusterOptions)) -> Cluster {
    prepare();
    let mut options = ClusterOptions::new(model);
    options.ranks = 4;
    change(&mut options);
    Cluster::start(options, &NoProgress).unwrap_or_else(|e| panic!("a cluster: {e}"))
}

/// Runs as `change` says; tokens and logits must be those of one rank.
fn stats_of_equal_run(
    shape: &Tiny,
    model: &Path,
    alone: &mut Cluster,
    what: &str,
    change: impl FnOnce(&mut ClusterOptions),
) -> RunStats {
    // The longest prompt takes two chunks in flow.
    let lengths = [5, 1, 300, 8, 33];
    let requests: Vec<_> =
        lengths.iter().enumerate().map(|(s, n)| request(&shape.prompt(*n, s as u64), 9)).collect();
    let mut cluster = start(model, change);
    let run = generate(&mut cluster, &requests);
    assert_eq!(tokens(&run), tokens(&generate(alone, &requests)), "{what}");
    let ids = shape.prompt(19, 4);
    for feed in [Feed::Prefill, Feed::Decode] {
        let bits = |cluster: &mut Cluster| -> Vec<u32> {
            let dump = cluster.logits(&ids, feed).unwrap_or_else(|e| panic!("{what}: {e}"));
            dump.logits.iter().map(|value| value.to_bits()).collect()
        };
        assert!(bits(&mut cluster) == bits(alone), "{what}, {feed:?}: logits");
    }
    run.stats
}

#[test]
fn weights_in_chunks_say_the_same() {
    let shape = Tiny { seed: 97, top_k: 2, layers: 3, experts: 7, positions: 400, ..Tiny::default() };
    let folder = shape.write();
    let mut alone = Setup::one_rank(folder.path()).start();
    // Two experts together and one left over, or each for itself.
    let two = (2 * 4 * shape.hidden * shape.inner) as u64;
    for (bytes, ranks, schedule) in [
        (two, 1, Schedule::Rounds),
        (1, 1, Schedule::Rounds),
        (two, 2, Schedule::Rounds),
        (two, 3, Schedule::Flow),
    ] {
        let what = format!("chunks of {bytes} bytes on {ranks} ranks");
        stats_of_equal_run(&shape, folder.path(), &mut alone, &what, |options| {
            (options.ranks, options.schedule) = (ranks, schedule);
            options.chunk_bytes = Some(bytes);
        });
    }
    // Rows of the embedding are the head's, in other forms too: of 257 tokens 96 lie together, or 32.
    for quant in [None, Some(Quant::Q8_0)] {
        let shape = Tiny { seed: 98, tied: quant.is_none(), layers: 1, positions: 400, ..Tiny::default() };
        let folder = shape.write();
        let mut alone = start(folder.path(), |options| (options.ranks, options.quant) = (1, quant));
        for bytes in [two, 1] {
            let what = format!("{quant:?}, a vocabulary in chunks of {bytes} bytes");
            stats_of_equal_run(&shape, folder.path(), &mut alone, &what, |options| {
                (options.ranks, options.quant, options.chunk_bytes) = (2, quant, Some(bytes));
            });
        }
    }
    // Other tables: experts go from chunks of one rank into others.
    let requests = [request(&shape.prompt(9, 3), 12), request(&shape.prompt(2, 4), 12)];
    let expected = tokens(&generate(&mut alone, &requests));
    let mut cluster = start(folder.path(), |options| {
        (options.ranks, options.chunk_bytes) = (2, Some(two));
    });
    let table = |of: fn(usize) -> usize| {
        let rank = |expert| Rank::from(of(expert));
        let of_layer = (0..shape.experts).map(rank).collect::<Vec<_>>();
        PlacementTable::from_assignment(vec![of_layer; shape.layers], 2).expect("a table")
    };
    for table in [table(|expert| usize::from(expert < 1)), table(|expert| expert / 2 % 2), table(|_| 0)] {
        cluster.change(Strategy::Coherent, Schedule::Rounds, Some(table)).expect("changed");
        assert_eq!(tokens(&generate(&mut cluster, &requests)), expected);
    }
}

#[test]
fn rows_whose_logits_no_binding_takes_say_the_same() {
    let shape = Tiny { seed: 99, top_k: 2, layers: 2, positions: 200, ..Tiny::default() };
    let folder = shape.write();
    // The logits of 64 rows lie together: a prompt's of three times as many, and those of 70 texts that are written at once,
    // some of them drawn, some with the likelihoods of their tokens.
    let ids = shape.prompt(190, 5);
    let text = |s: u64| {
        let sampling = Sampling {
            temperature: if s.is_multiple_of(3) { 0.9 } else { 0.0 },
            seed: s,
            ..Sampling::default()
        };
        Request { sampling, logprobs: s.is_multiple_of(7).then_some(2), ..request(&shape.prompt(2, s), 5) }
    };
    let requests: Vec<Request> = (0..70).map(text).collect();
    let said = |chunk_bytes: Option<u64>, ranks: usize, schedule: Schedule| {
        let mut cluster = start(folder.path(), |options| {
            (options.ranks, options.schedule, options.chunk_bytes) = (ranks, schedule, chunk_bytes);
            options.draws_on_device = Some(true);
        });
        let dump = cluster.logits(&ids, Feed::Prefill).expect("logits");
        let bits: Vec<u32> = dump.logits.iter().map(|value| value.to_bits()).collect();
        let run = generate(&mut cluster, &requests);
        let likely: Vec<_> = run.sequences.iter().map(|done| format!("{:?}", done.logprobs)).collect();
        (bits, tokens(&run), likely)
    };
    let whole = said(None, 1, Schedule::Rounds);
    assert_eq!(whole.0.len(), 190 * shape.vocab);
    for (ranks, schedule) in [(1, Schedule::Rounds), (2, Schedule::Rounds), (2, Schedule::Flow)] {
        assert!(said(Some(1), ranks, schedule) == whole, "{ranks} ranks, {schedule}");
    }
}

#[test]
fn replicated_prefill_sends_no_context_and_bounded_domains_send_less() {
    for top_k in [1, 2] {
        let shape =
            Tiny { seed: 90 + top_k as u64, top_k, layers: 3, experts: 8, positions: 400, ..Tiny::default() };
        let folder = shape.write();
        let mut alone = Setup::one_rank(folder.path()).start();
        for schedule in [Schedule::Rounds, Schedule::Flow] {
            let mut run = |prefill: Prefill, domain: Domain, transport: TransportKind| {
                let what = format!("top-{top_k}, {schedule}, {prefill}, {domain}");
                let stats = stats_of_equal_run(&shape, folder.path(), &mut alone, &what, |options| {
                    (options.schedule, options.transport) = (schedule, transport);
                    (options.prefill, options.domain) = (prefill, domain);
                });
                assert_eq!((&stats.prefill, &stats.domain), (&prefill.to_string(), &domain.to_string()));
                stats
            };
            let home = run(Prefill::Home, Domain::World, TransportKind::Local);
            let replicated = run(Prefill::Replicated, Domain::World, TransportKind::Quic);
            // 347 tokens of prompts against 40 that are decoded: what is left is theirs.
            assert!(
                4 * replicated.bytes.kv < home.bytes.kv && replicated.bytes.kv > 0,
                "{} and {}",
                replicated.bytes.kv,
                home.bytes.kv
            );
            if schedule == Schedule::Rounds {
                assert_eq!(home.prefill_exchanges_per_layer, 2.0);
                assert_eq!(replicated.prefill_exchanges_per_layer, 1.0, "partials alone");
            }
            // One peer in place of three, and none.
            let pair = run(Prefill::Home, Domain::Pair, TransportKind::Local);
            assert!(
                2 * pair.bytes.kv < home.bytes.kv && pair.bytes.kv > 0,
                "{} and {}",
                pair.bytes.kv,
                home.bytes.kv
            );
            assert!(pair.crossings_per_token > home.crossings_per_token, "what is outside comes back");
            let both = run(Prefill::Replicated, Domain::Pair, TransportKind::Local);
            assert!(both.bytes.kv < replicated.bytes.kv);
            // All ranks of this process are on one host.
            let host = run(Prefill::Home, Domain::Host, TransportKind::Local);
            assert!(host.bytes.kv == home.bytes.kv || schedule == Schedule::Flow);
        }
    }
}

#[test]
fn vanilla_prompts_may_be_replicated_and_overlap_left_out() {
    let shape = Tiny { seed: 95, layers: 2, experts: 8, positions: 400, ..Tiny::default() };
    let folder = shape.write();
    let mut alone = Setup::one_rank(folder.path()).start();
    for schedule in [Schedule::Rounds, Schedule::Flow] {
        stats_of_equal_run(&shape, folder.path(), &mut alone, "without overlap", |options| {
            (options.schedule, options.overlap) = (schedule, Overlap::Off);
        });
        let stats = stats_of_equal_run(&shape, folder.path(), &mut alone, "vanilla", |options| {
            (options.strategy, options.schedule) = (Strategy::Vanilla, schedule);
            options.prefill = Prefill::Replicated;
        });
        assert_eq!(stats.bytes.kv, 0);
    }
}

#[test]
fn rows_may_start_peer_by_peer() {
    for (top_k, strategy) in [(1, Strategy::Coherent), (2, Strategy::Coherent), (2, Strategy::Vanilla)] {
        let shape = Tiny { seed: 98, top_k, layers: 3, experts: 8, positions: 400, ..Tiny::default() };
        let folder = shape.write();
        let mut alone = Setup::one_rank(folder.path()).start();
        for overlap in [Overlap::Peers, Overlap::Own, Overlap::Auto] {
            let what = format!("top-{top_k}, {strategy}, {overlap}");
            let stats = stats_of_equal_run(&shape, folder.path(), &mut alone, &what, |options| {
                (options.strategy, options.overlap) = (strategy, overlap);
            });
            // Three peers' rows hardly ever come at the same instant.
            assert!(
                overlap == Overlap::Auto || (stats.peer_starts > 0) == (overlap == Overlap::Peers),
                "{what}"
            );
        }
    }
}

#[test]
fn steps_may_run_in_halves() {
    for (top_k, strategy) in [(1, Strategy::Coherent), (2, Strategy::Coherent), (1, Strategy::Vanilla)] {
        let shape = Tiny { seed: 99, top_k, layers: 3, experts: 8, positions: 400, ..Tiny::default() };
        let folder = shape.write();
        let mut alone = Setup::one_rank(folder.path()).start();
        for (transport, ranks, prefill) in [
            (TransportKind::Local, 4, Prefill::Home),
            (TransportKind::Quic, 3, Prefill::Home),
            (TransportKind::Local, 2, Prefill::Replicated),
        ] {
            let what = format!("top-{top_k}, {strategy}, {transport}, {ranks} ranks");
            let stats = stats_of_equal_run(&shape, folder.path(), &mut alone, &what, |options| {
                (options.strategy, options.prefill) = (strategy, prefill);
                (options.transport, options.ranks) = (transport, ranks);
                options.overlap = Overlap::Halves;
            });
            // Of the first and the last steps a few have one sequence alone.
            assert!(stats.halved_steps > 0.7, "{what}: {}", stats.halved_steps);
            let twice = strategy == Strategy::Vanilla || top_k > 1;
            assert_eq!(stats.exchanges_per_layer, if twice { 2.0 } else { 1.0 }, "{what}");
        }
    }
}

#[test]
fn steps_may_be_submitted_together() {
    let shape = Tiny { seed: 101, top_k: 2, layers: 3, experts: 8, positions: 400, ..Tiny::default() };
    let folder = shape.write();
    let by = |steps: usize| {
        start(folder.path(), |options| (options.ranks, options.steps_together) = (1, Some(steps)))
    };
    let prompts: Vec<_> =
        [5, 1, 300, 8, 33].iter().zip(0..).map(|(n, seed)| shape.prompt(*n, seed)).collect();
    let free: Vec<_> = prompts.iter().map(|prompt| request(prompt, 40)).collect();
    let run = generate(&mut by(1), &free);
    assert_eq!(run.stats.joined_steps, 0.0);
    // Texts that end by themselves, one after another and amidst steps that are submitted together; the others go on.
    let end = tokens(&run)[1][6];
    folder.edit_config(|config| {
        config.insert("eos_token_id".to_string(), end.into());
    });
    let mut requests = free.clone();
    requests.extend(prompts.iter().zip(3..).map(|(p, n)| Request { ignore_eos: false, ..request(p, n * 7) }));
    let mut single = by(1);
    let alone = generate(&mut single, &requests);
    let expected = tokens(&alone);
    assert!(expected[5..].iter().zip(3..).any(|(ids, n)| ids.len() < n * 7), "one ends before its time");
    for steps in [2, 4, 7] {
        let mut together = by(steps);
        let run = generate(&mut together, &requests);
        assert_eq!(tokens(&run), expected, "{steps} steps");
        let of_all = (steps - 1) as f64 / steps as f64;
        assert!(run.stats.joined_steps > 0.6 * of_all, "{steps} steps: {}", run.stats.joined_steps);
        // The same pairs, whatever was submitted in vain.
        assert_eq!(run.stats.expert_load, alone.stats.expert_load, "{steps} steps");
        for request in &requests {
            let of_one = |cluster: &mut Cluster| tokens(&generate(cluster, std::slice::from_ref(request)));
            assert_eq!(of_one(&mut together), of_one(&mut single), "{steps} steps");
        }
    }
}

#[test]
fn rows_may_be_held_back_for_a_fuller_launch() {
    for (top_k, strategy) in [(1, Strategy::Coherent), (2, Strategy::Coherent), (1, Strategy::Vanilla)] {
        let shape = Tiny { seed: 97, top_k, layers: 3, experts: 8, positions: 400, ..Tiny::default() };
        let folder = shape.write();
        let mut alone = Setup::one_rank(folder.path()).start();
        for (linger, transport, ranks) in [
            (Linger::Off, TransportKind::Local, 4),
            (Linger::Auto, TransportKind::Local, 4),
            (Linger::For(Duration::from_millis(2)), TransportKind::Local, 4),
            (Linger::For(Duration::from_millis(2)), TransportKind::Quic, 3),
        ] {
            let what = format!("top-{top_k}, {strategy}, {transport}, linger {linger}");
            let stats = stats_of_equal_run(&shape, folder.path(), &mut alone, &what, |options| {
                (options.strategy, options.schedule) = (strategy, Schedule::Flow);
                (options.transport, options.ranks, options.linger) = (transport, ranks, linger);
            });
            let held = (stats.linger_share, stats.token_time.linger_ms);
            match linger {
                Linger::Off => assert_eq!(held, (0.0, 0.0), "{what}"),
                Linger::For(_) => assert!(held.0 > 0.0 && held.1 > 0.0, "{what}: {held:?}"),
                Linger::Auto => {}
            }
        }
    }
}

#[test]
fn keys_and_values_may_travel_as_their_layers_input() {
    for top_k in [1, 2] {
        let shape =
            Tiny { seed: 92 + top_k as u64, top_k, layers: 3, experts: 8, positions: 400, ..Tiny::default() };
        let folder = shape.write();
        let mut alone = Setup::one_rank(folder.path()).start();
        for schedule in [Schedule::Rounds, Schedule::Flow] {
            let mut kv_bytes = |kv_wire: KvWire| {
                let what = format!("top-{top_k}, {schedule}, {kv_wire}");
                let stats = stats_of_equal_run(&shape, folder.path(), &mut alone, &what, |options| {
                    (options.schedule, options.kv_wire) = (schedule, kv_wire);
                });
                stats.bytes.kv as f64
            };
            // Keys and values of 32 columns each, or the 32 columns of the input, and 10 bytes that say whose they are.
            let share = kv_bytes(KvWire::Hidden) / kv_bytes(KvWire::Cache);
            let expected = f64::from(10 + 4 * 32) / f64::from(10 + 4 * 64);
            assert!((share - expected).abs() < 0.02, "{share} of the bytes");
        }
    }
}

#[test]
fn where_tokens_of_several_experts_go_on_changes_no_bit() {
    let shape = Tiny { seed: 100, top_k: 2, layers: 3, experts: 8, positions: 400, ..Tiny::default() };
    let folder = shape.write();
    let mut alone = Setup::one_rank(folder.path()).start();
    let texts: Vec<_> = (0..4).map(|s| shape.prompt(64, s)).collect();
    let trace = alone.profile(&texts, &NoProgress).expect("a profile");
    let counts = Affinity::from_trace(&trace, shape.experts).expect("counts");
    let by_weight = PlacementTable::round_robin(shape.layers, shape.experts, 4);
    let mut ahead = by_weight.clone();
    ahead.look_ahead(&counts);
    assert!(ahead.outlook.is_some());
    for schedule in [Schedule::Rounds, Schedule::Flow] {
        let mut crossings = |table: &PlacementTable| {
            let what = format!("{schedule}, outlook: {}", table.outlook.is_some());
            let stats = stats_of_equal_run(&shape, folder.path(), &mut alone, &what, |options| {
                options.schedule = schedule;
                options.placement = PlacementSource::Table(table.clone());
            });
            stats.crossings_per_token
        };
        let (ahead, by_weight) = (crossings(&ahead), crossings(&by_weight));
        // In flow homes go by who is free, and crossings vary from run to run.
        assert!(schedule == Schedule::Flow || ahead != by_weight, "tokens go elsewhere: {ahead}");
    }
}

#[test]
fn the_cache_that_a_run_took_is_told() {
    let shape = Tiny { seed: 96, layers: 2, positions: 200, ..Tiny::default() };
    let folder = shape.write();
    let mut cluster = start(folder.path(), |options| {
        (options.ranks, options.cache_positions) = (2, Some(160));
    });
    let stats = generate(&mut cluster, &[request(&shape.prompt(60, 1), 20)]).stats;
    // Blocks of 16 positions; keys and values in f32 of 2 layers.
    let of_text = |blocks: f64| blocks * 16.0 * stats.kv_bytes_per_token;
    for peak in &stats.kv_peak_bytes {
        let peak = *peak as f64;
        assert!(
            peak >= of_text(5.0) && peak <= of_text(6.0),
            "{peak}: 80 tokens, granted half a block ahead"
        );
    }
    assert_eq!(
        (stats.kv_peak_bytes.len(), stats.longest_context),
        (2, 160),
        "the cache, not the model's 200"
    );
    assert!(stats.kv_bytes_per_token >= (2 * 2 * 4 * shape.hidden) as f64);
    let short = generate(&mut cluster, &[request(&shape.prompt(10, 1), 3)]).stats;
    assert!(short.kv_peak_bytes[0] < stats.kv_peak_bytes[0], "of this run alone");
}

#[test]
fn replicated_prompts_are_not_summed_at_the_source() {
    let shape = Tiny { seed: 97, layers: 1, ..Tiny::default() };
    let folder = shape.write();
    prepare();
    let mut options = ClusterOptions::new(folder.path());
    (options.ranks, options.combine, options.prefill) = (2, Combine::Sum, Prefill::Replicated);
    let error = Cluster::start(options, &NoProgress).err().expect("it is refused");
    assert!(error.is_input() && error.to_string().contains("every rank"), "{error}");
}

#[test]
fn no_step_waits_for_a_kernel() {
    let shape = Tiny { seed: 101, top_k: 2, layers: 2, experts: 8, positions: 400, ..Tiny::default() };
    let folder = shape.write();
    let lengths = [1, 2, 300, 3, 9, 17, 40, 5];
    let requests: Vec<_> =
        lengths.iter().enumerate().map(|(s, n)| request(&shape.prompt(*n, s as u64), 3 + 2 * s)).collect();
    let made = |warm_up: Option<bool>, quant: Quant, ranks: usize, schedule: Schedule| {
        let mut cluster = start(folder.path(), |options| {
            (options.warm_up, options.quant) = (warm_up, Some(quant));
            (options.ranks, options.schedule) = (ranks, schedule);
        });
        generate(&mut cluster, &requests).stats.kernels_made.iter().sum::<u64>()
    };
    // Nothing else here holds its matrices so: no device that a rank takes over has these kernels.
    assert!(made(Some(false), Quant::Q4_0, 3, Schedule::Rounds) > 0);
    for schedule in [Schedule::Rounds, Schedule::Flow] {
        assert_eq!(made(None, Quant::Q8_0, 3, schedule), 0, "{schedule}");
    }
    assert_eq!(made(Some(true), Quant::Q8_0, 1, Schedule::Rounds), 0, "one rank");
}
