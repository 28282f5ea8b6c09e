//! Rank-to-rank traffic: one matrix per setting, all on one scale.

use super::colour::{self, FLIP};
use super::data::{ReportData, SettingFacts};
use super::svg::Svg;
use super::table::byte_text;
use std::fmt::Write;

const SIDE: f64 = 250.0;
const LEFT: f64 = 34.0;
const TOP: f64 = 30.0;
/// More ranks than this and the cells carry no numbers.
const NUMBERED: usize = 8;

/// All matrices as figures.
pub(super) fn figures(data: &ReportData) -> String {
    let top = data.settings.iter().flat_map(|s| s.traffic.iter().flatten()).copied().max().unwrap_or(0);
    let mut html = String::from("<div class=\"maps\">");
    for setting in &data.settings {
        let _ = write!(
            html,
            "<figure>{}<figcaption><b>{}</b> {} in one run, {} between the busiest pair.</figcaption></figure>",
            matrix(setting, top),
            super::svg::escape(&setting.label()),
            byte_text(setting.traffic.iter().flatten().sum::<u64>() as f64),
            byte_text(setting.traffic.iter().flatten().copied().max().unwrap_or(0) as f64),
        );
    }
    html.push_str("</div>");
    html
}

fn matrix(setting: &SettingFacts, top: u64) -> String {
    let ranks = setting.traffic.len().max(1);
    let cell = SIDE / ranks as f64;
    let mut svg = Svg::new(LEFT + SIDE + 2.0, TOP + SIDE + 4.0);
    svg.text(LEFT + SIDE / 2.0, 10.0, "m", "middle", "to rank");
    svg.text_upward(9.0, TOP + SIDE / 2.0, "m", "from rank");
    for (from, row) in setting.traffic.iter().enumerate() {
        let y = TOP + from as f64 * cell;
        if ranks <= 16 {
            let middle = (from as f64 + 0.5) * cell;
            svg.text(LEFT + middle, TOP - 5.0, "m", "middle", &from.to_string());
            svg.text(LEFT - 5.0, TOP + middle + 4.0, "m", "end", &from.to_string());
        }
        for (to, &bytes) in row.iter().enumerate() {
            draw_cell(&mut svg, [LEFT + to as f64 * cell, y, cell], (from, to), bytes, top, ranks);
        }
    }
    svg.finish(&format!("bytes from rank to rank, {}", setting.label()), "class=\"heat\"")
}

fn draw_cell(svg: &mut Svg, frame: [f64; 3], pair: (usize, usize), bytes: u64, top: u64, ranks: usize) {
    let [x, y, cell] = frame;
    let gap = if ranks <= 16 { 1.0 } else { 0.0 };
    let inner = cell - 2.0 * gap;
    if pair.0 == pair.1 {
        svg.rect(x + gap, y + gap, inner, inner, "var(--well)");
        return;
    }
    let step = colour::step(bytes as f64 / top.max(1) as f64);
    let title = format!("rank {} to rank {}: {}", pair.0, pair.1, byte_text(bytes as f64));
    svg.rect_titled([x + gap, y + gap, inner, inner], &format!("var(--s{step})"), &title);
    if ranks <= NUMBERED {
        let class = if step >= FLIP { "t flip" } else { "t" };
        svg.text(x + cell / 2.0, y + cell / 2.0 + 4.0, class, "middle", &byte_text(bytes as f64));
    }
}
