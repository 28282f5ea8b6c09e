//! Bar plots: stay rates of the placements, and bytes by class of the settings.

use super::colour::RANK_COLOURS;
use super::data::ReportData;
use super::svg::Svg;
use super::table::byte_text;

const WIDTH: f64 = 520.0;
const ROW: f64 = 46.0;
const RIGHT: f64 = 2.0;

/// Stay rate of each placement on held-out text, with chance (1/R) marked.
pub(super) fn stay_rates(data: &ReportData) -> String {
    let chance = 1.0 / data.placement.ranks.max(1) as f64;
    let best = data.stay.iter().map(|stay| stay.stay_rate).fold(chance, f64::max);
    let top = (best * 1.15).clamp(0.05, 1.0);
    let scale = (WIDTH - RIGHT) / top;
    let height = ROW * data.stay.len() as f64 + 26.0;
    let mut svg = Svg::new(WIDTH, height);
    for (index, stay) in data.stay.iter().enumerate() {
        let y = ROW * index as f64;
        let strong = index + 1 == data.stay.len();
        svg.text(0.0, y + 14.0, "t", "start", &stay.label);
        let note =
            format!("{:.1} % · {:.2} crossings a token", 100.0 * stay.stay_rate, stay.crossings_per_token);
        svg.text(WIDTH - RIGHT, y + 14.0, "t", "end", &note);
        svg.rect(0.0, y + 20.0, WIDTH - RIGHT, 16.0, "var(--well)");
        let fill = if strong { "var(--accent)" } else { "var(--quiet)" };
        svg.rect(0.0, y + 20.0, stay.stay_rate * scale, 16.0, fill);
    }
    let x = chance * scale;
    let bottom = height - 24.0;
    svg.path(&format!("M{x:.1} 18V{bottom:.1}"), "stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3");
    svg.text(x, height - 8.0, "m", "middle", &format!("chance, 1/R = {:.0} %", 100.0 * chance));
    svg.finish("stay rate of each placement on text that was not profiled", "class=\"wide\"")
}

/// Bytes per decoded token, one stacked bar per setting.
pub(super) fn bytes(data: &ReportData) -> String {
    let top = data.settings.iter().map(|s| s.decode_bytes_per_token.total()).fold(0.0, f64::max);
    let scale = if top > 0.0 { (WIDTH - RIGHT) / top } else { 0.0 };
    let mut svg = Svg::new(WIDTH, ROW * data.settings.len() as f64);
    for (index, setting) in data.settings.iter().enumerate() {
        let y = ROW * index as f64;
        svg.text(0.0, y + 14.0, "t", "start", &setting.label());
        let total = format!("{} a token", byte_text(setting.decode_bytes_per_token.total()));
        svg.text(WIDTH - RIGHT, y + 14.0, "t", "end", &total);
        svg.rect(0.0, y + 20.0, WIDTH - RIGHT, 16.0, "var(--well)");
        let mut x = 0.0;
        for (class, (name, value)) in setting.decode_bytes_per_token.entries().into_iter().enumerate() {
            let title = format!("{name}: {}", byte_text(value));
            svg.rect_titled([x, y + 20.0, value * scale, 16.0], &class_colour(class), &title);
            x += value * scale;
        }
    }
    let drawing = svg.finish("bytes on the wire per decoded token, by class", "class=\"wide\"");
    format!("{}{drawing}", class_legend(data))
}

fn class_legend(data: &ReportData) -> String {
    let names = data.settings.first().map(|s| s.decode_bytes_per_token.entries()).unwrap_or_default();
    let keys: Vec<String> = names
        .iter()
        .enumerate()
        .filter(|(_, (name, _))| !name.is_empty())
        .map(|(class, (name, _))| {
            format!("<span><i style=\"background:{}\"></i>{name}</span>", class_colour(class))
        })
        .collect();
    format!("<div class=\"keys\">{}</div>", keys.concat())
}

fn class_colour(class: usize) -> String {
    format!("var(--r{})", class % RANK_COLOURS)
}
