//! The grid's rows as tables, Markdown or HTML, one for each cell.

use exflow::engine::plan::Parts;
use exflow::study::GridRow;
use std::fmt::Write;

/// The best vanilla with round-robin of a row's cell, and vanilla in rounds.
fn baselines(rows: &[GridRow], row: &GridRow) -> (f64, f64) {
    let of_cell = rows.iter().filter(|r| {
        (&r.model, r.ranks, r.sequences, &r.link) == (&row.model, row.ranks, row.sequences, &row.link)
            && r.strategy == "vanilla"
            && r.table == "round_robin"
    });
    let best = of_cell.clone().map(|r| r.tokens_per_s).fold(0.0, f64::max);
    let rounds = of_cell.filter(|r| r.schedule == "rounds").map(|r| r.tokens_per_s).fold(0.0, f64::max);
    (best, rounds)
}

const COLUMNS: [&str; 18] = [
    "setting",
    "tokens/s",
    "range",
    "predicted",
    "× best vanilla",
    "× vanilla in rounds",
    "floor",
    "TTFT ms",
    "2nd ms",
    "TPOT p50",
    "p99",
    "waits/layer",
    "crossings",
    "stay",
    "dispatch+combine B",
    "K/V B",
    "K/V peak MB",
    "longest text",
];

/// What a row's setting is called.
fn name(row: &GridRow) -> String {
    let mut setting = format!("{}, {}, {}", row.strategy, row.schedule, row.table);
    if row.schedule == "flow" && row.linger != "auto" && row.ablation.is_none() {
        let _ = write!(setting, ", linger {}", row.linger);
    }
    row.ablation.as_ref().map_or_else(|| setting.clone(), |ablation| format!("{ablation} ({setting})"))
}

fn cells(rows: &[GridRow], row: &GridRow) -> [String; 18] {
    let (best, rounds) = baselines(rows, row);
    let times = |base: f64| if base > 0.0 { format!("{:.2}", row.tokens_per_s / base) } else { "–".into() };
    let bytes = &row.bytes_per_token;
    let or_dash = |figure: Option<f64>| figure.map_or_else(|| "–".to_owned(), |f| format!("{f:.1}"));
    [
        name(row),
        format!("{:.1}", row.tokens_per_s),
        format!("{:.1}–{:.1}", row.tokens_per_s_range.0, row.tokens_per_s_range.1),
        or_dash(row.predicted_tokens_per_s),
        times(best),
        times(rounds),
        or_dash(row.floor_tokens_per_s),
        format!("{:.0}", row.ttft_ms),
        format!("{:.0}", row.second_token_ms),
        format!("{:.1}", row.tpot_p50_ms),
        format!("{:.1}", row.tpot_p99_ms),
        format!("{:.2}", row.exchanges_per_layer),
        format!("{:.2}", row.crossings_per_token),
        format!("{:.3}", row.stay_rate),
        format!("{:.0}", bytes.dispatch + bytes.combine),
        format!("{:.0}", bytes.kv),
        format!("{:.2}", row.kv_peak_bytes as f64 / 1e6),
        row.longest_context.to_string(),
    ]
}

const TIMES: [&str; 12] = [
    "ms of a token",
    "all",
    "computed",
    "rows",
    "partials",
    "keys and values",
    "ids",
    "busy rank",
    "held back",
    "predicted: computed",
    "travel",
    "busy rank, context",
];

/// Where a token's time went, and where it was predicted to go.
fn times(row: &GridRow) -> [String; 12] {
    let t = &row.token_time;
    let ms = |figure: f64| format!("{figure:.2}");
    let predicted = |of: fn(&Parts) -> f64| row.predicted_parts.as_ref().map_or("–".into(), |p| ms(of(p)));
    [
        name(row),
        ms(t.total_ms()),
        ms(t.compute_ms),
        ms(t.dispatch_ms),
        ms(t.combine_ms),
        ms(t.context_ms),
        ms(t.ids_ms),
        ms(t.queue_ms),
        ms(t.linger_ms),
        predicted(|p| p.compute_ms),
        predicted(|p| p.travel_ms),
        predicted(|p| p.queue_ms + p.context_ms),
    ]
}

/// How the planner's pick did beside the best fixed setting, where it ran.
fn beside_best(of: &[&GridRow]) -> Option<String> {
    let (auto, beside) = of.iter().find_map(|row| row.beside_best.as_ref().map(|beside| (row, beside)))?;
    let best = if beside.same { "the same" } else { &beside.setting };
    Some(format!(
        "auto ({}, {}) beside the best fixed setting ({best}), by turns: × {:.2}, {} pairs of quartiles {:.2} and {:.2}",
        auto.schedule, auto.table, beside.ratio, beside.pairs, beside.quartiles.0, beside.quartiles.1
    ))
}

/// The rows by cell, with a heading each.
fn by_cell(rows: &[GridRow]) -> Vec<(String, Vec<&GridRow>)> {
    let mut cells: Vec<(String, Vec<&GridRow>)> = Vec::new();
    for row in rows {
        let name = format!("{}, {} ranks, {} sequences, {}", row.model, row.ranks, row.sequences, row.link);
        match cells.iter_mut().find(|(known, _)| *known == name) {
            Some((_, of)) => of.push(row),
            None => cells.push((name, vec![row])),
        }
    }
    cells
}

pub(super) fn markdown(rows: &[GridRow], missing: &[String]) -> String {
    let mut text = String::new();
    for (name, of) in by_cell(rows) {
        let _ = writeln!(text, "### {name}\n");
        let head =
            |columns: &[&str]| format!("| {} |\n|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
        text += &head(&COLUMNS);
        for row in &of {
            let _ = writeln!(text, "| {} |", cells(rows, row).join(" | "));
        }
        let _ = write!(text, "\n{}", head(&TIMES));
        for row in &of {
            let _ = writeln!(text, "| {} |", times(row).join(" | "));
        }
        text.push('\n');
        if let Some(line) = beside_best(&of) {
            let _ = writeln!(text, "{line}\n");
        }
    }
    if !missing.is_empty() {
        let _ = writeln!(text, "Missing: {}.", missing.join("; "));
    }
    text
}

pub(super) fn html(rows: &[GridRow], missing: &[String]) -> String {
    let mut text = String::from(
        "<!doctype html><meta charset=\"utf-8\"><title>exflow bench strategies</title>\n\
         <style>body{font:14px sans-serif}td,th{padding:2px 8px;text-align:right}td:first-child{text-align:left}</style>\n",
    );
    let escape = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;");
    for (name, of) in by_cell(rows) {
        let line = |cells: &[String], tag: &str| -> String {
            let cells: String = cells.iter().map(|c| format!("<{tag}>{}</{tag}>", escape(c))).collect();
            format!("<tr>{cells}</tr>\n")
        };
        let table = |columns: &[&str], of: Vec<Vec<String>>| -> String {
            let head: Vec<String> = columns.iter().map(ToString::to_string).collect();
            let body: String = of.iter().map(|cells| line(cells, "td")).collect();
            format!("<table>{}{body}</table>\n", line(&head, "th"))
        };
        let _ = writeln!(text, "<h2>{}</h2>", escape(&name));
        text += &table(&COLUMNS, of.iter().map(|row| cells(rows, row).to_vec()).collect());
        text += &table(&TIMES, of.iter().map(|row| times(row).to_vec()).collect());
        if let Some(line_of_auto) = beside_best(&of) {
            let _ = writeln!(text, "<p>{}</p>", escape(&line_of_auto));
        }
    }
    if !missing.is_empty() {
        let _ = writeln!(text, "<p>Missing: {}.</p>", escape(&missing.join("; ")));
    }
    text
}
