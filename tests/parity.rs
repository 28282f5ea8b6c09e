//! Models of every family, made and run by transformers (tests/parity/make_fixtures.py), through the engine: logits,
//! chosen experts and greedy tokens, on one rank and on several, under both strategies.

mod common;

use common::{Setup, generate, request, root};
use exflow::engine::{
    self, Cluster, ClusterOptions, Dtype, Feed, KvDtype, KvWire, LogitsDump, NoProgress, Numerics, Quant,
    Schedule, Strategy,
};
use exflow_placement::npy::{self, Array};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What transformers' and the engine's float32 arithmetic may differ by.
const LOGITS: f64 = 2e-4;
/// Choices are compared where they are no closer than this.
const MARGIN: f64 = 1e-3;
/// Router weights, all of them within 0..3.
const WEIGHTS: f64 = 2e-4;

struct Expected(BTreeMap<String, Array>);

impl Expected {
    fn read(folder: &Path) -> Self {
        let path = folder.join("expected.npz");
        Self(npy::read_npz(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn values(&self, name: &str) -> &[f64] {
        &self.0.get(name).unwrap_or_else(|| panic!("{name} is not in expected.npz")).data
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.values(name).iter().map(|&id| id as u32).collect()
    }

    fn moe_layers(&self) -> Vec<usize> {
        let number = |name: &String| name.strip_prefix("experts.").and_then(|l| l.parse().ok());
        let mut layers: Vec<usize> = self.0.keys().filter_map(number).collect();
        layers.sort_unstable();
        layers
    }
}

/// `EXFLOW_PARITY` names a folder of other models that tests/parity/make_fixtures.py made.
fn fixtures() -> Vec<PathBuf> {
    let folder = std::env::var_os("EXFLOW_PARITY").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| root().join("tests/parity/fixtures"));
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("fixtures").map(|entry| entry.expect("an entry").path()).collect();
    found.sort();
    found
}

/// Logits, experts and router weights of every position.
fn compare(name: &str, dump: &LogitsDump, expected: &Expected) -> f64 {
    let truth = expected.values("logits");
    assert_eq!(dump.logits.len(), truth.len(), "{name}: shape of the logits");
    let worst = dump.logits.iter().zip(truth).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    let layers: Vec<usize> = dump.layers.iter().map(|l| l.layer).collect();
    assert_eq!(layers, expected.moe_layers(), "{name}: which layers are MoE layers");
    let mut compared = 0;
    for routing in &dump.layers {
        let (l, k) = (routing.layer, routing.k);
        let (experts, weights) =
            (expected.values(&format!("experts.{l}")), expected.values(&format!("router_weights.{l}")));
        for (t, &margin) in expected.values(&format!("margins.{l}")).iter().enumerate() {
            if margin < MARGIN {
                continue;
            }
            compared += 1;
            for i in t * k..(t + 1) * k {
                assert_eq!(f64::from(routing.experts[i]), experts[i], "{name}: layer {l}, token {t}");
                let off = (f64::from(routing.weights[i]) - weights[i]).abs();
                assert!(off < WEIGHTS, "{name}: layer {l}, token {t}: router weight off by {off}");
            }
        }
    }
    assert!(compared * 10 > 9 * dump.tokens * layers.len(), "{name}: routers that decide clearly");
    worst
}

fn continues(name: &str, cluster: &mut Cluster, expected: &Expected) {
    let (prompt, greedy) = (expected.ids("prompt"), expected.ids("greedy"));
    let mut wanted = request(&prompt, greedy.len());
    wanted.ignore_eos = true;
    let run = generate(cluster, &[wanted]);
    let clear = expected.values("greedy_margins").iter().position(|&m| m < MARGIN).unwrap_or(greedy.len());
    assert!(clear > 12, "{name}: only {clear} tokens are decided clearly");
    assert_eq!(run.sequences[0].output_ids[..clear], greedy[..clear], "{name}: greedy tokens");
}

#[test]
fn every_family_says_what_transformers_says() {
    common::prepare();
    let fixtures = fixtures();
    assert!(fixtures.len() >= 20, "only {} fixtures", fixtures.len());
    let mut failed = Vec::new();
    for folder in fixtures {
        let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
        let expected = Expected::read(&folder);
        // Greedy tokens by steps that are submitted together, whatever this machine takes for them.
        let mut options = ClusterOptions::new(&folder);
        options.steps_together = Some(4);
        let mut cluster = Cluster::start(options, &NoProgress).unwrap_or_else(|e| panic!("{name}: {e}"));
        let prompt = expected.ids("prompt");
        for feed in [Feed::Prefill, Feed::Decode] {
            let dump = cluster.logits(&prompt, feed).unwrap_or_else(|e| panic!("{name}: {e}"));
            let worst = compare(&name, &dump, &expected);
            if worst > LOGITS {
                failed.push(format!("{name}, {feed:?}: {worst:.1e}"));
            }
        }
        continues(&name, &mut cluster, &expected);
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn every_family_says_the_same_on_two_and_four_ranks() {
    for (index, folder) in fixtures().into_iter().enumerate() {
        let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
        let expected = Expected::read(&folder);
        let prompt = expected.ids("prompt");
        let alone = Setup::one_rank(&folder).start().logits(&prompt, Feed::Decode).expect("logits");
        // Each family under each strategy, and on 2 and on 4 ranks, in turn.
        let ranks = [2, 4];
        for (i, strategy) in [Strategy::Vanilla, Strategy::Coherent].into_iter().enumerate() {
            let ranks = ranks[(i + index) % 2];
            let mut cluster = Setup::new(&folder, ranks, strategy).start();
            let dump = cluster.logits(&prompt, Feed::Decode).unwrap_or_else(|e| panic!("{name}: {e}"));
            let bits = |d: &LogitsDump| d.logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(bits(&dump) == bits(&alone), "{name}: {strategy:?} on {ranks} ranks");
            continues(&name, &mut cluster, &expected);
        }
    }
}

/// Prefilled in chunks, past 4,096 positions; decoded from there on two ranks.
#[test]
fn contexts_past_4096_positions_say_what_transformers_says() {
    for (name, decodes) in [("gpt_oss", true), ("deepseek_v3", false)] {
        let folder = root().join("tests/parity/long").join(name);
        let expected = Expected::read(&folder);
        let prompt = expected.ids("prompt");
        assert!(prompt.len() > 4096);
        let mut alone = Setup::one_rank(&folder).start();
        let dump = alone.logits(&prompt, Feed::Prefill).unwrap_or_else(|e| panic!("{name}: {e}"));
        let truth = expected.values("logits");
        let last = &dump.logits[dump.logits.len() - truth.len()..];
        let worst = last.iter().zip(truth).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-3, "{name}: {worst:.1e}");
        if decodes {
            continues(name, &mut Setup::new(&folder, 2, Strategy::Coherent).start(), &expected);
        }
    }
}

#[test]
fn weights_of_f16_are_held_in_f16_without_a_difference() {
    common::prepare();
    let fixtures = root().join("tests/parity/fixtures");
    let dump = |name: &str, dtype: Dtype, ranks: usize| {
        let mut options = ClusterOptions::new(fixtures.join(name));
        (options.dtype, options.ranks) = (dtype, ranks);
        let mut cluster = Cluster::start(options, &NoProgress).unwrap_or_else(|e| panic!("{name}: {e}"));
        let prompt = Expected::read(&fixtures.join(name)).ids("prompt");
        let dump = cluster.logits(&prompt, Feed::Decode).expect("logits").logits;
        dump.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    // Published in f16: rounding to f16 changes nothing, in either kernel, on any number of ranks.
    let f32_bits = dump("olmoe_gqa_f16", Dtype::F32, 1);
    for ranks in [1, 3] {
        assert!(dump("olmoe_gqa_f16", Dtype::F16, ranks) == f32_bits, "{ranks} ranks");
    }
    // Published in f32: it does, a little, the same on any number of ranks.
    for name in ["deepseek_v3", "gpt_oss", "qwen2_moe"] {
        let (whole, half) = (dump(name, Dtype::F32, 1), dump(name, Dtype::F16, 1));
        let pairs = whole.iter().zip(&half).map(|(a, b)| (f32::from_bits(*a) - f32::from_bits(*b)).abs());
        let worst = pairs.fold(0.0, f32::max);
        assert!(worst > 0.0 && worst < 0.1, "{name}: off by {worst}");
        assert!(dump(name, Dtype::F16, 2) == half, "{name}: 2 ranks");
    }
}

#[test]
fn narrower_weights_and_caches_give_the_same_bits_on_any_number_of_ranks() {
    common::prepare();
    let fixtures = root().join("tests/parity/fixtures");
    let dump = |name: &str, (quant, kv_dtype): (Option<Quant>, KvDtype), ranks: usize| {
        let mut options = ClusterOptions::new(fixtures.join(name));
        (options.quant, options.kv_dtype, options.ranks) = (quant, kv_dtype, ranks);
        let mut cluster = Cluster::start(options, &NoProgress).unwrap_or_else(|e| panic!("{name}: {e}"));
        let prompt = Expected::read(&fixtures.join(name)).ids("prompt");
        cluster.logits(&prompt, Feed::Decode).expect("logits").logits
    };
    let settings = [
        (Some(Quant::Q8_0), KvDtype::F32, 0.5),
        (Some(Quant::Q4_0), KvDtype::F16, 4.0),
        (None, KvDtype::F16, 0.1),
        (None, KvDtype::Q8, 0.5),
    ];
    for name in ["qwen3_moe", "deepseek_v2"] {
        let exact = dump(name, (None, KvDtype::F32), 1);
        for (quant, kv_dtype, limit) in settings {
            let alone = dump(name, (quant, kv_dtype), 1);
            let worst = exact.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst > 0.0 && worst < limit, "{name} {quant:?} {kv_dtype:?}: off by {worst}");
            let bits = |logits: Vec<f32>| logits.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let together = dump(name, (quant, kv_dtype), 3);
            assert!(bits(together) == bits(alone), "{name} {quant:?} {kv_dtype:?}: 3 ranks");
        }
    }
}

/// Rows in bytes: a little off the exact product of the same weights, by the same bits wherever a token is and however
/// many are fed at once; told where there is nothing to round.
#[test]
fn fast_numerics_stay_near_the_exact_ones_and_give_the_same_bits_on_any_number_of_ranks() {
    common::prepare();
    let fixtures = root().join("tests/parity/fixtures");
    let start = |name: &str, quant: Option<Quant>, numerics: Numerics, (ranks, schedule)| {
        let mut options = ClusterOptions::new(fixtures.join(name));
        (options.quant, options.numerics) = (quant, numerics);
        (options.ranks, options.schedule) = (ranks, schedule);
        Cluster::start(options, &NoProgress)
    };
    let one = (1, Schedule::Rounds);
    for (name, quant, limit) in [
        ("qwen3_moe", Some(Quant::Q8_0), 0.25),
        ("deepseek_v2", Some(Quant::Q8_0), 0.25),
        ("olmoe", Some(Quant::Q4_0), 0.25),
        ("gpt_oss_mxfp4", None, 0.25),
    ] {
        let prompt = Expected::read(&fixtures.join(name)).ids("prompt");
        let dump = |numerics: Numerics, world, feed: Feed| {
            let mut cluster = start(name, quant, numerics, world).unwrap_or_else(|e| panic!("{name}: {e}"));
            cluster.logits(&prompt, feed).expect("logits").logits
        };
        let bits = |logits: &[f32]| logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let exact = dump(Numerics::Exact, one, Feed::Decode);
        let fast = dump(Numerics::Fast, one, Feed::Decode);
        let worst = exact.iter().zip(&fast).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        eprintln!("{name} {quant:?}: off by {worst}");
        assert!(worst > 0.0 && worst < limit, "{name} {quant:?}: off by {worst}");
        for (schedule, feed) in [(Schedule::Rounds, Feed::Decode), (Schedule::Flow, Feed::Prefill)] {
            let together = dump(Numerics::Fast, (3, schedule), feed);
            let alone = dump(Numerics::Fast, one, feed);
            assert!(bits(&together) == bits(&alone), "{name} {quant:?}: 3 ranks, {schedule}, {feed}");
        }
    }
    if engine::devices()[0].matrix_side.is_none() {
        let error = start("olmoe", None, Numerics::Fast, one).err().expect("it is refused");
        assert!(error.is_input() && error.to_string().contains("--numerics fast"), "{error}");
    }
}

/// Matrices on matrix units: a little off the exact products, by the same bits wherever a token is, however many
/// are fed at once and on however many ranks.
#[test]
fn matrix_units_stay_near_the_exact_products_and_give_a_row_the_same_bits_in_any_batch() {
    common::prepare();
    if engine::devices()[0].matrix_side.is_none() {
        eprintln!("skipped: adapter offers no cooperative matrices");
        return;
    }
    let fixtures = root().join("tests/parity/fixtures");
    // Families of every kind of attention and expert: what has MXFP4 has bytes beside, unless scales are for units too.
    for (name, dtype, quant, scales_on_units, limit) in [
        ("olmoe", Dtype::F32, None, None, 0.02),
        ("olmoe", Dtype::F16, None, None, 0.02),
        ("qwen3_moe", Dtype::F16, None, None, 0.02),
        ("deepseek_v2", Dtype::F32, None, None, 0.02),
        ("deepseek_v2", Dtype::F16, None, None, 0.02),
        ("gpt_oss", Dtype::F16, None, None, 0.02),
        ("gpt_oss_mxfp4", Dtype::F16, None, Some(false), 0.25),
        ("gpt_oss_mxfp4", Dtype::F16, None, Some(true), 0.02),
        ("olmoe", Dtype::F32, Some(Quant::Q8_0), Some(true), 0.02),
        ("deepseek_v2", Dtype::F32, Some(Quant::Q8_0), Some(true), 0.02),
        ("qwen3_moe", Dtype::F32, Some(Quant::Q4_0), Some(true), 0.02),
    ] {
        let prompt = Expected::read(&fixtures.join(name)).ids("prompt");
        let dump = |numerics: Numerics, ranks: usize, schedule: Schedule, feed: Feed| {
            let mut options = ClusterOptions::new(fixtures.join(name));
            (options.dtype, options.quant, options.numerics) = (dtype, quant, numerics);
            options.scales_on_units = scales_on_units;
            (options.ranks, options.schedule) = (ranks, schedule);
            let mut cluster = Cluster::start(options, &NoProgress).unwrap_or_else(|e| panic!("{name}: {e}"));
            let logits = cluster.logits(&prompt, feed).expect("logits").logits;
            let request = request(&prompt, 1);
            let sides = cluster.generate(&[request], &mut |_| {}).expect("a token").stats.matrix_units;
            let uses = numerics == Numerics::Fast;
            assert!(
                sides.len() == ranks && sides.iter().all(|side| (*side > 0) == uses),
                "{name}: {sides:?}"
            );
            logits
        };
        let bits = |logits: &[f32]| logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let exact = dump(Numerics::Exact, 1, Schedule::Rounds, Feed::Decode);
        let fast = dump(Numerics::Fast, 1, Schedule::Rounds, Feed::Decode);
        let worst = exact.iter().zip(&fast).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let of = format!("{name} {dtype} {quant:?} {scales_on_units:?}");
        eprintln!("{of}: off by {worst}");
        assert!(worst > 0.0 && worst < limit, "{of}: off by {worst}");
        for (ranks, schedule, feed) in [
            (1, Schedule::Rounds, Feed::Prefill),
            (3, Schedule::Rounds, Feed::Decode),
            (3, Schedule::Flow, Feed::Prefill),
        ] {
            let other = dump(Numerics::Fast, ranks, schedule, feed);
            assert!(bits(&other) == bits(&fast), "{of}: {ranks} ranks, {schedule}, {feed}");
        }
    }
}

/// `folder` with the numbers that its MXFP4 blocks stand for in their place.
fn expanded(folder: &Path) -> tempfile::TempDir {
    const SIZES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let made = tempfile::TempDir::new().expect("a folder");
    for name in ["config.json", "tokenizer.json"] {
        let _ = std::fs::copy(folder.join(name), made.path().join(name));
    }
    let bytes = std::fs::read(folder.join("model.safetensors")).expect("weights");
    let stored = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut tensors = Vec::new();
    for (name, view) in stored.tensors() {
        let Some(of) = name.strip_suffix("_blocks") else {
            if !name.ends_with("_scales") {
                tensors.push((name, view.dtype(), view.shape().to_vec(), view.data().to_vec()));
            }
            continue;
        };
        let scales = stored.tensor(&format!("{of}_scales")).expect("scales");
        let (experts, n, k) = (view.shape()[0], view.shape()[1], 32 * view.shape()[2]);
        let mut values = vec![0f32; experts * n * k];
        for at in 0..values.len() {
            let (expert, row, column) = (at / (n * k), at / k % n, at % k);
            let nibble = view.data()[at / 2] >> (4 * (at % 2));
            let sign = if nibble & 8 == 0 { 1.0 } else { -1.0 };
            let scale = 2f32.powi(i32::from(scales.data()[at / 32]) - 127);
            values[(expert * k + column) * n + row] = sign * SIZES[usize::from(nibble & 7)] * scale;
        }
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        tensors.push((of.to_owned(), safetensors::tensor::Dtype::F32, vec![experts, k, n], bytes));
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, &made.path().join("model.safetensors")).expect("written");
    made
}

#[test]
fn experts_in_mxfp4_give_the_bits_of_the_numbers_that_they_stand_for() {
    let folder = root().join("tests/parity/fixtures/gpt_oss_mxfp4");
    let full = expanded(&folder);
    let prompt = Expected::read(&folder).ids("prompt");
    for feed in [Feed::Prefill, Feed::Decode] {
        let bits = |folder: &Path, ranks: usize| {
            let mut cluster = Setup::new(folder, ranks, Strategy::Coherent).start();
            let dump = cluster.logits(&prompt, feed).expect("logits");
            dump.logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let alone = bits(full.path(), 1);
        assert!(alone.iter().any(|&logit| f32::from_bits(logit).abs() > 0.5));
        for ranks in [1, 2] {
            assert!(bits(&folder, ranks) == alone, "{feed:?} on {ranks} ranks");
        }
    }
}

/// Keys and values of other ranks made anew from their layers' inputs: rotary positions of every kind of head, norms of
/// queries and keys, biases.
#[test]
fn keys_and_values_that_travel_as_their_layers_input_have_the_same_bits() {
    common::prepare();
    let fixtures = root().join("tests/parity/fixtures");
    let bits = |cluster: &mut Cluster, prompt: &[u32]| {
        let dump = cluster.logits(prompt, Feed::Decode).expect("logits");
        dump.logits.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let start = |name: &str, change: &dyn Fn(&mut ClusterOptions)| {
        let mut options = ClusterOptions::new(fixtures.join(name));
        (options.ranks, options.kv_wire) = (3, KvWire::Hidden);
        change(&mut options);
        Cluster::start(options, &NoProgress)
    };
    for name in ["olmoe", "qwen3_moe", "phimoe", "rope_llama3", "qwen2_moe"] {
        let prompt = Expected::read(&fixtures.join(name)).ids("prompt");
        let alone = bits(&mut Setup::one_rank(&fixtures.join(name)).start(), &prompt);
        for schedule in [Schedule::Rounds, Schedule::Flow] {
            let mut cluster =
                start(name, &|o| o.schedule = schedule).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(bits(&mut cluster, &prompt) == alone, "{name}, {schedule}");
        }
    }
    // Where keys and values are fewer bytes than the input they are made from, it is refused.
    for (name, kv_dtype) in [("deepseek_v2", KvDtype::F32), ("olmoe", KvDtype::Q8)] {
        let error = start(name, &|o| o.kv_dtype = kv_dtype).err().expect("it is refused");
        assert!(error.is_input() && error.to_string().contains("bytes of each token"), "{error}");
    }
}
