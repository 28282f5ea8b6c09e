//! The table of figures, one column per setting, and how numbers are written.

use super::data::{ReportData, SettingFacts};
use super::svg::escape;
use std::fmt::Write;

type Cell = fn(&SettingFacts) -> String;

/// Rows of the table: name, unit, value.
const ROWS: [(&str, &str, Cell); 12] = [
    ("Throughput", "tokens/s", |s| format!("{:.1}", s.tokens_per_s)),
    ("lowest – highest", "tokens/s", |s| {
        format!("{:.1} – {:.1}", s.tokens_per_s_range.0, s.tokens_per_s_range.1)
    }),
    ("Time to first token", "ms", |s| format!("{:.0}", s.ttft_ms)),
    ("Time per further token", "ms", |s| format!("{:.1}", s.tpot_ms)),
    ("Exchanges per MoE layer", "", |s| format!("{:.2}", s.exchanges_per_layer)),
    ("Stay rate while decoding", "", |s| rate_text(s.stay_rate)),
    ("Bytes: dispatch", "one run", |s| byte_text(s.bytes.dispatch)),
    ("combine", "one run", |s| byte_text(s.bytes.combine)),
    ("kv", "one run", |s| byte_text(s.bytes.kv)),
    ("ids", "one run", |s| byte_text(s.bytes.ids)),
    ("control", "one run", |s| byte_text(s.bytes.control)),
    ("All bytes", "one run", |s| byte_text(s.bytes.total())),
];

/// The table as HTML.
pub(super) fn figures(data: &ReportData) -> String {
    let mut html = String::from("<div class=\"scroll\"><table><thead><tr><th></th>");
    for setting in &data.settings {
        let _ = write!(
            html,
            "<th scope=\"col\">{}<small>{}</small></th>",
            escape(&setting.strategy),
            escape(&setting.placement.replace('_', "-"))
        );
    }
    html.push_str("</tr></thead><tbody>");
    for (name, unit, cell) in ROWS {
        let _ = write!(html, "<tr><th scope=\"row\">{name}<small>{unit}</small></th>");
        for setting in &data.settings {
            let _ = write!(html, "<td>{}</td>", escape(&cell(setting)));
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table></div>");
    html
}

/// Bytes with a decimal unit (1 kB = 1000 B) and three significant digits.
pub fn byte_text(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes.max(0.0);
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A share as a percentage.
pub fn rate_text(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits_at_most() {
        let cases = [
            (0.0, "0 B"),
            (999.0, "999 B"),
            (1234.0, "1.23 kB"),
            (99_960.0, "100 kB"),
            (999_600.0, "1.00 MB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(byte_text(bytes), text);
        }
    }
}
