//! The report for people: one self-contained HTML file with plots as inline SVG and its numbers as JSON.
//!
//! Nothing here runs a model: [`ReportData`] goes in, text comes out. The page names no outside address,
//! follows the reader's light or dark setting and works from 400 pixels of width up.

mod affinity;
mod bars;
mod checks;
mod colour;
mod course;
mod data;
mod page;
mod placement;
mod replay;
mod strategies;
mod svg;
mod table;
mod traffic;

pub use data::{
    ByteClasses, CheckFacts, ModelFacts, PlacementFacts, ProfileFacts, ReportData, SettingFacts, StayFacts,
    StrategyFacts,
};
pub use page::render;
pub use replay::render_replay;
pub use table::{byte_text, rate_text};
