//! Experts in chunks: which lie together, and that those which move between chunks keep their numbers.

use super::{ModelWeights, Shelf, Store};
use crate::gpu::{Gpu, Recording};
use crate::model::ModelSpec;
use crate::options::Dtype;
use crate::weights::{Chunk, LayerFfn};
use exflow_placement::ExpertId;
use std::path::Path;

fn chunks(weights: &ModelWeights, layer: usize) -> &[Chunk] {
    match &weights.layers[layer].ffn {
        LayerFfn::Moe { experts, .. } => &experts.chunks,
        LayerFfn::Dense(_) => &[],
    }
}

/// The first matrices of a layer's experts, unit by unit.
fn units(gpu: &Gpu, weights: &ModelWeights, layer: usize) -> Vec<[u32; 4]> {
    let of_chunk = |chunk: &Chunk| {
        let weight = &chunk.ffn.up.weight;
        let mut recording = Recording::new(gpu);
        recording.read::<[u32; 4]>(&weight.buffer, 0, weight.units);
        let parts = recording.submit().and_then(|submission| submission.fetch()).expect("read back");
        bytemuck::pod_collect_to_vec::<u8, [u32; 4]>(&parts[0])
    };
    chunks(weights, layer).iter().flat_map(of_chunk).collect()
}

#[test]
fn as_many_experts_lie_together_as_fit() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/gpt-moe-16e");
    let (spec, store) = (ModelSpec::read(&model).expect("a model"), Store::open(&model).expect("weights"));
    let mut gpu = Gpu::open(None, 0).expect("an adapter");
    let held_as = (Dtype::F32, None);
    let ids = |range: std::ops::Range<usize>| range.map(ExpertId::from).collect::<Vec<_>>();
    let load = |gpu: &Gpu, ids: &[ExpertId]| {
        let all = vec![ids.to_vec(); spec.moe_layers()];
        ModelWeights::load(&spec, &store, gpu, &all, held_as, &mut |_| {}).expect("loads")
    };
    let sizes = |weights: &ModelWeights| -> Vec<(usize, usize)> {
        chunks(weights, spec.moe_layers[0]).iter().map(|chunk| (chunk.first, chunk.count)).collect()
    };
    let layer = spec.moe_layers[0];
    let whole = load(&gpu, &ids(0..16));
    assert_eq!(sizes(&whole), [(0, 16)]);
    let expected = units(&gpu, &whole, layer);
    let expert = chunks(&whole, layer)[0].ffn.up.weight.units / 16;

    gpu.limit_chunks(Some(5 * 16 * expert as u64));
    let mut cut = load(&gpu, &ids(0..16));
    assert_eq!(sizes(&cut), [(0, 5), (5, 5), (10, 5), (15, 1)]);
    assert!(units(&gpu, &cut, layer) == expected);

    // Some go, and come again: out of one chunk into another, on the device or from the file.
    let shelf = Shelf { spec: &spec, store: &store, held_as };
    let some: Vec<ExpertId> = [1, 4, 5, 9, 12, 13, 15].map(ExpertId::from).into();
    let all = |ids: &[ExpertId]| vec![ids.to_vec(); spec.moe_layers()];
    cut.replace_experts(shelf, &gpu, &all(&some), &mut |_| {}).expect("replaced");
    assert_eq!(sizes(&cut), [(0, 5), (5, 2)]);
    let of = |expert_id: &ExpertId| expected[expert_id.index() * expert..][..expert].to_vec();
    assert!(units(&gpu, &cut, layer) == some.iter().flat_map(of).collect::<Vec<_>>());
    let others: Vec<ExpertId> = ids(0..16).into_iter().filter(|id| !some.contains(id)).collect();
    // A piece at a time, of whatever size; the old ones serve until all are there.
    let mut assemble = |ids: Vec<ExpertId>, read, bytes: usize| {
        let before = units(&gpu, &cut, layer);
        let mut assembly = cut.assemble(shelf, &gpu, (layer, ids), read).expect("room");
        let mut pieces = 1;
        while !cut.assemble_more(shelf, &gpu, &mut assembly, bytes).expect("more") {
            assert!(units(&gpu, &cut, layer) == before, "piece {pieces}");
            pieces += 1;
        }
        (pieces, units(&gpu, &cut, layer), sizes(&cut))
    };
    let read = Some(shelf.read(layer, &others).expect("read"));
    let (pieces, now, sizes) = assemble(ids(0..16), read, 100_000);
    assert_eq!((pieces, &sizes[..]), (48, &[(0, 5), (5, 5), (10, 5), (15, 1)][..]), "2 x 16 x 147,456 bytes");
    assert!(now == expected);
    let (_, now, sizes) = assemble(some.clone(), None, 1 << 30);
    assert_eq!(sizes, [(0, 5), (5, 2)]);
    assert!(now == some.iter().flat_map(of).collect::<Vec<_>>());
    let (pieces, _, sizes) = assemble(Vec::new(), None, 1);
    assert!(pieces == 1 && sizes.is_empty());
    assert!(cut.assemble(shelf, &gpu, (layer, ids(3..4)), None).is_err(), "it is not there");
}
