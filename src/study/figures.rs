//! What a study found: medians, the table for people, the report's data and the files.

use super::{Comparison, Corpus, Measured, Placed, Profiled, StudyError};
use crate::report::{
    self, ByteClasses, ModelFacts, PlacementFacts, ProfileFacts, ReportData, SettingFacts, byte_text,
    rate_text,
};
use exflow_engine::{BytesByClass, ModelSpec, RunStats};
use exflow_placement::{Affinity, PlacementTable, Topology, score_affinity};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Everything that a study found.
#[derive(Debug)]
pub struct Study {
    /// Routes.
    pub profiled: Profiled,
    /// The solved placement.
    pub placed: Placed,
    /// The figures, as the report shows them.
    pub report: ReportData,
}

impl Study {
    /// Puts the parts together.
    pub fn new(
        title: &str,
        model: ModelFacts,
        corpus: &Corpus,
        profiled: Profiled,
        placed: Placed,
        compared: &Comparison,
        texts: Vec<(String, String)>,
    ) -> Self {
        let first = compared.measured.first().and_then(|m| m.runs.first());
        let report = ReportData {
            title: title.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            created: utc_text(SystemTime::now()),
            adapters: compared.adapters.clone(),
            transport: first.map(|run| run.transport.clone()).unwrap_or_default(),
            profile: ProfileFacts {
                tokens: profiled.trace.tokens(),
                held_out_tokens: profiled.held_out.tokens(),
                sources: corpus.sources.clone(),
                seconds: profiled.seconds,
            },
            placement: PlacementFacts {
                seconds: placed.seconds,
                ..PlacementFacts::of(&placed.table, Some(&placed.affinity))
            },
            transitions: matrices(&placed.affinity.transitions, placed.affinity.experts),
            load: rows(&placed.affinity.load_or_derived(), placed.affinity.experts),
            stay: placed.stay.clone(),
            settings: compared.measured.iter().map(medians).collect(),
            repeats: first.map_or(0, |_| compared.measured[0].runs.len()),
            sequences: compared.said.sequences.len(),
            same_tokens: true, // `compare` ends with an error where they differ
            texts,
            model,
            ..ReportData::default()
        };
        Self { profiled, placed, report }
    }

    /// Writes `trace.npy`, `affinity.npz`, `placement.json` and `report.html`; returns the report's path.
    pub fn save(&self, folder: &Path) -> Result<PathBuf, StudyError> {
        std::fs::create_dir_all(folder).map_err(|source| StudyError::Io { path: folder.into(), source })?;
        self.profiled.trace.save_npy(&folder.join("trace.npy"))?;
        super::save_affinity(&folder.join("affinity.npz"), &self.placed.affinity, &self.report.model.digest)?;
        self.placed.table.save(&folder.join("placement.json"))?;
        let path = folder.join("report.html");
        std::fs::write(&path, report::render(&self.report))
            .map_err(|source| StudyError::Io { path: path.clone(), source })?;
        Ok(path.canonicalize().unwrap_or(path))
    }
}

impl ModelFacts {
    /// The shape of a model that was loaded from `folder`.
    pub fn of(spec: &ModelSpec, folder: &Path) -> Self {
        let name = folder.canonicalize().unwrap_or_else(|_| folder.into());
        Self {
            name: name.file_name().unwrap_or(name.as_os_str()).to_string_lossy().into_owned(),
            digest: spec.digest.clone(),
            layers: spec.layers,
            moe_layers: spec.moe_layers(),
            experts: spec.experts,
            top_k: spec.top_k,
            hidden: spec.hidden,
            vocab: spec.vocab_size,
            positions: spec.max_positions,
        }
    }
}

/// The table of a study, one line per setting, for a terminal.
pub fn text_table(data: &ReportData) -> String {
    let [head, rows @ ..] = &cells(data)[..] else { return String::new() };
    let widths: Vec<usize> = (0..head.len())
        .map(|c| std::iter::once(head).chain(rows).map(|row| row[c].chars().count()).max().unwrap_or(0))
        .collect();
    let line = |row: &[String]| {
        let cells = row.iter().zip(&widths).enumerate().map(|(c, (cell, &width))| match c {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ") + "\n"
    };
    let rule = widths.iter().map(|&w| "─".repeat(w)).collect::<Vec<_>>().join("──") + "\n";
    line(head) + &rule + &rows.iter().map(|row| line(row)).collect::<String>()
}

/// The table of a study in Markdown.
pub fn markdown_table(data: &ReportData) -> String {
    let line = |row: &[String]| format!("| {} |\n", row.join(" | "));
    let [head, rows @ ..] = &cells(data)[..] else { return String::new() };
    let rule = format!("|---|{}\n", "---:|".repeat(head.len() - 1));
    line(head) + &rule + &rows.iter().map(|row| line(row)).collect::<String>()
}

fn cells(data: &ReportData) -> Vec<Vec<String>> {
    let head = [
        "setting",
        "tokens/s",
        "TTFT ms",
        "exchanges/layer",
        "stay rate",
        "dispatch",
        "combine",
        "kv",
        "ids",
        "control",
    ];
    let mut table = vec![head.map(String::from).to_vec()];
    for setting in &data.settings {
        let mut row = vec![
            format!("{}, {}", setting.strategy, setting.placement),
            format!("{:.1}", setting.tokens_per_s),
            format!("{:.0}", setting.ttft_ms),
            format!("{:.2}", setting.exchanges_per_layer),
            rate_text(setting.stay_rate),
        ];
        row.extend(setting.bytes.entries().map(|(_, bytes)| byte_text(bytes)));
        table.push(row);
    }
    table
}

/// Medians over the repeats; bytes and traffic are those of the run of median throughput, so that they add up.
fn medians(measured: &Measured) -> SettingFacts {
    let mut runs: Vec<&RunStats> = measured.runs.iter().collect();
    runs.sort_by(|a, b| a.tokens_per_s.total_cmp(&b.tokens_per_s));
    let Some(middle) = runs.get(runs.len() / 2) else { return SettingFacts::default() };
    let over = |figure: fn(&RunStats) -> f64| median(runs.iter().map(|run| figure(run)).collect());
    SettingFacts {
        strategy: measured.setting.strategy.to_string(),
        placement: measured.setting.name.clone(),
        tokens_per_s: over(|run| run.tokens_per_s),
        tokens_per_s_range: (runs[0].tokens_per_s, runs[runs.len() - 1].tokens_per_s),
        ttft_ms: over(|run| run.ttft_ms),
        tpot_ms: over(|run| run.tpot_ms),
        exchanges_per_layer: over(|run| run.exchanges_per_layer),
        stay_rate: over(|run| run.stay_rate),
        crossings_per_token: over(|run| run.crossings_per_token),
        bytes: classes(&middle.bytes, |bytes| *bytes as f64),
        decode_bytes_per_token: classes(&middle.decode_bytes_per_token, |bytes| *bytes),
        traffic: middle.traffic.clone(),
        expert_load: middle.expert_load.clone(),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => 0.5 * (values[n / 2 - 1] + values[n / 2]),
    }
}

fn classes<T>(bytes: &BytesByClass<T>, number: fn(&T) -> f64) -> ByteClasses {
    ByteClasses {
        dispatch: number(&bytes.dispatch),
        combine: number(&bytes.combine),
        kv: number(&bytes.kv),
        ids: number(&bytes.ids),
        control: number(&bytes.control),
    }
}

impl PlacementFacts {
    /// What a table says of itself, and how often its tokens cross by `affinity`'s counts.
    pub fn of(table: &PlacementTable, affinity: Option<&Affinity>) -> Self {
        let topology = Topology::uniform(table.ranks);
        let crossings = affinity.map_or(0.0, |a| score_affinity(table, a, &topology).crossings_per_token);
        // In crossings a bound can be told where every move costs the same, as it does without a topology.
        let cost_of_counts = affinity.map_or(0.0, |a| crossings * a.tokens());
        let share = match (table.cost, table.lower_bound) {
            (Some(cost), Some(bound)) if cost > 0.0 && (cost / cost_of_counts - 1.0).abs() < 0.02 => {
                Some(bound / cost)
            }
            _ => None,
        };
        Self {
            name: String::new(),
            ranks: table.ranks,
            assignment: table
                .assignment
                .iter()
                .map(|row| row.iter().map(|rank| rank.index()).collect())
                .collect(),
            crossings_per_token: crossings,
            lower_bound: share.map(|share| share * crossings),
            seconds: table.history.last().map_or(0.0, |last| last.seconds),
            history: table.history.clone(),
            baselines: table.baselines.clone(),
        }
    }
}

impl ReportData {
    /// A page of this program, made now, with nothing on it.
    pub fn new() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            created: utc_text(SystemTime::now()),
            ..Self::default()
        }
    }

    /// Shows these counts: a map for each pair of layers, and the experts' load.
    pub fn show_affinity(&mut self, affinity: &Affinity) {
        self.transitions = matrices(&affinity.transitions, affinity.experts);
        self.load = rows(&affinity.load_or_derived(), affinity.experts);
    }
}

fn matrices(flat: &[f64], side: usize) -> Vec<Vec<Vec<f64>>> {
    flat.chunks_exact((side * side).max(1)).map(|matrix| rows(matrix, side)).collect()
}

fn rows(flat: &[f64], width: usize) -> Vec<Vec<f64>> {
    flat.chunks_exact(width.max(1)).map(<[f64]>::to_vec).collect()
}

/// `2026-01-31 12:05 UTC`; days to dates by the proleptic Gregorian calendar.
fn utc_text(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, of_day) = ((seconds / 86_400) as i64, seconds % 86_400);
    let shifted = days + 719_468; // days since 0000-03-01
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", of_day / 3600, of_day / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_come_out_right() {
        let at = |seconds| utc_text(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01 00:00 UTC");
        assert_eq!(at(951_827_696), "2000-02-29 12:34 UTC");
        assert_eq!(at(4_107_542_400), "2100-03-01 00:00 UTC");
    }

    #[test]
    fn medians_of_odd_and_even() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert_eq!(median(Vec::new()), 0.0);
    }

    #[test]
    fn the_tables_line_up() {
        let setting = SettingFacts {
            strategy: "vanilla".into(),
            placement: "round_robin".into(),
            ..Default::default()
        };
        let data = ReportData { settings: vec![setting.clone(), setting], ..Default::default() };
        let text = text_table(&data);
        let widths: Vec<usize> = text.lines().map(|line| line.chars().count()).collect();
        assert!(widths.windows(2).all(|pair| pair[0] == pair[1]), "{text}");
        assert_eq!(markdown_table(&data).lines().count(), 4);
    }
}
