//! Matrices with a row for each token, the embedding's and the head's: in chunks of as many rows as one binding takes.

use super::layers::{Dense, Loader};
use crate::EngineError;
use crate::gpu::Buffer;
use exflow_shaders::Weights;

/// The rows of consecutive tokens.
pub(crate) struct VocabularyChunk {
    /// The first token, a multiple of [`ROWS`].
    pub(crate) first: usize,
    /// `[tokens, H]`, and of the head its bias.
    pub(crate) rows: Dense,
}

/// Rows stand in blocks of so many (`shared/weight.wgsl`), which are never cut.
const ROWS: usize = 32;

impl Loader<'_> {
    /// The embedding, in f32.
    pub(super) fn embedding(&mut self) -> Result<Vec<VocabularyChunk>, EngineError> {
        self.vocabulary(Weights::F32, self.names.embedding, &[])
    }

    /// The head; where it is tied, the embedding's rows.
    pub(super) fn head(
        &mut self,
        embedding: &[VocabularyChunk],
    ) -> Result<Vec<VocabularyChunk>, EngineError> {
        let bias = match self.spec.head_bias {
            true => {
                let bias = self.vector("lm_head.bias", self.spec.vocab_size)?;
                bias.widen(4 * self.spec.v4()).values
            }
            false => Vec::new(),
        };
        if !self.spec.tied_head {
            return self.vocabulary(self.form, "lm_head.weight", &bias);
        }
        let tied = embedding.iter().map(|chunk| {
            let weight = chunk.rows.weight.clone();
            let bias = self.bias_of(&bias, chunk.first, 4 * weight.height4)?;
            Ok(VocabularyChunk { first: chunk.first, rows: Dense { weight, bias } })
        });
        tied.collect()
    }

    /// A chunk after the other: each is on its way to the device before the next one is read.
    fn vocabulary(
        &mut self,
        form: Weights,
        name: &str,
        bias: &[f32],
    ) -> Result<Vec<VocabularyChunk>, EngineError> {
        let (vocab, hidden) = (self.spec.vocab_size, self.spec.hidden);
        let most = self.rows_together(form);
        let chunks = (0..vocab).step_by(most).map(|first| {
            let range = first * hidden..vocab.min(first + most) * hidden;
            let read = self.rows(name, &[vocab, hidden], hidden, range)?.padded();
            let weight = self.upload_as(form, name, &read, read.count())?;
            let bias = self.bias_of(bias, first, read.count())?;
            self.store.release_some();
            Ok(VocabularyChunk { first, rows: Dense { weight, bias } })
        });
        chunks.collect()
    }

    fn bias_of(&self, bias: &[f32], first: usize, rows: usize) -> Result<Option<Buffer>, EngineError> {
        if bias.is_empty() {
            Ok(None)
        } else {
            self.upload("lm_head.bias", &bias[first..first + rows]).map(Some)
        }
    }

    /// How many rows one binding takes.
    fn rows_together(&self, form: Weights) -> usize {
        let block = 16 * (ROWS * form.units(4 * self.spec.h4()).1) as u64;
        ROWS * (self.gpu.max_matrix_bytes(form) / block).max(1) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Gpu, Recording};
    use crate::model::ModelSpec;
    use crate::options::Dtype;
    use crate::weights::{ModelWeights, Store};
    use std::path::Path;

    #[test]
    fn as_many_rows_lie_together_as_fit() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/gpt-moe-16e");
        let (spec, store) =
            (ModelSpec::read(&model).expect("a model"), Store::open(&model).expect("weights"));
        let mut gpu = Gpu::open(None, 0).expect("an adapter");
        let load = |gpu: &Gpu| {
            let none = vec![Vec::new(); spec.moe_layers()];
            ModelWeights::load(&spec, &store, gpu, &none, (Dtype::F32, None), &mut |_| {}).expect("loads")
        };
        let units = |gpu: &Gpu, chunks: &[VocabularyChunk]| -> Vec<[u32; 4]> {
            let of_chunk = |chunk: &VocabularyChunk| {
                let weight = &chunk.rows.weight;
                let mut recording = Recording::new(gpu);
                recording.read::<[u32; 4]>(&weight.buffer, 0, weight.units);
                let parts = recording.submit().and_then(|submission| submission.fetch()).expect("read back");
                bytemuck::pod_collect_to_vec::<u8, [u32; 4]>(&parts[0])
            };
            chunks.iter().flat_map(of_chunk).collect()
        };
        let whole = load(&gpu);
        assert_eq!((whole.embedding.len(), whole.head.len()), (1, 1));
        // 96 rows and some bytes.
        gpu.limit_chunks(Some(100 * 4 * spec.hidden as u64));
        let cut = load(&gpu);
        let firsts = |chunks: &[VocabularyChunk]| chunks.iter().map(|chunk| chunk.first).collect::<Vec<_>>();
        let expected: Vec<usize> = (0..spec.vocab_size).step_by(96).collect();
        assert!(expected.len() > 1);
        assert_eq!((firsts(&cut.embedding), firsts(&cut.head)), (expected.clone(), expected));
        assert!(units(&gpu, &cut.embedding) == units(&gpu, &whole.embedding));
        assert!(units(&gpu, &cut.head) == units(&gpu, &whole.head));
    }
}
