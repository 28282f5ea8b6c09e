//! Placements and counts in other programs' formats.
//!
//! - CSV `Expert,Node`, as the ExFlow authors' solver writes it: experts numbered through the layers (expert e of MoE
//!   layer l is l·E + e), one node each; copies have no place in it.
//! - JSON `physical_to_logical_map` `[L][S]`, as SGLang reads it: the logical expert in every physical slot of a layer,
//!   slots dealt to ranks in equal runs; the first slot of an expert is its primary here.
//! - JSON `logical_count` `[L][E]` or `[steps][L][E]`, as vLLM and SGLang record it: tokens per expert, a load alone.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::affinity::{Affinity, AffinityError};
use crate::ids::{ExpertId, LayerId, Rank};
use crate::table::{PlacementTable, Replica, TableError};

/// How a table is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableFormat {
    /// This crate's JSON.
    Json,
    /// `Expert,Node`.
    Csv,
    /// `physical_to_logical_map`.
    Sglang,
}

/// Number of layers, experts and ranks that a file itself need not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableShape {
    /// E.
    pub experts: usize,
    /// R; `None`: one more than the largest rank that is named.
    pub ranks: Option<usize>,
}

#[derive(Deserialize)]
struct Sglang {
    physical_to_logical_map: Vec<Vec<usize>>,
}

#[derive(Deserialize)]
struct Counts {
    logical_count: CountRows,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum CountRows {
    Layers(Vec<Vec<f64>>),
    Steps(Vec<Vec<Vec<f64>>>),
}

impl PlacementTable {
    /// Reads a table in any of the three formats; told apart by their content. `shape` is needed for the two foreign ones.
    pub fn read(path: &Path, shape: Option<TableShape>) -> Result<Self, TableError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| TableError::Io { path: path.into(), source })?;
        let foreign = |what: String| TableError::Foreign { path: path.into(), what };
        let shape_of = |format: &str| {
            shape.ok_or_else(|| {
                foreign(format!("{format} does not say how many experts a layer has; give --experts E"))
            })
        };
        if text.trim_start().starts_with('{') {
            return match serde_json::from_str::<Sglang>(&text) {
                Ok(map) => from_slots(&map.physical_to_logical_map, shape_of("a physical_to_logical_map")?)
                    .map_err(foreign),
                Err(_) => Self::load(path),
            };
        }
        from_csv(&text, shape_of("Expert,Node")?).map_err(foreign)
    }

    /// Checks and writes the table in a format.
    pub fn write(&self, path: &Path, format: TableFormat) -> Result<(), TableError> {
        let text = match format {
            TableFormat::Json => return self.save(path),
            TableFormat::Csv => self.to_csv(),
            TableFormat::Sglang => self.to_slots(),
        };
        self.check()?;
        let text = text.map_err(|what| TableError::Foreign { path: path.into(), what })?;
        std::fs::write(path, text).map_err(|source| TableError::Io { path: path.into(), source })
    }

    fn to_csv(&self) -> Result<String, String> {
        if !self.replicas.is_empty() {
            return Err(format!(
                "Expert,Node has no place for the {} copies of this table; leave them out with --no-replicas, or write JSON",
                self.replicas.len()
            ));
        }
        let rows = self.assignment.iter().flatten().enumerate();
        Ok(std::iter::once("Expert,Node\n".to_owned())
            .chain(rows.map(|(expert, rank)| format!("{expert},{rank}\n")))
            .collect())
    }

    /// Every rank gets as many slots as the fullest rank needs; slots that are left over repeat what the rank holds.
    fn to_slots(&self) -> Result<String, String> {
        let held = |layer: usize, rank: usize| self.experts_of(LayerId::from(layer), Rank::from(rank));
        let slots = (0..self.layers)
            .flat_map(|layer| (0..self.ranks).map(move |rank| held(layer, rank).len()))
            .max()
            .unwrap_or(0);
        let mut map = Vec::with_capacity(self.layers);
        for layer in 0..self.layers {
            let mut row: Vec<u16> = Vec::with_capacity(slots * self.ranks);
            for rank in 0..self.ranks {
                let experts = held(layer, rank);
                if experts.is_empty() {
                    return Err(format!(
                        "rank {rank} holds nothing of layer {layer}, which a physical_to_logical_map cannot say; solve with --balance layer"
                    ));
                }
                row.extend(experts.iter().cycle().take(slots).map(|expert| expert.0));
            }
            map.push(row);
        }
        let text = serde_json::to_string(&BTreeMap::from([("physical_to_logical_map", map)]));
        text.map(|text| text + "\n").map_err(|error| error.to_string())
    }
}

fn from_csv(text: &str, shape: TableShape) -> Result<PlacementTable, String> {
    let mut nodes: BTreeMap<usize, u16> = BTreeMap::new();
    for (number, line) in text.lines().map(str::trim).enumerate() {
        if line.is_empty() || (number == 0 && line.eq_ignore_ascii_case("expert,node")) {
            continue;
        }
        let parsed = line.split_once(',').and_then(|(expert, node)| {
            Some((expert.trim().parse::<usize>().ok()?, node.trim().parse::<u16>().ok()?))
        });
        let Some((expert, node)) = parsed else {
            return Err(format!(
                "line {}: {line:?} is not `expert,node`; write two whole numbers",
                number + 1
            ));
        };
        if nodes.insert(expert, node).is_some() {
            return Err(format!("line {}: expert {expert} stands twice; remove one", number + 1));
        }
    }
    if let Some(missing) = (0..nodes.len()).find(|expert| !nodes.contains_key(expert)) {
        return Err(format!("expert {missing} has no node; number the experts through from 0"));
    }
    if shape.experts == 0 || nodes.is_empty() || !nodes.len().is_multiple_of(shape.experts) {
        return Err(format!(
            "{} experts do not make whole layers of {}; give --experts as in the model",
            nodes.len(),
            shape.experts
        ));
    }
    let ranks: Vec<Rank> = nodes.into_values().map(Rank).collect();
    let rows: Vec<Vec<Rank>> = ranks.chunks_exact(shape.experts).map(<[Rank]>::to_vec).collect();
    build(rows, Vec::new(), shape)
}

fn from_slots(map: &[Vec<usize>], shape: TableShape) -> Result<PlacementTable, String> {
    let Some(ranks) = shape.ranks else {
        return Err("a physical_to_logical_map does not say how many ranks there are; give --ranks R".into());
    };
    let (mut rows, mut copies) = (Vec::new(), Vec::new());
    for (layer, slots) in map.iter().enumerate() {
        if slots.is_empty() || !slots.len().is_multiple_of(ranks) {
            return Err(format!(
                "layer {layer} has {} slots, which {ranks} ranks cannot share equally; give --ranks as they were",
                slots.len()
            ));
        }
        let mut row = vec![None; shape.experts];
        for (slot, &expert) in slots.iter().enumerate() {
            let rank = Rank::from(slot / (slots.len() / ranks));
            let Some(primary) = row.get_mut(expert) else {
                return Err(format!(
                    "layer {layer}, slot {slot}: expert {expert} of a model with {}; give --experts as in the model",
                    shape.experts
                ));
            };
            match primary {
                None => *primary = Some(rank),
                Some(_) => {
                    let (layer, expert) = (LayerId::from(layer), ExpertId::from(expert));
                    copies.push(Replica { layer, expert, rank });
                }
            }
        }
        let missing = row.iter().position(Option::is_none);
        if let Some(expert) = missing {
            return Err(format!("layer {layer}: no slot holds expert {expert}; make the map again"));
        }
        rows.push(row.into_iter().flatten().collect());
    }
    build(rows, copies, shape)
}

fn build(rows: Vec<Vec<Rank>>, copies: Vec<Replica>, shape: TableShape) -> Result<PlacementTable, String> {
    let named = rows.iter().flatten().map(|rank| rank.index() + 1).max().unwrap_or(0);
    let mut table = PlacementTable::from_assignment(rows, shape.ranks.unwrap_or(named))
        .map_err(|error| error.to_string())?;
    table.set_replicas(copies);
    Ok(table)
}

impl Affinity {
    /// Reads `logical_count`: load alone, all transitions zero.
    pub fn load_logical_count(path: &Path) -> Result<Self, AffinityError> {
        let foreign = |what: String| AffinityError::Foreign { path: path.into(), what };
        let text = std::fs::read_to_string(path).map_err(|error| foreign(error.to_string()))?;
        let counts: Counts = serde_json::from_str(&text)
            .map_err(|error| foreign(format!("{error}; expected logical_count [L][E] or [steps][L][E]")))?;
        let steps = match counts.logical_count {
            CountRows::Layers(layers) => vec![layers],
            CountRows::Steps(steps) => steps,
        };
        let (layers, experts) =
            (steps.first().map_or(0, Vec::len), steps.first().and_then(|s| s.first()).map_or(0, Vec::len));
        let whole =
            |step: &Vec<Vec<f64>>| step.len() == layers && step.iter().all(|layer| layer.len() == experts);
        if layers == 0 || experts == 0 || !steps.iter().all(whole) {
            return Err(foreign(
                "logical_count is empty or its rows differ in length; record it again".into(),
            ));
        }
        let mut affinity = Self::zeros(layers, experts);
        let mut load = vec![0.0; layers * experts];
        for step in &steps {
            load.iter_mut().zip(step.iter().flatten()).for_each(|(sum, count)| *sum += count);
        }
        (affinity.load, affinity.wrap, affinity.coactivation) = (Some(load), None, None);
        affinity.check()?;
        Ok(affinity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    fn shape(experts: usize, ranks: usize) -> Option<TableShape> {
        Some(TableShape { experts, ranks: Some(ranks) })
    }

    #[test]
    fn csv_there_and_back() {
        let (_dir, path) = written("");
        let table = PlacementTable::round_robin(3, 4, 2);
        table.write(&path, TableFormat::Csv).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("Expert,Node\n0,0\n1,1\n"));
        let read = PlacementTable::read(&path, Some(TableShape { experts: 4, ranks: None })).unwrap();
        assert_eq!((read.assignment, read.ranks), (table.assignment, 2));
        assert!(PlacementTable::read(&path, None).unwrap_err().to_string().contains("--experts"));
        assert!(PlacementTable::read(&path, shape(5, 2)).unwrap_err().to_string().contains("whole layers"));
    }

    #[test]
    fn slots_there_and_back_with_copies() {
        let (_dir, path) = written("");
        let mut table = PlacementTable::linear(2, 4, 2);
        table.set_replicas(vec![Replica { layer: LayerId(1), expert: ExpertId(0), rank: Rank(1) }]);
        table.write(&path, TableFormat::Sglang).unwrap();
        let read = PlacementTable::read(&path, shape(4, 2)).unwrap();
        assert_eq!((&read.assignment, &read.replicas), (&table.assignment, &table.replicas));
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"physical_to_logical_map\":[[0,1,0,2,3,2],[0,1,0,0,2,3]]}\n");
        assert!(table.write(&path, TableFormat::Csv).unwrap_err().to_string().contains("copies"));
        assert!(PlacementTable::read(&path, shape(3, 2)).is_err());
        assert!(PlacementTable::read(&path, shape(5, 2)).unwrap_err().to_string().contains("no slot"));
    }

    #[test]
    fn our_own_json_needs_no_shape() {
        let (_dir, path) = written("");
        let table = PlacementTable::round_robin(3, 4, 2);
        table.write(&path, TableFormat::Json).unwrap();
        assert_eq!(PlacementTable::read(&path, None).unwrap(), table);
    }

    #[test]
    fn counts_are_load() {
        let (_dir, path) = written("{\"logical_count\": [[[1, 2], [3, 4]], [[10, 20], [30, 40]]]}");
        let affinity = Affinity::load_logical_count(&path).unwrap();
        assert_eq!(affinity.load.unwrap(), [11.0, 22.0, 33.0, 44.0]);
        assert!(affinity.transitions.iter().all(|&count| count == 0.0));
        for wrong in ["{}", "{\"logical_count\": []}", "{\"logical_count\": [[1, 2], [3]]}", "x"] {
            let (_dir, path) = written(wrong);
            assert!(Affinity::load_logical_count(&path).is_err(), "{wrong}");
        }
        let (_dir, path) = written("{\"logical_count\": [[1, -2]]}");
        assert!(matches!(Affinity::load_logical_count(&path), Err(AffinityError::Count { .. })));
    }

    #[test]
    fn wrong_lines_are_named() {
        for (text, named) in
            [("Expert,Node\n0,0\nx,1\n", "line 3"), ("0,0\n0,1\n", "twice"), ("0,0\n2,0\n", "expert 1")]
        {
            let (_dir, path) = written(text);
            let error = PlacementTable::read(&path, shape(1, 2)).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
