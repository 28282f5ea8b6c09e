//! The placement as a grid, layers × experts, coloured by rank.

use super::colour::RANK_COLOURS;
use super::data::PlacementFacts;
use super::svg::Svg;

const WIDTH: f64 = 640.0;
const LEFT: f64 = 40.0;
const TOP: f64 = 20.0;
/// More experts than this and the cells carry no numbers.
const NUMBERED: usize = 24;

/// The grid, with a key of the ranks.
pub(super) fn grid(placement: &PlacementFacts, load: &[Vec<f64>]) -> String {
    let experts = placement.assignment.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let cell = (WIDTH - LEFT) / experts as f64;
    let row = cell.clamp(12.0, 26.0);
    let layers = placement.assignment.len();
    let mut svg = Svg::new(WIDTH, TOP + row * layers as f64 + 4.0);
    for expert in (0..experts).filter(|e| experts <= NUMBERED || e % 8 == 0) {
        let x = LEFT + (expert as f64 + 0.5) * cell;
        svg.text(x, TOP - 6.0, "m", "middle", &expert.to_string());
    }
    for (layer, assignment) in placement.assignment.iter().enumerate() {
        let y = TOP + row * layer as f64;
        svg.text(LEFT - 8.0, y + row / 2.0 + 4.0, "m", "end", &format!("{layer}"));
        for (expert, &rank) in assignment.iter().enumerate() {
            let x = LEFT + expert as f64 * cell;
            let tokens = load.get(layer).and_then(|row| row.get(expert));
            let tokens = tokens.map_or(String::new(), |n| format!("; {n:.0} profiled tokens"));
            let title = format!("MoE layer {layer}, expert {expert}: rank {rank}{tokens}");
            let fill = format!("var(--r{})", rank % RANK_COLOURS);
            svg.rect_titled([x + 0.75, y + 0.75, cell - 1.5, row - 1.5], &fill, &title);
            if experts <= NUMBERED {
                svg.text(x + cell / 2.0, y + row / 2.0 + 4.0, "n", "middle", &rank.to_string());
            }
        }
    }
    let drawing = svg.finish("rank of every expert: rows are MoE layers, columns experts", "class=\"grid\"");
    format!("{}{drawing}", key(placement.ranks))
}

fn key(ranks: usize) -> String {
    let keys: Vec<String> = (0..ranks)
        .map(|rank| {
            format!("<span><i style=\"background:var(--r{})\"></i>rank {rank}</span>", rank % RANK_COLOURS)
        })
        .collect();
    format!("<div class=\"keys\">{}</div>", keys.concat())
}
