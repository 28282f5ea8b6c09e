//! A memory-mapped safetensors file: tensors by name, in f32, checked for shape and for numbers.

use crate::EngineError;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The weights of one model folder.
pub(crate) struct Store {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    data_start: usize,
}

/// What to do about a file that is not what it should be.
const COPY_ANEW: &str = "copy or download the model anew";
/// Bytes of each tensor that enter the digest, from its start.
const SAMPLE_BYTES: usize = 256;

impl Store {
    /// Maps `folder/model.safetensors` and checks its header; no tensor is read yet.
    pub(crate) fn open(folder: &Path) -> Result<Self, EngineError> {
        let path = folder.join("model.safetensors");
        let unreadable =
            |e: std::io::Error| EngineError::file(&path, format!("cannot be read: {e}"), COPY_ANEW);
        let file = std::fs::File::open(&path).map_err(unreadable)?;
        // SAFETY: the file is opened for reading only; changing a model's file while it is being loaded is
        // outside of what any loader can answer for.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            EngineError::file(&path, format!("not a whole safetensors file: {e:?}"), COPY_ANEW)
        })?;
        let data_start = header + 8;
        Ok(Self { path, map, metadata, data_start })
    }

    /// SHA-256 over config, tokenizer (where there is one), the header and a sample of every tensor.
    pub(crate) fn digest(&self, folder: &Path) -> String {
        let mut hash = Sha256::new();
        for name in ["config.json", "tokenizer.json"] {
            let bytes = std::fs::read(folder.join(name)).unwrap_or_default();
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(&bytes);
        }
        hash.update(&self.map[..self.data_start]);
        let mut tensors: Vec<_> = self.metadata.tensors().into_iter().collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        for (_, info) in tensors {
            let (start, end) = info.data_offsets;
            hash.update(&self.map[self.data_start + start..][..SAMPLE_BYTES.min(end - start)]);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The elements `range` of tensor `name`, which must have shape `shape`, in f32.
    pub(crate) fn read(
        &self,
        name: &str,
        shape: &[usize],
        range: Range<usize>,
    ) -> Result<Vec<f32>, EngineError> {
        let Some(info) = self.metadata.info(name) else {
            return Err(self.bad(name, "missing", COPY_ANEW));
        };
        if info.shape != shape {
            let what = format!("shape {:?}, config.json says {shape:?}", info.shape);
            return Err(self.bad(name, what, "use the config.json that belongs to these weights"));
        }
        let width = match info.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => {
                let what = format!("dtype {other:?} cannot be read");
                return Err(self.bad(name, what, "convert it to F32, F16 or BF16"));
            }
        };
        let start = self.data_start + info.data_offsets.0 + range.start * width;
        let bytes = &self.map[start..start + range.len() * width];
        let values = widen(info.dtype, bytes);
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => {
                let what = format!("element {} is {}", range.start + index, values[index]);
                Err(self.bad(name, what, COPY_ANEW))
            }
        }
    }

    fn bad(&self, name: &str, what: impl Into<String>, remedy: &str) -> EngineError {
        EngineError::tensor(&self.path, name, what, remedy)
    }
}

fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let pairs = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F16 => pairs.map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => pairs.map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}
