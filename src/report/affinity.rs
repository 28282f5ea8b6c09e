//! Affinity heat maps: one per pair of adjacent MoE layers, in router order and grouped by rank.

use super::colour::{self, STEPS};
use super::data::ReportData;
use super::svg::{Svg, escape};
use std::fmt::Write;

/// Side of a heat map's square, in user units.
const SIDE: f64 = 240.0;
const LEFT: f64 = 34.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 34.0;

/// All heat maps as figures, with the legend in front.
pub(super) fn figures(data: &ReportData) -> String {
    let pairs: Vec<Vec<Vec<f64>>> = data.transitions.iter().map(|counts| conditional(counts)).collect();
    let top = scale_top(&pairs);
    let mut html = legend(top);
    html.push_str("<div class=\"maps\">");
    for (layer, shares) in pairs.iter().enumerate() {
        let order = Order::router(shares.len());
        let grouped = Order::grouped(data, layer, shares.len());
        let _ = write!(
            html,
            "<figure>{}{}<figcaption>{}</figcaption></figure>",
            heat_map(layer, shares, &order, top, "by-router"),
            heat_map(layer, shares, &grouped, top, "by-rank"),
            caption(layer, shares, &data.transitions[layer])
        );
    }
    html.push_str("</div>");
    html
}

/// Share at the end of the colour scale: few cells exceed it, so that one extreme link does not pale all others.
fn scale_top(pairs: &[Vec<Vec<f64>>]) -> f64 {
    let mut shares: Vec<f64> = pairs.iter().flatten().flatten().copied().collect();
    shares.sort_by(f64::total_cmp);
    let at = (shares.len() as f64 * 0.99) as usize;
    shares.get(at.min(shares.len().saturating_sub(1))).copied().unwrap_or(0.0).max(f64::MIN_POSITIVE)
}

/// P(j | i) from counts; a row that no token took is all zero.
fn conditional(counts: &[Vec<f64>]) -> Vec<Vec<f64>> {
    counts
        .iter()
        .map(|row| {
            let total: f64 = row.iter().sum();
            row.iter().map(|count| if total > 0.0 { count / total } else { 0.0 }).collect()
        })
        .collect()
}

/// In which order a map shows its experts, and where its ranks' blocks end.
struct Order {
    rows: Vec<usize>,
    columns: Vec<usize>,
    /// Number of rows and columns of each rank's block; empty in router order.
    blocks: Vec<(usize, usize)>,
}

impl Order {
    fn router(experts: usize) -> Self {
        Self { rows: (0..experts).collect(), columns: (0..experts).collect(), blocks: Vec::new() }
    }

    fn grouped(data: &ReportData, layer: usize, experts: usize) -> Self {
        let none = Vec::new();
        let at = |layer: usize| data.placement.assignment.get(layer).unwrap_or(&none);
        let (rows, columns) = (by_rank(at(layer), experts), by_rank(at(layer + 1), experts));
        let held = |layer: usize, rank: usize| at(layer).iter().filter(|&&r| r == rank).count();
        let blocks = (0..data.placement.ranks).map(|r| (held(layer, r), held(layer + 1, r))).collect();
        Self { rows, columns, blocks }
    }
}

/// Experts sorted by their rank, router order within one.
fn by_rank(assignment: &[usize], experts: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by_key(|&expert| assignment.get(expert).copied().unwrap_or(usize::MAX));
    order
}

fn heat_map(layer: usize, shares: &[Vec<f64>], order: &Order, top: f64, class: &str) -> String {
    let mut svg = Svg::new(LEFT + SIDE + 2.0, TOP + SIDE + BOTTOM);
    svg.rect(LEFT, TOP, SIDE, SIDE, "var(--s0)");
    let experts = shares.len().max(1);
    let cell = SIDE / experts as f64;
    for (step, data) in cells_by_step(shares, order, top, cell).iter().enumerate().skip(1) {
        if !data.is_empty() {
            svg.path(data, &format!("fill:var(--s{step})"));
        }
    }
    outline_blocks(&mut svg, order, cell);
    ticks(&mut svg, order, experts, cell);
    svg.text(
        LEFT + SIDE / 2.0,
        TOP + SIDE + 29.0,
        "m",
        "middle",
        &format!("expert at MoE layer {}", layer + 1),
    );
    svg.text_upward(9.0, TOP + SIDE / 2.0, "m", &format!("expert at MoE layer {layer}"));
    let attributes = format!(
        "class=\"heat {class}\" data-pair=\"{layer}\" data-rows=\"{}\" data-columns=\"{}\" data-frame=\"{LEFT} {TOP} {SIDE}\"",
        list(&order.rows),
        list(&order.columns)
    );
    svg.finish(&format!("affinity between MoE layers {layer} and {}", layer + 1), &attributes)
}

/// One path of rectangles per colour step, runs of equal cells merged: small however many experts there are.
fn cells_by_step(shares: &[Vec<f64>], order: &Order, top: f64, cell: f64) -> Vec<String> {
    let mut paths = vec![String::new(); STEPS];
    for (y, &row) in order.rows.iter().enumerate() {
        let steps: Vec<usize> = order.columns.iter().map(|&j| colour::step(shares[row][j] / top)).collect();
        let mut start = 0;
        for run in steps.chunk_by(|a, b| a == b) {
            let (x, width) = (LEFT + start as f64 * cell, run.len() as f64 * cell);
            let y = TOP + y as f64 * cell;
            let _ = write!(paths[run[0]], "M{x:.2} {y:.2}h{width:.2}v{cell:.2}h-{width:.2}z");
            start += run.len();
        }
    }
    paths
}

fn outline_blocks(svg: &mut Svg, order: &Order, cell: f64) {
    let (mut x, mut y) = (LEFT, TOP);
    for &(rows, columns) in &order.blocks {
        let (width, height) = (columns as f64 * cell, rows as f64 * cell);
        svg.path(
            &format!("M{x:.2} {y:.2}h{width:.2}v{height:.2}h-{width:.2}z"),
            "fill:none;stroke:var(--accent);stroke-width:1.6",
        );
        x += width;
        y += height;
    }
}

fn ticks(svg: &mut Svg, order: &Order, experts: usize, cell: f64) {
    let bottom = TOP + SIDE + 13.0;
    if order.blocks.is_empty() {
        for expert in [0, experts / 2, experts - 1] {
            let middle = (expert as f64 + 0.5) * cell;
            svg.text(LEFT + middle, bottom, "m", "middle", &expert.to_string());
            svg.text(LEFT - 4.0, TOP + middle + 4.0, "m", "end", &expert.to_string());
        }
        return;
    }
    let (mut x, mut y) = (LEFT, TOP);
    for (rank, &(rows, columns)) in order.blocks.iter().enumerate() {
        let (width, height) = (columns as f64 * cell, rows as f64 * cell);
        if width >= 12.0 {
            svg.text(x + width / 2.0, bottom, "m", "middle", &format!("r{rank}"));
        }
        if height >= 12.0 {
            svg.text(LEFT - 4.0, y + height / 2.0 + 4.0, "m", "end", &format!("r{rank}"));
        }
        x += width;
        y += height;
    }
}

/// What to see in a map: its strongest link, and how predictable the next expert is on the whole.
fn caption(layer: usize, shares: &[Vec<f64>], counts: &[Vec<f64>]) -> String {
    let total: f64 = counts.iter().flatten().sum();
    let best: f64 = counts.iter().map(|row| row.iter().copied().fold(0.0, f64::max)).sum();
    let mean_best = if total > 0.0 { best / total } else { 0.0 };
    let (mut from, mut to) = (0, 0);
    for (i, row) in counts.iter().enumerate() {
        for (j, count) in row.iter().enumerate() {
            if *count > counts[from][to] {
                (from, to) = (i, j);
            }
        }
    }
    let strongest = shares.get(from).and_then(|row| row.get(to)).copied().unwrap_or(0.0);
    format!(
        "<b>Layers {layer} → {}</b> The likeliest next expert takes {:.0} % of tokens. \
         Most used link: {from} → {to} ({:.0} % of expert {from}'s tokens).",
        layer + 1,
        100.0 * mean_best,
        100.0 * strongest
    )
}

fn legend(top: f64) -> String {
    let stops: Vec<String> = (0..STEPS).map(|i| format!("var(--s{i})")).collect();
    format!(
        "<div class=\"legend\"><span>0</span><span class=\"ramp\" style=\"background:linear-gradient(90deg,{})\"></span>\
         <span>{:.0} % and more</span><span class=\"m\">of the row expert's tokens go to the column expert</span></div>",
        escape(&stops.join(",")),
        100.0 * top
    )
}

fn list(ids: &[usize]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unused_expert_gives_an_empty_row() {
        assert_eq!(conditional(&[vec![3.0, 1.0], vec![0.0, 0.0]]), [[0.75, 0.25], [0.0, 0.0]]);
    }

    #[test]
    fn grouping_keeps_router_order_within_a_rank() {
        assert_eq!(by_rank(&[1, 0, 1, 0], 4), [1, 3, 0, 2]);
        assert_eq!(by_rank(&[], 3), [0, 1, 2]);
    }

    #[test]
    fn equal_neighbours_share_one_rectangle() {
        let shares = vec![vec![1.0, 1.0], vec![0.0, 1.0]];
        let paths = cells_by_step(&shares, &Order::router(2), 1.0, 10.0);
        assert_eq!(paths[STEPS - 1].matches('M').count(), 2);
        assert_eq!(paths[0].matches('M').count(), 1);
    }
}
