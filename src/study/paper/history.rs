//! Routing counts of a model's checkpoints during its training, `routing_history.npz` beside its weights.

use exflow_placement::{Affinity, AffinityError, npy};
use std::path::Path;

/// The file's name in a model's folder.
const FILE: &str = "routing_history.npz";

/// Counts of C checkpoints on one text.
#[derive(Debug, Clone)]
pub struct RoutingHistory {
    /// `[C]` training steps.
    pub steps: Vec<f64>,
    /// `[C]` counts.
    pub counts: Vec<Affinity>,
}

impl RoutingHistory {
    /// Reads the history of a model's folder; none where it has no such file.
    ///
    /// # Errors
    /// Where the file cannot be read or its arrays are not of the shapes that they must have.
    pub fn load(model: &Path) -> Result<Option<Self>, AffinityError> {
        let path = model.join(FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let file = |source| AffinityError::File { path: path.clone(), source };
        let mut arrays = npy::read_npz(&path).map_err(file)?;
        let missing = || AffinityError::NoTransitions { path: path.clone() };
        let steps = arrays.remove("steps").ok_or_else(missing)?.data;
        let transitions = arrays.remove("transitions").ok_or_else(missing)?;
        let [count, pairs, experts, columns] = transitions.shape[..] else {
            return Err(wrong(transitions.shape, "[C, L-1, E, E]".into()));
        };
        if experts != columns || experts == 0 || count != steps.len() {
            return Err(wrong(transitions.shape, format!("[{}, L-1, E, E]", steps.len())));
        }
        let layers = pairs + 1;
        let (square, whole) = (experts * experts, pairs * experts * experts);
        let mut part = |name: &str, size: usize| -> Vec<Option<Vec<f64>>> {
            let array = arrays.remove(name).filter(|array| array.data.len() == count * size);
            let of = |at: usize| array.as_ref().map(|array| array.data[at * size..][..size].to_vec());
            (0..count).map(of).collect()
        };
        let (wraps, loads) = (part("wrap", square), part("load", layers * experts));
        let counts = transitions.data.chunks_exact(whole.max(1)).zip(wraps).zip(loads);
        let counts: Vec<Affinity> = counts
            .map(|((transitions, wrap), load)| Affinity {
                layers,
                experts,
                transitions: transitions.to_vec(),
                wrap,
                coactivation: None,
                load,
            })
            .collect();
        counts.iter().try_for_each(Affinity::check)?;
        Ok(Some(Self { steps, counts }))
    }
}

fn wrong(shape: Vec<usize>, expected: String) -> AffinityError {
    AffinityError::Shape { array: "transitions", shape, expected }
}
