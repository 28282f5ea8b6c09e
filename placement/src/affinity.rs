//! Counts that a placement is made from: transitions between adjacent layers, the wrap to the next
//! token, co-activation within a layer, load. All are additive over tokens.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::npy::{self, Array, NpyError};
use crate::rng::Rng;
use crate::trace::RoutingTrace;

/// What is wrong with affinity counts.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AffinityError {
    /// The file is not a readable archive.
    #[error("affinity file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: NpyError,
    },
    /// The archive has no array `transitions`.
    #[error(
        "affinity file {path}: it has no array \"transitions\" [L-1, E, E]; write it with `exflow profile`"
    )]
    NoTransitions {
        /// The file.
        path: PathBuf,
    },
    /// A file of counts in another program's format.
    #[error("counts {path}: {what}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// An array's shape disagrees with the others.
    #[error("affinity array {array:?} has shape {shape:?}; expected {expected}")]
    Shape {
        /// The array.
        array: &'static str,
        /// Its shape or length.
        shape: Vec<usize>,
        /// The shape that it must have.
        expected: String,
    },
    /// A count is negative, infinite or not a number.
    #[error("affinity array {array:?}, layer {layer}, expert {row}, column {column}: {value} is not a count")]
    Count {
        /// The array.
        array: &'static str,
        /// Layer (of a transition: the earlier one).
        layer: usize,
        /// Row: the expert, or the expert left.
        row: usize,
        /// Column: the expert entered.
        column: usize,
        /// What stands there.
        value: f64,
    },
    /// A trace names an expert that the model does not have.
    #[error("routing trace, token {token}, layer {layer}: expert {expert} of a model with {experts} experts")]
    Expert {
        /// Token.
        token: usize,
        /// MoE layer.
        layer: usize,
        /// The id.
        expert: i32,
        /// Experts per layer.
        experts: usize,
    },
    /// Two profiles of different models.
    #[error("profiles of {a:?} and {b:?} [layers, experts] cannot be merged: they are of different models")]
    Merge {
        /// Layers and experts of one.
        a: [usize; 2],
        /// Layers and experts of the other.
        b: [usize; 2],
    },
    /// A weight of a merge is negative or not a number.
    #[error("a profile cannot be mixed in with weight {0}: give a number above 0")]
    Weight(f64),
}

/// Affinity counts of L MoE layers with E experts each. Top-k counts all k x k pairs of a token.
#[derive(Debug, Clone, PartialEq)]
pub struct Affinity {
    /// L.
    pub layers: usize,
    /// E.
    pub experts: usize,
    /// `[L-1, E, E]`: from expert i of layer l to expert j of layer l+1.
    pub transitions: Vec<f64>,
    /// `[E, E]`: from the last layer of a token to the first of its successor.
    pub wrap: Option<Vec<f64>>,
    /// `[L, E, E]`: tokens that chose both i and j in layer l; the diagonal is the load.
    pub coactivation: Option<Vec<f64>>,
    /// `[L, E]`: tokens that chose expert i of layer l.
    pub load: Option<Vec<f64>>,
}

impl Affinity {
    /// All counts zero, wrap, co-activation and load present.
    pub fn zeros(layers: usize, experts: usize) -> Self {
        let square = experts * experts;
        Self {
            layers,
            experts,
            transitions: vec![0.0; layers.saturating_sub(1) * square],
            wrap: Some(vec![0.0; square]),
            coactivation: Some(vec![0.0; layers * square]),
            load: Some(vec![0.0; layers * experts]),
        }
    }

    /// Counts a trace. `wrap` is absent where no token follows another, `coactivation` where k is 1.
    pub fn from_trace(trace: &RoutingTrace, experts: usize) -> Result<Self, AffinityError> {
        check_ids(trace, experts)?;
        let mut counts = Self::zeros(trace.layers(), experts);
        let last = trace.layers() - 1;
        let (mut wrapped, mut wrap) = (false, vec![0.0; experts * experts]);
        for token in 0..trace.tokens() {
            for layer in 0..trace.layers() {
                counts.count_layer(trace, token, layer);
            }
            if trace.follows(token) {
                wrapped = true;
                add_pairs(&mut wrap, experts, trace.chosen(token - 1, last), trace.chosen(token, 0));
            }
        }
        counts.wrap = wrapped.then_some(wrap);
        if trace.k() == 1 {
            counts.coactivation = None;
        }
        Ok(counts)
    }

    fn count_layer(&mut self, trace: &RoutingTrace, token: usize, layer: usize) {
        let (experts, square) = (self.experts, self.experts * self.experts);
        let chosen = trace.chosen(token, layer);
        if let Some(load) = &mut self.load {
            chosen.iter().for_each(|&id| load[layer * experts + id as usize] += 1.0);
        }
        if let (Some(co), true) = (&mut self.coactivation, trace.k() > 1) {
            add_pairs(&mut co[layer * square..][..square], experts, chosen, chosen);
        }
        if layer + 1 < self.layers {
            let counts = &mut self.transitions[layer * square..][..square];
            add_pairs(counts, experts, chosen, trace.chosen(token, layer + 1));
        }
    }

    /// Transitions from layer `layer` to the next, `[E, E]`.
    pub fn transition(&self, layer: usize) -> &[f64] {
        let square = self.experts * self.experts;
        &self.transitions[layer * square..][..square]
    }

    /// Load `[L, E]`: the array where it is there, else what leaves each expert (of the last layer: what enters).
    pub fn load_or_derived(&self) -> Vec<f64> {
        if let Some(load) = &self.load {
            return load.clone();
        }
        let e = self.experts;
        let mut load: Vec<f64> = self.transitions.chunks_exact(e).map(|row| row.iter().sum()).collect();
        let mut last = vec![0.0; e];
        let entering =
            if self.layers > 1 { Some(self.transition(self.layers - 2)) } else { self.wrap.as_deref() };
        for row in entering.unwrap_or_default().chunks_exact(e) {
            last.iter_mut().zip(row).for_each(|(sum, count)| *sum += count);
        }
        load.extend(last);
        load
    }

    /// Adds `weight` times the counts of another profile of the same model. An array that only one of
    /// the two has is kept as that one's.
    pub fn merge(&mut self, other: &Self, weight: f64) -> Result<(), AffinityError> {
        let (a, b) = ([self.layers, self.experts], [other.layers, other.experts]);
        if a != b {
            return Err(AffinityError::Merge { a, b });
        }
        if !(weight >= 0.0 && weight.is_finite()) {
            return Err(AffinityError::Weight(weight));
        }
        add_scaled(&mut self.transitions, &other.transitions, weight);
        merge_optional(&mut self.wrap, other.wrap.as_ref(), weight);
        merge_optional(&mut self.coactivation, other.coactivation.as_ref(), weight);
        merge_optional(&mut self.load, other.load.as_ref(), weight);
        Ok(())
    }

    /// Deals every count to two profiles at random, about `share` of each to the first: what is learnt on one can then
    /// be scored on the other. Counts that are not whole are dealt whole, their rest by chance.
    pub fn split(&self, share: f64, seed: u64) -> (Self, Self) {
        let mut rng = Rng::fork(seed, 0x5b117);
        let (mut first, mut second) = (self.clone(), self.clone());
        (first.transitions, second.transitions) = deal(&self.transitions, share, &mut rng);
        let mut optional =
            |counts: &Option<Vec<f64>>| counts.as_deref().map(|counts| deal(counts, share, &mut rng)).unzip();
        (first.wrap, second.wrap) = optional(&self.wrap);
        (first.coactivation, second.coactivation) = optional(&self.coactivation);
        (first.load, second.load) = optional(&self.load);
        (first, second)
    }

    /// Tokens that the counts are of, as far as they tell: pairs grow with k², load with k.
    pub fn tokens(&self) -> f64 {
        let e = self.experts;
        let load: f64 = self.load_or_derived()[..e].iter().sum();
        let pairs: f64 = if self.layers > 1 { self.transition(0).iter().sum() } else { 0.0 };
        if pairs > 0.0 { load * load / pairs } else { load }
    }

    /// Every count times `factor`.
    pub fn scale(&mut self, factor: f64) {
        let arrays =
            [Some(&mut self.transitions), self.wrap.as_mut(), self.coactivation.as_mut(), self.load.as_mut()];
        arrays.into_iter().flatten().flatten().for_each(|count| *count *= factor);
    }

    /// Whether shapes agree and every entry is a count.
    pub fn check(&self) -> Result<(), AffinityError> {
        let (l, e) = (self.layers, self.experts);
        let pairs = l.saturating_sub(1);
        check_array("transitions", &self.transitions, [pairs, e, e])?;
        check_optional("wrap", self.wrap.as_ref(), [1, e, e])?;
        check_optional("coactivation", self.coactivation.as_ref(), [l, e, e])?;
        check_optional("load", self.load.as_ref(), [l, 1, e])?;
        if l == 0 || e == 0 {
            let expected = "at least one layer and one expert".to_owned();
            return Err(AffinityError::Shape { array: "transitions", shape: vec![pairs, e, e], expected });
        }
        Ok(())
    }

    /// Writes the `.npz` archive of DESIGN.md 5, float64.
    pub fn save_npz(&self, path: &Path) -> Result<(), AffinityError> {
        let (l, e) = (self.layers, self.experts);
        let shapes = ([l.saturating_sub(1), e, e], [e, e], [l, e, e], [l, e]);
        let mut arrays: Vec<(&str, &[usize], &[f64])> = vec![("transitions", &shapes.0, &self.transitions)];
        arrays.extend(self.wrap.as_deref().map(|data| ("wrap", &shapes.1[..], data)));
        arrays.extend(self.coactivation.as_deref().map(|data| ("coactivation", &shapes.2[..], data)));
        arrays.extend(self.load.as_deref().map(|data| ("load", &shapes.3[..], data)));
        npy::write_npz(path, &arrays).map_err(|source| AffinityError::File { path: path.into(), source })
    }

    /// Reads the `.npz` archive of DESIGN.md 5; all but `transitions` may be absent.
    pub fn load_npz(path: &Path) -> Result<Self, AffinityError> {
        let mut arrays =
            npy::read_npz(path).map_err(|source| AffinityError::File { path: path.into(), source })?;
        let transitions =
            arrays.remove("transitions").ok_or_else(|| AffinityError::NoTransitions { path: path.into() })?;
        let [pairs, rows, columns] = transitions.shape[..] else {
            return Err(wrong_shape("transitions", transitions.shape, "[L-1, E, E]".into()));
        };
        if rows != columns {
            return Err(wrong_shape("transitions", transitions.shape, "[L-1, E, E]".into()));
        }
        let (l, e) = (pairs + 1, rows);
        let affinity = Self {
            layers: l,
            experts: e,
            transitions: transitions.data,
            wrap: shaped("wrap", arrays.remove("wrap"), &[e, e])?,
            coactivation: shaped("coactivation", arrays.remove("coactivation"), &[l, e, e])?,
            load: shaped("load", arrays.remove("load"), &[l, e])?,
        };
        affinity.check()?;
        Ok(affinity)
    }
}

/// Every count dealt in two.
fn deal(counts: &[f64], share: f64, rng: &mut Rng) -> (Vec<f64>, Vec<f64>) {
    counts.iter().map(|&count| deal_count(count, share, rng)).unzip()
}

/// About `share` of a count: a binomial draw, by the normal distribution where the count is large.
fn deal_count(count: f64, share: f64, rng: &mut Rng) -> (f64, f64) {
    let whole = count.floor() + f64::from(u8::from(rng.unit() < count.fract()));
    let first = if whole < 64.0 {
        (0..whole as u32).filter(|_| rng.unit() < share).count() as f64
    } else {
        let spread = (whole * share * (1.0 - share)).sqrt();
        (whole * share + spread * rng.normal()).round().clamp(0.0, whole)
    };
    (first, whole - first)
}

fn check_ids(trace: &RoutingTrace, experts: usize) -> Result<(), AffinityError> {
    for token in 0..trace.tokens() {
        for layer in 0..trace.layers() {
            let wrong = trace.chosen(token, layer).iter().find(|&&id| id < 0 || id as usize >= experts);
            if let Some(&expert) = wrong {
                return Err(AffinityError::Expert { token, layer, expert, experts });
            }
        }
    }
    Ok(())
}

fn add_pairs(counts: &mut [f64], experts: usize, from: &[i32], to: &[i32]) {
    for &i in from {
        for &j in to {
            counts[i as usize * experts + j as usize] += 1.0;
        }
    }
}

fn add_scaled(into: &mut [f64], from: &[f64], weight: f64) {
    into.iter_mut().zip(from).for_each(|(a, b)| *a += weight * b);
}

fn merge_optional(into: &mut Option<Vec<f64>>, from: Option<&Vec<f64>>, weight: f64) {
    match (into.as_mut(), from) {
        (Some(into), Some(from)) => add_scaled(into, from, weight),
        (None, Some(from)) => *into = Some(from.iter().map(|count| weight * count).collect()),
        (_, None) => {}
    }
}

fn wrong_shape(array: &'static str, shape: Vec<usize>, expected: String) -> AffinityError {
    AffinityError::Shape { array, shape, expected }
}

fn shaped(
    name: &'static str,
    array: Option<Array>,
    shape: &[usize],
) -> Result<Option<Vec<f64>>, AffinityError> {
    match array {
        Some(array) if array.shape != shape => Err(wrong_shape(name, array.shape, format!("{shape:?}"))),
        array => Ok(array.map(|array| array.data)),
    }
}

fn check_optional(
    name: &'static str,
    data: Option<&Vec<f64>>,
    shape: [usize; 3],
) -> Result<(), AffinityError> {
    data.map_or(Ok(()), |data| check_array(name, data, shape))
}

fn check_array(
    array: &'static str,
    data: &[f64],
    [layers, rows, columns]: [usize; 3],
) -> Result<(), AffinityError> {
    if data.len() != layers * rows * columns {
        let expected = format!("{layers} x {rows} x {columns} counts");
        return Err(wrong_shape(array, vec![data.len()], expected));
    }
    match data.iter().position(|&count| !(count >= 0.0 && count.is_finite())) {
        None => Ok(()),
        Some(at) => {
            let (layer, row, column) = (at / (rows * columns), at / columns % rows, at % columns);
            Err(AffinityError::Count { array, layer, row, column, value: data[at] })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> RoutingTrace {
        let mut trace = RoutingTrace::new(2, 2);
        trace.push_token(&[0, 1, 2, 0]);
        trace.push_token(&[1, 2, 2, 1]);
        trace.mark_break();
        trace.push_token(&[0, 2, 1, 0]);
        trace
    }

    #[test]
    fn counts_all_pairs_of_a_trace() {
        let counts = Affinity::from_trace(&trace(), 3).unwrap();
        assert_eq!(counts.transitions, [2., 1., 1., 1., 1., 2., 1., 2., 1.]);
        assert_eq!(counts.wrap.as_deref().unwrap(), [0., 1., 1., 0., 0., 0., 0., 1., 1.]);
        assert_eq!(counts.load.as_deref().unwrap(), [2., 2., 2., 2., 2., 2.]);
        assert_eq!(counts.coactivation.as_deref().unwrap()[..9], [2., 1., 1., 1., 2., 1., 1., 1., 2.]);
        let bad = Affinity::from_trace(&trace(), 2).unwrap_err();
        assert!(matches!(bad, AffinityError::Expert { token: 0, layer: 1, expert: 2, .. }));
    }

    #[test]
    fn merging_adds_and_round_trips() {
        let one = Affinity::from_trace(&trace(), 3).unwrap();
        let mut sum = one.clone();
        sum.merge(&one, 3.0).unwrap();
        let mut four = one.clone();
        four.scale(4.0);
        assert_eq!(sum, four);
        assert!(matches!(sum.merge(&Affinity::zeros(2, 4), 1.0), Err(AffinityError::Merge { .. })));
        assert!(matches!(sum.merge(&one, f64::NAN), Err(AffinityError::Weight(_))));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npz");
        sum.save_npz(&path).unwrap();
        assert_eq!(Affinity::load_npz(&path).unwrap(), sum);
    }

    #[test]
    fn a_split_deals_every_count() {
        let mut counts = Affinity::from_trace(&trace(), 3).unwrap();
        counts.scale(1000.0);
        let (first, second) = counts.split(0.8, 1);
        let mut sum = first.clone();
        sum.merge(&second, 1.0).unwrap();
        assert_eq!(sum, counts);
        let share = first.transitions.iter().sum::<f64>() / counts.transitions.iter().sum::<f64>();
        assert!((share - 0.8).abs() < 0.02, "{share}");
        assert_eq!((counts.tokens(), counts.split(0.8, 1)), (3000.0, (first, second)));
    }

    #[test]
    fn wrong_files_are_named_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npz");
        assert!(matches!(Affinity::load_npz(&path), Err(AffinityError::File { .. })));
        npy::write_npz(&path, &[("load", &[1], &[1.0])]).unwrap();
        assert!(matches!(Affinity::load_npz(&path), Err(AffinityError::NoTransitions { .. })));
        npy::write_npz(&path, &[("transitions", &[1, 2, 3], &[0.0; 6])]).unwrap();
        assert!(matches!(Affinity::load_npz(&path), Err(AffinityError::Shape { .. })));
        npy::write_npz(&path, &[("transitions", &[1, 2, 2], &[0.0, 1.0, f64::NAN, 0.0])]).unwrap();
        let error = Affinity::load_npz(&path).unwrap_err();
        assert!(matches!(error, AffinityError::Count { row: 1, column: 0, .. }), "{error}");
        npy::write_npz(&path, &[("transitions", &[1, 1, 1], &[1.0]), ("load", &[2, 2], &[0.0; 4])]).unwrap();
        assert!(matches!(Affinity::load_npz(&path), Err(AffinityError::Shape { array: "load", .. })));
    }
}
