//! Tests of the checks: on routes that were invented with and without affinity.

use super::*;
use crate::report::{ModelFacts, ReportData, SettingFacts, StrategyFacts};
use exflow_placement::{Affinity, Generator};
use std::time::Duration;

fn options() -> StudyOptions {
    StudyOptions { ranks: 4, time_limit: Duration::from_millis(60), seed: 1 }
}

fn found(spec: Generator, tokens: usize) -> Gathered {
    let trace = spec.trace(tokens, 1, 2);
    let affinity = Some(Affinity::from_trace(&trace, spec.experts).expect("counts"));
    Gathered { affinity, traces: vec![("t.npy".into(), trace)], ..Gathered::default() }
}

fn of<'c>(checks: &'c [crate::report::CheckFacts], name: &str) -> &'c crate::report::CheckFacts {
    checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no check {name:?}"))
}

#[test]
fn routes_with_affinity_pass_and_routes_without_fail() {
    let spec = Generator::new(5, 16, 1);
    let checks = paper_checks(&found(spec, 16_000), None, &options()).expect("checks");
    assert_eq!(checks.len(), 15);
    for name in ["affinity is real", "stay rate", "experts per rank", "profile size"] {
        assert_eq!(of(&checks, name).pass, Some(true), "{:?}", of(&checks, name));
    }
    for name in ["lossless", "one exchange", "throughput", "another domain", "training evolution"] {
        assert_eq!(of(&checks, name).pass, None, "{:?}", of(&checks, name));
    }
    let blind = Generator { community: 0.0, successor: 0.0, ..spec };
    let checks = paper_checks(&found(blind, 6000), None, &options()).expect("checks");
    for name in ["affinity is real", "stay rate"] {
        assert_eq!(of(&checks, name).pass, Some(false), "{:?}", of(&checks, name));
    }
}

#[test]
fn runs_are_judged_by_what_was_measured() {
    let setting = |strategy: &str, placement: &str, exchanges_per_layer, dispatch| {
        let mut setting = SettingFacts { exchanges_per_layer, ..SettingFacts::default() };
        (setting.strategy, setting.placement) = (strategy.into(), placement.into());
        setting.decode_bytes_per_token.dispatch = dispatch;
        setting
    };
    let bench = |coherent: f64| ReportData {
        model: ModelFacts { top_k: 1, ..ModelFacts::default() },
        same_tokens: coherent < 1.5,
        settings: vec![
            setting("vanilla", "round_robin", 2.0, 200.0),
            setting("coherent", "round_robin", coherent, 100.0),
            setting("coherent", "affinity", coherent, 60.0),
        ],
        ..ReportData::default()
    };
    let row = |strategy: &str, schedule: &str, table: &str, tokens_per_s| StrategyFacts {
        strategy: strategy.into(),
        schedule: schedule.into(),
        table: table.into(),
        tokens_per_s,
        ..StrategyFacts::default()
    };
    let judged = |coherent, fast| {
        let benches = vec![bench(coherent)];
        // Of tokens that take two experts nothing is claimed.
        let top_2 = StrategyFacts {
            model: "synthetic-gqa".into(),
            top_k: 2,
            ranks: 4,
            exchanges_per_layer: 2.0,
            ..row("coherent", "rounds", "affinity", 9.0)
        };
        let of_top_1 =
            [row("vanilla", "rounds", "round_robin", 10.0), row("coherent", "flow", "affinity", fast)];
        let strategies = of_top_1.into_iter().chain([top_2]).collect();
        let found = Gathered { benches, strategies, ..found(Generator::new(4, 8, 1), 4000) };
        let checks = paper_checks(&found, None, &options()).expect("checks");
        ["lossless", "one exchange", "throughput"].map(|name| of(&checks, name).pass)
    };
    assert_eq!(judged(1.0, 25.0), [Some(true); 3]);
    assert_eq!(judged(2.0, 12.0), [Some(false); 3]);
}

#[test]
fn the_bundled_models_history_shows_its_training() {
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/gpt-moe-16e");
    let history = RoutingHistory::load(&model).expect("readable").expect("it is there");
    assert_eq!((history.steps.len(), history.counts[0].layers, history.counts[0].experts), (21, 8, 16));
    let checks = paper_checks(&Gathered::default(), Some(&history), &options()).expect("checks");
    assert_eq!(of(&checks, "training evolution").pass, Some(true), "{:?}", of(&checks, "training evolution"));
    assert_eq!(of(&checks, "training evolution").values.len(), 21);
    assert_eq!(of(&checks, "affinity is real").pass, Some(true));
    assert!(RoutingHistory::load(std::path::Path::new("/nowhere")).expect("no file").is_none());
}
