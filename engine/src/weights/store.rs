//! Memory-mapped safetensors files: tensors by name, in f32, checked for shape and for numbers.

use super::formats;
use crate::EngineError;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The weights of one model folder, in one file or in shards.
pub(crate) struct Store {
    shards: Vec<Shard>,
    /// Which shard holds a tensor; empty where there is one file.
    index: BTreeMap<String, usize>,
    /// Rows and columns that share one scale of an 8-bit matrix.
    fp8_block: (usize, usize),
    /// Bytes that were read since pages were given back.
    window: AtomicU64,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    data_start: usize,
}

/// What to do about a file that is not what it should be.
const COPY_ANEW: &str = "copy or download the model anew";
/// Samples after which the pages that they were read from are given back: a system that keeps files in large pages maps one of 2 MiB
/// and more for a sample, and with that a whole file of small tensors.
const SAMPLES_AT_ONCE: usize = 16;
/// Bytes of each tensor that enter the digest, from its start.
const SAMPLE_BYTES: usize = 256;
/// Bytes of config and tokenizer that enter it: no real one comes near them.
const MAX_HASHED_BYTES: u64 = 64 << 20;
/// What a load keeps of its files in memory, beside what is on its way.
const WINDOW_BYTES: u64 = 32 << 20;
const INDEX: &str = "model.safetensors.index.json";
/// No real index or header comes near it; a larger one is not read.
const MAX_INDEX_BYTES: u64 = 32 << 20;

impl Store {
    /// Maps `folder/model.safetensors`, or the shards that its index names, and checks their headers; no tensor is
    /// read yet.
    pub(crate) fn open(folder: &Path) -> Result<Self, EngineError> {
        let fp8_block = formats::fp8_block(folder);
        let one = folder.join("model.safetensors");
        if one.exists() || !folder.join(INDEX).exists() {
            let (shards, index) = (vec![Shard::open(one)?], BTreeMap::new());
            return Ok(Self { shards, index, fp8_block, window: AtomicU64::new(0) });
        }
        let (path, names) = read_index(folder)?;
        let mut files: Vec<&String> = names.values().collect();
        files.sort();
        files.dedup();
        let shards = files.iter().map(|name| Shard::open(folder.join(name)));
        let shards = shards.collect::<Result<Vec<_>, _>>()?;
        let mut index = BTreeMap::new();
        for (name, file) in &names {
            let shard = files.binary_search(&file).unwrap_or(0);
            if shards[shard].metadata.info(name).is_none() {
                let what = format!("says that {file} holds {name:?}, which it does not");
                return Err(EngineError::file(&path, what, COPY_ANEW));
            }
            index.insert(name.clone(), shard);
        }
        Ok(Self { shards, index, fp8_block, window: AtomicU64::new(0) })
    }

    /// SHA-256 over config, tokenizer and index (where there are such), every header and a sample of every tensor.
    pub(crate) fn digest(&self, folder: &Path) -> String {
        let mut hash = Sha256::new();
        for name in ["config.json", "tokenizer.json"] {
            let mut bytes = Vec::new();
            if let Ok(file) = std::fs::File::open(folder.join(name)) {
                let _ = file.take(MAX_HASHED_BYTES).read_to_end(&mut bytes);
            }
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(&bytes);
        }
        if !self.index.is_empty() {
            hash.update(std::fs::read(folder.join(INDEX)).unwrap_or_default());
        }
        for shard in &self.shards {
            hash.update(&shard.map[..shard.data_start]);
            let mut tensors: Vec<_> = shard.metadata.tensors().into_iter().collect();
            tensors.sort_by(|a, b| a.0.cmp(&b.0));
            for some in tensors.chunks(SAMPLES_AT_ONCE) {
                for (_, info) in some {
                    let (start, end) = info.data_offsets;
                    hash.update(&shard.map[shard.data_start + start..][..SAMPLE_BYTES.min(end - start)]);
                }
                crate::os::release(&shard.map);
            }
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether there is a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.shard(name).metadata.info(name).is_some()
    }

    /// The elements `range` of tensor `name`, which must have shape `shape`, in f32.
    pub(crate) fn read(
        &self,
        name: &str,
        shape: &[usize],
        range: Range<usize>,
    ) -> Result<Vec<f32>, EngineError> {
        let (shard, info) = self.find(name, shape, range.len() as u64)?;
        let values = match info.dtype {
            Dtype::F8_E4M3 => self.read_fp8(name, shape, shard.bytes(info, &range, 1), range.start)?,
            Dtype::F32 => formats::f32s(shard.bytes(info, &range, 4)),
            Dtype::F16 => formats::f16s(shard.bytes(info, &range, 2)),
            Dtype::BF16 => formats::bf16s(shard.bytes(info, &range, 2)),
            other => {
                let what = format!("dtype {other:?} cannot be read");
                return Err(self.bad(name, what, "convert it to F32, F16 or BF16"));
            }
        };
        self.finite(name, range.start, values)
    }

    /// Gives the pages that were read back to the system, which keeps the files' content as long as it has room.
    pub(crate) fn release(&self) {
        self.window.store(0, Ordering::Relaxed);
        self.shards.iter().for_each(|shard| crate::os::release(&shard.map));
    }

    /// The same once much was read since.
    pub(crate) fn release_some(&self) {
        if self.window.load(Ordering::Relaxed) >= WINDOW_BYTES {
            self.release();
        }
    }

    /// `values`, which stand in tensor `name` from element `first` on, if all of them are numbers.
    pub(crate) fn finite(&self, name: &str, first: usize, values: Vec<f32>) -> Result<Vec<f32>, EngineError> {
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => {
                let what = format!("element {} is {}", first + index, values[index]);
                Err(self.bad(name, what, COPY_ANEW))
            }
        }
    }

    /// Names of all tensors, and the files that they are in.
    pub(crate) fn names(&self) -> impl Iterator<Item = (String, &Path)> {
        self.shards
            .iter()
            .flat_map(|shard| shard.metadata.offset_keys().into_iter().map(|name| (name, &*shard.path)))
    }

    /// Whether experts are published in MXFP4.
    pub(crate) fn packs_experts(&self) -> bool {
        self.names().any(|(name, _)| name.ends_with(".experts.gate_up_proj_blocks"))
    }

    /// Bytes `range` of tensor `name` of u8, which must have shape `shape`.
    pub(crate) fn read_bytes(
        &self,
        name: &str,
        shape: &[usize],
        range: Range<usize>,
    ) -> Result<&[u8], EngineError> {
        let (shard, info) = self.find(name, shape, range.len() as u64)?;
        match info.dtype {
            Dtype::U8 => Ok(shard.bytes(info, &range, 1)),
            other => Err(self.bad(name, format!("dtype {other:?}, not U8"), COPY_ANEW)),
        }
    }

    /// Elements from `first` on of an 8-bit matrix, each times its block's scale.
    fn read_fp8(
        &self,
        name: &str,
        shape: &[usize],
        bytes: &[u8],
        first: usize,
    ) -> Result<Vec<f32>, EngineError> {
        let [rows, columns] = *shape else {
            return Err(self.bad(name, "an 8-bit tensor that is no matrix", "convert it to BF16"));
        };
        let (block_rows, block_columns) = self.fp8_block;
        let scales_shape = [rows.div_ceil(block_rows), columns.div_ceil(block_columns)];
        let scales_name = format!("{name}_scale_inv");
        let count = scales_shape[0] * scales_shape[1];
        let scales = self.read(&scales_name, &scales_shape, 0..count)?;
        let scaled = |(i, &byte): (usize, &u8)| {
            let (row, column) = ((first + i) / columns, (first + i) % columns);
            let scale = scales[row / block_rows * scales_shape[1] + column / block_columns];
            formats::e4m3(byte) * scale
        };
        Ok(bytes.iter().enumerate().map(scaled).collect())
    }

    fn shard(&self, name: &str) -> &Shard {
        &self.shards[self.index.get(name).copied().unwrap_or(0)]
    }

    /// The tensor, of which `range_of` elements are going to be read.
    fn find(&self, name: &str, shape: &[usize], range_of: u64) -> Result<(&Shard, &TensorInfo), EngineError> {
        let shard = self.shard(name);
        let Some(info) = shard.metadata.info(name) else {
            return Err(self.bad(name, "missing", COPY_ANEW));
        };
        if info.shape != shape {
            let what = format!("shape {:?}, config.json says {shape:?}", info.shape);
            return Err(self.bad(name, what, "use the config.json that belongs to these weights"));
        }
        let (start, end) = info.data_offsets;
        let elements = shape.iter().product::<usize>().max(1) as u64;
        self.window.fetch_add(range_of * ((end - start) as u64 / elements), Ordering::Relaxed);
        Ok((shard, info))
    }

    fn bad(&self, name: &str, what: impl Into<String>, remedy: &str) -> EngineError {
        EngineError::tensor(&self.shard(name).path, name, what, remedy)
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, EngineError> {
        let unreadable =
            |e: std::io::Error| EngineError::file(&path, format!("cannot be read: {e}"), COPY_ANEW);
        let file = std::fs::File::open(&path).map_err(unreadable)?;
        // SAFETY: the file is opened for reading only; changing a model's file while it is being loaded is
        // outside of what any loader can answer for.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        let (header, metadata) = header(&map).map_err(|what| EngineError::file(&path, what, COPY_ANEW))?;
        Ok(Self { path, map, metadata, data_start: header + 8 })
    }

    /// The bytes of elements `range`, `width` bytes each; the header's check has bounded them.
    fn bytes(&self, info: &TensorInfo, range: &Range<usize>, width: usize) -> &[u8] {
        let start = self.data_start + info.data_offsets.0;
        &self.map[start + range.start * width..start + range.end * width]
    }
}

/// Length and content of a safetensors file's header; every tensor's bytes are within the file, and its own.
pub(crate) fn header(bytes: &[u8]) -> Result<(usize, Metadata), String> {
    let length = bytes.first_chunk().map(|first| u64::from_le_bytes(*first));
    if let Some(length) = length.filter(|&length| length > MAX_INDEX_BYTES) {
        return Err(format!("not a whole safetensors file: a header of {length} bytes is too large"));
    }
    SafeTensors::read_metadata(bytes).map_err(|e| format!("not a whole safetensors file: {e:?}"))
}

/// The index's path and its map from tensors to files, which may not lead out of the folder.
fn read_index(folder: &Path) -> Result<(PathBuf, BTreeMap<String, String>), EngineError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let path = folder.join(INDEX);
    let bad = |what: String| EngineError::file(&path, what, COPY_ANEW);
    let size = std::fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
    if size > MAX_INDEX_BYTES {
        return Err(bad(format!("{size} bytes, too large")));
    }
    let text = std::fs::read_to_string(&path).map_err(|e| bad(format!("cannot be read: {e}")))?;
    let index: Index = serde_json::from_str(&text).map_err(|e| bad(format!("no index of shards: {e}")))?;
    let outside = |file: &&String| Path::new(file.as_str()).file_name() != Some(std::ffi::OsStr::new(file));
    if let Some(file) = index.weight_map.values().find(outside) {
        return Err(bad(format!("names the shard {file:?}, which is not a file of this folder")));
    }
    if index.weight_map.is_empty() {
        return Err(bad("names no tensor".to_owned()));
    }
    Ok((path, index.weight_map))
}
