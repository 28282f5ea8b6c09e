//! The report of `exflow simulate`: stay rate, time and bytes over the number of ranks, and who sends to whom.

use super::colour::{self, RANK_COLOURS};
use super::page;
use super::svg::{Svg, escape};
use super::table::byte_text;
use crate::study::Replayed;
use std::fmt::Write;

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 64.0;
const BOTTOM: f64 = 36.0;
const TOP: f64 = 12.0;

/// One value of a replay.
type Value = fn(&Replayed) -> Option<f64>;

/// The page of replays alone, with the figures as JSON.
pub fn render_replay(title: &str, rows: &[Replayed]) -> String {
    let body = format!("<header><h1>{}</h1></header>{}", escape(title), sections(rows));
    page::document(title, &body, &serde_json::to_string(rows).unwrap_or_else(|_| "[]".into()))
}

/// The sections where there are rows.
pub(super) fn sections_of(rows: &[Replayed]) -> String {
    if rows.is_empty() { String::new() } else { sections(rows) }
}

/// Stay rate, times, bytes, balance and traffic of every row.
fn sections(rows: &[Replayed]) -> String {
    let plots: [(&str, &str, Value); 5] = [
        ("Stay rate", "Share of layer transitions without a crossing; higher is better.", |r| {
            Some(r.simulation.stay_rate)
        }),
        (
            "Time in exchanges per step, in rounds, ms",
            "What every sequence waits for its next token where each exchange is a barrier.",
            |r| r.simulation.rounds_ms,
        ),
        (
            "Time in crossings per token without barriers, ms",
            "What a token pays where it waits for nobody but itself.",
            |r| r.simulation.flow_ms,
        ),
        ("Bytes per token", "All classes together: rows, outputs, keys and values.", |r| {
            let s = &r.simulation;
            Some(s.dispatch_bytes + s.combine_bytes + s.kv_bytes)
        }),
        ("Busiest rank over the mean", "Rows that experts work on, mean over steps and layers.", |r| {
            Some(r.simulation.imbalance)
        }),
    ];
    let mut body = keys(rows);
    for (name, lead, value) in plots {
        let _ = write!(body, "<section><h2>{name}</h2><p>{lead}</p>{}</section>", plot(name, rows, value));
    }
    let _ = write!(
        body,
        "<section><h2>Who sends to whom</h2><p>Bytes per token from a rank (row) to another (column).</p>{}</section>",
        traffic(rows)
    );
    body
}

/// The series: every table and strategy.
fn series(rows: &[Replayed]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for row in rows {
        let name = label(row);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn label(row: &Replayed) -> String {
    format!("{} · {}", row.strategy, row.placement)
}

fn keys(rows: &[Replayed]) -> String {
    let key = |(at, name): (usize, &String)| {
        format!("<span><i style=\"background:var(--r{})\"></i>{}</span>", at % RANK_COLOURS, escape(name))
    };
    format!("<div class=\"keys\">{}</div>", series(rows).iter().enumerate().map(key).collect::<String>())
}

/// A line for each series over the number of ranks; points where there is one number only.
fn plot(name: &str, rows: &[Replayed], value: Value) -> String {
    let points: Vec<f64> = rows.iter().filter_map(value).collect();
    if points.is_empty() {
        return "<p>No links are known.</p>".into();
    }
    let top = points.iter().copied().fold(0.0, f64::max).max(f64::MIN_POSITIVE) * 1.08;
    let mut ranks: Vec<usize> = rows.iter().map(|row| row.ranks).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let place = |r: usize| ranks.iter().position(|&known| known == r).unwrap_or(0) as f64 + 0.5;
    let x = |r: usize| LEFT + place(r) * (WIDTH - LEFT) / ranks.len() as f64;
    let y = |v: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - v / top);
    let mut svg = Svg::new(WIDTH, HEIGHT);
    for step in 0..=4 {
        let at = top * f64::from(step) / 4.0;
        svg.path(&format!("M{LEFT} {:.1}H{WIDTH}", y(at)), "stroke:var(--line);stroke-width:1");
        svg.text(LEFT - 6.0, y(at) + 4.0, "m", "end", &short(at));
    }
    ranks.iter().for_each(|&r| svg.text(x(r), HEIGHT - BOTTOM + 16.0, "m", "middle", &r.to_string()));
    svg.text(f64::midpoint(LEFT, WIDTH), HEIGHT - 4.0, "m", "middle", "ranks");
    for (at, name) in series(rows).iter().enumerate() {
        let colour = format!("var(--r{})", at % RANK_COLOURS);
        let mut line = String::new();
        for row in rows.iter().filter(|row| label(row) == *name) {
            let Some(v) = value(row) else { continue };
            let _ =
                write!(line, "{}{:.1} {:.1}", if line.is_empty() { 'M' } else { 'L' }, x(row.ranks), y(v));
            let title = format!("{name}, {} ranks: {}", row.ranks, short(v));
            svg.rect_titled([x(row.ranks) - 4.0, y(v) - 4.0, 8.0, 8.0], &colour, &title);
        }
        svg.path(&line, &format!("stroke:{colour};stroke-width:2;fill:none"));
    }
    svg.finish(&format!("{name} over the number of ranks"), "class=\"wide\"")
}

fn short(value: f64) -> String {
    match value {
        v if v >= 10_000.0 => byte_text(v),
        v if v >= 100.0 => format!("{v:.0}"),
        v => format!("{v:.2}"),
    }
}

fn traffic(rows: &[Replayed]) -> String {
    let most =
        rows.iter().flat_map(|row| row.simulation.traffic.iter().flatten()).copied().fold(0.0, f64::max);
    let mut html = String::from("<div class=\"maps\">");
    for row in rows.iter().filter(|row| row.ranks <= 32) {
        let side = 220.0;
        let cell = side / row.ranks as f64;
        let mut svg = Svg::new(side, side);
        for (from, line) in row.simulation.traffic.iter().enumerate() {
            for (to, &bytes) in line.iter().enumerate() {
                let step = colour::step(if most > 0.0 { bytes / most } else { 0.0 });
                let title = format!("rank {from} to rank {to}: {} a token", byte_text(bytes));
                let frame = [to as f64 * cell, from as f64 * cell, cell - 1.0, cell - 1.0];
                svg.rect_titled(frame, &format!("var(--s{step})"), &title);
            }
        }
        let drawing = svg.finish(&format!("traffic of {}", label(row)), "class=\"heat\"");
        let _ = write!(
            html,
            "<figure>{drawing}<figcaption><b>{}</b>, {} ranks</figcaption></figure>",
            escape(&label(row)),
            row.ranks
        );
    }
    html.push_str("</div>");
    html
}

#[cfg(test)]
mod tests {
    use super::*;
    use exflow_placement::{Link, PlacementTable, RoutingTrace, SimulateOptions, Strategy, Topology};

    #[test]
    fn the_page_stands_alone_and_carries_its_numbers() {
        let mut trace = RoutingTrace::new(2, 1);
        [[0, 1], [1, 1], [1, 0], [0, 0]].iter().for_each(|ids| trace.push_token(ids));
        let choice = crate::study::TableChoice { name: "<t>".into(), table: PlacementTable::linear(2, 2, 2) };
        let topology = Topology::uniform(2).or_linked(Link { latency_us: 1.0, gbit_per_s: 1.0 });
        let options = SimulateOptions {
            strategy: Strategy::Coherent,
            batch: 2,
            row_bytes: 10.0,
            kv_bytes: 1.0,
            combine_sum: false,
        };
        let rows = crate::study::replay(&trace, &[choice], &topology, &[Strategy::Coherent], &options)
            .expect("replay");
        let page = render_replay("a & b", &rows);
        assert!(page.contains("a &amp; b") && page.contains("&lt;t&gt;") && !page.contains("http"));
        assert!(!page.contains("NaN") && page.matches("<svg").count() == 6);
        let start = page.find("id=\"data\">").expect("data") + 10;
        let json = &page[start..start + page[start..].find("</script>").expect("its end")];
        let value: serde_json::Value = serde_json::from_str(json).expect("JSON");
        assert_eq!(value[0]["placement"], "<t>");
    }
}
