//! The main job as library code: profile a model, solve a placement, run the settings side by side.
//!
//! [`Corpus::collect`] gathers text, [`profile`] routes it, [`place`] solves and scores on what was kept back,
//! [`compare`] runs the settings interleaved and checks that they say the same, [`Study::save`] writes the files.

mod compare;
mod corpus;
mod error;
mod figures;
mod files;
mod gathering;
mod grid;
mod held_out;
mod moves;
mod paper;
mod placing;
mod planning;
mod replaying;

pub use compare::{Comparison, Measured, Setting, compare};
pub use corpus::{Corpus, Document, OwnText, passages};
pub use error::StudyError;
pub use figures::{Study, markdown_table, text_table};
pub use files::{load_affinity, read_documents, save_affinity};
pub use gathering::{GatherError, Gathered};
pub use grid::{
    ALONE, BEGINNINGS, BesideBest, Cell, ClassBytes, Effort, Grid, GridRow, SOLVED_ON, SyntheticModel,
    chain_table, decode_rate, grid_alike, grid_profile, grid_prompts, grid_table, requests,
};
pub use held_out::{BalanceScore, HeldOut, balances, held_out, keep_back};
pub use moves::{Gaps, MovePauses, move_pauses};
pub use paper::{Evidence, RoutingHistory, StudyOptions, paper_checks};
pub use placing::{Placed, Profiled, place, profile, solve_with_progress};
pub use planning::{Candidate, Planned, Planner, Ranked, candidates, layer_split, planned_table, ways};
pub use replaying::{ReplayError, Replayed, TableChoice, replay, sweep};
