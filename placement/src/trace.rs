//! Routing traces: which experts each token chose in each MoE layer. Ids only, never text.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::npy::{self, NpyError};

/// What is wrong with a routing trace.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file is not a readable array.
    #[error("routing trace {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: NpyError,
    },
    /// The array has neither of the two shapes of a trace.
    #[error("routing trace {path}: shape {shape:?}; expected [tokens, layers] or [tokens, layers, k]")]
    Shape {
        /// The file.
        path: PathBuf,
        /// The array's shape.
        shape: Vec<usize>,
    },
    /// An element is not a whole number from 0 to 65535.
    #[error("routing trace {path}: token {token}, layer {layer}: {value} is not an expert id")]
    Id {
        /// The file.
        path: PathBuf,
        /// Token, counted from 0.
        token: usize,
        /// MoE layer, counted from 0.
        layer: usize,
        /// What stands there.
        value: f64,
    },
}

/// Chosen experts, int32 `[tokens, layers, k]`, largest router weight first.
///
/// `.npy`, which others read and write, has no place for where sequences begin; what serde writes keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Parts")]
pub struct RoutingTrace {
    layers: usize,
    k: usize,
    ids: Vec<i32>,
    breaks: Vec<usize>,
}

/// What serde reads, not yet looked at.
#[derive(Deserialize)]
struct Parts {
    layers: usize,
    k: usize,
    ids: Vec<i32>,
    breaks: Vec<usize>,
}

impl TryFrom<Parts> for RoutingTrace {
    type Error = String;

    fn try_from(Parts { layers, k, ids, breaks }: Parts) -> Result<Self, String> {
        let row = layers.checked_mul(k).filter(|row| *row > 0).ok_or("a trace has layers and experts")?;
        let tokens = ids.len() / row;
        if ids.len() % row > 0 {
            return Err(format!("{} expert ids are not whole tokens of {row}", ids.len()));
        }
        if let Some(id) = ids.iter().find(|id| !(0..65536).contains(*id)) {
            return Err(format!("{id} is not an expert id"));
        }
        if !breaks.is_sorted_by(|a, b| a < b) || breaks.iter().any(|at| *at == 0 || *at > tokens) {
            return Err(format!("breaks {breaks:?} do not part {tokens} tokens"));
        }
        Ok(Self { layers, k, ids, breaks })
    }
}

impl RoutingTrace {
    /// An empty trace of `layers` MoE layers and `k` experts per token and layer (1 is the least of both).
    pub fn new(layers: usize, k: usize) -> Self {
        Self { layers: layers.max(1), k: k.max(1), ids: Vec::new(), breaks: Vec::new() }
    }

    /// Appends one token: `ids` is `[layers, k]`.
    ///
    /// # Panics
    /// In debug builds, where `ids` has another length; release builds drop a token of another length.
    pub fn push_token(&mut self, ids: &[i32]) {
        debug_assert_eq!(ids.len(), self.layers * self.k, "a token has layers x k expert ids");
        if ids.len() == self.layers * self.k {
            self.ids.extend_from_slice(ids);
        }
    }

    /// Says that the next token does not follow the last one: a new sequence begins. Kept for the wrap
    /// counts (last layer of a token to the first of its successor); the `.npy` form has no place for it.
    pub fn mark_break(&mut self) {
        if self.breaks.last() != Some(&self.tokens()) && self.tokens() > 0 {
            self.breaks.push(self.tokens());
        }
    }

    /// Whether token `token` follows token `token - 1` in one sequence.
    pub fn follows(&self, token: usize) -> bool {
        token > 0 && self.breaks.binary_search(&token).is_err()
    }

    /// The tokens of each sequence.
    pub fn texts(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let breaks = || self.breaks.iter().copied().filter(|at| *at < self.tokens());
        let ends = breaks().chain([self.tokens()]);
        std::iter::once(0)
            .chain(breaks())
            .zip(ends)
            .map(|(from, to)| from..to)
            .filter(|text| !text.is_empty())
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len() / (self.layers * self.k)
    }

    /// Number of MoE layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Experts per token and layer.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The experts of one token in one layer, `[k]`.
    pub fn chosen(&self, token: usize, layer: usize) -> &[i32] {
        let start = (token * self.layers + layer) * self.k;
        &self.ids[start..start + self.k]
    }

    /// One past the largest id; 0 for an empty trace.
    pub fn experts(&self) -> usize {
        self.ids.iter().max().map_or(0, |&id| id.max(-1) as usize + 1)
    }

    /// The tokens `range`, breaks included: for holding some of a trace back.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let row = self.layers * self.k;
        let end = range.end.min(self.tokens());
        let start = range.start.min(end);
        let inside = self.breaks.iter().filter(|&&at| at > start && at < end);
        Self {
            layers: self.layers,
            k: self.k,
            ids: self.ids[start * row..end * row].to_vec(),
            breaks: inside.map(|at| at - start).collect(),
        }
    }

    /// Writes int32 `.npy`: `[tokens, layers]` where k is 1, else `[tokens, layers, k]`.
    pub fn save_npy(&self, path: &Path) -> Result<(), TraceError> {
        let shape = [self.tokens(), self.layers, self.k];
        let shape = if self.k == 1 { &shape[..2] } else { &shape[..] };
        let write = || -> Result<(), NpyError> {
            let mut file = BufWriter::new(File::create(path)?);
            npy::write_i32(&mut file, shape, &self.ids)?;
            Ok(file.flush()?)
        };
        write().map_err(|source| TraceError::File { path: path.into(), source })
    }

    /// Reads `.npy`, `[tokens, layers]` or `[tokens, layers, k]`, of any integer or float type.
    /// Consecutive tokens count as one sequence.
    pub fn load_npy(path: &Path) -> Result<Self, TraceError> {
        let read = || -> Result<_, NpyError> {
            let mut wrong = None;
            let mut count = 0usize;
            let (shape, ids) = npy::read_map(&mut BufReader::new(File::open(path)?), |value| {
                let sound = value.fract() == 0.0 && (0.0..65536.0).contains(&value);
                if !sound && wrong.is_none() {
                    wrong = Some((count, value));
                }
                count += 1;
                value as i32
            })?;
            Ok((shape, ids, wrong))
        };
        let (shape, ids, wrong) = read().map_err(|source| TraceError::File { path: path.into(), source })?;
        let (layers, k) = match shape[..] {
            [_, layers] if layers > 0 => (layers, 1),
            [_, layers, k] if layers > 0 && k > 0 => (layers, k),
            _ => return Err(TraceError::Shape { path: path.into(), shape }),
        };
        if let Some((at, value)) = wrong {
            let (token, layer) = (at / (layers * k), at / k % layers);
            return Err(TraceError::Id { path: path.into(), token, layer, value });
        }
        Ok(Self { layers, k, ids, breaks: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_of_both_shapes() {
        let dir = tempfile::tempdir().unwrap();
        for k in [1, 2] {
            let mut trace = RoutingTrace::new(3, k);
            for token in 0..5 {
                trace.push_token(&(0..3 * k as i32).map(|i| i + token).collect::<Vec<_>>());
            }
            let path = dir.path().join(format!("{k}.npy"));
            trace.save_npy(&path).unwrap();
            assert_eq!(RoutingTrace::load_npy(&path).unwrap(), trace);
        }
    }

    #[test]
    fn breaks_part_sequences() {
        let mut trace = RoutingTrace::new(1, 1);
        trace.mark_break();
        trace.push_token(&[0]);
        trace.push_token(&[1]);
        trace.mark_break();
        trace.mark_break();
        trace.push_token(&[2]);
        assert_eq!([0, 1, 2].map(|t| trace.follows(t)), [false, true, false]);
        assert!(!trace.slice(1..3).follows(1));
        trace.mark_break();
        assert_eq!(trace.texts().collect::<Vec<_>>(), [0..2, 2..3], "none after the last");
        assert_eq!(RoutingTrace::new(1, 1).texts().count(), 0);
    }

    #[test]
    fn serde_keeps_breaks_and_refuses_what_is_no_trace() {
        let mut trace = RoutingTrace::new(2, 1);
        for text in [2, 3] {
            trace.mark_break();
            (0..text).for_each(|id| trace.push_token(&[id, 1]));
        }
        let text = serde_json::to_string(&trace).unwrap();
        assert_eq!(serde_json::from_str::<RoutingTrace>(&text).unwrap(), trace);
        for (what, other, error) in [
            ("\"k\":1", "\"k\":0", "has layers"),
            ("\"k\":1", "\"k\":3", "whole tokens of 6"),
            ("\"breaks\":[2]", "\"breaks\":[6]", "do not part 5"),
            ("\"ids\":[0,", "\"ids\":[-7,", "-7 is not"),
        ] {
            let wrong = text.replace(what, other);
            assert_ne!(wrong, text);
            let refused = serde_json::from_str::<RoutingTrace>(&wrong).unwrap_err().to_string();
            assert!(refused.contains(error), "{refused}");
        }
    }

    #[test]
    fn ids_that_are_none_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.npy");
        let mut file = File::create(&path).unwrap();
        npy::write_f64(&mut file, &[2, 2], &[0.0, 1.0, 2.0, -1.0]).unwrap();
        let error = RoutingTrace::load_npy(&path).unwrap_err();
        assert!(matches!(error, TraceError::Id { token: 1, layer: 1, .. }), "{error}");
        let mut file = File::create(&path).unwrap();
        npy::write_f64(&mut file, &[4], &[0.0; 4]).unwrap();
        assert!(matches!(RoutingTrace::load_npy(&path), Err(TraceError::Shape { .. })));
    }
}
