//! Rows of `exflow bench strategies`: a table, and tokens/s as bars, one group for each model, ranks, sequences and link.

use super::data::StrategyFacts;
use super::svg::{Svg, escape};
use super::table::{byte_text, rate_text};
use std::fmt::Write;

const WIDTH: f64 = 520.0;
const ROW: f64 = 26.0;

/// The whole section's content.
pub(super) fn figures(rows: &[StrategyFacts]) -> String {
    let mut html = String::new();
    let mut groups: Vec<String> = Vec::new();
    for row in rows {
        let group = group(row);
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    for name in groups {
        let of: Vec<&StrategyFacts> = rows.iter().filter(|row| group(row) == name).collect();
        let _ = write!(html, "<h3>{}</h3>{}{}", escape(&name), bars(&name, &of), table(&of));
    }
    html
}

fn group(row: &StrategyFacts) -> String {
    format!("{}, {} ranks, {} sequences, {}", row.model, row.ranks, row.sequences, row.link)
}

fn label(row: &StrategyFacts) -> String {
    format!("{} · {} · {}", row.strategy, row.schedule, row.table)
}

/// Measured tokens/s, the prediction as a mark.
fn bars(name: &str, rows: &[&StrategyFacts]) -> String {
    let value = |row: &&StrategyFacts| row.tokens_per_s.max(row.predicted_tokens_per_s.unwrap_or(0.0));
    let top = rows.iter().map(value).fold(0.0, f64::max);
    let (left, right) = (190.0, 70.0);
    let scale = if top > 0.0 { (WIDTH - left - right) / top } else { 0.0 };
    let mut svg = Svg::new(WIDTH, ROW * rows.len() as f64 + 4.0);
    for (at, row) in rows.iter().enumerate() {
        let y = ROW * at as f64;
        svg.text(left - 8.0, y + 16.0, "t", "end", &label(row));
        svg.rect(left, y + 5.0, row.tokens_per_s * scale, 15.0, "var(--accent)");
        if let Some(predicted) = row.predicted_tokens_per_s.filter(|p| p.is_finite()) {
            let x = left + predicted * scale;
            svg.path(&format!("M{x:.1} {:.1}V{:.1}", y + 2.0, y + 23.0), "stroke:var(--ink);stroke-width:2");
        }
        svg.text(WIDTH, y + 16.0, "t", "end", &format!("{:.1}", row.tokens_per_s));
    }
    svg.finish(&format!("tokens per second, {name}; marks are predictions"), "class=\"wide\"")
}

fn table(rows: &[&StrategyFacts]) -> String {
    let mut html = String::from(
        "<div class=\"scroll\"><table><thead><tr><th></th><th>tokens/s</th><th>predicted</th><th>TTFT ms</th>\
         <th>TPOT p50 ms</th><th>p99 ms</th><th>exchanges a layer</th><th>crossings a token</th><th>stay rate</th>\
         <th>dispatch + combine</th><th>kv</th></tr></thead><tbody>",
    );
    for row in rows {
        let bytes = row.bytes_per_token;
        let predicted = row.predicted_tokens_per_s.map_or("–".into(), |p| format!("{p:.1}"));
        let _ = write!(
            html,
            "<tr><th scope=\"row\">{}</th><td>{:.1}</td><td>{predicted}</td><td>{:.0}</td><td>{:.1}</td><td>{:.1}</td>\
             <td>{:.2}</td><td>{:.2}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&label(row)),
            row.tokens_per_s,
            row.ttft_ms,
            row.tpot_p50_ms,
            row.tpot_p99_ms,
            row.exchanges_per_layer,
            row.crossings_per_token,
            rate_text(row.stay_rate),
            byte_text(bytes.dispatch + bytes.combine),
            byte_text(bytes.kv)
        );
    }
    html.push_str("</tbody></table></div>");
    html
}
